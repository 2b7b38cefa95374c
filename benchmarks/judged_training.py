"""What the cells of ``benchmarks/judged.py`` share: training, measuring, choosing on a dev set."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch

from benchmarks.judged_sets import (
    SCIFACT,
    Answers,
    Cell,
    Found,
    Job,
    Place,
    opened,
    split_answers,
)
from tercet.data.files.sources import Source, write_examples
from tercet.files.atomic import replacing_file
from tercet.models.embedder import Embedder
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Run
from tercet.types import Example

LIMITS: Final[dict[str, Any]] = {"query_tokens": 64, "document_tokens": 256}  # of every model
RUN: Final = Run(
    device="cpu", dtype="bfloat16", memory_gb=3.0, save_minutes=3.0, show_progress=False
)
BASES: Final = {name: name for name in ("minilm", "me5-small", "smollm2")}  # what is loaded


def load(model: str | Path, **changes: Any) -> Embedder:
    """A model in the precision in which all are measured, cut to the same lengths."""
    source = BASES.get(str(model), model)
    return Embedder.load(source, dtype=torch.bfloat16, **{**LIMITS, **changes})


def measured(place: Place, embedder: Embedder, names: Iterable[str], **facts: Any) -> Found:
    """What a model answers to these sets, with facts and the CPU minutes that each set took."""
    answers: Answers = {}
    minutes: dict[str, float] = {}
    for name in names:
        print(f"measuring {name}", flush=True)
        evaluation = opened(place, name)
        begin = time.process_time()
        found = evaluation.measure(embedder)
        minutes[name] = round((time.process_time() - begin) / 60, 2)
        answers |= split_answers(found) if name == SCIFACT else {name: found}
    return Found(answers, {**facts, "measuring_minutes": minutes})


def untouched(job: Job, *, model: str, sets: Sequence[str], **changes: Any) -> Found:
    """Measure a model before any training."""
    return measured(job.place, load(model, **changes), sets)


def baselines(job: Job, *, sets: Sequence[str]) -> Found:
    """Measure what needs no model: BM25, the overlap of words, the usual label of a word."""
    answers: Answers = {}
    for name in sets:
        found = opened(job.place, name).words()
        answers |= split_answers(found) if name == SCIFACT else {name: found}
    return Found(answers)


def trained(
    job: Job, recipe: Recipe, data: Mapping[str, Sequence[Source]], dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Train, and return what was spent; goes on after a kill."""
    run = replace(RUN, dtype=cast("Any", dtype))
    resumed, begin = job.was_begun, time.process_time()
    train(recipe, data, job.folder, run=run, say=lambda line: print(line, flush=True))
    minutes = round((time.process_time() - begin) / 60, 2)
    return {
        "steps": sum(stage.steps or 0 for stage in recipe.stages),
        "training_minutes": None if resumed else minutes,  # which would be those since the kill
        "training_precision": dtype,
    }


def variants(
    name: str,
    run: Callable[..., Found],
    numbers: Mapping[str, Mapping[str, Any]],
    dev: str,
    **about: Any,
) -> Iterator[Cell]:
    """Cells that differ in some numbers, and one with three seeds of that which is best on dev.

    They are named after it: ``NAME-LABEL``.
    """
    cells = {f"{name}-{label}": given for label, given in numbers.items()}
    for cell, given in cells.items():
        yield Cell(cell, partial(run, **given), **about)
    best = partial(best_variant, run=run, cells=cells, dev=dev)
    yield Cell(name, best, about["minutes"], tuple(cells), seeds=3, is_best_of=True)


def best_variant(
    job: Job, *, run: Callable[..., Found], cells: Mapping[str, Mapping[str, Any]], dev: str
) -> Found:
    """Run the variant that is the best on the dev set; with seed 0 it has been run already."""
    best = job.place.best(cells, dev)
    return run(job, **cells[best]) if job.seed else Found(same_as=best)


def by_rate(*rates: float) -> dict[str, dict[str, float]]:
    """Variants that differ in the learning rate."""
    return {f"rate-{rate:g}": {"rate": rate} for rate in rates}


def written(path: Path, examples: Callable[[], Iterable[Example]]) -> Path:
    """A file of examples, which is written if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_examples(path, examples())
    return path


def written_records(path: Path, records: Callable[[], Iterable[Mapping[str, Any]]]) -> Path:
    """A file of records, which is written if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records())
        with replacing_file(path) as fresh:
            fresh.write_text("".join(lines), encoding="utf-8")
    return path


def written_texts(path: Path, texts: Callable[[], Iterable[str]]) -> Path:
    """A file of plain texts, which is written if it is missing."""
    return written_records(path, lambda: ({"text": text} for text in texts()))
