"""Data and commands for studies of toy models."""

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli import main
from tercet.data.files.sources import write_examples
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import EvaluationSet, as_evaluation_set
from tercet.files.artifacts import KeptResults
from tercet.training.recipe import Run
from tercet.types import Example
from tests.toy import SENTENCES

STUDIES = Path(__file__).parents[2] / "examples/studies"
QUIET = Run(device="cpu", show_progress=False)


def run(file: Path, out: Path, *words: Any, status: int = 0, **numbers: Any) -> str:
    """Run ``tercet study`` in this process, and return what it prints to both streams."""
    flags = [f"--{name.replace('_', '-')}={number}" for name, number in numbers.items()]
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as end:
        main(["study", str(file), "--out", str(out), *map(str, words), *flags])
    assert (end.value.code or 0) == status, printed.getvalue()
    return printed.getvalue()


def kept(out: Path, cell: str, name: str, *, seed: int = 0, stage: int = 0) -> np.ndarray:
    """Return the answers of a cell to a set, after a stage."""
    found = KeptResults(out / "cells" / cell).find(seed)
    assert found is not None
    return found[1][f"{stage}/{name}"]


def rows(lang: str = "", count: int = 12) -> list[Example]:
    """Return examples with one negative each."""
    return [
        Example(f"{text.split()[-1]} {i}", (text,), (SENTENCES[(i + 3) % 12],), lang=lang)
        for i, text in enumerate(SENTENCES[:count])
    ]


def bare(examples: Sequence[Example]) -> list[Example]:
    """Return the examples without negatives."""
    return [Example(each.query, each.positives, lang=each.lang) for each in examples]


def write_sets(folder: Path, langs: Sequence[str]) -> None:
    """Write training files and an evaluation set of each language."""
    for number, lang in enumerate(langs):
        examples = rows(lang, 12 - number)
        write_examples(folder / f"{lang}.jsonl", bare(examples))
        write_examples(folder / f"mined-{lang}.jsonl", examples)
        write_examples(folder / f"sets/{lang}.jsonl", examples[number : number + 9])


def made_set(name: str, category: Any = "Retrieval") -> EvaluationSet:
    """Return a set whose answers are a number for each of four queries, by words 0.1 to 0.4."""
    data = RetrievalSet.from_examples(rows(count=4), name)
    return replace(
        as_evaluation_set(data, ()),
        category=category,
        words=lambda: np.array([0.1, 0.2, 0.3, 0.4]),
    )
