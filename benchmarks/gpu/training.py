"""The training parts of benchmarks.gpu. Each function runs in a separate process and yields table rows."""

import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from benchmarks.loads import Load, mlm_load, pair_lengths, pair_load
from benchmarks.steps import GB, TrainStep, paper_settings, peak_gigabytes
from benchmarks.timing import median_seconds
from nomic_jax.data.batches.packing import number_compiled
from nomic_jax.hf import read_checkpoint
from nomic_jax.model.layers.layer_norm import layer_norm
from nomic_jax.model.layers.norm_kernel import find_problem, norm_of_sum
from nomic_jax.train.planning.kernels import kernels_of
from nomic_jax.train.planning.outline import Outline
from nomic_jax.train.planning.targets import gpu_of
from nomic_jax.train.sharding import DATA
from nomic_jax.train.watch.flops import peak_flops
from nomic_jax.train.watch.hlo import fused_attention_calls, read_program, require_fused_attention

Row = dict[str, Any]


def make_load(
    stage: str,
    rows: int,
    length: int,
    layout: str = "packed",
    tokens_per_pair: float = 0.0,
    negatives: int = 0,
    chunk_tokens: int = 0,
    devices: int = 1,
) -> Load:
    """Masked-LM rows of ``length`` tokens, pairs of ``tokens_per_pair`` tokens, or triplets of texts of ``length``."""
    if stage == "mlm":
        return mlm_load(rows, length)
    if tokens_per_pair:
        query, document = pair_lengths(np.random.default_rng(0), rows, tokens_per_pair)
        lengths = query, document[:, None]
    else:
        lengths = np.full(rows, length), np.full((rows, 1 + negatives), length)
    return pair_load(stage, *lengths, layout=layout, longest=length, chunk_tokens=chunk_tokens, devices=devices)


def make_step(stage: str, load: Load, model: dict, layout: str = "packed", kept_chunks: float = 1.0, **kw) -> TrainStep:
    fields = {} if stage == "mlm" else dict(kept_chunks=kept_chunks, data=dict(layout=layout))
    return TrainStep(paper_settings(stage, model, **fields), load, **kw)


def train(
    stage: str,
    model: dict,
    load: dict,
    kept_chunks: float = 1.0,
    weights: str = "",
    steps: int = 5,
    seconds: float = 5.0,
) -> Iterator[Row]:
    """Runs a stage's step from ``weights``, a checkpoint directory, or from random weights."""
    step = make_step(stage, make_load(stage, **load), model, load.get("layout", "packed"), kept_chunks)
    compiling = step.compile()
    attention = attention_of(step)
    pretrained = {"encoder": read_checkpoint(Path(weights)).params["encoder"]} if weights else None
    yield run(step, steps, seconds, pretrained) | {
        "compile_s": compiling,
        "attention": attention,
        "estimated_s": estimated_seconds(step),
    }


def attention_of(step: TrainStep) -> str:
    """The attention kernels in the compiled step.

    Raises:
      MissingKernel: the program for a GPU has no fused attention.
    """
    assert step.compiled is not None
    hlo = step.compiled.as_text() or ""
    calls = require_fused_attention(hlo) if jax.default_backend() == "gpu" else fused_attention_calls(hlo)
    if not calls:
        return f"none of cuDNN ({jax.default_backend()})"
    packed = step.load.layout is not None and step.load.layout.packed
    return f"{'cudnn_packed' if packed else 'cudnn'}: {', '.join(f'{n} {name}' for name, n in calls.items())}"


def estimated_seconds(step: TrainStep) -> float | None:
    """What ``launch.plan`` says of the compiled step; None for a device that it does not know."""
    assert step.compiled is not None
    gpu = gpu_of(step.mesh.devices.flat[0].device_kind)
    if gpu is None:
        return None
    load = step.load
    chunks = load.arrays["shape"].reshape(step.mesh.size, -1) if load.layout is not None else None
    loops = Outline(load.batch, load.layout, chunks).loops(step.settings)
    program = read_program(step.compiled.as_text() or "")
    try:
        return sum(kernel.seconds for kernel in kernels_of(program, gpu.rates, loops, step.mesh.size))
    except (LookupError, ValueError) as error:  # a form of HLO that is not known yet must not cost the measurement
        print(f"no estimate: {error}", file=sys.stderr)
        return None


def run(step: TrainStep, steps: int, seconds: float, pretrained: dict | None = None) -> Row:
    """Measures at least ``steps`` steps, and more while ``seconds`` allow, after a first step that is not counted."""
    step.start(pretrained)
    loss = step()
    taken = median_seconds(step, steps, seconds)
    load = step.load
    return {
        "step_s": taken,
        "tokens_per_s": load.real_tokens / taken,
        "pairs_per_s": None if load.stage == "mlm" else load.rows / taken,
        "mfu": step.mfu(taken),
        "peak_gb": peak_gigabytes(),
        "planned_gb": step.planned_bytes / GB,
        "rows": load.rows,
        "filled": load.real_tokens / load.padded_tokens,
        "loss": loss,
    }


