"""Seconds, of the host's clock: what is timed must end with its result on the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any

MOST_CALLS = 20


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returned)"""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def median_seconds(call: Callable[[], Any], at_least: int = 3, seconds: float = 3.0) -> float:
    """Of so many calls, and of more (20 at most) while they take less than ``seconds`` together."""
    times: list[float] = []
    while len(times) < at_least or (sum(times) < seconds and len(times) < MOST_CALLS):
        times.append(timed(call)[0])
    return statistics.median(times)
