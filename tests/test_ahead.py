import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from tercet.ahead import done_ahead, usual_workers


def threads_ahead() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_calls_whichever_ends_first(workers):
    def late(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    calls = (partial(late, number) for number in range(20))
    assert list(done_ahead(calls, workers)) == list(range(20))
    assert not threads_ahead()


def test_calls_are_drawn_in_the_thread_that_asks_and_no_more_than_the_workers_need():
    drawn: list[str] = []
    made: list[str] = []

    def call() -> None:
        made.append(threading.current_thread().name)

    def calls() -> Iterator[Callable[[], None]]:
        for _ in range(10):
            drawn.append(threading.current_thread().name)
            yield call

    results = done_ahead(calls(), 2)
    next(results)
    assert len(drawn) == 4  # the one in use, one for each worker, and one that waits
    next(results)
    assert len(drawn) == 5
    assert len(list(results)) == 8
    assert set(drawn) == {threading.current_thread().name}
    assert len(made) == 10 and all(name.startswith("ahead") for name in made)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_when_its_result_is_asked_for(workers):
    def call(number: int) -> int:
        if number == 2:
            raise ValueError("number 2 is damaged")
        return number

    results = done_ahead((partial(call, number) for number in range(9)), workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="number 2 is damaged"):
        next(results)
    assert not threads_ahead()


def test_closing_waits_for_calls_that_have_begun_and_drops_the_others():
    begun, ended, go = [], [], threading.Event()

    def call(number: int) -> None:
        begun.append(number)
        if number:
            go.wait(10)
        ended.append(number)

    results = done_ahead((partial(call, number) for number in range(9)), 1)
    next(results)
    while len(begun) < 2:
        time.sleep(0.001)
    threading.Timer(0.05, go.set).start()
    results.close()
    assert begun == ended == [0, 1]
    assert not threads_ahead()


@pytest.mark.parametrize(
    ("device", "cores", "threads", "processes", "workers"),
    [
        ("cpu", 2, 2, 1, 0),
        ("cpu", 8, 4, 1, 1),
        ("cpu", 8, 4, 2, 0),
        ("cuda", 1, 1, 1, 1),
        ("cuda", 4, 2, 1, 3),
        ("cuda", 64, 32, 8, 4),
        ("cuda", 16, 8, 8, 1),
    ],
)
def test_the_usual_number_of_workers_leaves_cores_to_torch_and_to_other_processes(
    monkeypatch, device, cores, threads, processes, workers
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert usual_workers(torch.device(device), processes) == workers
