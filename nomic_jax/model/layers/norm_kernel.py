"""LayerNorm of a residual sum as one kernel for GPUs, forward and backward, in Pallas (Triton).

XLA takes three kernels for each direction, because a row is read once for each of its statistics. Here a block of rows
stays in registers: the forward pass reads both terms of the sum and writes the norm, the backward pass reads the terms
and the gradients and writes the gradient of the sum. The sum itself is never stored.

The gradients of the output come one for each use of it, and are added up in the kernel. XLA would add them in a kernel
of its own before.
"""

import concurrent.futures
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nomic_jax.model.layers.layer_norm import STATISTICS, layer_norm
from nomic_jax.model.varying import varying_as

# Triton's arrays have sizes that are powers of two. A row is several tiles of such a width: 768 = 3 x 256.
MOST_TILE = 1024
MOST_TILES = 16
MOST_WIDTH = 8192
BLOCK = 4096  # elements of the rows that a program holds at once: 32 for each thread of four warps
# Programs of a backward pass, each of which writes a partial sum of the gradients of scale and bias. An H100 runs four
# on each of its 132 cores at once.
MOST_PROGRAMS = 512
DTYPES = ("float32", "bfloat16", "float16")


def is_supported(width: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernels exist for rows of this width and type."""
    tile = _tile(width)
    return tile >= 32 and width // tile <= MOST_TILES and width <= MOST_WIDTH and jnp.dtype(dtype).name in DTYPES


def norm_of_sum(
    x: jax.Array,
    added: jax.Array,
    scale_D: jax.Array,
    bias_D: jax.Array,
    epsilon: float,
    *,
    uses: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns ``layer_norm(x + added)``, [..., D] in the dtype of ``x``, as often as it is used.

    The sum and the statistics are float32. Each use should take its own element of the tuple, which all are the same
    array: then the gradients of the uses reach the kernel of the backward pass apart.

    Args:
      x, added: the terms of the sum, of one shape and dtype (``is_supported``).
      scale_D, bias_D: float32.
      uses: length of the tuple.
      interpret: compute without a GPU, slowly, what the kernels say.
    """
    scale_D, bias_D = varying_as(scale_D, x), varying_as(bias_D, x)
    out_TD = _norm_of_sum(_rows(x), _rows(added), scale_D, bias_D, epsilon, uses, interpret)
    return tuple(each.reshape(x.shape) for each in out_TD)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _norm_of_sum(x_TD, added_TD, scale_D, bias_D, epsilon, uses, interpret):
    return _forward(x_TD, added_TD, scale_D, bias_D, epsilon, uses, interpret)[0]


def _forward(x_TD, added_TD, scale_D, bias_D, epsilon, uses, interpret):
    blocks = _Blocks.of(*x_TD.shape)
    row, number, parameter = blocks.specs(blocks.rows)
    out_TD, mean_T, inverse_T = _call(
        functools.partial(_forward_kernel, blocks=blocks, epsilon=epsilon),
        "norm_forward",
        pl.cdiv(blocks.total, blocks.rows),
        blocks,
        [(x_TD, row), (added_TD, row), (scale_D, parameter), (bias_D, parameter)],
        [(x_TD.shape, x_TD.dtype, row), (x_TD.shape[:1], np.float32, number), (x_TD.shape[:1], np.float32, number)],
        interpret,
    )
    statistics = tuple(jax.ad_checkpoint.checkpoint_name(each, STATISTICS) for each in (mean_T, inverse_T))
    return (out_TD,) * uses, (x_TD, added_TD, *statistics, scale_D)


def _backward(epsilon, uses, interpret, residuals, gradients):
    x_TD, added_TD, mean_T, inverse_T, scale_D = residuals
    blocks = _Blocks.of(*x_TD.shape)
    turns = pl.cdiv(pl.cdiv(blocks.total, blocks.rows), MOST_PROGRAMS)
    programs = pl.cdiv(blocks.total, blocks.rows * turns)
    row, number, parameter = blocks.specs(blocks.rows * turns)
    partial = pl.BlockSpec((1, blocks.width), lambda i: (i, 0))
    of_sum_TD, of_scale_PD, of_bias_PD = _call(
        functools.partial(_backward_kernel, blocks=blocks, turns=turns, uses=uses),
        "norm_backward",
        programs,
        blocks,
        [(x_TD, row), (added_TD, row), (mean_T, number), (inverse_T, number), (scale_D, parameter)]
        + [(gradient, row) for gradient in gradients],
        [(x_TD.shape, x_TD.dtype, row)] + 2 * [((programs, blocks.width), np.float32, partial)],
        interpret,
    )
    return of_sum_TD, of_sum_TD, jnp.sum(of_scale_PD, axis=0), jnp.sum(of_bias_PD, axis=0)


_norm_of_sum.defvjp(_forward, _backward)


def _tile(width: int) -> int:
    """The largest power of two that divides the width, at most MOST_TILE."""
    return min(width & -width, MOST_TILE)


class _Blocks(NamedTuple):
    """How an array [total, width] is divided: blocks of rows, of which each row is several tiles.

    Attributes:
      rows: of a block, a power of two.
      tile: width of a tile, a power of two.
    """

    total: int
    width: int
    rows: int
    tile: int

    @classmethod
    def of(cls, total: int, width: int) -> "_Blocks":
        return cls(total, width, 1 << max(BLOCK // width, 1).bit_length() - 1, _tile(width))

    @property
    def warps(self) -> int:
        return 4 if self.width <= BLOCK else 8

    @property
    def tiles(self) -> range:
        """The column at which each tile starts."""
        return range(0, self.width, self.tile)

    def specs(self, rows: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """Those of an array [total, width] and of one [total] in blocks of ``rows``, and of a whole one [width]."""
        return (
            pl.BlockSpec((rows, self.width), lambda i: (i, 0)),
            pl.BlockSpec((rows,), lambda i: (i,)),
            pl.BlockSpec((self.width,), lambda i: (0,)),
        )

    def in_array(self, block: jax.Array, turns: int = 1) -> jax.Array | None:
        """Which rows of a block are rows of the array, [rows]; None if those of all programs are, of ``turns`` each."""
        if self.total % (self.rows * turns) == 0:
            return None
        return block * self.rows + jnp.arange(self.rows) < self.total


def _call(kernel, name: str, programs: int, blocks: _Blocks, inputs: list, outputs: list, interpret: bool) -> Any:
    # In jax.shard_map, the outputs vary over devices as the inputs do.
    varying = getattr(jax.typeof(inputs[0][0]), "manual_axis_type", None)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(programs,),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in outputs],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
    )(*[array for array, _ in inputs])


def _load(ref, rows: Any, column: int, blocks: _Blocks, in_array: jax.Array | None) -> jax.Array:
    """A tile [rows, tile] in float32; 0 outside of the array."""
    part = ref.at[rows, pl.ds(column, blocks.tile)]
    if in_array is None:
        return triton.load(part).astype(jnp.float32)
    mask = jnp.broadcast_to(in_array[:, None], (blocks.rows, blocks.tile))
    return triton.load(part, mask=mask, other=0).astype(jnp.float32)


def _store(ref, rows: Any, column: int, blocks: _Blocks, in_array: jax.Array | None, value: jax.Array) -> None:
    mask = None if in_array is None else jnp.broadcast_to(in_array[:, None], value.shape)
    triton.store(ref.at[rows, pl.ds(column, blocks.tile)], value.astype(ref.dtype), mask=mask)


def _mean(tiles: list[jax.Array], blocks: _Blocks) -> jax.Array:
    """The mean of each row, [rows, 1]."""
    sums = [jnp.sum(tile, axis=1, keepdims=True) for tile in tiles]
    return functools.reduce(jnp.add, sums) * (1 / blocks.width)


def _forward_kernel(
    x_ref, added_ref, scale_ref, bias_ref, out_ref, mean_ref, inverse_ref, *, blocks: _Blocks, epsilon: float
):
    rows = pl.ds(0, blocks.rows)
    in_array = blocks.in_array(pl.program_id(0))
    sums = [
        _load(x_ref, rows, column, blocks, in_array) + _load(added_ref, rows, column, blocks, in_array)
        for column in blocks.tiles
    ]
    mean = _mean(sums, blocks)
    centred = [tile - mean for tile in sums]
    inverse = jax.lax.rsqrt(_mean([tile * tile for tile in centred], blocks) + epsilon)
    for column, tile in zip(blocks.tiles, centred):
        columns = pl.ds(column, blocks.tile)
        out = tile * (inverse * scale_ref[columns][None]) + bias_ref[columns][None]
        _store(out_ref, rows, column, blocks, in_array, out)
    triton.store(mean_ref.at[rows], mean[:, 0], mask=in_array)
    triton.store(inverse_ref.at[rows], inverse[:, 0], mask=in_array)


def _backward_kernel(
    x_ref, added_ref, mean_ref, inverse_ref, scale_ref, *others, blocks: _Blocks, turns: int, uses: int
):
    gradient_refs, (of_sum_ref, of_scale_ref, of_bias_ref) = others[:uses], others[uses:]
    first = pl.program_id(0) * turns

    def turn(i: jax.Array, totals: tuple) -> tuple:
        rows = pl.ds(i * blocks.rows, blocks.rows)
        in_array = blocks.in_array(first + i, turns)

        def load(ref, column: int) -> jax.Array:
            return _load(ref, rows, column, blocks, in_array)

        other = None if in_array is None else 0.0
        mean, inverse = (
            triton.load(ref.at[rows], mask=in_array, other=other)[:, None] for ref in (mean_ref, inverse_ref)
        )
        normalised = [(load(x_ref, at) + load(added_ref, at) - mean) * inverse for at in blocks.tiles]
        gradients = [sum(load(ref, at) for ref in gradient_refs) for at in blocks.tiles]
        scaled = [tile * scale_ref[pl.ds(at, blocks.tile)][None] for tile, at in zip(gradients, blocks.tiles)]
        level = _mean(scaled, blocks)
        along = _mean([tile * normal for tile, normal in zip(scaled, normalised)], blocks)
        for column, tile, normal in zip(blocks.tiles, scaled, normalised):
            _store(of_sum_ref, rows, column, blocks, in_array, inverse * (tile - level - normal * along))
        of_scale, of_bias = totals
        return (
            tuple(total + tile * normal for total, tile, normal in zip(of_scale, gradients, normalised)),
            tuple(total + tile for total, tile in zip(of_bias, gradients)),
        )

    zeros = tuple(jnp.zeros((blocks.rows, blocks.tile), jnp.float32) for _ in blocks.tiles)
    of_scale, of_bias = jax.lax.fori_loop(0, turns, turn, (zeros, zeros))
    for column, scale, bias in zip(blocks.tiles, of_scale, of_bias):
        columns = pl.ds(column, blocks.tile)
        of_scale_ref[0, columns] = jnp.sum(scale, axis=0)
        of_bias_ref[0, columns] = jnp.sum(bias, axis=0)


@functools.cache
def is_sound(width: int, dtype: str) -> bool:
    """Returns whether the kernels work on the GPU of this process: they run, and agree with XLA's form.

    Tried once for each width and dtype. If they do not work, a warning says so.
    """
    # In a thread of its own, because in this one jax may be tracing a program.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        problem = thread.submit(find_problem, width, dtype).result()
    if problem:
        warnings.warn(f"LayerNorm is computed by XLA, because its kernel does not work here: {problem}", stacklevel=2)
    return not problem


def find_problem(width: int, dtype: str, interpret: bool = False) -> str:
    """Says what is wrong with the kernels; "" if nothing is."""
    rng = np.random.default_rng(0)
    rows, uses = 2 * BLOCK // width + 1, 2  # the last block is not full
    arrays = [jnp.asarray(rng.normal(size=(rows, width)), dtype) for _ in range(2 + uses)]
    parameters = [jnp.asarray(rng.normal(size=width), jnp.float32) for _ in range(2)]

    def by_kernel(x, added, scale, bias):
        return norm_of_sum(x, added, scale, bias, 1e-12, uses=uses, interpret=interpret)

    def by_xla(x, added, scale, bias):
        return (layer_norm(x.astype(jnp.float32) + added, scale, bias, 1e-12, dtype),) * uses

    def outputs(function):
        def compute(terms, parameters, gradients):
            out, pullback = jax.vjp(function, *terms, *parameters)
            return out, pullback(gradients)

        return jax.tree.map(np.asarray, jax.jit(compute)(arrays[:2], parameters, tuple(arrays[2:])))

    try:
        found, expected = outputs(by_kernel), outputs(by_xla)
    except Exception as error:  # whatever the compiler or the driver objects to
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    tolerance = 4 * float(jnp.finfo(dtype).eps) + 1e-5
    for name, ours, theirs in zip(
        ("the norm", "the norm", "the gradient", "the gradient", "the gradient of scale", "the gradient of bias"),
        jax.tree.leaves(found),
        jax.tree.leaves(expected),
    ):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        apart = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        if not apart < tolerance:
            return f"{name} is off by {apart:.2g} of its length"
    return ""
