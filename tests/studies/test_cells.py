"""The study of docs/extending.md on toy models: run, killed, continued, changed, in part."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.retrieval import measure
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.models.embedder import Embedder
from tercet.recipes.finetune import finetune
from tercet.studies import cells as cells_module
from tercet.studies.cells import Cell, Study
from tercet.training.loop import train
from tests.studies.toy_studies import QUIET, kept, rows, run
from tests.toy import save_model

DOCS = Path(__file__).parents[2] / "docs/extending.md"
COLDER = """        Cell("colder", finetune(model=model, temperature=0.005, **numbers), "warm"),
    ]
"""
NUMBERS: dict[str, Any] = {"steps": 2, "batch_size": 6, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_model(folder / "base", "bert")
    shown = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    (example,) = (block for block in shown if ") -> Study:" in block)
    (folder / "temperatures.py").write_text(example.replace("    ]\n", COLDER))
    write_examples(folder / "pairs.jsonl", rows())
    write_examples(folder / "test.jsonl", rows(count=9))
    run_in(folder, "out")
    return folder


def run_in(folder: Path, out: str, *words: Any, data: str = "pairs.jsonl", **more: Any) -> str:
    files = ["--data", folder / data, "--test", folder / "test.jsonl", "--model", folder / "base"]
    return run(folder / "temperatures.py", folder / out, *files, *words, **{**NUMBERS, **more})


def refuse_to_train(monkeypatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("this cell is done")

    monkeypatch.setattr(cells_module, "train", fails)


def test_a_cell_holds_what_training_and_measuring_by_hand_give(folder, tmp_path):
    data = RetrievalSet.from_examples(folder / "test.jsonl")
    source = [open_source(folder / "pairs.jsonl")]
    for cell, temperature in (("untrained", None), ("warm", 0.1), ("colder", 0.005)):
        base = tmp_path / "warm/model" if cell == "colder" else folder / "base"
        model = Embedder.load(base)
        if temperature:
            recipe = finetune(model=str(base), temperature=temperature, **NUMBERS)
            model = train(recipe, source, tmp_path / cell, run=QUIET)
        expected = measure(model, data).result.scores["ndcg@10"]
        assert np.allclose(kept(folder / "out", cell, "test"), expected)


def test_models_are_deleted_and_answers_tables_and_pictures_stay(folder):
    names = {"cells", "results.json", "table.md", "temperatures.png"}
    assert {path.name for path in (folder / "out").glob("[!.]*")} == names
    assert not list(folder.glob("out/cells/*/seed-0"))


def test_a_finished_study_is_not_trained_again(folder, monkeypatch):
    refuse_to_train(monkeypatch)
    printed = run_in(folder, "out")
    assert printed.count("is done already") == 4
    assert "0.01" in printed and "cold - warm" in printed


def test_another_number_weight_or_base_is_refused_with_what_to_do(folder, monkeypatch):
    refuse_to_train(monkeypatch)
    printed = run_in(folder, "out", learning_rate=2e-3, status=2)
    assert "warm: was run with another recipe; give another --out, or delete that" in printed
    assert "another data" in run_in(folder, "out", weight="pairs=2", status=2)
    weights = folder / "base/model.safetensors"
    before = weights.read_bytes()
    try:
        changed = bytearray(before)
        changed[-3] ^= 1
        weights.write_bytes(bytes(changed))
        assert "another model" in run_in(folder, "out", "--only=untrained", status=2)
        assert "another base" in run_in(folder, "out", "--only=cold", status=2)
    finally:
        weights.write_bytes(before)


def test_a_folder_of_an_earlier_version_is_refused(folder, tmp_path):
    (tmp_path / "cells/untrained").mkdir(parents=True)
    (tmp_path / "cells/untrained/cell.json").write_text("{}")
    assert "was written by an earlier version" in run_in(folder, str(tmp_path), status=2)


def test_a_killed_study_goes_on(folder, tmp_path, monkeypatch):
    real, bases = cells_module.train, []

    def stopped(*given: Any, **more: Any) -> Any:
        bases.append(given[0].model.base)
        if len(bases) == 2:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(cells_module, "train", stopped)
    run_in(folder, str(tmp_path), status=130)
    assert not (tmp_path / "table.md").exists()
    printed = run_in(folder, str(tmp_path))
    assert printed.count("is done already") == 2
    assert len(bases) == 4
    for cell in ("cold", "colder"):
        assert np.array_equal(kept(tmp_path, cell, "test"), kept(folder / "out", cell, "test"))


def test_a_model_that_was_deleted_is_trained_again_for_a_cell_after_it(folder, tmp_path):
    first = run_in(folder, str(tmp_path), "--without", "colder", "--without", "cold")
    assert "trained again" not in first and not list(tmp_path.glob("cells/*/seed-0"))
    printed = run_in(folder, str(tmp_path), "--only=colder")
    assert "cell 1 of 2: warm is done already" in printed
    assert "warm is trained again: its model was deleted, and colder needs it" in printed
    assert np.array_equal(kept(tmp_path, "colder", "test"), kept(folder / "out", "colder", "test"))
    assert not list(tmp_path.glob("cells/*/seed-0"))


def test_each_seed_is_another_training_of_the_recipe(folder, tmp_path, monkeypatch):
    real, seeds = cells_module.train, []

    def noted(*given: Any, **more: Any) -> Any:
        seeds.append(given[0].seed)
        return real(*given, **more)

    monkeypatch.setattr(cells_module, "train", noted)
    words = ("--only=warm", "--only=untrained", "--seeds=2", "--keep-models")
    printed = run_in(folder, str(tmp_path), *words)
    assert seeds == [0, 1]
    assert "0.1, spread over seeds" in printed and "cell 3 of 3: warm, seed 1" in printed
    assert np.array_equal(kept(tmp_path, "warm", "test"), kept(folder / "out", "warm", "test"))
    assert (tmp_path / "cells/warm/seed-1/model").is_dir()
    assert kept(tmp_path, "warm", "test", seed=1) is not None


def test_cells_are_chosen_by_name_with_those_they_come_after():
    recipe = finetune(model="x")
    chain = [Cell("a-1", recipe), Cell("b-1", recipe, after="a-1"), Cell("b-2", recipe)]
    study = Study(cells=chain, sets=[], report=lambda results: [])

    def names(*given: Any) -> list[str]:
        return [cell.name for cell in study.selected(*given)]

    assert names() == ["a-1", "b-1", "b-2"]
    assert names(["b-1"]) == ["a-1", "b-1"]
    assert names(["*-1"], ["b*"]) == ["a-1"]
    with pytest.raises(RecipeError, match="no cell is named c; choose from a-1, b-1, b-2"):
        names([], ["c"])
    with pytest.raises(RecipeError, match="no cell is left"):
        names(["b-2"], ["b-2"])
    for cells in ([*chain, chain[0]], chain[1:]):
        with pytest.raises(RecipeError):
            Study(cells=cells, sets=[], report=lambda results: [])


def test_what_is_no_study_file_is_refused(tmp_path):
    file = tmp_path / "empty.py"
    assert "there is no such Python file" in run(file, tmp_path / "out", status=2)
    file.write_text("")
    assert "has no function study" in run(file, tmp_path / "out", status=2)


def test_help_shows_the_studys_own_flags(folder):
    printed = run(folder / "temperatures.py", folder / "out", "--help")
    assert "How much the temperature of the loss matters." in printed
    assert "--batch-size" in printed and "--seeds" in printed and "--temperature" not in printed
    assert "No such option" in run_in(folder, "out", "--temperature=1", status=2)
