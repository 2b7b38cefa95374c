"""Speed of making batches, and whether a device waits for them.

Batches of Debian package descriptions, with the tokenizer of XLM-RoBERTa. First the batches alone,
as the training loop makes them, with 0, 1 and 2 threads, tokenized each time or read from the token
cache. Then with a device that is simulated: a step sleeps, without holding Python's lock, as long
as BGE-M3's shape is computed to take on an H200. The share of the time in which this device waits
is measured here, and computed for 4 and 16 cores from processor seconds. Last, how many small
operations a main thread launches meanwhile, since Python runs one thread at a time.

Run: python -m benchmarks.input_speed
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import pyarrow.parquet as pq
import torch

from benchmarks.common import Row, write_results
from tercet.ahead import done_ahead
from tercet.data.batches.collate import Batch, Collator
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.models.embedder import Embedder
from tercet.recipes.finetune import finetune
from tercet.training.batches import collator_of, with_cached_tokens
from tercet.types import Example

DATA: Final = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
PAIRS: Final = 1_024  # of a batch
STEPS: Final = 6  # of a run, after one that is not counted
REPEATS: Final = 3
WORKERS: Final = (0, 1, 2)
DEVICE: Final = 210_000  # tokens a second of BGE-M3's shape in training on an H200: computed
MODEL: Final = "me5-small"  # XLM-RoBERTa's tokenizer, as BGE-M3's
SECONDS: Final = 0.5  # of launching small operations


def batches(source: Source, collate: Collator) -> Iterator[Callable[[], Batch]]:
    """The batches of a training, to be made in any thread."""
    sampler = Sampler([source], BatchPlan(batch_size=PAIRS, seed=0, epochs=100))
    step = 0
    while (rows := sampler.next_batch()) is not None:
        yield partial(lambda rows, step: collate(rows.examples([source]), [0, step]), rows, step)
        step += 1


def made(source: Source, collate: Collator, workers: int) -> float:
    """Tokens a second of the batches alone."""
    with closing(done_ahead(batches(source, collate), workers)) as drawn:
        next(drawn)
        begin = time.perf_counter()
        tokens = sum(len(next(drawn).texts.ids) for _ in range(STEPS))
        return tokens / (time.perf_counter() - begin)


def waited(source: Source, collate: Collator, workers: int) -> float:
    """Share of the time in which the device waits for a batch."""
    waits = 0.0
    with closing(done_ahead(batches(source, collate), workers)) as drawn:
        batch, start = next(drawn), time.perf_counter()
        for _ in range(STEPS):
            time.sleep(len(batch.texts.ids) / DEVICE)
            begin = time.perf_counter()
            batch = next(drawn)
            waits += time.perf_counter() - begin
        return waits / (time.perf_counter() - start)


def launched(source: Source, collate: Collator, workers: int) -> float:
    """Small operations a second of a main thread, while threads make batches all the time."""
    x, count = torch.zeros(8), 0
    calls = islice(batches(source, collate), 100)  # more than the threads make in the time
    with closing(done_ahead(calls, workers, spare=98)) as drawn:
        next(drawn)
        begin = time.perf_counter()
        while time.perf_counter() < begin + SECONDS:
            for _ in range(20):
                x.add_(1)
            count += 20
        return count / (time.perf_counter() - begin)


def costs(source: Source, collate: Collator) -> tuple[float, float]:
    """Processor seconds a token: of the thread that asks, and of the tokenizer's other threads.

    The first are those in which Python runs, which one thread does at a time.
    """
    with closing(done_ahead(batches(source, collate), 0)) as drawn:
        next(drawn)
        every, own = time.process_time(), time.thread_time()
        tokens = sum(len(next(drawn).texts.ids) for _ in range(STEPS))
        own = time.thread_time() - own
        return own / tokens, (time.process_time() - every - own) / tokens


def computed(own: float, others: float, cores: int, workers: int) -> float:
    """Share of the time that a device waits, if nothing but these costs holds the threads up."""
    if not workers:
        each = own + others / cores  # before each step
        return each / (each + 1 / DEVICE)
    made_in = max(own, (own + others) / cores)  # Python runs one thread at a time
    if workers == 1:
        made_in = max(made_in, own + others / cores)
    return max(0.0, 1 - 1 / DEVICE / made_in)


def main() -> None:
    """Measure all in turn, and write the medians."""
    torch.set_num_threads(1)
    embedder, stage = Embedder.load(MODEL), finetune(model=MODEL, batch_size=PAIRS).stages[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TERCET_CACHE"] = folder  # of the tokens
        table = pq.read_table(DATA, columns=["short", "long", "split"]).to_pylist()
        pairs = (Example(r["short"], (r["long"],)) for r in table if r["split"] == "train")
        write_examples(Path(folder) / "pairs.jsonl", pairs)
        source = open_source(Path(folder) / "pairs.jsonl")
        fresh = collator_of(embedder, stage, lambda role, task: "")
        collators = {
            "tokenized": fresh,
            "cached": with_cached_tokens(fresh, embedder, stage, [source]),
        }
        rows: list[Row] = []
        for name, collate in collators.items():
            measured: dict[tuple[str, int], list[float]] = {}
            spent = [costs(source, collate) for _ in range(REPEATS)]
            for _ in range(REPEATS):
                for workers in WORKERS:
                    for what, measure in (
                        ("made", made),
                        ("waited", waited),
                        ("launched", launched),
                    ):
                        found = measure(source, collate, workers)
                        measured.setdefault((what, workers), []).append(found)
            own, others = (statistics.median(of) for of in zip(*spent, strict=True))
            for workers in WORKERS:
                made_, waited_, launched_ = (
                    measured[what, workers] for what in ("made", "waited", "launched")
                )
                rows.append(
                    {
                        "name": f"{name}, {workers} workers",
                        "tokens_per_second": statistics.median(made_),
                        "device_waits": statistics.median(waited_),
                        "device_waits_each": waited_,
                        "launches_per_second": statistics.median(launched_),
                        "python_seconds_per_million_tokens": own * 1e6,
                        "other_seconds_per_million_tokens": others * 1e6,
                        **{
                            f"device_waits_computed_{cores}_cores": computed(
                                own, others, cores, workers
                            )
                            for cores in (4, 16)
                        },
                        "device_tokens_per_second_computed": DEVICE,
                        "target": "device_waits < 0.05" if workers == 2 else None,
                    }
                )
    write_results("input_speed", rows, "tokenizers")


if __name__ == "__main__":
    main()
