"""Worker processes of this machine, one core each."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nomic_jax.jobs.tasks import WAIT_SECONDS, Engine, Task, make_block, missing_blocks, progress_bar

_worker: Any = None


@contextlib.contextmanager
def worker_processes(load: Callable[[], Any] | None, workers: int) -> Iterator[Executor | None]:
    """Yields a pool of ``workers`` processes, each with what ``load`` returns; None for one, which is this process.

    Raises:
      OSError: a process died.
    """
    if workers == 1:
        yield None
        return
    # Not forked: a fork of a process with threads (tokenizer, jax) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (load,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process died, perhaps for lack of memory; run the same command with fewer --workers to resume"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def process_engine(pool: Executor) -> Engine:
    """Returns the ``Engine`` that makes the blocks in a pool from ``worker_processes``."""

    def run(task: Task, worker: Any, wait: bool = True) -> None:
        pending = missing_blocks(task)
        if not pending:
            return
        with progress_bar(task, pending) as bar:
            while pending:
                waiting = {block: pool.submit(_make, task, block) for block in pending}
                unfinished = []
                try:
                    for block, future in waiting.items():
                        if future.result():
                            bar.update(task.size(block))
                        else:
                            unfinished.append(block)
                except BaseException:
                    for future in waiting.values():
                        future.cancel()
                    raise
                if not wait:
                    return
                if len(unfinished) == len(pending):
                    time.sleep(WAIT_SECONDS)
                pending = unfinished

    return run


def _make(task: Task, block: int) -> bool:
    return make_block(task, block, _worker)


def _start_worker(load: Callable[[], Any] | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the worker without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have their own workers
    _worker = load() if load else None


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
