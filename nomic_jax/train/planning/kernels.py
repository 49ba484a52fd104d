"""The kernels of a compiled step for GPUs: what each reads, writes and computes, and the least time that takes.

Bytes are the operands and results of a kernel; of what it slices, gathers, updates or scatters, only the part that it
touches. FLOPs are those of matrix products and of attention. A loop counts as often as it turns.

A kernel takes the longer of its bytes and its FLOPs at the rates of the device, and a launch. Collectives are charged
as if nothing else ran beside them. Not charged: contention of scatters whose indices repeat, products of shapes that
no algorithm fits well, and waiting for the host.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from nomic_jax.train.watch.hlo import COLLECTIVES, Instruction, Program, array_bytes, dimensions

KINDS = ("products", "attention", "elementwise", "copies", "collectives")
# They take no time, or another line stands for them.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
VIEWS = ("bitcast", "copy", "reshape", "transpose", "convert")
ATTENTION_BLOCK = 128  # queries of a block of cuDNN's attention


class UnknownTurns(ValueError):
    """A program does not say how often a loop turns, and nobody else does."""


class Rates(NamedTuple):
    """What a device was seen to reach.

    Attributes:
      bytes: of its memory, per second.
      copied_bytes: the same of copies between two places in its memory, such as what a loop keeps for each turn.
      flops, attention_flops: of products and of attention in 16 bits, per second.
      link_bytes: to other devices, in each direction, per second.
      launch: seconds between two kernels.
      forward_block, backward_block: seconds of a block of packed attention that has nothing to compute. A kernel has
        blocks for all texts that its rows may hold, each as long as the row.
    """

    bytes: float
    copied_bytes: float
    flops: float
    attention_flops: float
    link_bytes: float
    launch: float
    forward_block: float
    backward_block: float


class Loops(NamedTuple):
    """What a program depends on and does not say.

    Attributes:
      turns: part of a loop's name -> its turns, where the compiler does not know them.
      shares: of the chunks that have the first, the second, ... shape: how often each branch of a conditional runs.
        Without them, and in conditionals with another number of branches, the dearest branch counts.
      pairs_per_token: squared lengths of the texts over all computed tokens, padding included. With 0, attention of
        packed rows is charged no products, and that of other rows those of one text as long as the row.
    """

    turns: Mapping[str, float] = {}
    shares: tuple[float, ...] = ()
    pairs_per_token: float = 0.0


class Kernel(NamedTuple):
    """A line of the program that is launched. Bytes, FLOPs and seconds are those of all ``times``.

    Attributes:
      kind: one of KINDS.
      name: the fused computation, or the target of a call.
      source: the jax primitive and its scopes.
    """

    kind: str
    name: str
    shape: str
    source: str
    times: float
    bytes: float
    flops: float
    seconds: float


def kernels_of(program: Program, rates: Rates, loops: Loops, devices: int = 1) -> list[Kernel]:
    """The kernels of one step on one device, in the order of the program.

    Raises:
      UnknownTurns: ``loops`` lacks a loop.
    """
    return list(_Reader(program, rates, loops, devices).walk(program.entry, 1.0))


def totals(kernels: list[Kernel]) -> dict[str, Kernel]:
    """Kind, and "all" -> the sum of its kernels, the longest first."""
    sums: dict[str, Kernel] = {}
    for kernel in kernels:
        for kind in ("all", kernel.kind):
            so_far = sums.get(kind, Kernel(kind, "", "", "", 0.0, 0.0, 0.0, 0.0))
            sums[kind] = so_far._replace(
                times=so_far.times + kernel.times,
                bytes=so_far.bytes + kernel.bytes,
                flops=so_far.flops + kernel.flops,
                seconds=so_far.seconds + kernel.seconds,
            )
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def repeating_scatters(program: Program) -> list[Instruction]:
    """The scatters of floating-point numbers whose indices may repeat.

    They add in an order that changes from run to run, and wait for each other where indices do repeat.
    """
    return [
        each
        for instructions in program.computations.values()
        for each in instructions
        if each.op == "scatter" and "unique_indices=true" not in each.rest and re.match(r"\(?(b?f)\d", each.shape)
    ]


class _Reader:
    def __init__(self, program: Program, rates: Rates, loops: Loops, devices: int):
        self.computations, self.rates, self.loops, self.devices = program.computations, rates, loops, devices

    def walk(self, name: str, times: float) -> list[Kernel]:
        shapes = {each.name: each.shape for each in self.computations[name]}
        kernels: list[Kernel] = []
        for each in self.computations[name]:
            called = each.called
            if each.op in FREE or each.op.endswith(("-done", "-update")):
                continue
            if each.op == "while":
                kernels += self.walk(called["body"][0], times * self._turns(each))
            elif each.op == "conditional":
                kernels += self._branches(each, times)
            elif each.op in ("call", "async-start"):
                kernels += self.walk((called.get("to_apply") or called["calls"])[0], times)
            else:
                kernels.append(self._kernel(each, [shapes.get(operand, "") for operand in each.operands], times))
        return kernels

    def _turns(self, loop: Instruction) -> float:
        if loop.trips is not None:
            return loop.trips
        source = _source(loop)
        for part, turns in self.loops.turns.items():
            if part in source:
                return turns
        raise UnknownTurns(f"the program does not say how often the loop {loop.name} ({source or 'unnamed'}) turns")

    def _branches(self, conditional: Instruction, times: float) -> list[Kernel]:
        called = conditional.called
        names = called.get("branch_computations") or called["true_computation"] + called["false_computation"]
        if len(names) == len(self.loops.shares):
            return [
                kernel
                for name, share in zip(names, self.loops.shares)
                if share
                for kernel in self.walk(name, times * share)
            ]
        branches = [self.walk(name, times) for name in names]
        return max(branches, key=lambda kernels: sum(kernel.seconds for kernel in kernels))

    def _kernel(self, each: Instruction, operands: list[str], times: float) -> Kernel:
        target = re.search(r'custom_call_target="([^"]+)"', each.rest)
        fused = each.called.get("calls", [""])[0] if each.op in ("fusion", "fusion-start") else ""
        name = target[1] if target else fused or each.op
        moved = float(_results(each) + sum(sum(array_bytes(shape)) for shape in operands))
        kind, flops, extra = "elementwise", 0.0, 0.0
        if fused:
            moved, flops = self._inside(fused)
            kind = "copies" if self._only_copies(fused) else kind
        elif "cudnn$fmha" in name:
            kind = "attention"
            flops, extra = self._attention(operands, "Backward" in name)
        elif each.op == "dot" or "cublas" in name:
            flops = _product_flops(each, operands[0])
        elif each.op.removesuffix("-start") in COLLECTIVES:
            kind = "collectives"
            extra = self._link_bytes(each) / self.rates.link_bytes
        if kind == "elementwise":
            kind = "products" if flops else "copies" if "copy" in name else kind
        flops_rate = self.rates.attention_flops if kind == "attention" else self.rates.flops
        bytes_rate = self.rates.copied_bytes if kind == "copies" else self.rates.bytes
        seconds = max(moved / bytes_rate, flops / flops_rate) + extra + self.rates.launch
        return Kernel(kind, name, each.shape, _source(each), times, times * moved, times * flops, times * seconds)

    def _only_copies(self, name: str) -> bool:
        """Whether a fused computation does nothing but place a slice; computing its index does not count."""
        copying = ("parameter", "constant", "tuple", "bitcast", "copy", "dynamic-slice", "dynamic-update-slice")
        body = self.computations[name]
        return any(each.op.startswith("dynamic-") for each in body) and all(
            each.op in copying or not any(dimensions(each.shape)) for each in body
        )

    def _inside(self, name: str) -> tuple[float, float]:
        """The bytes that a fused computation moves, and the FLOPs of its products."""
        body = {each.name: each for each in self.computations[name]}
        sizes = {each.name: sum(array_bytes(each.shape)) for each in body.values()}

        def origin(value: str) -> str:
            while value in body and body[value].op in VIEWS and len(body[value].operands) == 1:
                value = body[value].operands[0]
            return value

        partly: Counter[str] = Counter()  # what is read of an array, or all of it if it is in ``whole``
        whole: set[str] = set()
        flops = 0.0
        for each in body.values():
            if each.op == "parameter" or (each.op in VIEWS and not each.is_root):
                continue
            for position, value in enumerate(each.operands):
                if position == 0 and each.op in ("slice", "dynamic-slice", "gather"):
                    partly[origin(value)] += sizes[each.name]
                elif position == 0 and each.op in ("dynamic-update-slice", "scatter"):
                    partly[origin(value)] += sizes.get(_update(each), 0) if each.op == "scatter" else 0
                else:
                    whole.add(origin(value))
            if each.op == "dot":
                flops += _product_flops(each, body[each.operands[0]].shape)
        root = next(each for each in body.values() if each.is_root)
        written = 0
        for value in root.operands if root.op == "tuple" else (root.name,):
            result = body[origin(value)]
            is_update = result.op in ("dynamic-update-slice", "scatter")
            written += sizes[_update(result)] if is_update else sizes[value]
        read = sum(
            sizes[each.name] if each.name in whole else min(partly[each.name], sizes[each.name])
            for each in body.values()
            if each.op == "parameter"
        )
        return float(read + written), flops

    def _attention(self, operands: list[str], backward: bool) -> tuple[float, float]:
        """FLOPs of cuDNN's attention on [B, L, H, K], and the seconds of its empty blocks."""
        rows, length, heads, width = dimensions(operands[0])[0]
        segments = [dimensions(shape)[0] for shape in operands if shape.startswith("s32")]
        packed = bool(segments) and len(segments[0]) == 2
        pairs = self.loops.pairs_per_token if segments and self.loops.pairs_per_token else 0.0 if packed else length
        flops = (10.0 if backward else 4.0) * rows * length * pairs * heads * width
        if not packed:
            return flops, 0.0
        blocks = rows * segments[0][1] * heads * -(-length // ATTENTION_BLOCK)
        return flops, blocks * (self.rates.backward_block if backward else self.rates.forward_block)

    def _link_bytes(self, each: Instruction) -> float:
        """What each device sends in a ring. A reduction goes round twice."""
        kind, arrays = each.op.removesuffix("-start"), array_bytes(each.shape)
        if kind == "collective-permute":
            return arrays[-1]
        if each.op != kind and kind in ("all-gather", "reduce-scatter"):
            arrays = arrays[len(arrays) // 2 :]
        whole = sum(arrays) * (self.devices if kind == "reduce-scatter" else 1)
        return (2 if kind == "all-reduce" else 1) * whole * (self.devices - 1) / self.devices


def _source(each: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', each.rest)
    return found[1] if found else ""


def _results(each: Instruction) -> int:
    """Bytes of the results, without the scratch memory of a library, which comes last."""
    arrays = array_bytes(each.shape)
    has_scratch = each.op == "custom-call" and len(arrays) > 1 and re.search(r", [su]8\[\d+\]\S*\)$", each.shape)
    return sum(arrays[:-1] if has_scratch else arrays)


def _update(each: Instruction) -> str:
    """The operand with the new values of an update or a scatter of one array."""
    return each.operands[1 if each.op == "dynamic-update-slice" else 2]


def _product_flops(each: Instruction, left: str) -> float:
    contracting = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]+)', each.rest)
    if not contracting or not dimensions(left) or not dimensions(each.shape):
        return 0.0
    flops = 2.0
    for size in dimensions(each.shape)[0]:
        flops *= size
    for axis in re.findall(r"\d+", contracting[1]):
        flops *= dimensions(left)[0][int(axis)]
    return flops
