"""Timing by the host's clock: a timed call must return its result to the host before it ends."""

import statistics
import time
from collections.abc import Callable
from typing import Any

MOST_CALLS = 20


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns (seconds, result of the call)."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def median_seconds(call: Callable[[], Any], at_least: int = 3, seconds: float = 3.0) -> float:
    """Median of ``at_least`` calls, and of up to 20 while all calls together take less than ``seconds``."""
    times: list[float] = []
    while len(times) < at_least or (sum(times) < seconds and len(times) < MOST_CALLS):
        times.append(timed(call)[0])
    return statistics.median(times)
