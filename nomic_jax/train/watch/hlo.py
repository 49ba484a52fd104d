"""Reads the HLO of a compiled step: its instructions, the bytes it moves between devices, and the fused attention."""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

# Call targets of jax._src.cudnn.fused_attention_stablehlo: __cudnn$fmhaSoftmax, __cudnn$fmhaSoftmaxBackward, ...
FUSED_ATTENTION = r"__cudnn\$fmha\w*"
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_ARRAY = re.compile(rf"\b({'|'.join(ITEM_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<op>[\w-]+)\((?P<rest>.*)")
_CALLED = re.compile(
    r"\b(?P<role>body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
    r"(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class MissingKernel(RuntimeError):
    """A program for a GPU computes attention without the fused kernel."""


class Instruction(NamedTuple):
    """A line of HLO.

    Attributes:
      shape: of the result, as in the text: "f32[2,8]{1,0}", or several in brackets.
      operands: names of instructions of the same computation.
      rest: the line after the opening bracket of the operands.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        """Role ("body", "calls", ...) -> names of the computations that it calls."""
        found: dict[str, list[str]] = {}
        for match in _CALLED.finditer(self.rest):
            names = (match["one"] or match["several"]).replace("%", "").split(", ")
            found.setdefault(match["role"], []).extend(names)
        return found

    @property
    def trips(self) -> int | None:
        """How often a loop turns; None if the compiler does not know."""
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else None


class Program(NamedTuple):
    """Attributes: computations: name -> instructions in the order of the text; entry: name of the first to run."""

    computations: dict[str, list[Instruction]]
    entry: str


class Collective(NamedTuple):
    """Attributes:
    kind: one of COLLECTIVES.
    bytes: size of the whole arrays: the result of a gather, the operand of a scatter or a reduction.
    times: how often it runs in a step. A loop multiplies by its trip count, and a branch counts as always taken. None
      inside a loop whose trip count the compiler does not know.
    """

    kind: str
    bytes: int
    times: int | None


def read_program(hlo: str) -> Program:
    """Reads ``compiled.as_text()``."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current = computations[head["name"]] = []
                entry = head["name"] if head["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.-]+)", re.split(r"\)(?:,|$)", found["rest"], maxsplit=1)[0])
            current.append(
                Instruction(
                    found["name"], found["shape"], found["op"], tuple(operands), found["rest"], bool(found["root"])
                )
            )
    return Program(computations, entry)


def dimensions(shape: str) -> list[list[int]]:
    """The dimensions of each array of a shape."""
    return [[int(size) for size in sizes.split(",") if size] for _, sizes in _ARRAY.findall(shape)]


def array_bytes(shape: str) -> list[int]:
    """The size of each array of a shape."""
    return [ITEM_BYTES[kind] * math.prod(size) for (kind, _), size in zip(_ARRAY.findall(shape), dimensions(shape))]


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program (``compiled.as_text()``) over all ``devices``, in program order."""
    program = read_program(hlo)
    times = _runs(program)
    found = []
    for name, instructions in program.computations.items():
        for each in instructions:
            kind = each.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            arrays = array_bytes(each.shape)
            if each.op != kind and kind in ("all-gather", "reduce-scatter"):
                arrays = arrays[len(arrays) // 2 :]  # the operands come first
            size = sum(arrays) * (devices if kind == "reduce-scatter" else 1)
            found.append(Collective(kind, size, times[name]))
    return found


def _runs(program: Program) -> dict[str, int | None]:
    """How many times each computation runs when the program runs once."""
    callers: dict[str, list[tuple[str, int | None]]] = {}
    for caller, instructions in program.computations.items():
        for each in instructions:
            for names in each.called.values():
                for name in names:
                    callers.setdefault(name, []).append((caller, each.trips if each.op == "while" else 1))

    @functools.cache
    def runs(name: str) -> int | None:
        if name == program.entry:
            return 1
        total = 0
        for caller, times in callers.get(name, []):
            of_caller = runs(caller)
            if of_caller is None or times is None:
                return None
            total += of_caller * times
        return total

    return {name: runs(name) for name in program.computations}


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
