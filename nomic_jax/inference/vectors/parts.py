"""The parts of an output of ``launch.embed``: a block of rows becomes a file of vectors and kept columns."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nomic_jax.data.formats.parquet import open_parquet
from nomic_jax.inference.vectors.blocks import Block, BlockRows
from nomic_jax.inference.vectors.kept_columns import kept_table
from nomic_jax.inference.vectors.made_with import VECTORS, with_record
from nomic_jax.inference.vectors.reused import ReusedVectors
from nomic_jax.inference.vectors.storage import Folder
from nomic_jax.inference.vectors.stored_types import ranges_of, to_stored

if TYPE_CHECKING:  # imported where used: a .npy of jsonl needs none
    import pyarrow as pa

    from nomic_jax.inference.embedder import Embedder

# The number of batches whose texts are passed to `encode` in one call, which sorts them by length. With batches of 64
# web texts, `encode` then computes 1.35 tokens per real token. With 8 batches per call it computes 2.5, with a whole
# block 1.2, but the progress bar is updated only once per call.
BATCHES_PER_CALL = 64
# Rows of a row group: one is read to show the text of a search result.
GROUP_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class PartSettings:
    """What the parts of an output have in common. It can be pickled, for processes that embed some of the blocks.

    Attributes:
      folder: where the parts are written, on this machine or in a remote store.
      suffix: ".npy" or ".parquet".
      model: a checkpoint directory, or a name on the hub.
      dtype, max_length: as the embedder that made the plan resolved them, so that all processes do the same.
      schema: of `row` and the kept columns; None for .npy.
      record: what the vectors are made with, which every part keeps; for int8 with the ranges.
      reuse: an earlier output, whose vectors of equal texts are kept.
    """

    folder: Folder
    suffix: str
    model: str | Path
    dtype: str
    max_length: int
    text_column: str
    keep: tuple[str, ...]
    schema: "pa.Schema | None"
    on_bad_row: str
    prompt_name: str | None
    prompt: str | None
    batch_size: int
    truncate_dim: int | None
    normalize: bool
    output_dtype: str
    record: dict[str, Any]
    reuse: Path | None = None

    def part(self, number: int) -> str:
        """Returns the name of a part in the folder. Parts appear there when they are complete."""
        return f"part-{number:05d}{self.suffix}"


class PartWriter:
    """Embeds blocks, one at a time, with one open model. What is written depends on the settings and the block only.

    Args:
      embedder: the open model; None to open that of the settings.

    Attributes:
      reused: how many vectors were taken from the earlier output.
    """

    def __init__(self, settings: PartSettings, embedder: "Embedder | None" = None):
        if embedder is None:
            from nomic_jax.inference.embedder import Embedder

            embedder = Embedder.from_pretrained(settings.model, dtype=settings.dtype, max_length=settings.max_length)
        self.settings = settings
        self._rows = BlockRows(settings.text_column, settings.keep, settings.on_bad_row)
        self._encode: Callable[[list[str]], np.ndarray] = functools.partial(
            embedder.encode,
            prompt_name=settings.prompt_name,
            prompt=settings.prompt,
            batch_size=settings.batch_size,
            show_progress_bar=False,
            normalize_embeddings=settings.normalize,
            truncate_dim=settings.truncate_dim,
        )
        self._known: ReusedVectors | None = None
        if settings.reuse is not None:
            self._known = ReusedVectors(settings.reuse, settings.record, settings.text_column)
            self._encode = functools.partial(self._known.encode, compute=self._encode)

    @property
    def reused(self) -> int:
        return self._known.reused if self._known else 0

    def write(self, block: Block, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Writes the part of a block. ``advance`` is called with the number of further texts that are embedded.

        Raises:
          BadRow: the input has changed since it was surveyed.
          ValueError: the model gives a vector that is not finite.
        """
        settings = self.settings
        rows = self._rows.read(block)
        table = None
        if settings.schema is not None:
            # Built before embedding, so that values that parquet cannot hold fail early.
            types = dict(zip(settings.schema.names, settings.schema.types))
            table = kept_table(rows, settings.keep, types)
        vectors_NE = self.embed([row[settings.text_column] for _, row in rows], advance)
        if len(wrong := np.flatnonzero(~np.isfinite(vectors_NE).all(axis=1))):
            raise ValueError(f"the model gives row {rows[wrong[0]][0]} a vector with NaN or infinite values")
        stored_NE = to_stored(vectors_NE, settings.output_dtype, ranges_of(settings.record))
        with settings.folder.new_file(settings.part(block.number)) as file:
            if table is None:
                with file.open("wb") as f:
                    np.save(f, stored_NE)
            else:
                table = table.append_column(VECTORS, _lists(stored_NE))
                write_parquet(file, with_record(table.schema, settings.record), [table])

    def sample(self, blocks: Sequence[Block]) -> np.ndarray:
        """Returns the vectors of all texts of some blocks, float32 [N, E]."""
        rows = [row for block in blocks for _, row in self._rows.read(block)]
        with tqdm(desc="embedding a sample", unit=" texts", total=len(rows)) as bar:
            return self.embed([row[self.settings.text_column] for row in rows], bar.update)

    def embed(self, texts: list[str], advance: Callable[[int], Any]) -> np.ndarray:
        """Returns the vectors of texts, float32 [N, E]."""
        if not texts:  # all rows of the block are bad: the part still says how long a vector is
            return self._encode([""])[:0]
        vectors = []
        at_once = BATCHES_PER_CALL * self.settings.batch_size
        for start in range(0, len(texts), at_once):
            vectors.append(self._encode(texts[start : start + at_once]))
            advance(len(vectors[-1]))
        return np.concatenate(vectors)


def _lists(stored_NE: np.ndarray) -> "pa.Array":
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(stored_NE.reshape(-1)), stored_NE.shape[1])


def write_parquet(path: Path, schema: "pa.Schema", tables: "Iterable[pa.Table]") -> None:
    """Writes tables with the numbers in vectors, which rarely repeat, without a dictionary."""
    import pyarrow.parquet as pq

    names = [name for name in schema.names if name != VECTORS]
    with pq.ParquetWriter(path, schema, use_dictionary=names) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=GROUP_ROWS)


def shape(file: str) -> tuple[int, int]:
    """Returns the rows and dimensions of a part or of an output, from its header. ``file`` is a path or URL."""
    if file.endswith(".npy"):
        return np.load(file, mmap_mode="r").shape
    with open_parquet(file) as parquet:
        return parquet.metadata.num_rows, parquet.schema_arrow.field(VECTORS).type.list_size
