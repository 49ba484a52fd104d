"""Settings that a run chooses before its first step where they are "auto": computation dtype and layout.

The choices are in the record of the run, so that a resumed run keeps them. They change speed and rounding, but neither
the rows of a step nor the number of negatives.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nomic_jax.data.batches.pairs import MAX_CHUNK_TOKENS
from nomic_jax.model import EmbeddingConfig
from nomic_jax.model.attention import choose, traced_platform
from nomic_jax.model.layers import norm
from nomic_jax.train.config import PairData, TrainConfig

AUTO = "auto"
LONGEST_DENSE = 512  # tokens of a packed row whose attention may be computed across its texts
_SEGMENTS = 32  # texts of a packed row, usually


def make_choices(
    config: TrainConfig,
    record: Mapping[str, Any] | None,
    device_count: int,
    say: Callable[[str], None],
    biased: bool = False,
) -> TrainConfig:
    """Returns the settings without "auto", and says what was chosen.

    Args:
      record: of the latest checkpoint of the run, which has chosen before; None for a new run.
      say: prints a line.
      biased: whether the model has a relative position bias, with which no fused kernel computes attention.
    """
    recorded = (record or {}).get("config") or {}
    chosen = {}
    if config.model.dtype == AUTO:
        dtype = (recorded.get("model") or {}).get("dtype") or default_dtype()
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        chosen["model.dtype"] = dtype
    if isinstance(config.data, PairData) and config.data.layout == AUTO:
        layout: Any = (recorded.get("data") or {}).get("layout")
        layout = layout or default_layout(config, config.data, device_count, biased)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, layout=layout))
        chosen["data.layout"] = layout
    if chosen:
        origin = "as the run began" if recorded else f"for {traced_platform()}"
        say(f"{config.stage}: {', '.join(f'{name}={value}' for name, value in chosen.items())} ({origin})")
    return config


def choose_norm_kernel(
    model: EmbeddingConfig, record: Mapping[str, Any] | None, exchange: Callable[[str], list[str]]
) -> EmbeddingConfig:
    """Returns the model with ``norm_kernel`` in the place of "auto": that of the record, or what all processes can run.

    Runs of earlier versions have none in their record, and took "xla". ``exchange`` returns the texts of all processes.
    """
    encoder = model.encoder
    if encoder.norm_kernel != AUTO:
        return model
    if record and (fields := (record.get("model") or {}).get("encoder")):
        chosen = fields.get("norm_kernel", "xla")
    else:
        chosen = "triton" if set(exchange(norm.choose(encoder))) == {"triton"} else "xla"
    return dataclasses.replace(model, encoder=dataclasses.replace(encoder, norm_kernel=chosen))


def default_dtype() -> str:
    """bfloat16 where the devices multiply it faster; a CPU does not."""
    return "float32" if traced_platform() == "cpu" else "bfloat16"


def default_layout(config: TrainConfig, data: PairData, device_count: int, biased: bool = False) -> str:
    """Returns "padded" for a batch no larger than a chunk, "packed" where attention does not pay for it, or "bucketed".

    A CPU computes packed rows also in small batches: padding would be computed as slowly as text. It depends on the
    settings alone, not on the texts: reading them takes long.
    """
    attention = choose(config.model.dtype, packed=True, max_segments=_SEGMENTS, biased=biased)
    if attention == "cpu" and max(data.query_length, data.document_length) <= LONGEST_DENSE:
        return "packed"
    tokens_per_row = data.query_length + (1 + data.num_negatives) * data.document_length
    if tokens_per_row * config.batch_size // device_count <= MAX_CHUNK_TOKENS:
        return "padded"
    return "packed" if attention == "cudnn_packed" else "bucketed"
