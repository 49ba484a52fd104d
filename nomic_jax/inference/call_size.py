"""What a call of the encoder computes on a device: texts packed in rows or padded ones, and how many."""

import dataclasses
import functools
from pathlib import Path

import jax

from nomic_jax.data.batches.calls import max_segments
from nomic_jax.data.batches.shapes import LENGTHS
from nomic_jax.model import EncoderConfig
from nomic_jax.model.attention import choose, score_bytes

# Maximum number of tokens per device and call of padded texts, for any batch size. A CPU is fastest when activations
# stay near its caches. On a GPU it limits memory.
TOKENS_PER_CALL = {"cpu": 1024}
TOKENS_PER_CALL_ELSEWHERE = 131_072
# Maximum memory per device and call for the scores of dense attention, which a GPU uses in float32.
SCORE_BYTES_PER_CALL = 4 * 2**30
# A CPU computes a call as one row. Among these lengths a short text finds one that is hardly longer, and the rest of
# several texts too.
CPU_ROWS = (16, 32, 64, 128, 256, 384, 512, 640, 768, 896, *(length for length in LENGTHS if length >= 1024))
# In rows of this length the dense formula is faster than skipping the blocks of other texts.
CPU_DENSE_ROW = 128
GPU_ROWS = (64, 512, 2048, 8192)
GPU_ROW = 2048
UNKNOWN_CACHE_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Packing:
    """How texts are packed on a device; the fields are arguments of ``packed_calls``."""

    row_lengths: tuple[int, ...]
    preferred: tuple[int, ...]
    largest: int


def packing(encoder: EncoderConfig, platform: str) -> Packing | None:
    """Returns how texts are packed in rows, or None where they are padded.

    Texts are packed where attention skips what other texts of the row have: on a CPU, and on a GPU with cuDNN's kernel
    for packed rows. An attention that the user names computes padded texts, unless it is one of these two; and so do
    encoders whose attention these two do not compute.
    """
    windows = [window for layer in range(encoder.num_layers) if (window := encoder.window_of(layer)) is not None]
    is_plain = not (encoder.causal or windows or encoder.has_relative_bias or encoder.kv_heads < encoder.num_heads)
    if platform == "cpu" and encoder.attention in ("auto", "cpu_packed") and is_plain:
        row = cpu_row(encoder)
        packed = Packing(CPU_ROWS, (CPU_DENSE_ROW, row), 2 * row)
    elif platform == "gpu" and encoder.attention in ("auto", "cudnn_packed"):
        packed = Packing(GPU_ROWS, (GPU_ROW,), GPU_ROWS[-1])
        segments = max_segments(GPU_ROW)
        fused = choose(
            encoder.dtype,
            head_dim=encoder.dim_per_head,
            packed=True,
            max_segments=segments,
            biased=encoder.has_relative_bias,
            two_sided_window=bool(windows) and not encoder.causal,
        )
        if fused != "cudnn_packed":
            return None
    else:
        return None
    rows = packed.row_lengths
    while rows[-1] < encoder.max_positions:
        rows = (*rows, 2 * rows[-1])
    return dataclasses.replace(packed, row_lengths=rows)


def packed_attention(row_length: int, platform: str) -> str:
    """Returns the attention of packed rows of one length."""
    if platform != "cpu":
        return "cudnn_packed"
    return "cpu" if row_length <= CPU_DENSE_ROW else "cpu_packed"


def cpu_row(encoder: EncoderConfig) -> int:
    """Returns the number of tokens, 256 to 2048, for which a layer's widest activations fit in the CPU's last cache."""
    widest = max((2 if encoder.is_gated else 1) * encoder.intermediate_size, 3 * encoder.hidden_size)
    tokens = min(max(cache_bytes() // (4 * widest), 256), 2048)
    return 1 << (tokens.bit_length() - 1)


@functools.cache
def cache_bytes() -> int:
    """Returns the size of the CPU's last cache in bytes, as Linux reports it, or UNKNOWN_CACHE_BYTES."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            size = file.read_text().strip()
            sizes.append(int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0))
        except (OSError, ValueError):
            continue
    return max(sizes, default=UNKNOWN_CACHE_BYTES)


def rows_per_call(length: int, encoder: EncoderConfig, platform: str) -> int:
    """Returns the maximum number of packed rows of ``length`` tokens per device and call; at least 1."""
    if platform != "cpu":
        return max(1, TOKENS_PER_CALL_ELSEWHERE // length)
    return cpu_row(encoder) // length if length == CPU_DENSE_ROW else 1


def texts_per_call(encoder: EncoderConfig, length: int, platform: str | None = None) -> int:
    """Returns the maximum number of padded texts of ``length`` tokens per device and call; at least 1.

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
