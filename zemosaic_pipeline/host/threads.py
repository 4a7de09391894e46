"""Work on many threads, how many of them, and Python's collector of cycles."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.settings.settings import Settings

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Objects made, and not freed, between two looks for unreachable cycles.
COLLECT_AFTER = 200_000


def collect_seldom() -> None:
    """Have Python look for unreachable cycles seldom, in a process that is the worker's own.

    Half a million objects come with the imports and stay; to look through them again and again took a tenth of a short
    run.
    """
    gc.set_threshold(COLLECT_AFTER)


def run_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, cancelled: Callable[[], bool] = lambda: False
) -> list[Result]:
    """``[work(item) for item in items]`` on ``jobs`` threads; the first error ends it.

    Raises
    ------
    Cancelled
        ``cancelled()`` said so, which is asked several times a second.
    """
    stop = threading.Event()

    def one(item: Item) -> Result:
        if stop.is_set():
            raise Cancelled
        return work(item)

    with ThreadPoolExecutor(max(jobs, 1), thread_name_prefix="work") as pool:
        futures = [pool.submit(one, item) for item in items]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                if cancelled():
                    raise Cancelled
        finally:
            stop.set()
    return [future.result() for future in futures]


def worker_count(settings: Settings) -> int:
    """Threads for the work on pixels."""
    if settings.num_processing_workers > 0:
        return settings.num_processing_workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
