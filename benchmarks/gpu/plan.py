"""The parts of benchmarks.gpu: the functions to run, their arguments and order; and the targets for an H200."""

import dataclasses
from pathlib import Path
from typing import Any

# Published targets on an H200: row -> (figure, good, stretch). An H100 reaches 0.94 of them.
TARGETS = {
    "mlm": ("tokens_per_s", 400_000, 480_000),
    "contrastive": ("pairs_per_s", 1200, 1900),
    "finetune": ("step_s", 0.30, 0.25),
    "inference-512": ("tokens_per_s", 1_200_000, 1_700_000),
    "inference-2048": ("tokens_per_s", 1_000_000, 1_350_000),
    "mlm_8192": ("mfu", 0.33, 0.38),
}
# What ``deterministic`` sets for a training step.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
EVERY_COMMAND = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE,CONDITIONAL"
# Options of XLA that may help. One that does, by these rows, becomes a default of all commands in launch/gpu.py.
SWEPT_FLAGS = {
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "no command buffers": COMMAND_BUFFERS,
    "latency-hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "LayerNorm of cuDNN": "--xla_gpu_enable_cudnn_layer_norm=true",
    "Triton for every product": "--xla_gpu_triton_gemm_any=true",
    "command buffers for loops too": COMMAND_BUFFERS + EVERY_COMMAND,
}