def largest(
    model: dict, load: dict, first: int, seconds: float, limit_gb: float | None = None, steps: int = 1
) -> Iterator[Row]:
    """Finds the largest contrastive batch whose activations all fit: searches by planned memory, then runs real steps.

    Args:
      first: pairs of the first size. Every size fills a number of chunks that training rounds up to.
      seconds: time limit of the search.
      limit_gb: memory limit; by default that of the device's allocator.
    """
    started = time.perf_counter()
    if limit_gb is None:
        limit_gb = 0.97 * jax.local_devices()[0].memory_stats()["bytes_limit"] / GB
    per_pair, chunk = load["tokens_per_pair"], load["chunk_tokens"]
    numbers = sorted({number_compiled(chunks) for chunks in range(max(1, int(first * per_pair / chunk)), 4096)})
    sizes = [int(0.96 * chunks * chunk / per_pair) for chunks in numbers]
    planned: dict[int, float] = {}
    seconds_of: dict[int, float] = {}
    fitting: dict[int, TrainStep] = {}
    while (size := next_size(sizes, planned, limit_gb)) is not None:
        if fitting and time.perf_counter() - started + 2 * max(seconds_of.values()) > seconds:
            break
        step = make_step("contrastive", make_load("contrastive", size, **load), model)
        seconds_of[size] = step.compile()
        planned[size] = step.planned_bytes / GB
        if planned[size] <= limit_gb:
            fitting[size] = step
    tried = ", ".join(f"{pairs:,}: {gb:.3g} GB" for pairs, gb in sorted(planned.items()))
    note = f"planned memory by pairs: {tried}; limit {limit_gb:.3g} GB"
    while fitting:
        pairs = max(fitting)
        try:
            yield run(fitting.pop(pairs), steps, 0.0) | {"compile_s": seconds_of[pairs], "note": note}
            return
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            note += f"; {pairs:,} pairs did not run"
    raise MemoryError(f"no batch fits; {note}")


def next_size(sizes: list[int], planned: dict[int, float], limit: float) -> int | None:
    """The size to plan next, or None if the largest size that fits is known.

    The search begins with the first size. Then it extrapolates memory linearly from the two largest sizes that fit (or
    proportionally from one) and takes the largest size that should fit, at most four times the largest that does. The
    result always lies between the sizes that fit and those that do not.
    """
    fitting = [size for size in sizes if planned.get(size, np.inf) <= limit]
    if not planned:
        return sizes[0]
    if not fitting:
        smaller = [size for size in sizes if size < min(planned)]
        return smaller[-1] if smaller else None
    too_large = min((size for size, gb in planned.items() if gb > limit), default=np.inf)
    left = [size for size in sizes if fitting[-1] < size < too_large]
    if not left:
        return None
    low, high = fitting[-2:] if len(fitting) > 1 else (0, fitting[-1])
    slope = (planned[high] - planned.get(low, 0.0)) / (high - low)
    expected = [size for size in left if size <= 4 * high and planned[high] + slope * (size - high) <= limit]
    return expected[-1] if expected else left[0]


def one_of_eight(model: dict, load: dict, kept_chunks: float) -> Iterator[Row]:
    """Planned memory of one of 8 GPUs in the step of the whole batch.

    On a GPU, the step is compiled for 8 GPUs of the same kind, which need not exist. On a CPU, it is compiled for 8
    virtual devices, which must exist.
    """
    if jax.default_backend() == "gpu":
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="cuda", topology="1x1x8").devices
    else:
        devices = jax.devices()[:8]
    mesh = jax.make_mesh((8,), (DATA,), axis_types=(AxisType.Auto,), devices=devices)
    step = make_step(
        "contrastive", make_load("contrastive", **load, devices=8), model, kept_chunks=kept_chunks, mesh=mesh
    )
    compiling = step.compile()
    yield {
        "compile_s": compiling,
        "planned_gb": step.planned_bytes / GB,
        "rows": load["rows"],
        "attention": attention_of(step),
        "note": f"compiled for 8 x {devices[0].device_kind}, nothing was run; an H100 has 80 GB",
    }


