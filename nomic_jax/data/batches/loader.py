"""Batches prepared in background threads while the devices compute."""

from collections.abc import Iterator

from nomic_jax.data.batches.stream import Batch, Stream
from nomic_jax.extras import needs


def read_ahead(
    stream: Stream, start: int, stop: int, shard: int = 0, shard_count: int = 1, threads: int = 2
) -> Iterator[Batch]:
    """Returns the batches of steps start ... stop - 1, prepared in background threads while the devices compute."""
    with needs("training", "nomic_jax[train]"):
        import grain

    steps = grain.MapDataset.range(start, stop).map(lambda step: stream.batch(int(step), shard, shard_count))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(steps.to_iter_dataset(options))
