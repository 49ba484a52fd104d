"""The one training loop. It does not know which stage it runs."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from nomic_jax.cpu import all_work_space_kept
from nomic_jax.data.batches.loader import read_ahead
from nomic_jax.data.batches.permutation import VERSION
from nomic_jax.files.writing import write_json
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EncoderConfig
from nomic_jax.model.attention import choose, is_fused
from nomic_jax.run.checkpoints import Checkpoints, latest_record
from nomic_jax.run.pretrained import at_step, identify, read_pretrained, resolve
from nomic_jax.run.record import make_record, shuffle_of, trained_prompts
from nomic_jax.run.workdir import used_workdir
from nomic_jax.train import hosts
from nomic_jax.train.choices import choose_norm_kernel, make_choices
from nomic_jax.train.config import ConfigurationError, TrainConfig
from nomic_jax.train.evaluation import Evaluate, Evaluations
from nomic_jax.train.interruption import Interruption, Preempted
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.objectives.lora import BASE, merged_weights
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.planning import recomputation
from nomic_jax.train.planning.candidates import batches_of
from nomic_jax.train.sharding import gather_locally, make_mesh, put_rows, replicated
from nomic_jax.train.start import find_tokenizer, make_model, read_guide, start_values, with_pad_token
from nomic_jax.train.state import TrainState, init_state, make_train_step
from nomic_jax.train.watch.goodput import Goodput
from nomic_jax.train.watch.hlo import require_fused_attention
from nomic_jax.train.watch.progress import Progress
from nomic_jax.train.watch.skipped import SkippedSteps


def train(
    config: TrainConfig,
    workdir: str | Path,
    devices: list[jax.Device] | None = None,
    evaluate: Evaluate | None = None,
    stop: int | None = None,
    repeated: dict[str, Any] | None = None,
    began: float | None = None,
) -> dict[str, float]:
    """Runs a stage to its last step. Resumes from the latest checkpoint of ``workdir`` if there is one.

    Args:
      config: every setting of the run.
      workdir: see ``nomic_jax.run.workdir``.
      devices: the devices to use; all by default.
      evaluate: computes the scores that ``config.evaluation`` requests.
      repeated: the record of the run that this one repeats: its data have the same fingerprint and order.
      began: start of the command on the clock of ``time.monotonic``, for the goodput; now by default.
      stop: stop after this step, like an interruption but without an error.

    Returns:
      The metrics of the last step; empty if the run had finished before.

    Raises:
      ConfigurationError, MixtureError, BadRow, ResumeError, DamagedCheckpoint: the run cannot start; the message says
        what to change.
      FileRefused: ``workdir`` holds something else than a run, or a link out of the run.
      InUse: another process trains in ``workdir``.
      MissingKernel: on a GPU, attention would not be flash attention, and the configuration does not ask for that.
      SaveError: a checkpoint could not be written; raised at the next step.
      DivergedError: too many steps in a row were not finite.
      Preempted: SIGTERM or Ctrl-C stopped the run, and the last step is saved.
    """
    workdir = Path(workdir)
    goodput = Goodput(began)
    with contextlib.ExitStack() as stack:
        # One process holds the directory for all.
        hosts.on_first_process(lambda: stack.enter_context(used_workdir(workdir)))
        if jax.default_backend() == "cpu":
            stack.enter_context(all_work_space_kept())
        return _train(config, workdir, devices, evaluate, stop, repeated, goodput)


def _train(
    config: TrainConfig,
    workdir: Path,
    devices: list[jax.Device] | None,
    evaluate: Evaluate | None,
    stop: int | None,
    repeated: dict[str, Any] | None,
    goodput: Goodput,
) -> dict[str, float]:
    """Trains in a working directory that is held."""
    mesh = make_mesh(devices)
    earlier_record = repeated or hosts.on_first_process(lambda: latest_record(workdir))
    # Which checkpoint this is, is decided once, for all processes: the run that it belongs to may still train.
    places = hosts.on_first_process(lambda: [str(resolve(path)) if path else "" for path in _named_models(config)])
    pretrained = read_pretrained(places[0]) if places[0] else None
    biased = pretrained is not None and pretrained.config.encoder.has_relative_bias
    config = make_choices(config, earlier_record, mesh.size, _print_once, biased)
    config.check(mesh.size)
    parent, guide = (identify(path) if path else None for path in places)
    model = choose_norm_kernel(make_model(config, pretrained), earlier_record, hosts.exchange)
    config.check_lengths(model.encoder, model.width)
    tokenizer = find_tokenizer(config, pretrained, model)
    if pretrained is None:
        model = with_pad_token(model, tokenizer)
    shuffle = shuffle_of(earlier_record) if earlier_record else VERSION
    stream = make_stream(config, tokenizer, mesh.size, shuffle)
    if repeated and stream.fingerprint != repeated["data_fingerprint"]:
        raise ConfigurationError(
            f"{config.data.mixture}: these are not the rows and tokens of the run (their fingerprint is "
            f"{stream.fingerprint[:16]}, it had {repeated['data_fingerprint'][:16]}); give the same files, unchanged"
        )
    steps = config.steps if config.steps >= 0 else round(config.epochs * stream.steps_per_epoch)
    end = steps if stop is None else min(stop, steps)
    hosts.check_agreement(config=dataclasses.asdict(config), data=stream.fingerprint)
    hosts.check_shared(workdir)

    guide_model = read_guide(config, places[1], model, tokenizer)
    schedule = learning_rate(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule)
    settings, chosen = dataclasses.asdict(config), None
    if config.model.recompute == recomputation.AUTO and end:
        chosen = recomputation.recorded(earlier_record, config, mesh.size)
        if chosen is None:
            batches_to_come = batches_of(config, stream, mesh.size)
            chosen = recomputation.choose(config, model, batches_to_come, optimizer, mesh, guide_model, _print_once)
        config = chosen.applied(config)
        config.check(mesh.size)
        model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, recompute=config.model.recompute))
        stream = make_stream(config, tokenizer, mesh.size, shuffle)
    base = pretrained.params["encoder"] if pretrained else None
    stage = make_stage(config, model, stream.layout, guide_model, base)
    ema = config.optim.ema
    train_step = make_train_step(stage, optimizer, mesh, config.accumulate, config.sharding, config.deterministic, ema)
    record = make_record(
        settings,
        model,
        stream,
        tokenizer,
        device_count=mesh.size,
        parent=parent,
        guide=guide,
        earlier=list(pretrained.training) if pretrained is not None else [],
        recomputation=dataclasses.asdict(chosen) if chosen else None,
    )
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        kept = config.checkpoint
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir,
                record,
                every=kept.every,
                keep=kept.keep,
                keep_every=kept.keep_every,
                on_first_process=hosts.on_first_process,
            )
        )
        checkpoints.check_same_run()
        start = checkpoints.latest_step or 0
        pretrained_params = start_values(config, pretrained)
        state = init_state(jax.random.key(config.seed), stage, optimizer, mesh, pretrained_params, config.sharding, ema)
        frozen = jax.device_put(stage.frozen, replicated(mesh))
        merge = jax.jit(merged_weights, static_argnums=(1, 2))
        if checkpoints.latest_step is not None:
            restored = checkpoints.restore(state.to_checkpoint(frozen.get(BASE)))
            state = TrainState.from_checkpoint(restored)
            if BASE in frozen:
                frozen[BASE] = restored["params"]["encoder"]
            if hosts.is_first_process():
                print(f"{config.stage}: resuming from step {start} of {steps} in {workdir}")
        else:
            if hosts.is_first_process():
                tokenizer.save(workdir)
                resolved = dataclasses.asdict(config) | {"model": dataclasses.asdict(model.encoder)}
                write_json(workdir / "config.json", resolved)
            checkpoints.save(0, state.to_checkpoint(frozen.get(BASE)))
        if start < end and hosts.is_first_process():
            stack.enter_context(goodput.recorded(workdir, start))

        skipped = SkippedSteps(workdir, start, stream)
        evaluations = Evaluations(config.evaluation, workdir, start, evaluate)
        checkpoints.best_step = evaluations.best_step
        progress = stack.enter_context(Progress(config, model.encoder, workdir, start, steps, schedule, goodput))
        end = start if evaluations.is_over else end
        prepared = read_ahead(stream, start, end, jax.process_index(), jax.process_count())
        for step, batch in enumerate(goodput.steps(prepared), start + 1):
            rows = put_rows(batch.arrays, mesh)
            if step == start + 1 and _should_be_fused(model.encoder):
                # This reuses the compiled program.
                require_fused_attention(train_step.lower(state, rows, frozen).compile().as_text() or "")
            state, metrics = train_step(state, rows, frozen)
            skipped.add(step, batch.source, metrics)
            progress.add(step, batch, metrics)
            evaluating = evaluations.is_due(step, steps)
            if evaluating:
                params = state.to_use
                if BASE in frozen:
                    params = merge(params | frozen, config.lora, model.encoder)
                params = gather_locally(params, mesh)
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
                    checkpoints.save(step, state.to_checkpoint(frozen.get(BASE)))
            checkpoints.check()
            if evaluating and evaluations.is_over and step < end:
                _write_once(
                    f"{config.stage}: stopped after step {step} of {steps}: no better figure in "
                    f"{config.evaluation.patience} evaluations than at step {evaluations.best_step}"
                )
                break
            if stopping and step < steps:
                with goodput.spending("checkpoint"):
                    checkpoints.wait()
                raise Preempted(
                    f"{interruption.name}: stopped after step {step} of {steps}, which is saved in {workdir}; "
                    f"the same command resumes"
                )
        checkpoints.wait()
    return progress.last


def _named_models(config: TrainConfig) -> tuple[str | Path, str]:
    start = at_step(config.init_from, config.init_step) if config.init_step else config.init_from
    return start, config.loss.guide


def _print_once(line: str) -> None:
    if hosts.is_first_process():
        print(line, flush=True)


def _write_once(line: str) -> None:
    """Prints a line above the progress bar."""
    if hosts.is_first_process():
        tqdm.write(line)


def _should_be_fused(encoder: EncoderConfig) -> bool:
    """Whether some of its layers should use a fused kernel, as those of the published models on a GPU."""
    automatic = choose(encoder.dtype, head_dim=encoder.dim_per_head, biased=encoder.has_relative_bias)
    return is_fused(automatic) and encoder.attention != "xla"
