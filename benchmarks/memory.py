"""Calculates the memory that a token takes in training, without running it.

    python benchmarks/memory.py

The table has the bytes per token that the backward pass keeps: the residuals of `jax.vjp` of the 137M encoder in
bfloat16, under each policy of `config.model.recompute`, traced for a GPU with cuDNN's attention. In packed rows the
kernel keeps statistics for each text that a row may hold.

`python -m launch.plan` says what a whole step needs, as XLA's compiler for GPUs plans it.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

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
    args = parser.parse_args()
    with traced_for(Target("gpu", (9, 0), 91900)):  # nothing is compiled
        kept = {policy: kilobytes_per_token(policy, args.length) for policy in POLICIES}
        packed = {policy: kilobytes_per_token(policy, args.length, args.segments) for policy in POLICIES}
    print(f"jax {jax.__version__}, 137M, bfloat16, rows of {args.length} tokens\n")
    print(f"| recompute | KB kept per token | in packed rows of {args.segments} texts |\n|---|---|---|")
    for policy in POLICIES:
        print(f"| {policy} | {kept[policy]:,.0f} | {packed[policy]:,.0f} |")


if __name__ == "__main__":
    main()
