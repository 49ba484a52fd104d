"""Reads the HLO of a compiled step: the bytes it moves between devices, and whether attention is fused."""

import functools
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
_COMPUTATION = re.compile(
    r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) [^\n]*\{\n(?P<body>.*?)^\}", re.MULTILINE | re.DOTALL
)
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
    r"(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class MissingKernel(RuntimeError):
    """A program for a GPU computes attention without the fused kernel."""


class Collective(NamedTuple):
    """Attributes:
    kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "collective-permute".
    bytes: size of the whole arrays: the result of a gather, the operand of a scatter or a reduction.
    times: how often it runs in a step. A loop multiplies by its trip count, and a branch counts as always taken. None
      inside a loop whose trip count the compiler does not know.
    """

    kind: str
    bytes: int
    times: int | None


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program (``compiled.as_text()``) over all ``devices``, in program order."""
    found = []
    for computation, times in _computations(hlo):
        for match in _COLLECTIVE.finditer(computation):
            arrays = [
                ITEM_BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
                for dtype, dims in _ARRAY.findall(match["shapes"])
            ]
            if match["start"] and match["kind"] == "all-gather":
                arrays = arrays[len(arrays) // 2 :]  # the operands come first
            size = sum(arrays) * (devices if match["kind"] == "reduce-scatter" else 1)
            found.append(Collective(match["kind"], size, times))
    return found


def _computations(hlo: str) -> list[tuple[str, int | None]]:
    """The text of every computation, and how many times it runs when the program runs once."""
    bodies = {match["name"]: match["body"] for match in _COMPUTATION.finditer(hlo)}
    entry = next(match["name"] for match in _COMPUTATION.finditer(hlo) if match["entry"])
    callers: dict[str, list[tuple[str, int | None]]] = {}
    for caller, body in bodies.items():
        for line in body.splitlines():
            is_loop, trips = " while(" in line, _TRIPS.search(line)
            times = (int(trips[1]) if trips else None) if is_loop else 1
            for match in _CALLED.finditer(line):
                for name in (match["one"] or match["several"]).replace("%", "").split(", "):
                    callers.setdefault(name, []).append((caller, times))

    @functools.cache
    def runs(name: str) -> int | None:
        if name == entry:
            return 1
        total = 0
        for caller, times in callers.get(name, []):
            of_caller = runs(caller)
            if of_caller is None or times is None:
                return None
            total += of_caller * times
        return total

    return [(body, runs(name)) for name, body in bodies.items()]


def fused_attention_calls(hlo: str) -> Counter[str]:
    """Call target -> number of calls of cuDNN's flash attention in a compiled program."""
    return Counter(re.findall(rf'custom_call_target="({FUSED_ATTENTION})"', hlo))


def require_fused_attention(hlo: str) -> Counter[str]:
    """The calls of cuDNN's flash attention in a training step that was compiled for a GPU.

    Raises:
      MissingKernel: the forward or the backward pass has none. The step would run, but several times slower.
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
