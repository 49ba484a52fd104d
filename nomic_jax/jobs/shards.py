"""Shards of a job array: each process makes a fixed share of the blocks, and one more, the merge, writes the output.

    --shard=1/3, --shard=2/3, --shard=3/3    the shares, at any time and on any machine
    --shard=merge                            afterwards

The shards may share the folder of the output, or have one each, whose contents are then copied into one. A shard
leaves a record of what its blocks were made with. The merge makes no block: it compares the records and names what is
missing; only if nothing is does the command write its output.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nomic_jax.jobs.tasks import Engine, Task, local_engine, missing_blocks

MERGE = "merge"
_SHOWN = 3


class Shard(NamedTuple):
    """The share ``number`` of ``total``, from 1."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class ShardEnded(Exception):
    """A shard has made its share, and the output has to be merged; the message is for the user."""


class Incomplete(ValueError):
    """A merge found blocks missing, or made with other settings; the message says which."""


def parse_shard(text: str) -> Shard:
    """Returns the shard that "2/3" stands for. Raises ValueError if it is none."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard={text} is no shard; write 1/3, 2/3 and 3/3 for three of them, then {MERGE}")
    return Shard(int(found[1]), int(found[2]))


class _Share(Task):
    """The blocks of a task that a shard makes."""

    def __init__(self, task: Task, blocks: list[int]):
        self.task, self.blocks = task, blocks
        self.label, self.progress, self.unit, self.is_shared = task.label, task.progress, task.unit, task.is_shared

    def __len__(self) -> int:
        return len(self.blocks)

    def file(self, block: int) -> Path:
        return self.task.file(self.blocks[block])

    def write(self, block: int, worker: Any, advance: Callable[[int], Any]) -> None:
        self.task.write(self.blocks[block], worker, advance)

    def made(self) -> set[int]:
        made = self.task.made()
        return {number for number, block in enumerate(self.blocks) if block in made}

    @property
    def records(self) -> Path:
        return self.task.records

    def settings(self) -> Mapping[str, Any]:
        return self.task.settings()

    def size(self, block: int) -> int:
        return self.task.size(self.blocks[block])

    def tidy(self, block: int) -> None:
        self.task.tidy(self.blocks[block])


def blocks_of(shard: Shard, task: Task) -> list[int]:
    """Returns the blocks of a shard: every ``total``-th. Where they begin depends on the settings of the task, so that
    the only blocks of many small tasks are not all those of shard 1.
    """
    begin = (shard.number - 1 - zlib.crc32(_canonical(task).encode())) % shard.total
    return list(range(begin, len(task), shard.total))


def shard_engine(shard: Shard, engine: Engine = local_engine) -> Engine:
    """Returns the ``Engine`` that makes the blocks of a shard by another engine, and then ends the command.

    With ``wait`` it raises ShardEnded, unless the task is for another one (``Task.is_last``) and all its blocks are
    there, those of the other shards too.
    """

    def run(task: Task, worker: Any, wait: bool = True) -> None:
        blocks = blocks_of(shard, task)
        engine(_Share(task, blocks), worker, wait)
        record = {"label": task.label, "shard": str(shard), "settings": dict(task.settings()), "blocks": blocks}
        task.write_record(f"{_slug(task)}-{shard.number}-of-{shard.total}.json", record)
        if wait and (task.is_last or missing_blocks(task)):
            then = f"run --shard={MERGE}" if task.is_last else f"run the shards again for what follows {task.label!r}"
            raise ShardEnded(f"shard {shard} has made its blocks; when all {shard.total} have, {then}")

    return run


def merge_engine() -> Engine:
    """Returns the ``Engine`` that makes nothing, and raises Incomplete if blocks of any task so far are missing."""
    found: dict[Path, str] = {}  # of each task: what is wrong with it

    def run(task: Task, worker: Any, wait: bool = True) -> None:
        key = task.records / task.label
        if problem := _problem(task):
            found[key] = problem
        else:
            found.pop(key, None)
        if wait and found:
            more = f"; and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
            raise Incomplete(f"nothing was merged: {'; '.join([*found.values()][:_SHOWN])}{more}")

    return run


def _problem(task: Task) -> str:
    """Returns what a merge of the task lacks; "" if it is complete."""
    settings, shards = json.loads(_canonical(task))[1], []
    for file, record in task.read_records(f"{_slug(task)}-"):
        try:
            shard, made_with = parse_shard(record["shard"]), dict(record["settings"])
        except (TypeError, KeyError, ValueError) as error:
            return f"{file} is no record of a shard ({error}); delete it and run its shard again"
        shards.append(shard)
        if changes := _changes(made_with, settings):
            again = f"run it again, or delete {file} if it is an older one"
            return f"{task.label}: shard {shard} was made with other settings ({changes}); {again}"
    missing = missing_blocks(task)
    if not missing:
        return ""
    what = f"{task.label} ({task.records.parent}): {len(missing):,} of {len(task):,} blocks are missing"
    what += f" ({_listed(missing)})"
    for count in sorted({shard.total for shard in shards}):
        of_shards = [Shard(number, count) for number in range(1, count + 1)]
        late = [str(shard) for shard in of_shards if set(missing) & set(blocks_of(shard, task))]
        what += f"; run --shard={_listed(late)}"
    return what if shards else f"{what}; no shard has ended"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    more = f"; and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    shown = [f"{name} was {_value(before, name)}, is {_value(now, name)}" for name in names[:_SHOWN]]
    return "; ".join(shown) + more


def _value(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name])[:200] if name in settings else "absent"


def _listed(values: Iterable[Any]) -> str:
    values = [str(value) for value in values]
    return ", ".join(values[:10]) + (f" and {len(values) - 10:,} more" if len(values) > 10 else "")


def _canonical(task: Task) -> str:
    return json.dumps([task.label, task.settings()], sort_keys=True)


def _slug(task: Task) -> str:
    return re.sub("[^a-z0-9]+", "-", task.label.lower())
