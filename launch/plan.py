"""Plans a training run before anybody rents a GPU: memory of a device, work, collectives, and an estimate of its time.

    nomic-jax plan --config=mlm[:variant] [--devices=8 --device=h100] [--config.field=value ...]

It compiles the training step that launch.train would run, from shapes alone: no data, tokenizer, weights or hub. With
--config.init_from, the architecture is that of the model there; without it, that of config.model. A guide of the loss
(--config.loss.guide) is opened too. The
compiler for GPUs runs on a machine without one, with the extra cuda12 (pip install 'nomic_jax[cuda12]'). Without it,
the plan is that of XLA's compiler for CPUs, which needs more memory, and there is no estimate of the time.

Texts are made up after measured ones, with the means of --query_tokens and --document_tokens; with
--config.data.mixture they are as long as those in the token cache of launch.pretokenize.

The estimate charges each kernel the longer of its bytes and its FLOPs at the rates that an H100 reached (other GPUs: in
proportion to their data sheets), attention by the lengths of the texts, each launch, and collectives as if nothing else
ran beside them. It leaves out the wait for data, checkpoints, evaluation, compilation, contention of scatters, and the
network between machines.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
from absl import flags

from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.planning.lengths import made_up, of_token_cache
from nomic_jax.train.planning.plan import Plan, make_plan, measured
from nomic_jax.train.planning.targets import GPUS, Gpu, MissingCompiler, absent_gpus, allow_absent_gpus
from nomic_jax.train.sharding import make_mesh
from nomic_jax.train.start import make_model

from . import config_files
from .errors import run

FLAGS = flags.FLAGS
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu.json"
NVLINK_DEVICES = 8
# A plan that takes more of a device's memory than this leaves too little for what the compiler does not plan.
MOST_MEMORY = 0.94


def main(_: list[str]) -> None:
    allow_absent_gpus()
    jax.config.update("jax_num_cpu_devices", FLAGS.devices)  # for a plan without the compiler for GPUs
    config = TrainConfig.from_mapping(FLAGS.config.to_dict())
    if config.init_from:
        config = dataclasses.replace(config, model=make_model(config, read_pretrained(config.init_from)).encoder)
    given = (FLAGS.query_tokens, FLAGS.document_tokens)
    if config.data.mixture and given != (None, None):
        raise ValueError(
            "--query_tokens and --document_tokens are for plans without data; leave out config.data.mixture"
        )
    sources = of_token_cache(config) if config.data.mixture else [made_up(config, *given)]
    devices, gpu = _devices(FLAGS.device, FLAGS.devices)
    guide = read_pretrained(config.loss.guide).config if config.loss.guide else None
    report = functools.partial(print, file=sys.stderr)
    plan = make_plan(config, make_mesh(devices), sources, gpu, FLAGS.rows, report, guide)
    print(plan.as_json() if FLAGS.json else "\n".join(_page(plan, config)))


def _devices(name: str, count: int) -> tuple[list[jax.Device], Gpu | None]:
    """The devices to compile for, and what they are if they are GPUs."""
    if name != "cpu":
        try:
            return absent_gpus(name, count), GPUS[name]
        except MissingCompiler as error:
            print(f"warning: {error}. This is the plan of XLA's compiler for CPUs.", file=sys.stderr)
    return jax.devices("cpu")[:count], None


def _page(plan: Plan, config: TrainConfig) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    lines = [
        f"{plan.stage}, {plan.rows:,} rows a step on {plan.devices} x {plan.device}, jax {plan.jax_version}",
        f"  {settings}",
        f"  texts: {plan.texts}; {plan.real_tokens:,} tokens a step, {plan.real_tokens / plan.padded_tokens:.0%} of "
        f"what is computed",
        "",
        "memory of a device, GB",
    ]
    parts = [
        ("parameters", plan.parameters),
        ("optimizer", plan.optimizer),
        ("frozen guide", plan.frozen),
        ("batch", plan.batch),
        ("activations, gradients, scratch", plan.activations),
        ("plan", plan.memory.peak),
    ]
    lines += [f"  {name:32s} {size / 1e9:8.2f}" for name, size in parts if size]
    if plan.device_bytes:
        share = plan.memory.peak / plan.device_bytes
        verdict = "fits" if share <= MOST_MEMORY else "DOES NOT FIT"
        lines.append(f"  {'the device has':32s} {plan.device_bytes / 1e9:8.2f}  {verdict} ({share:.0%})")
    lines.append(f"  recomputed in the backward pass: {_recomputed(plan)}")
    lines += ["", "work of a step", f"  {'FLOPs of the model':32s} {plan.flops / 1e12:8.4g} TFLOP"]
    for kind, kernel in plan.kernels.items():
        lines.append(
            f"  {kind:16s} {kernel.flops / 1e12:8.1f} TFLOP {kernel.bytes / 1e9:9.1f} GB {kernel.times:9,.0f} kernels "
            f"{1e3 * kernel.seconds:9.1f} ms"
        )
    for kind, (number, size) in plan.collectives.items():
        lines.append(f"  {kind:16s} {number:8,d} times, {size / 1e6:,.0f} MB")
    lines += [f"  {warning}" for warning in _warnings(plan)]
    if plan.seconds is None:
        steps = "" if plan.steps is None else f" of the {plan.steps:,} steps"
        return [*lines, "", f"no estimate of the time{steps}: the program is not one for a GPU"]
    return lines + _time(plan)


def _recomputed(plan: Plan) -> str:
    policies = {
        "none": "nothing in a layer",
        "elementwise": "norms, activations and rotations",
        "attention": "all but the inputs and outputs of attention",
        "layer": "whole layers",
    }
    policy = policies[plan.settings["recompute"]]
    if not plan.chunks:
        return policy
    kept = round(plan.settings["kept_chunks"] * plan.chunks)
    return (
        f"{policy}; {plan.chunks} chunks of {plan.chunk_tokens:,} tokens, {plan.chunks_with_text} with text, "
        f"{kept} kept, {plan.chunks - kept} computed again"
    )


def _warnings(plan: Plan) -> list[str]:
    found = []
    if plan.seconds is not None and plan.settings["dtype"] != "float32" and not plan.attention:
        found.append(
            "WARNING: no fused attention; packed rows need Hopper or later, which config.data.layout=bucketed does not"
        )
    if plan.scatters:
        found.append(
            f"WARNING: {plan.scatters} scatters of floats with indices that may repeat; their wait is not charged"
        )
    if plan.devices > NVLINK_DEVICES:
        found.append(f"collectives are charged as within one machine; {plan.devices} devices are several")
    return found


def _time(plan: Plan) -> list[str]:
    assert plan.seconds is not None
    rate = f"{plan.real_tokens / plan.seconds:,.0f} tokens/s"
    if plan.stage in ("contrastive", "finetune"):
        rate += f", {plan.rows / plan.seconds:,.0f} {'pairs' if plan.stage == 'contrastive' else 'queries'}/s"
    lines = ["", f"estimate: {plan.seconds:.3f} s a step, {rate}"]
    if plan.steps is None:
        lines.append("  the whole configuration: give --rows, the rows of its data, or config.steps")
    elif plan.hours is not None:
        lines.append(
            f"  the whole configuration, {plan.steps:,} steps: {_duration(plan.hours)}, "
            f"{plan.hours * plan.devices:,.1f} GPU-hours"
        )
    rows = measured(RESULTS, plan.device)
    if not rows:
        return [*lines, f"  the estimate has not been compared with measurements of a {plan.device}"]
    lines.append(f"  the same estimate beside what an {plan.device} measured, each for the program that ran:")
    for row in rows:
        off = row["estimated_s"] / row["step_s"] - 1
        note = f"; {row['estimate_note']}" if row.get("estimate_note") else ""
        lines.append(f"    {row['name']}: {row['estimated_s']:.4g} s, measured {row['step_s']:.4g} ({off:+.0%}){note}")
    return lines


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


if __name__ == "__main__":
    config_files.define(
        "config", "mlm, contrastive, finetune, glue, or a .py file; with :variant if wanted, such as mlm:debug."
    )
    flags.mark_flag_as_required("config")
    flags.DEFINE_integer("devices", 1, "Number of devices.", lower_bound=1)
    flags.DEFINE_enum("device", "h100", [*GPUS, "cpu"], "What they are.")
    flags.DEFINE_float("query_tokens", None, "Tokens of a query in the mean, without data. [14]", lower_bound=3)
    flags.DEFINE_float("document_tokens", None, "Tokens of a document in the mean, without data. [178]", lower_bound=3)
    flags.DEFINE_integer(
        "rows", 0, "Rows of the data, for the number of steps. [those of the token cache]", lower_bound=0
    )
    flags.DEFINE_bool("json", False, "Print JSON.")
    run(main)
