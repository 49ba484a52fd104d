"""The one training loop. It does not know which stage it runs."""

import contextlib
import dataclasses
from pathlib import Path

import jax

from nomic_jax.data.labelled import LabelledRows, LabelledStream
from nomic_jax.data.loader import Stream, read_ahead
from nomic_jax.data.mixing import Sampling
from nomic_jax.data.mixture import ROW_KINDS, read_mixture
from nomic_jax.data.mlm import MlmStream
from nomic_jax.data.pairs import PairStream, make_layout
from nomic_jax.data.pretokenize import pretokenize
from nomic_jax.data.sources import write_json
from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.data.tokens import TokenStore
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.train import hosts
from nomic_jax.train.checkpoint import Checkpoints, identify, read_pretrained
from nomic_jax.train.config import ConfigurationError, LabelledData, MlmData, TrainConfig
from nomic_jax.train.evaluation import Evaluate, Evaluations
from nomic_jax.train.goodput import Goodput
from nomic_jax.train.hlo import require_fused_attention
from nomic_jax.train.interruption import Interruption, Preempted
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.progress import Progress
from nomic_jax.train.record import make_record, trained_prompts
from nomic_jax.train.sharding import gather_locally, make_mesh, put_rows, replicated
from nomic_jax.train.skipped import SkippedSteps
from nomic_jax.train.stages import make_stage
from nomic_jax.train.state import init_state, make_train_step


