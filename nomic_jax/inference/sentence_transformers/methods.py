"""The methods of SentenceTransformer besides ``encode``, for ``Embedder``; ``names`` says what differs, and why.

Methods whose deprecation sentence-transformers announces do the same as the ones that replace them.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint, push_to_hub, write_checkpoint
from nomic_jax.hf.checkpoint import SIMILARITIES
from nomic_jax.inference.forks import check_not_forked
from nomic_jax.inference.sentence_transformers.devices import device_name, find_devices, place
from nomic_jax.inference.sentence_transformers.names import REFUSED, refusal
from nomic_jax.inference.sentence_transformers.opening import ORGANIZATION
from nomic_jax.inference.sentence_transformers.tensors import has_tensor, to_numpy, to_tensor
from nomic_jax.inference.similarity import pairwise_similarity, similarity_matrix
from nomic_jax.model import EmbeddingConfig


class ReportedScores:
    """What sentence-transformers' evaluators report: ``evaluations``, name of an evaluator -> metric -> score."""

    def __init__(self) -> None:
        self.evaluations: dict[str, dict[str, float]] = {}

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Keeps the scores of an evaluator, which calls this; those of its last call count."""
        name = getattr(evaluator, "name", "") or type(evaluator).__name__
        self.evaluations[name] = {metric: float(score) for metric, score in metrics.items()}


class SentenceTransformerMethods:
    """Base of ``Embedder``: the methods with sentence-transformers' names that are not its own."""

    SUPPORTED_SIMILARITY_FN_NAMES: ClassVar[tuple[str, ...]] = SIMILARITIES
    model_type: ClassVar[str] = "SentenceTransformer"
    default_huggingface_organization: ClassVar[str | None] = ORGANIZATION

    config: EmbeddingConfig
    params: dict
    tokenizer: Tokenizer
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str
    max_length: int
    truncate_dim: int | None
    encode: Callable[..., Any]
    model_card_data: ReportedScores
    _rows: NamedSharding
    _card: str | None
    _source: Checkpoint

    def __getattr__(self, name: str) -> Any:
        # Called for names that are not found otherwise. AttributeError: hasattr() says that they are not there.
        if name in REFUSED:
            raise AttributeError(refusal(name), name=name, obj=self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __call__(self, *features: Any, **options: Any) -> Any:
        raise TypeError(refusal("forward"))

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(refusal("modules"))

    # --- similarity -------------------------------------------------------------------------------------------------

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns similarities [len(embeddings1), len(embeddings2)] by ``similarity_fn_name``, float32.

        Distances are negated: higher is closer. The result is a torch tensor if an argument is one.
        """
        return self._compared(similarity_matrix, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the similarity of each embedding with the one at the same place, float32 [N]; see ``similarity``."""
        return self._compared(pairwise_similarity, embeddings1, embeddings2)

    def _compared(self, function: Any, embeddings1: Any, embeddings2: Any) -> Any:
        scores = function(self.similarity_fn_name, to_numpy(embeddings1), to_numpy(embeddings2))
        if has_tensor(embeddings1) or has_tensor(embeddings2):
            return to_tensor(scores, self.device)
        return scores

    # --- dimensions and lengths -------------------------------------------------------------------------------------

    def get_embedding_dimension(self) -> int:
        """Returns the number of components of a vector."""
        return self.config.output_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    @contextlib.contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Sets ``truncate_dim`` in a ``with`` block."""
        before = self.truncate_dim
        try:
            self.truncate_dim = truncate_dim
            yield
        finally:
            self.truncate_dim = before

    truncate_sentence_embeddings = truncate_embeddings

    @property
    def max_seq_length(self) -> int:
        """``max_length`` under the name of sentence-transformers. It can be set."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.max_length = value

    def get_max_seq_length(self) -> int:
        """Returns the maximum number of tokens per text."""
        return self.max_length

    # --- inputs -----------------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> list[str]:
        return ["text"]

    def supports(self, modality: Any) -> bool:
        """Returns whether inputs of this kind can be embedded: only "text"."""
        return modality in self.modalities

    def is_singular_input(self, inputs: Any) -> bool:
        """Returns whether ``encode`` takes this as one text."""
        return isinstance(inputs, str)

    def get_model_kwargs(self) -> list[str]:
        """Returns the names of further arguments of ``encode``: none."""
        return []

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Accepts True, which is how models are pooled here."""
        if not include_prompt:
            raise ValueError("include_prompt=False is not implemented: prompts are pooled like other tokens")

    # --- devices ----------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The devices that hold the parameters and divide the texts of a batch."""
        return tuple(self._rows.mesh.devices.flat)

    @property
    def device(self) -> str:
        """The first of ``devices`` by the name that torch has for it: "cpu", "cuda:0"."""
        return device_name(self.devices[0])

    @property
    def dtype(self) -> np.dtype:
        """The type of the computation; parameters and vectors are float32."""
        return jnp.dtype(self.config.encoder.dtype)

    def _put_on_devices(self, params: dict, devices: Sequence[jax.Device]) -> None:
        check_not_forked()
        self.params, self._rows = place(params, devices)

    def to(self, device: Any = None, *others: Any, **options: Any) -> Self:
        """Moves the parameters to other devices (``find_devices`` lists their names) and returns the embedder."""
        if others or options or device is None or str(device).startswith("torch."):
            raise TypeError(
                'to() takes a device, such as "cpu", "cuda" or "cuda:1"; the type of the computation is given when the '
                'model is opened: Embedder(..., dtype="bfloat16")'
            )
        self._put_on_devices(self.params, find_devices(device))
        return self

    def cpu(self) -> Self:
        """Moves the parameters to the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """Moves the parameters to the GPUs, or to the one with a number."""
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def start_multi_process_pool(self, target_devices: Any = None) -> dict[str, Any]:
        """Puts the parameters on further devices and returns what ``encode`` takes as ``pool``.

        The devices are those of this process: JAX computes on all of them at once, and no other process is started.
        """
        check_not_forked()
        params, rows = place(self.params, find_devices(target_devices))
        return {"model": self, "params": params, "rows": rows}

    @staticmethod
    def stop_multi_process_pool(pool: dict[str, Any]) -> None:
        """Frees the memory of a pool, which cannot be used any more."""
        pool.clear()

    def encode_multi_process(
        self,
        sentences: Any,
        pool: dict[str, Any],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk_size: int | None = None,
        show_progress_bar: bool | None = None,
        precision: str = "float32",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Calls ``encode`` with ``pool``."""
        return self.encode(
            sentences,
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            precision=precision,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            pool=pool,
            chunk_size=chunk_size,
        )

    def _placement(self, device: Any, pool: dict[str, Any] | None) -> tuple[dict, NamedSharding]:
        """Returns the parameters and the sharding of rows for a call of ``encode``; one device moves the embedder."""
        if pool is not None:
            if not isinstance(pool, dict) or pool.get("model") is not self:
                raise ValueError("pool is not one of this embedder's start_multi_process_pool, or it was stopped")
            return pool["params"], pool["rows"]
        if isinstance(device, list | tuple):
            return place(self.params, find_devices(device))
        if device is not None and tuple(devices := find_devices(device)) != self.devices:
            self._put_on_devices(self.params, devices)
        return self.params, self._rows

    def eval(self) -> Self:
        """Returns the embedder, which computes nothing else than embeddings."""
        return self

    def get_backend(self) -> str:
        return "jax"

    # --- evaluators, files, hub -------------------------------------------------------------------------------------

    def evaluate(self, evaluator: Any, output_path: str | None = None) -> Any:
        """Returns what an evaluator of sentence-transformers returns for this model; it writes to ``output_path``."""
        if output_path is not None:
            os.makedirs(output_path, exist_ok=True)
        return evaluator(self, output_path)

    @classmethod
    def load(cls, input_path: str) -> Self:
        """Opens a model; the constructor does the same."""
        return cls(input_path)  # type: ignore[call-arg]

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
        *,
        overwrite: bool = False,
    ) -> None:
        """Writes a Hugging Face directory: what ``convert.to_hf`` writes, with the settings of this embedder.

        A model that was opened from a Hugging Face directory keeps its model card. Scores of evaluators are in a card
        that is written here.

        Args:
          path: other files in this directory stay.
          model_name: for the model card; None for the name of the directory.
          create_model_card: False writes no README.md.
          train_datasets: refused, because a card lists the data that its records name.
          safe_serialization: True only.
          overwrite: also replace files that no export wrote, or that were changed since.

        Raises:
          FileExistsError, FileRefused: see ``nomic_jax.hf.write_checkpoint``.
        """
        _check_saving(train_datasets, safe_serialization)
        checkpoint = dataclasses.replace(
            self._source,
            config=self.config,
            params={"encoder": jax.device_get(self.params)},
            labels=(),
            tokenizer=self.tokenizer,
            prompts=dict(self.prompts),
            default_prompt_name=self.default_prompt_name,
            similarity=self.similarity_fn_name,
            max_length=self.max_length,
        )
        scores = self.model_card_data.evaluations
        write_checkpoint(
            path,
            checkpoint,
            evaluations={name: {"tasks": {}, "average": metrics} for name, metrics in scores.items()},
            name=model_name,
            readme=self._card if create_model_card else "",
            overwrite=overwrite,
        )

    save = save_pretrained

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: list[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads the model to the hub and returns the URL of the commit or pull request.

        Args:
          repo_id: "organisation/name", or a name alone for the owner of the token.
          token, private, commit_message, revision, create_pr: see ``nomic_jax.hf.push_to_hub``.
          safe_serialization, train_datasets: see ``save_pretrained``.
          local_model_path: upload this export instead.
          exist_ok: whether the repository may exist.
          replace_model_card: replace the card of the repository; False keeps it, if there is one.

        Raises:
          FileExistsError: the repository exists.
          OSError, ValueError: see ``nomic_jax.hf.push_to_hub``.
        """
        from huggingface_hub import HfApi  # slow to import, and only this needs it

        _check_saving(train_datasets, safe_serialization)
        api = HfApi(token=token)
        there = api.repo_exists(repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}")
        if there and not (exist_ok or create_pr):
            raise FileExistsError(f"{repo_id} exists on the hub; exist_ok=True adds a commit to it")
        options: dict[str, Any] = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
        options["commit_message"] = commit_message or "Add new Embedder model"
        if local_model_path is not None:
            return push_to_hub(local_model_path, repo_id, **options)
        # A branch that is made by the upload starts from the main branch.
        has_card = there and any(api.file_exists(repo_id, "README.md", revision=at) for at in (revision, None))
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, model_name=repo_id, create_model_card=replace_model_card or not has_card)
            return push_to_hub(directory, repo_id, **options)

    def save_to_hub(self, repo_id: str, organization: str | None = None, **options: Any) -> str:
        """Calls ``push_to_hub`` with ``organization``/``repo_id``."""
        return self.push_to_hub(f"{organization}/{repo_id}" if organization else repo_id, **options)


def _check_saving(train_datasets: list[str] | None, safe_serialization: bool) -> None:
    if train_datasets:
        raise ValueError("train_datasets is refused: the model card lists the data of the model's training records")
    if not safe_serialization:
        raise ValueError("safe_serialization=False is refused: weights are written as safetensors only")