def kernels(model: dict, rows: int, length: int, tokens_per_pair: float) -> Iterator[Row]:
    """Compares the gradients by the attention kernel of training and by the dense formula, both in bfloat16.

    The reference is the dense formula in float32. The check fails if the fused kernel's error is more than twice the
    rounding error of the dense formula plus 1e-3.
    """
    for name, load in (
        ("mlm", make_load("mlm", max(1, rows // 16), length)),
        ("padded", make_load("contrastive", rows, min(length, 256), "padded", tokens_per_pair)),
        ("packed", make_load("contrastive", rows, length, "packed", tokens_per_pair)),
    ):
        layout = "padded" if load.layout is None else "packed"
        gradients, attention = {}, ""
        for implementation, dtype in (("auto", "bfloat16"), ("xla", "bfloat16"), ("xla", "float32")):
            variant = model | dict(attention=implementation, dtype=dtype)
            step = make_step(
                load.stage, load, variant, layout, float(layout == "packed"), optimizer=gradient_in_state()
            )
            step.compile()
            if implementation == "auto":
                attention = attention_of(step)
            step.start()
            step()
            gradients[implementation, dtype] = jax.device_get(step.state.opt_state)
        exact = gradients.pop(("xla", "float32"))
        fused, dense = (distance(gradient, exact) for gradient in gradients.values())
        yield {
            "name": f"gradient, {name}",
            "attention": attention,
            "note": f"differs from the float32 gradient by {fused:.2e} of its norm; dense bfloat16 {dense:.2e}",
            "failed": not fused <= 2 * dense + 1e-3,
        }


def products(width: int, inner: int, tokens: int, repeat: int) -> Iterator[Row]:
    """The matrix products of a layer in isolation, in bfloat16, forward and backward: a bound on a step's speed."""
    peak = peak_flops(jax.devices()[0].device_kind)

    @jax.jit
    def forward_and_backward(x_TD, weights, cotangents):
        outputs, pullback = jax.vjp(lambda x_TD, weights: [x_TD @ weight for weight in weights], x_TD, weights)
        return outputs, pullback(cotangents)

    for name, rows, columns in (
        ("query, key and value in one", width, [3 * width]),
        ("output", width, [width]),
        ("up and gate in two", width, [inner, inner]),
        ("up and gate in one", width, [2 * inner]),
        ("down", inner, [width]),
    ):
        keys = iter(jax.random.split(jax.random.key(0), 1 + 2 * len(columns)))

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape, jnp.bfloat16)  # noqa: B023

        x_TD = normal(tokens, rows)
        weights, cotangents = [normal(rows, n) for n in columns], [normal(tokens, n) for n in columns]

        def calls() -> None:
            # Many calls per measurement, because one takes less than a millisecond on a GPU.
            results = [forward_and_backward(x_TD, weights, cotangents) for _ in range(repeat)]  # noqa: B023
            jax.block_until_ready(results[-1])

        calls()
        seconds = median_seconds(calls, 5, 1.0) / repeat
        flops = 3 * 2.0 * tokens * rows * sum(columns)
        yield {
            "name": f"products of {tokens:,} tokens: {name}",
            "step_s": seconds,
            "mfu": flops / seconds / peak if peak else None,
            "note": f"{flops / seconds / 1e12:.3g} TFLOP/s",
        }


def norms(width: int, tokens: int, repeat: int) -> Iterator[Row]:
    """LayerNorm of a residual sum with three uses, in bfloat16, forward and backward: XLA's form and the kernel.

    On a CPU, the kernel is interpreted.
    """
    on_gpu = jax.default_backend() == "gpu"
    shape = (tokens, width)
    x_TD, added_TD, *of_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 5)
    )
    scale_D, bias_D = jnp.ones(width), jnp.zeros(width)

    def by_xla(x_TD: jax.Array, added_TD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> tuple[jax.Array, ...]:
        return (layer_norm(x_TD + added_TD, scale_D, bias_D, 1e-12, "bfloat16", all_kept=True),) * 3

    by_kernel = functools.partial(norm_of_sum, epsilon=1e-12, uses=3, interpret=not on_gpu)
    taken = {}
    for name, norm in (("XLA", by_xla), ("kernel", by_kernel)):

        @jax.jit
        def forward(*terms, norm=norm):
            out, pullback = jax.vjp(norm, *terms)
            return out[0], pullback  # a result that is there twice would be copied

        backward = jax.jit(lambda pullback, *of_out: pullback(of_out)[1:])
        _, pullback = forward(x_TD, added_TD, scale_D, bias_D)
        backward(pullback, *of_out)
        for part, least, call in (
            ("forward", 3, lambda: forward(x_TD, added_TD, scale_D, bias_D)),
            ("backward", 6, lambda: backward(pullback, *of_out)),  # noqa: B023
        ):

            def calls(call=call) -> None:
                jax.block_until_ready([call() for _ in range(repeat)][-1])

            taken[name, part] = median_seconds(calls, 5, 0.5) / repeat
            rate = least * x_TD.nbytes / taken[name, part] / 1e9
            yield {
                "name": f"LayerNorm of a sum, {tokens:,} tokens, {part}: {name}",
                "step_s": taken[name, part],
                "note": f"{rate:,.0f} GB/s of the {least} arrays that it must move",
            }
    problem = find_problem(width, "bfloat16", interpret=not on_gpu)
    shares = [f"{part} {taken['kernel', part] / taken['XLA', part]:.2f}" for part in ("forward", "backward")]
    yield {
        "name": "LayerNorm of a sum: the kernel in the time of XLA",
        "note": ", ".join([*shares, *[f"WRONG: {problem}"] * bool(problem)]),
        "failed": bool(problem),
    }


def gradient_in_state() -> optax.GradientTransformation:
    """An optimizer that changes no parameter and stores the gradient in its state."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, tree)

    return optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


def distance(a: Any, b: Any) -> float:
    """The norm of the difference of all leaves, relative to the norm of ``b``."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    squares = [(np.sum((np.asarray(x, np.float64) - y) ** 2), np.sum(np.asarray(y, np.float64) ** 2)) for x, y in pairs]
    return float(np.sqrt(sum(top for top, _ in squares) / sum(bottom for _, bottom in squares)))