def train(
    config: TrainConfig,
    workdir: str | Path,
    devices: list[jax.Device] | None = None,
    evaluate: Evaluate | None = None,
    stop: int | None = None,
    expected_data: str = "",
    began: float | None = None,
) -> dict[str, float]:
    """Runs a stage to its last step, going on from the latest checkpoint of ``workdir`` if there is one.

    Args:
      config: every setting of the run.
      workdir: see ``nomic_jax.train.checkpoint``.
      devices: those to use; all by default.
      evaluate: what ``config.evaluation`` asks for.
      expected_data: the fingerprint that the stream must have.
      began: when the command did, on the clock of ``time.monotonic``, for the goodput; now by default.
      stop: ends this part of the run after so many steps, as an interruption would, but without an error.

    Returns:
      The metrics of the last step; empty if the run had finished before.

    Raises:
      ConfigurationError, MixtureError, BadRow, ResumeError, DamagedCheckpoint: before the first step, with what to do
        instead.
      MissingKernel: on a GPU, attention would not be flash attention, and nobody asked for that.
      SaveError: a checkpoint could not be written; at the next step.
      DivergedError: too many steps in a row were not finite.
      Preempted: there was SIGTERM or Ctrl-C; what has been done is saved.
    """
    workdir = Path(workdir)
    goodput = Goodput(began)
    mesh = make_mesh(devices)
    config.check(mesh.size)
    pretrained = read_pretrained(config.init_from) if config.init_from else None
    model = _model(config, pretrained)
    config.check_lengths(model.encoder)
    tokenizer = _tokenizer(config, pretrained)
    if tokenizer.vocab_size > model.encoder.vocab_size:
        # JAX would clamp the ids that are too large to the last row and train on.
        raise ConfigurationError(
            f"the tokenizer makes ids up to {tokenizer.vocab_size - 1}, the model has {model.encoder.vocab_size} word "
            f"embeddings; write a config.model.vocab_size of at least {tokenizer.vocab_size}, or the right tokenizer"
        )
    stream = make_stream(config, tokenizer, mesh.size)
    if expected_data and stream.fingerprint != expected_data:
        raise ConfigurationError(
            f"{config.data.mixture}: these are not the rows and tokens of the run (their fingerprint is "
            f"{stream.fingerprint[:16]}, it had {expected_data[:16]}); give the same files, unchanged"
        )
    steps = config.steps if config.steps >= 0 else round(config.epochs * stream.steps_per_epoch)
    end = steps if stop is None else min(stop, steps)
    hosts.check_agreement(config=dataclasses.asdict(config), data=stream.fingerprint)
    hosts.check_shared(workdir)

    stage = make_stage(config, model, stream.layout, _guide(config, model, tokenizer))
    schedule = learning_rate(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule)
    train_step = make_train_step(stage, optimizer, mesh, config.accumulate, config.sharding)
    record = make_record(
        config,
        model,
        stream,
        tokenizer,
        device_count=mesh.size,
        parent=identify(config.init_from) if config.init_from else None,
        guide=identify(config.loss.guide) if config.loss.guide else None,
        earlier=list(pretrained.training) if pretrained is not None else [],
    )
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint, record))
        checkpoints.check_same_run()
        start = checkpoints.latest_step or 0
        state = init_state(
            jax.random.key(config.seed), stage, optimizer, mesh, _start_values(config, pretrained), config.sharding
        )
        frozen = jax.device_put(stage.frozen, replicated(mesh))
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
            if hosts.is_first():
                print(f"{config.stage}: going on from step {start} of {steps} in {workdir}")
        else:
            if hosts.is_first():
                tokenizer.save(workdir)
                resolved = dataclasses.asdict(config) | {"model": dataclasses.asdict(model.encoder)}
                write_json(workdir / "config.json", resolved)
            checkpoints.save(0, state)
        if start < end and hosts.is_first():
            stack.enter_context(goodput.recorded(workdir, start))

        skipped = SkippedSteps(workdir, start, stream)
        evaluations = Evaluations(config.evaluation, workdir, start, evaluate)
        checkpoints.best_step = evaluations.best_step
        progress = stack.enter_context(Progress(config, model.encoder, workdir, start, steps, schedule, goodput))
        batches = read_ahead(stream, start, end, jax.process_index(), jax.process_count())
        for step, batch in enumerate(goodput.steps(batches), start + 1):
            rows = put_rows(batch.arrays, mesh)
            if step == start + 1 and _should_be_fused(model.encoder):
                # Nothing is compiled twice by it.
                require_fused_attention(train_step.lower(state, rows, frozen).compile().as_text() or "")
            state, metrics = train_step(state, rows, frozen)
            skipped.add(step, batch.source, metrics)
            progress.add(step, batch, metrics)
            evaluating = evaluations.is_due(step, steps)
            if evaluating:
                params = gather_locally(state.params, mesh)
                to_score = Checkpoint(model, params, tokenizer, prompts=trained_prompts(record))
                with goodput.spending("evaluation"):
                    scores = evaluations.run(step, to_score)
                progress.show(step, scores)
                checkpoints.best_step = evaluations.best_step
            stopping = interruption.at(step)
            if stopping or evaluating or step == end or checkpoints.is_due(step):
                skipped.catch_up()
                goodput.saved(step)
                with goodput.spending("checkpoint"):
                    checkpoints.save(step, state)
            checkpoints.check()
            if stopping and step < steps:
                with goodput.spending("checkpoint"):
                    checkpoints.wait()
                raise Preempted(
                    f"{interruption.name}: stopped after step {step} of {steps}, which is saved in {workdir}; "
                    f"the same command goes on"
                )
        checkpoints.wait()
    return progress.last


def _should_be_fused(encoder: EncoderConfig) -> bool:
    # In float32 there is no kernel, and nobody trains fast.
    return jax.default_backend() == "gpu" and encoder.dtype != "float32" and encoder.attention != "xla"


