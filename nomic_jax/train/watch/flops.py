"""FLOPs of a training step and peak FLOP/s of devices, for the MFU.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) counts model FLOPs on real tokens only. Padding and
recomputation are excluded.
"""

import jax

from nomic_jax.data.batches.stream import Batch
from nomic_jax.model import EncoderConfig

# Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets. The first match is used.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in bfloat16; None if it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def training_flops(config: EncoderConfig, batch: Batch) -> float:
    """FLOPs of one step on a global batch: the forward pass, and twice as many for the backward pass.

    Every weight of the layers costs one multiplication and one addition for each token. Attention costs two products of
    the heads' width for each pair of tokens of which one attends to the other. Local layers count as if all texts were
    as long as a token's text is on average. Embedding lookups, norms and the loss are left out.
    """
    D = config.hidden_size
    forward = batch.real_tokens * config.forward_flops_per_token(batch.token_pairs / max(batch.real_tokens, 1))
    if "target" in batch.arrays:
        # The masked-LM head and the last MLP run at the predicted positions only. The array is this process's share.
        predictions = batch.arrays["target"].size * jax.process_count()
        forward += 2.0 * predictions * D * (D + config.vocab_size)
        out_weights = config.num_heads * config.dim_per_head * D
        forward -= 2.0 * (batch.real_tokens - predictions) * (out_weights + config.mlp_weights)
    return 3 * forward
