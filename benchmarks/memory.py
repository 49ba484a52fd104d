"""Memory of training without running it: what the backward pass keeps of a token, and what one device of 8 needs.

    python benchmarks/memory.py

The first table is the residuals of `jax.vjp` of the 137M encoder in bfloat16, per token, under each policy of
`config.model.recompute`, with cuDNN's attention: JAX traces its kernel on any machine that answers for a cuDNN.

The second table adds up what one of 8 devices needs for the paper's shapes: parameters, gradient (twice) and Adam
moments in float32; what all its chunks of tokens keep; and one layer of one chunk in the backward pass, whose own
residuals are there once more as cotangents. It is a bound by accounting, not XLA's figure: that of the CPU compiler
says nothing of a GPU (it makes [heads, length, length] scores and does not schedule for memory: 10 chunks of 65,536
tokens take 257 GB there), and cuDNN cannot be compiled without a GPU.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder, embed

POLICIES = ("none", "elementwise", "attention", "layer")


def residual_bytes(config: EmbeddingConfig, rows: int, length: int) -> int:
    batch = {"ids": jnp.zeros((rows, length), jnp.int32), "length": jnp.full(rows, length, jnp.int32)}

    def residuals(params):
        return jax.vjp(lambda params: embed(params, batch, config), params)[1]

    shapes = jax.eval_shape(residuals, abstract_encoder(config.encoder))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def kilobytes_per_token(policy: str, length: int) -> float:
    config = EmbeddingConfig(
        dataclasses.replace(EncoderConfig(), dtype="bfloat16", attention="cudnn", recompute=policy)
    )
    # The parameters are residuals, too; the difference of two batches leaves what grows with the tokens.
    small, large = (residual_bytes(config, rows, length) for rows in (4, 8))
    return (large - small) / (4 * length) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--chunk_tokens", type=int, default=32_768)
    parser.add_argument("--filled", type=float, default=0.95, help="real tokens of a packed row")
    args = parser.parse_args()
    # Asked before the kernel is traced; nothing is compiled here.
    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda capability: True
    kept = {policy: kilobytes_per_token(policy, args.length) for policy in POLICIES}
    print(f"jax {jax.__version__}, 137M, bfloat16, rows of {args.length} tokens\n")
    print("| recompute | KB kept per token |\n|---|---|")
    for policy in POLICIES:
        print(f"| {policy} | {kept[policy]:,.0f} |")

    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_encoder(EncoderConfig())))
    state = 5 * 4 * parameters / 1e9
    layer = 2 * kept["none"] / EncoderConfig().num_layers * args.chunk_tokens / 1e6
    print(f"\nOne of 8 devices, chunks of {args.chunk_tokens:,} tokens, {args.filled:.0%} filled, in GB:\n")
    print(
        "| step | recompute | whole chunks | state | kept | a layer of a chunk | sum |\n|---|---|---|---|---|---|---|"
    )
    for name, tokens in (
        ("2,048 pairs of 288 tokens", 2048 * 288),
        ("2,048 pairs of 2,112 tokens", 2048 * 2112),
        ("32 queries with 8 texts, 512 tokens each", 32 * 9 * 512),
    ):
        for policy in POLICIES:
            for whole_chunks in (False, True):
                tokens_kept = args.chunk_tokens if whole_chunks else tokens / args.filled
                gigabytes = kept[policy] * tokens_kept / 1e6
                again = "again" if whole_chunks else "no"
                total = state + gigabytes + layer
                print(f"| {name} | {policy} | {again} | {state:.1f} | {gigabytes:.1f} | {layer:.1f} | {total:.0f} |")


if __name__ == "__main__":
    main()