def make_stream(config: TrainConfig, tokenizer: Tokenizer, devices: int = 1) -> Stream:
    """The stage's batches, tokenising first whatever is not in the cache yet.

    Of several processes the first one reads the files; the others open what it made, or make it where they do not share
    its cache.
    """
    data = config.data
    if isinstance(data, LabelledData):
        name = Path(data.mixture).parent.name
        rows = LabelledRows(data.mixture, data.columns, data.num_labels, tokenizer, data.seq_len, name)
        return LabelledStream(rows, tokenizer, batch_size=config.batch_size, seq_len=data.seq_len, seed=config.seed)
    sources = read_mixture(data.mixture, ROW_KINDS[config.stage])

    def open_stores(fingerprints: list[str]) -> list[TokenStore]:
        return [
            pretokenize(source, tokenizer, data.cache_dir, on_bad_row=data.on_bad_row, fingerprint=fingerprint)
            for source, fingerprint in zip(sources, fingerprints)
        ]

    stores = open_stores(hosts.of_first(lambda: [store.fingerprint for store in open_stores([""] * len(sources))]))
    if isinstance(data, MlmData):
        return MlmStream(
            stores,
            tokenizer,
            batch_size=config.batch_size,
            seq_len=data.seq_len,
            mask_rate=data.mask_rate,
            document_mask=data.document_mask,
            seed=config.seed,
        )
    return PairStream(
        stores,
        tokenizer,
        own_candidates_only=frozenset(source.name for source in sources if not source.in_batch_negatives),
        batch_size=config.batch_size,
        query_length=data.query_length,
        document_length=data.document_length,
        num_negatives=data.num_negatives,
        too_few_negatives=data.too_few_negatives,
        sampling=Sampling(
            data.sampling,
            data.sampling_temperature if data.sampling == "temperature" else 1.0,
            tuple(source.weight for source in sources) if data.sampling == "weights" else (),
            data.remainder,
        ),
        layout=make_layout(
            data.layout,
            stores,
            query_length=data.query_length,
            document_length=data.document_length,
            documents_per_row=1 + data.num_negatives,
            rows_per_device=config.batch_size // devices,
            chunk_tokens=data.chunk_tokens,
        ),
        devices=devices,
        seed=config.seed,
    )


def _model(config: TrainConfig, pretrained: Checkpoint | None) -> EmbeddingConfig:
    if pretrained is None:
        return EmbeddingConfig(config.model, layer_norm=config.loss.layer_norm)
    ours = {name: getattr(config.model, name) for name in ("dtype", "attention", "recompute")}
    encoder = dataclasses.replace(pretrained.config.encoder, **ours)
    # The contrastive loss takes cosine similarities of whole vectors, whatever the checkpoint makes of them.
    return dataclasses.replace(
        pretrained.config,
        encoder=encoder,
        layer_norm=pretrained.config.layer_norm or config.loss.layer_norm,
        dim=None,
        normalize=True,
    )


def _tokenizer(config: TrainConfig, pretrained: Checkpoint | None) -> Tokenizer:
    if config.data.tokenizer:
        return Tokenizer.from_pretrained(config.data.tokenizer)
    if pretrained is not None and pretrained.tokenizer is not None:
        return pretrained.tokenizer
    raise ConfigurationError("no tokenizer is named; write config.data.tokenizer (a directory or a hub name)")


def _guide(config: TrainConfig, model: EmbeddingConfig, tokenizer: Tokenizer) -> Checkpoint | None:
    if not config.loss.guide or config.stage == "mlm":
        return None
    guide = read_pretrained(config.loss.guide)
    where = f"config.loss.guide: {config.loss.guide}"
    if guide.tokenizer is None or guide.tokenizer.vocabulary != tokenizer.vocabulary:
        raise ConfigurationError(f"{where} has another vocabulary than this run: it would take the tokens for others")
    encoder = dataclasses.replace(guide.config.encoder, dtype=model.encoder.dtype, attention=model.encoder.attention)
    config.check_lengths(encoder)
    return dataclasses.replace(guide, config=dataclasses.replace(guide.config, encoder=encoder))


def _start_values(config: TrainConfig, pretrained: Checkpoint | None) -> dict:
    """The entries of the parameter tree that do not start at random."""
    if pretrained is None:
        return {}
    wanted = ["encoder"]
    if config.stage == "mlm":
        wanted.append("mlm_head")
    elif config.loss.learn_temperature:
        wanted.append("temperature")
    return {name: pretrained.params[name] for name in wanted if name in pretrained.params}
