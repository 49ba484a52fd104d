"""The arithmetic of a training step, and what a device could do at best: their ratio is the MFU.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) counts what the model needs of its texts' own tokens, not
what is computed on padding or a second time in the backward pass.
"""

import jax

from nomic_jax.data.batches.stream import Batch
from nomic_jax.model import EncoderConfig

# Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets. The first that fits counts.
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
    """FLOPs of one step on a global batch: a forward pass, and a backward pass of twice as much.

    A token meets every weight of the layers in one multiplication and one addition, and attention has two products of
    width D for each pair of tokens of a text. Embedding lookups, norms and the loss are left out.
    """
    D, F, N = config.hidden_size, config.intermediate_size, config.num_layers
    mlp_matrices = 3 if config.activation == "swiglu" else 2
    forward = 2.0 * batch.real_tokens * N * (4 * D * D + mlp_matrices * D * F)
    forward += 4.0 * batch.token_pairs * N * D
    if "target" in batch.arrays:
        # The masked-LM head, on this process's share of the predictions; elsewhere the last layer ends with attention.
        predictions = batch.arrays["target"].size * jax.process_count()
        forward += 2.0 * predictions * D * (D + config.vocab_size)
        forward -= 2.0 * (batch.real_tokens - predictions) * (D * D + mlp_matrices * D * F)
    return 3 * forward
