"""What a compiled step does, read off its HLO: what it moves between devices, and whether attention is one kernel."""

import math
import re
from collections import Counter
from typing import NamedTuple

# Call targets of jax._src.cudnn.fused_attention_stablehlo: __cudnn$fmhaSoftmax, __cudnn$fmhaSoftmaxBackward, ...
FUSED_ATTENTION = r"__cudnn\$fmha\w*"
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_ARRAY = re.compile(rf"\b({'|'.join(ITEM_BYTES)})\[([\d,]*)\]")


class MissingKernel(RuntimeError):
    """A program for a GPU computes attention in some other way than by the fused kernel."""


class Collective(NamedTuple):
    """Attributes:
    kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "collective-permute".
    bytes: of the whole arrays: what a gather ends with, what a scatter or a reduction begins with.
    in_entry: runs once a step; False inside of a loop or branch.
    """

    kind: str
    bytes: int
    in_entry: bool


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Every collective of a compiled program (``compiled.as_text()``) over all of so many devices, in its order."""
    found, entry = [], hlo.find("\nENTRY ")
    for match in _COLLECTIVE.finditer(hlo):
        arrays = [
            ITEM_BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in _ARRAY.findall(match["shapes"])
        ]
        if match["start"] and match["kind"] == "all-gather":
            arrays = arrays[len(arrays) // 2 :]  # the operands come first
        size = sum(arrays) * (devices if match["kind"] == "reduce-scatter" else 1)
        found.append(Collective(match["kind"], size, match.start() > entry >= 0))
    return found


def fused_attention_calls(hlo: str) -> Counter[str]:
    """Call target -> number of calls of cuDNN's flash attention in a compiled program."""
    return Counter(re.findall(rf'custom_call_target="({FUSED_ATTENTION})"', hlo))


def require_fused_attention(hlo: str) -> Counter[str]:
    """The calls of a training step that was compiled for a GPU.

    Raises:
      MissingKernel: the forward or the backward pass has none: the step would run, several times slower.
    """
    calls = fused_attention_calls(hlo)
    for part, is_there in (
        ("forward", any("Backward" not in name for name in calls)),
        ("backward", any("Backward" in name for name in calls)),
    ):
        if not is_there:
            raise MissingKernel(
                f"no call of cuDNN's flash attention (__cudnn$fmha...) in the {part} pass; it takes a GPU of Ampere or "
                f"later (for packed rows, Hopper), config.model.dtype=bfloat16 and config.model.attention=auto; "
                f"config.model.attention=xla trains without it, several times slower"
            )
    return calls
