"""The ablation of Arctic-Embed on a toy: shared pretraining, both widths, every part."""

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli import main
from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.retrieval import measure
from tercet.evaluate.report.intervals import paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.models.embedder import Embedder
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.arctic import FULL, Asked, arctic_cells, cells_by_part, require_bare
from tercet.train.loop import train
from tercet.train.run import Run
from tercet.types import Example
from tests.toy import SENTENCES, save_model

NUMBERS: dict[str, Any] = {
    "steps": 2,
    "batch_size": 5,
    "learning_rate": 1e-3,
    "finetuning_steps": 1,
    "finetuning_batch_size": 4,
    "negatives": 1,
}


def command(folder: Path, *more: str, status: int = 0) -> str:
    words = ["ablate", "arctic-embed", "--base", str(folder / "base"), "--out", str(folder / "out")]
    for lang in ("en", "de"):
        words += ["--data", str(folder / f"{lang}.jsonl")]
        words += ["--mined", str(folder / f"mined-{lang}.jsonl")]
    words += ["--eval", str(folder / "sets"), "--short=16", *more]
    words += [f"--{name.replace('_', '-')}={number}" for name, number in NUMBERS.items()]
    said = StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as end:
        main(words)
    assert (end.value.code or 0) == status, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arctic")
    save_model(folder / "base", "bert")
    for lang, shift in (("en", 0), ("de", 4)):
        rows = [
            Example(f"{text.split()[-1]} {shift}", (text,), (SENTENCES[(i + 3) % 12],), lang=lang)
            for i, text in enumerate(SENTENCES)
        ]
        write_examples(folder / f"mined-{lang}.jsonl", rows)
        bare = [Example(row.query, row.positives, lang=lang) for row in rows]
        write_examples(folder / f"{lang}.jsonl", bare)
        write_examples(folder / f"sets/{lang}.jsonl", rows[:9])
    write_examples(folder / "kept/de.jsonl", bare[:10])
    return folder


@pytest.fixture(scope="module")
def said(folder) -> list[str]:
    """What is told of one part, and then of all of them in the same folder."""
    some = command(folder, "--part=matryoshka")
    return [some, command(folder, "--threshold=0.98", "--filtered", f"5={folder / 'kept'}")]


def answers(folder: Path, cell: str, lang: str) -> np.ndarray:
    with np.load(folder / "out/cells" / cell / "answers.npz") as arrays:
        return arrays[f"0/{lang}"]


def test_a_pretraining_that_several_cells_begin_with_is_trained_once(said, folder):
    assert said[0].count("pretraining: 2 steps") == 2  # short vectors in it, and none
    assert said[0].count("finetuning: 1 steps") == 3
    assert "pretraining is trained again: its model is gone" in said[1]
    assert said[1].count("pretraining: 2 steps") == 3  # again, English alone, and filtered
    assert said[1].count("finetuning: 1 steps") == 5
    assert said[1].count("is done already") == 4  # three of matryoshka and what two began with
    assert not list(folder.glob("out/cells/*/model"))


def test_a_cell_is_what_a_run_of_both_stages_gives(said, folder, tmp_path):
    recipe = arctic_embed(base=str(folder / "base"), dims=[16], **NUMBERS)
    pairs, mined = (
        [open_source(folder / f"{kind}{lang}.jsonl") for lang in ("en", "de")]
        for kind in ("", "mined-")
    )
    run = Run(device="cpu", show_progress=False)
    train(recipe, {"pairs": pairs, "mined": mined}, tmp_path / "run", run=run)
    model = Embedder.load(tmp_path / "run/model")
    for lang in ("en", "de"):
        data = RetrievalSet.from_examples(folder / f"sets/{lang}.jsonl")
        for column, dims in enumerate((None, 16)):
            expected = measure(model, data, dims=dims).result.scores["ndcg@10"]
            assert np.allclose(answers(folder, FULL, lang)[:, column], expected)


def test_each_part_has_a_table_against_the_full_cell(said, folder):
    record = json.loads((folder / "out/results.json").read_text())
    tables = list(record["tables"].values())
    assert [[row[0] for row in table[1:5] if "-" in row[0]] for table in tables] == [
        ["en-en", "en-all", "all-en"],
        ["matryoshka-finetuning", "matryoshka-none", "matryoshka-finetuning - full"],
        ["threshold-0.98", "threshold-0.98 - full"],
        ["filter-5", "filter-5 - full"],
    ]
    assert tables[0][0] == ["nDCG@10", "en, whole", "en, at 16", "others, whole", "others, at 16"]
    one, full = (answers(folder, cell, "en")[:, 1] for cell in ("en-en", FULL))
    lead = paired_difference(one, full)
    shown = f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
    assert next(row for row in tables[0] if row[0] == "en-en - full")[2] == shown
    parts = ("data", "matryoshka", "thresholds", "filters")
    assert {path.stem for path in (folder / "out").glob("*.png")} == set(parts)


def test_given_again_nothing_is_trained(said, folder):
    more = ("--threshold=0.98", "--filtered", f"5={folder / 'kept'}")
    assert "steps" not in command(folder, *more)


def test_cells_differ_from_the_full_one_in_one_thing():
    asked = Asked(thresholds=(0.95,), filters=("10",), numbers=NUMBERS)
    groups = arctic_cells(asked, 3)
    cells = {
        cell.name: (group.first.recipe.stages[0], cell.recipe.stages[0])
        for group in groups
        for cell in group.then
    }
    first, then = cells[FULL]
    assert {group.first.recipe.seed for group in groups} == {3}
    assert (first.data, then.data) == ("pairs", "mined")
    assert [stage.data for stage in cells["en-all"]] == ["pairs-en", "mined"]
    assert [stage.data for stage in cells["all-en"]] == ["pairs", "mined-en"]
    assert [stage.data for stage in cells["filter-10"]] == ["pairs-10", "mined"]
    mined = cells["threshold-0.95"][1]
    assert mined.refresh is not None and mined.refresh.mining.rule.value == 0.95
    plain = [stage.objective.dims for stage in cells["matryoshka-none"]]  # pyright: ignore
    assert plain == [(), ()]
    assert list(cells_by_part(asked)) == ["data", "matryoshka", "thresholds", "filters"]


def test_what_cannot_be_varied_is_told(folder):
    with pytest.raises(RecipeError, match="nothing to vary in the part 'thresholds'"):
        cells_by_part(Asked("thresholds"))
    with pytest.raises(RecipeError, match="no threshold of mining would matter"):
        require_bare([open_source(folder / "mined-en.jsonl")])
    assert "give NAME=FOLDER" in command(folder, "--filtered=folder", status=2)
