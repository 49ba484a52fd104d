"""Calculates the memory of training without running it, per token and for one of 8 devices.

    python benchmarks/memory.py

The first table has the bytes per token that the backward pass keeps: the residuals of `jax.vjp` of the 137M encoder in
bfloat16, under each policy of `config.model.recompute`, traced for a GPU with cuDNN's attention. In packed rows the
kernel keeps statistics for each text that a row may hold.

The second table adds up the memory of one of 8 devices for the paper's shapes in packed rows:
- parameters, gradient (twice) and Adam moments in float32;
- the residuals of its chunks of tokens, for the number of chunks that is compiled;
- one layer of one chunk in the backward pass, whose residuals are there twice because their cotangents have the same
  size.

"fits" is the largest `config.kept_chunks` within --limit. The sum is a bound by accounting, not XLA's figure. The CPU
compiler's figure does not apply to a GPU: it materialises [heads, length, length] scores and does not schedule for
memory, so that 10 chunks of 65,536 tokens take 257 GB. cuDNN cannot be compiled without a GPU.
"""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp

from nomic_jax.data.batches.packing import number_compiled
from nomic_jax.model import EncoderConfig, abstract_encoder, encode
from nomic_jax.model.attention import Target, traced_for

POLICIES = ("none", "elementwise", "attention", "layer")


def residual_bytes(config: EncoderConfig, rows: int, length: int, segments: int) -> int:
    ids_BL = jnp.zeros((rows, length), jnp.int32)
    if segments:
        texts = dict(segment_BL=jnp.repeat(jnp.arange(segments), length // segments)[None].repeat(rows, 0))
        texts["max_segments"] = segments
    else:
        texts = dict(length_B=jnp.full(rows, length, jnp.int32))

    def residuals(params):
        return jax.vjp(lambda params: encode(params, ids_BL, config, **texts), params)[1]

    shapes = jax.eval_shape(residuals, abstract_encoder(config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def kilobytes_per_token(policy: str, length: int, segments: int = 0) -> float:
    """Kilobytes of residuals per token; ``segments``: texts that a packed row may hold, 0 for a row of one text."""
    config = dataclasses.replace(EncoderConfig(), dtype="bfloat16", recompute=policy)
    # The parameters are residuals, too. The difference of two batch sizes leaves the part that grows with the tokens.
    small, large = (residual_bytes(config, rows, length, segments) for rows in (4, 8))
    return (large - small) / (4 * length) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--segments", type=int, default=32, help="texts that a packed row may hold")
    parser.add_argument("--chunk_tokens", type=int, default=16_384, help="tokens of a chunk")
    parser.add_argument("--filled", type=float, default=0.97, help="share of real tokens in a packed row")
    parser.add_argument("--limit", type=float, default=72, help="memory of a device in GB")
    args = parser.parse_args()
    with traced_for(Target("gpu", (9, 0), 91900)):  # nothing is compiled
        kept = {policy: kilobytes_per_token(policy, args.length) for policy in POLICIES}
        packed = {policy: kilobytes_per_token(policy, args.length, args.segments) for policy in POLICIES}
    print(f"jax {jax.__version__}, 137M, bfloat16, rows of {args.length} tokens\n")
    print(f"| recompute | KB kept per token | in packed rows of {args.segments} texts |\n|---|---|---|")
    for policy in POLICIES:
        print(f"| {policy} | {kept[policy]:,.0f} | {packed[policy]:,.0f} |")

    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_encoder(EncoderConfig())))
    state = 5 * 4 * parameters / 1e9
    layer = 2 * packed["none"] / EncoderConfig().num_layers * args.chunk_tokens / 1e6
    print(f"\nOne of 8 devices, chunks of {args.chunk_tokens:,} tokens, {args.filled:.0%} filled, in GB. Every sum has")
    print(f"{state:.1f} for parameters, gradients and optimizer and {layer:.1f} for a layer in the backward pass.\n")
    print(f"| step | chunks | recompute | all kept | none kept | fits {args.limit:g} GB |\n|---|---|---|---|---|---|")
    for name, tokens in (
        ("2,048 pairs of 288 tokens", 2048 * 288),
        ("2,048 pairs of 2,112 tokens", 2048 * 2112),
        ("32 queries with 8 texts, 512 tokens each", 32 * 9 * 512),
    ):
        chunks = number_compiled(math.ceil(tokens / args.filled / args.chunk_tokens))
        for policy in POLICIES:
            chunk = packed[policy] * args.chunk_tokens / 1e6
            every, none = (state + layer + chunk * count for count in (chunks, 1))
            # Recomputing a chunk that was not kept needs the memory of one more chunk.
            share = 1 if every <= args.limit else max(0, int((args.limit - none) / chunk)) / chunks
            print(f"| {name} | {chunks} | {policy} | {every:,.0f} | {none:.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
