"""``nomic_jax.fit``: trains an embedder from Python, on any data, with the settings of a named configuration."""

import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nomic_jax.fitting.live_plot import live_plot
from nomic_jax.fitting.named_configs import get_config
from nomic_jax.fitting.rows import find_data
from nomic_jax.fitting.run import Run
from nomic_jax.fitting.stage import run_stage
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.train.config import ConfigurationError, TrainConfig
from nomic_jax.train.typed_fields import paths_of

_OWN = "own"  # the variant for a user's own data
# Names of fields in sentence-transformers and transformers.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "max_grad_norm": "optim.clip_norm",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "gradient_accumulation_steps": "accumulate",
    "per_device_train_batch_size": "batch_size",
    "max_length": "data.document_length",
    "max_seq_length": "data.document_length",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluation.every",
    "logging_steps": "log_every",
    "output_dir": "workdir",
}


def fit(
    model: str | os.PathLike,
    data: Any,
    *,
    workdir: str | os.PathLike,
    config: str | None = None,
    columns: Sequence[str] = (),
    query_prefix: str | None = None,
    document_prefix: str | None = None,
    **settings: Any,
) -> Run:
    """Trains ``model`` on ``data`` and returns the run. Called again with the same arguments, it resumes or is done.

    The columns say what is trained, as in sentence-transformers: a query and a document (question and answer, anchor
    and positive), with the other rows' documents as negatives; a query, a document and negatives (a list, a text, or
    several columns); or one column of text, for masked-LM. Two texts and a ``score`` are trained on with CoSENT; a
    query, a document, negatives and a list of a teacher's ``scores`` with KL divergence; ``loss=`` names another loss
    (``nomic_jax.data.source_loss``), such as "spans" or "simcse" for texts alone. Rows with labels are refused: see
    ``config``.

    Args:
      model: what training starts from: a run, one of its checkpoints, a Hugging Face directory or a name on the hub,
        such as "nomic-ai/nomic-embed-text-v1-unsupervised"; "" for random weights (then name data.tokenizer too).
      data: files (csv, tsv, json, jsonl, parquet, Arrow, zip; "hf:NAME"), a BEIR folder, a mixture .yaml, a list of
        dictionaries, a Dataset, or a DataFrame or table of pandas, polars or Arrow.
      workdir: folder of the run: checkpoints, metrics and settings.
      config: a configuration that gives the defaults: "contrastive", "finetune", "mlm" or "glue" (a classifier or a
        regression, with the column "label"), with a variant if wanted ("contrastive:one_gpu"), or a .py file. By
        default, the variant ":own" of the stage that the columns stand for.
      columns: the columns to train on, in the order query, document, negatives; by default found by their names, or
        all of them in their order.
      query_prefix, document_prefix: what goes in front of texts, "" for nothing; see ``nomic_jax.data.mixture``. By
        default "search_query" and "search_document".
      settings: fields of the configuration (``nomic_jax.train.config``): ``steps=``, ``batch_size=``, ``lr=``,
        ``document_length=`` by their last name where it is unique, others by their group (``checkpoint={"every": 50}``)
        or whole path (``**{"checkpoint.every": 50}``).

    Raises:
      ConfigurationError: a setting does not exist or cannot work.
      DataError, MixtureError, BadRow: the data cannot be used; the message names the row, file or column.
      Preempted: Ctrl-C stopped the run after a step, which is saved; the same call resumes it.
      Others as ``nomic_jax.train.loop.train``.
    """
    use_compilation_cache()
    changes = _changes(settings)
    named = get_config(config) if config else None
    stage = None if named is None else named.stage
    cache_dir = changes.get("data.cache_dir") or (named or get_config(f"contrastive:{_OWN}")).data.get("cache_dir")
    loss = changes.pop("data.loss", "")
    prefixes = (query_prefix, document_prefix)
    found = find_data(_one_pattern(data), columns, stage, cache_dir or "token_cache", prefixes, loss)
    values = named or get_config(f"{found.stage}:{_OWN}")
    values.init_from = os.fspath(model)
    if values.init_from:
        values.data.tokenizer = ""  # that of the model
    values.data.mixture, values.data.columns = found.mixture, ",".join(found.columns)
    if found.loss and found.columns:
        values.data.loss, values.data.scores = found.loss, ",".join(found.scores)
    if found.num_negatives and (config is None or values.data.num_negatives > found.num_negatives):
        values.data.num_negatives = found.num_negatives
    flat = values.to_dict()
    for path, value in changes.items():
        *groups, field = path.split(".")
        group = flat
        for name in groups:
            group = group.setdefault(name, {})
        group[field] = value
    settled = TrainConfig.from_mapping(flat)
    with live_plot(Path(workdir)) if _in_notebook() else contextlib.nullcontext():
        run_stage(settled, Path(workdir))
    return Run(workdir)


def _one_pattern(data: Any) -> Any:
    """Returns the data; of several files, the pattern that names all of them."""
    if not isinstance(data, list | tuple) or not data or not all(isinstance(file, str | os.PathLike) for file in data):
        return data
    names = [os.fspath(file) for file in data]
    if wrong := [name for name in names if set(name) & set("{},")]:
        raise ValueError(
            f"{wrong[0]!r} has a brace or comma, so that it cannot be one of several files; write a mixture"
        )
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _changes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns path -> value of the fields that keywords name.

    Raises:
      ConfigurationError: there is no such field, or several have that name.
    """
    paths = paths_of(TrainConfig)
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            for inner, inner_value in value.items():
                changes |= {_path(f"{name}.{inner}", paths): inner_value}
        else:
            changes |= {_path(name, paths): value}
    return changes


def _path(name: str, paths: Sequence[str]) -> str:
    if name in paths:
        return name
    found = [path for path in paths if path.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigurationError(f"{name!r} is a field of several groups; write one of {_spelled(found)}")
    last = name.rpartition(".")[2]
    by_last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(last, by_last, n=1)
    meant = SYNONYMS.get(last) or (by_last[close[0]] if close else None)
    hint = f"; did you mean {_spelled([meant])}?" if meant else "; nomic_jax/train/config.py explains the fields"
    raise ConfigurationError(f"there is no setting {name!r}{hint}")


def _spelled(paths: Sequence[str]) -> str:
    """Returns how keywords name the fields."""
    spelled = []
    for path in paths:
        group, _, field = path.rpartition(".")
        spelled.append(f"{group}={{{field!r}: ...}}" if group else f"{field}=")
    return ", ".join(spelled)


def _in_notebook() -> bool:
    """Returns whether a kernel of Jupyter runs this, which shows figures in the page."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