@dataclasses.dataclass(frozen=True)
class Process:
    """A function of a module of benchmarks.gpu that yields rows.

    Attributes:
      function: "module.function".
      row: fields that are added to each of its rows.
      flags: XLA flags.
      devices: number of virtual devices on a CPU.
      needs_gpu: the process fails if it would run on a CPU.
    """

    function: str
    arguments: dict[str, Any]
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: str = ""
    devices: int = 1
    needs_gpu: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the benchmark.

    Attributes:
      share: pairs of a step on one of 8 GPUs.
      whole: pairs of a step on all 8 GPUs.
      chunk: tokens of a chunk.
      repeat: fields of all timed calls, such as ``seconds`` for repeating them.
    """

    model: dict[str, Any]
    share: int
    whole: int
    pairs: dict[str, Any]
    mlm: dict[str, int]
    mlm_8192: dict[str, int]
    triplets: dict[str, int]
    chunk: int
    lengths: list[int]
    tokens: int
    texts: dict[str, int]
    block: dict[str, Any]
    kernels: dict[str, Any]
    largest: dict[str, Any]
    products: dict[str, int]
    norms: dict[str, int]
    repeat: dict[str, float] = dataclasses.field(default_factory=dict)


FULL = Sizes(
    model={"dtype": "bfloat16"},
    share=2048,
    whole=16_384,
    pairs=dict(length=2048, tokens_per_pair=192.0),
    mlm=dict(rows=64, length=2048),
    mlm_8192=dict(rows=16, length=8192),
    triplets=dict(rows=32, length=512, negatives=7),
    chunk=16_384,
    lengths=[128, 512, 2048, 8192],
    tokens=131_072,
    texts=dict(length=512, texts=8192, batch_size=256),
    block=dict(pairs=1_000_000, files=2, tokens_per_pair=192.0, k=28, seconds=20.0),
    kernels=dict(rows=64, length=2048, tokens_per_pair=192.0),
    largest=dict(first=2048, seconds=100.0),
    products=dict(width=768, inner=3072, tokens=16_384, repeat=20),
    norms=dict(width=768, tokens=131_072, repeat=20),
)
TINY = Sizes(
    model=dict(dtype="bfloat16", hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128),
    share=16,
    whole=64,
    pairs=dict(length=64, tokens_per_pair=24.0),
    mlm=dict(rows=4, length=64),
    mlm_8192=dict(rows=1, length=128),
    triplets=dict(rows=4, length=32, negatives=7),
    chunk=128,
    lengths=[16, 32, 64, 128],
    tokens=512,
    texts=dict(length=32, texts=16, batch_size=8),
    block=dict(pairs=4096, files=1, tokens_per_pair=12.0, k=28, seconds=0.5),
    kernels=dict(rows=16, length=64, tokens_per_pair=24.0),
    largest=dict(first=8, seconds=20.0, limit_gb=0.08),
    products=dict(width=64, inner=128, tokens=128, repeat=2),
    norms=dict(width=64, tokens=128, repeat=2),
    repeat=dict(seconds=0.0),
)


def make_plan(sizes: Sizes, weights: Path) -> dict[str, list[Process]]:
    """Part -> its processes. ``weights`` is the folder of the checkpoints written by ``weights.prepare``."""
    nomic, teacher = str(weights / "nomic"), str(weights / "teacher")
    share = sizes.pairs | dict(rows=sizes.share)
    triplets = sizes.triplets
    texts_of_triplets = triplets["rows"] * (2 + triplets["negatives"])
    kept_attention = sizes.model | dict(recompute="attention")
    long = sizes.model | dict(max_trained_positions=8192)

    def step(row: dict, stage: str, load: dict, recompute: str, flags: str = "", **arguments: Any) -> Process:
        model = arguments.pop("model", sizes.model) | dict(recompute=recompute)
        arguments |= dict(stage=stage, model=model, load=load) | sizes.repeat
        return Process("training.train", arguments, row, flags)

    def swept(name: str, recompute: str = "attention", flags: str = "", load: dict | None = None, **more) -> Process:
        row = {"name": f"contrastive, {name}", "compare": "contrastive"}
        return step(row, "contrastive", share | (load or {}), recompute, flags, steps=3, seconds=3.0, **more)

    def micro_batch(rows: int, recompute: str = "elementwise") -> Process:
        row = {"name": f"mlm, {rows} rows a micro-batch, recompute {recompute}", "compare": "mlm"}
        return step(row, "mlm", sizes.mlm | dict(rows=rows), recompute, steps=3, seconds=3.0)

    def inferred(name: str) -> Process:
        length = sizes.lengths[len(sizes.lengths) // 3]  # 512 tokens of 128 to 8,192
        row = {"key": "", "name": f"inference, {length:,} tokens a text, {name}", "compare": f"inference-{length}"}
        arguments = dict(weights=nomic, lengths=[length], tokens=sizes.tokens, row=row) | sizes.repeat
        return Process("inference.program", arguments, flags=SWEPT_FLAGS[name])

    inference = dict(weights=nomic, lengths=sizes.lengths, tokens=sizes.tokens) | sizes.repeat
    encode = sizes.texts | dict(weights=nomic) | sizes.repeat
    flags = list(SWEPT_FLAGS)
    eight = dict(kept_chunks=1.0, load=sizes.pairs | dict(rows=sizes.whole))
    return {
        "torch_train": [
            Process(
                "peers.train",
                dict(
                    stage="contrastive",
                    model=sizes.model,
                    load=share | dict(layout="padded"),
                    weights=nomic,
                    mini_batch_tokens=sizes.chunk,
                )
                | sizes.repeat,
            )
        ],
        "encode": [Process("inference.encode", encode), Process("peers.encode", encode)],
        "deterministic": [
            swept("deterministic", flags=DETERMINISTIC),
            step(
                {"name": "mlm, deterministic", "compare": "mlm"},
                "mlm",
                sizes.mlm,
                "elementwise",
                flags=DETERMINISTIC,
                steps=3,
                seconds=3.0,
            ),
        ],
        "sweep.chunks": [
            swept("chunks of twice as many tokens", load=dict(chunk_tokens=2 * sizes.chunk)),
            swept("chunks of 4 times as many tokens", load=dict(chunk_tokens=4 * sizes.chunk)),
        ],
        "sweep.recompute": [
            swept("recompute none, every chunk recomputed", recompute="none", kept_chunks=0.0),
            swept("recompute layer", recompute="layer"),
        ],
        "sweep.mlm": [
            micro_batch(sizes.mlm["rows"], "none"),
            micro_batch(sizes.mlm["rows"] // 2),
            micro_batch(sizes.mlm["rows"] * 2),
        ],
        "sweep.flags": [swept(name, flags=SWEPT_FLAGS[name]) for name in flags[:3]],
        "sweep.more": [
            swept("recompute elementwise, half of the chunks recomputed", recompute="elementwise", kept_chunks=0.5),
            swept("chunks of half as many tokens", load=dict(chunk_tokens=sizes.chunk // 2)),
        ],
        "sweep.more_flags": [swept(name, flags=SWEPT_FLAGS[name]) for name in flags[3:]],
        "sweep.mlm_flags": [
            step(
                {"name": f"mlm, {name}", "compare": "mlm"},
                "mlm",
                sizes.mlm,
                "elementwise",
                SWEPT_FLAGS[name],
                steps=3,
                seconds=3.0,
            )
            for name in flags[:4]
        ],
        "sweep.inference_flags": [inferred(name) for name in flags],
        "whole_batch": [
            step(
                dict(name=f"contrastive, {named(sizes.pairs | dict(rows=sizes.whole))}, chunks recomputed"),
                "contrastive",
                sizes.pairs | dict(rows=sizes.whole),
                "none",
                kept_chunks=0.0,
                steps=1,
                seconds=0.0,
            )
        ],
        "one_of_eight": [
            Process(
                "training.one_of_eight",
                eight | dict(model=kept_attention),
                dict(name=f"contrastive, {named(eight['load'])} over 8 GPUs, no chunk recomputed"),
                devices=8,
            )
        ],
        "largest": [
            Process(
                "training.largest",
                sizes.largest
                | dict(
                    model=sizes.model | dict(recompute="attention"), load=sizes.pairs | dict(chunk_tokens=sizes.chunk)
                ),
                dict(name="contrastive, the largest batch whose activations fit"),
            )
        ],
        "kernels": [Process("training.kernels", sizes.kernels | dict(model=sizes.model | dict(num_layers=1)))],
        "curation": [Process("curation.block", sizes.block | dict(teacher=teacher))],
        "mlm": [
            step(
                dict(key="mlm", name=f"mlm, {sizes.mlm['rows']} rows of {sizes.mlm['length']:,} tokens"),
                "mlm",
                sizes.mlm,
                "elementwise",
            )
        ],
        "contrastive": [
            step(
                dict(key="contrastive", name=f"contrastive, {named(share)}"),
                "contrastive",
                share,
                "attention",
                weights=nomic,
            )
        ],
        "finetune": [
            step(
                dict(key="finetune", name=f"finetune, {texts_of_triplets:,} texts of {triplets['length']:,} tokens"),
                "finetune",
                triplets,
                "attention",
            )
        ],
        "inference": [
            Process("inference.program", inference),
            Process("peers.infer", inference | dict(compiled=False)),
        ],
        "torch_compile": [Process("peers.infer", inference | dict(compiled=True))],
        "products": [Process("training.products", sizes.products)],
        "norms": [
            Process("training.norms", sizes.norms),
            step(
                dict(name="mlm, norms by XLA", compare="mlm"),
                "mlm",
                sizes.mlm,
                "elementwise",
                model=sizes.model | dict(norm_kernel="xla"),
                steps=3,
                seconds=3.0,
            ),
        ],
        "mlm_8192": [
            step(
                dict(key="mlm_8192", name=f"mlm, {sizes.mlm_8192['rows']} rows of {sizes.mlm_8192['length']:,} tokens"),
                "mlm",
                sizes.mlm_8192,
                "elementwise",
                model=long,
            )
        ],
    }


def named(load: dict[str, Any]) -> str:
    return f"{load['rows']:,} pairs of {load['tokens_per_pair']:g} tokens"
