"""Work that threads do before it is needed, such as the next batches while a GPU computes."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

import torch

T = TypeVar("T")

MOST_WORKERS: Final = 4  # chosen by itself; tokenizers use all cores in each call


def done_ahead(
    calls: Iterable[Callable[[], T]], workers: int, *, spare: int = 1
) -> Generator[T, None, None]:
    """Yield the result of each call, in order; ``workers`` threads work on the next ones.

    The calls are drawn here, in order: while a result is in use, ``workers`` others are made and
    ``spare`` more wait. An error is raised when its result is asked for. Closing the iterator
    waits for the calls that have begun and drops the others. Without workers, a call is made when
    asked for.
    """
    if not workers:
        for call in calls:
            yield call()
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, "ahead")
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > workers + spare:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def usual_workers(device: torch.device, processes: int = 1) -> int:
    """Return how many threads should prepare data for a device.

    For a GPU up to four of the cores that are left to each of ``processes``; on a CPU one, if there
    are cores beside those that torch computes with.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = (cores or 1) // processes
    if device.type == "cpu":
        return int(own > torch.get_num_threads())
    return max(1, min(MOST_WORKERS, own - 1))
