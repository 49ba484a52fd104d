"""How many texts of one length a call of the encoder computes on a device."""

import jax

from nomic_jax.model import EncoderConfig
from nomic_jax.model.attention import choose, score_bytes

# Maximum number of tokens per device and call, for any batch size. A CPU is fastest when activations stay near its
# caches (137M, 512 tokens per text: 4 texts per call give four times the tokens/s of 64). On a GPU it limits memory.
TOKENS_PER_CALL = {"cpu": 4096}
TOKENS_PER_CALL_ELSEWHERE = 131_072
# Maximum memory per device and call for the scores of dense attention, which a GPU uses in float32.
SCORE_BYTES_PER_CALL = 4 * 2**30


def texts_per_call(encoder: EncoderConfig, length: int, platform: str | None = None) -> int:
    """Returns the maximum number of texts of ``length`` tokens per device and call; at least 1.

    ``platform`` is that of the device; None for JAX's default backend.
    """
    texts = TOKENS_PER_CALL.get(platform or jax.default_backend(), TOKENS_PER_CALL_ELSEWHERE) // length
    for window in {encoder.window_of(layer) for layer in range(encoder.num_layers)}:
        automatic = choose(
            encoder.dtype,
            head_dim=encoder.dim_per_head,
            biased=encoder.has_relative_bias,
            two_sided_window=window is not None and window < length - 1 and not encoder.causal,
        )
        implementation = automatic if encoder.attention == "auto" else encoder.attention
        if scores := score_bytes(implementation, length, encoder.num_heads, window):
            texts = min(texts, SCORE_BYTES_PER_CALL // scores)
    return max(1, texts)
