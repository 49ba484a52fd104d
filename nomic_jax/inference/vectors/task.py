"""The task of ``launch.embed``: blocks of rows become parts, in this process, on a Ray cluster, or as shards."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nomic_jax.inference.vectors.blocks import Block
from nomic_jax.inference.vectors.parts import PartSettings, PartWriter
from nomic_jax.jobs.tasks import Task


class PartsTask(Task):
    """Embeds blocks. Processes that share the work have different blocks, so that the folder may be a remote store.

    Args:
      plan: the settings and inputs that the parts depend on.
    """

    label, progress, unit, is_shared = "embedding", True, " texts", False

    def __init__(self, settings: PartSettings, blocks: Sequence[Block], plan: Mapping[str, Any]):
        self.parts, self.blocks, self.plan = settings, blocks, plan

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "writer"}

    @functools.cached_property
    def writer(self) -> PartWriter:
        """Opens the model, once in each process."""
        from nomic_jax.inference.compilation_cache import use_compilation_cache

        use_compilation_cache()
        return PartWriter(self.parts)

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, block: int) -> str:
        return self.parts.part(self.blocks[block].number)

    def file(self, block: int) -> Path:
        return Path(self.parts.folder.path(self.name(block)))

    def made(self) -> set[int]:
        names = self.parts.folder.names()
        return {block for block in range(len(self)) if self.name(block) in names}

    def size(self, block: int) -> int:
        return sum(segment.stop - segment.start for segment in self.blocks[block].segments)

    def write(self, block: int, worker: Any, advance: Callable[[int], Any]) -> None:
        self.writer.write(self.blocks[block], advance)

    def settings(self) -> Mapping[str, Any]:
        return self.plan

    @property
    def records(self) -> Path:
        return Path(self.parts.folder.place)

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        self.parts.folder.write_json(f"shard-{name}", record)

    def read_records(self, prefix: str) -> Iterator[tuple[str, Any]]:
        folder = self.parts.folder
        for name in sorted(folder.names()):
            if name.startswith(f"shard-{prefix}"):
                yield folder.path(name), folder.read_json(name)
