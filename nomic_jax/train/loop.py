"""The one training loop. It does not know which stage it runs."""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from nomic_jax.data.loader import Stream, read_ahead
from nomic_jax.data.mixture import Kind, read_mixture
from nomic_jax.data.mlm import MlmStream
from nomic_jax.data.pairs import PairStream
from nomic_jax.data.sources import write_json
from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.data.tokens import pretokenize
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.checkpoint import Checkpoints, make_record, read_pretrained
from nomic_jax.train.config import ConfigurationError, MlmData, TrainConfig
from nomic_jax.train.metrics import MetricsWriter
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.sharding import make_mesh, put_rows
from nomic_jax.train.stages import make_stage
from nomic_jax.train.state import init_state, make_train_step

ROW_KINDS: dict[str, Kind] = {"mlm": "text", "contrastive": "pair", "finetune": "triplet"}


def train(config: TrainConfig, workdir: str | Path, devices: list[jax.Device] | None = None) -> dict[str, float]:
    """Runs a stage to its last step, going on from the latest checkpoint of ``workdir`` if there is one.

    Args:
      config: every setting of the run.
      workdir: see ``nomic_jax.train.checkpoint``.
      devices: those to use; all by default.

    Returns:
      The metrics of the last step; empty if the run had finished before.

    Raises:
      ConfigurationError, MixtureError, BadRow, ResumeError: before the first step, with what to do instead.
    """
    workdir = Path(workdir)
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
    stream = make_stream(config, tokenizer)
    steps = config.steps if config.steps >= 0 else round(config.epochs * stream.steps_per_epoch)

    stage = make_stage(config, model)
    schedule = learning_rate(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule)
    train_step = make_train_step(stage, optimizer, mesh, config.accumulate)
    state = init_state(jax.random.key(config.seed), stage, optimizer, mesh, _start_values(config, pretrained))

    earlier = list(pretrained.training) if pretrained is not None else []
    record = make_record(config, model, stream, tokenizer, earlier)
    checkpoints = Checkpoints(workdir, config.checkpoint, record)
    start = checkpoints.latest_step or 0
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
        print(f"{config.stage}: going on from step {start} of {steps} in {workdir}")
    else:
        tokenizer.save(workdir)
        write_json(workdir / "config.json", dataclasses.asdict(config) | {"model": dataclasses.asdict(model.encoder)})
        checkpoints.save(0, state, force=steps == 0)

    last: dict[str, float] = {}
    writer = MetricsWriter(workdir, start)
    bar = tqdm(initial=start, total=steps, desc=config.stage, unit=" steps", dynamic_ncols=True)
    batches = read_ahead(stream, start, steps, jax.process_index(), jax.process_count())
    window_start, window_tokens, window_steps = time.perf_counter(), 0, 0
    for step, batch in enumerate(batches, start + 1):
        state, metrics = train_step(state, put_rows(batch.arrays, mesh))
        window_tokens += batch.real_tokens
        window_steps += 1
        if step % config.log_every == 0 or step == steps:
            last = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds = time.perf_counter() - window_start
            writer.write(
                step,
                last
                | {
                    "lr": float(np.asarray(schedule(step - 1))),
                    "source": batch.source,
                    "real_tokens": batch.real_tokens,
                    "padded_tokens": batch.padded_tokens,
                    "seconds_per_step": seconds / window_steps,
                    "tokens_per_second": window_tokens / seconds,
                },
            )
            bar.set_postfix(loss=f"{last['loss']:.3f}", tokens_per_s=f"{window_tokens / seconds:.0f}", refresh=False)
            window_start, window_tokens, window_steps = time.perf_counter(), 0, 0
        bar.update()
        checkpoints.save(step, state, force=step == steps)
    bar.close()
    writer.close()
    checkpoints.close()
    return last


def make_stream(config: TrainConfig, tokenizer: Tokenizer) -> Stream:
    """The stage's batches, tokenising first whatever is not in the cache yet."""
    data = config.data
    sources = read_mixture(data.mixture, ROW_KINDS[config.stage])
    stores = [pretokenize(source, tokenizer, data.cache_dir, on_bad_row=data.on_bad_row) for source in sources]
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
        batch_size=config.batch_size,
        query_length=data.query_length,
        document_length=data.document_length,
        num_negatives=data.num_negatives,
        too_few_negatives=data.too_few_negatives,
        seed=config.seed,
    )


def _model(config: TrainConfig, pretrained: Checkpoint | None) -> EmbeddingConfig:
    if pretrained is None:
        return EmbeddingConfig(config.model)
    encoder = dataclasses.replace(pretrained.config.encoder, dtype=config.model.dtype, attention=config.model.attention)
    # The contrastive loss takes cosine similarities, whether or not the checkpoint normalises what it returns.
    return dataclasses.replace(pretrained.config, encoder=encoder, normalize=True)


def _tokenizer(config: TrainConfig, pretrained: Checkpoint | None) -> Tokenizer:
    if config.data.tokenizer:
        return Tokenizer.from_pretrained(config.data.tokenizer)
    if pretrained is not None and pretrained.tokenizer is not None:
        return pretrained.tokenizer
    raise ConfigurationError("no tokenizer is named; write config.data.tokenizer (a directory or a hub name)")


def _start_values(config: TrainConfig, pretrained: Checkpoint | None) -> dict:
    """The entries of the parameter tree that do not start at random."""
    if pretrained is None:
        return {}
    wanted = ("encoder", "mlm_head") if config.stage == "mlm" else ("encoder",)
    return {name: pretrained.params[name] for name in wanted if name in pretrained.params}
