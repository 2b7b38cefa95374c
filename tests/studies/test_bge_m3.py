"""The ablation of BGE-M3 on a toy: every cell from the command line, and its tables."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tercet.cli import main
from tercet.data.files.sources import write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.embedder_kinds import measure_kinds
from tercet.evaluate.measures.retrieval import measure_bm25
from tercet.evaluate.report.intervals import interval, paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import COLUMNS, open_kinds_set, open_sets
from tercet.models.embedder import Embedder
from tercet.objectives.unified import Unified
from tercet.studies.cells import FULL, M3_CELLS, bge_m3_cells
from tercet.studies.kinds_tables import kinds_tables, of_column
from tercet.studies.tables import AVERAGE, Found
from tercet.types import Example
from tercet.vectors import KINDS
from tests.toy import SENTENCES, save_model

SIZES = {"steps": 1, "retromae_steps": 1, "contrastive_steps": 1}
OTHERS = [name for names in M3_CELLS.values() for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    save_model(folder / "base", "xlm-roberta")
    pairs = [
        Example(" ".join(text.split()[-2:]), (text,), (SENTENCES[(i + 3) % 12],))
        for i, text in enumerate(SENTENCES)
    ]
    write_examples(folder / "pairs.jsonl", pairs)
    write_examples(folder / "test.jsonl", pairs[:9])
    return folder


def command(folder: Path, out: Path, *more: str) -> None:
    sizes = [f"--{name.replace('_', '-')}={number}" for name, number in SIZES.items()]
    sizes += [f"--{name}batch-size=4" for name in ("", "retromae-", "contrastive-")]
    data = ["--data", str(folder / "pairs.jsonl"), "--eval", str(folder / "test.jsonl")]
    words = ["ablate", "bge-m3", *data, "--out", str(out), "--base", str(folder / "base")]
    with pytest.raises(SystemExit) as end:
        main([*words, "--multi-dim=8", *sizes, *more])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def found(folder) -> Found:
    command(folder, folder / "out", "--keep-models")
    sets = open_sets([folder / "test.jsonl"], open_kinds_set)
    cells = {}
    for name in (FULL, *OTHERS):
        with np.load(folder / "out/cells" / name / "answers.npz") as arrays:
            stages = sorted({key.split("/")[0] for key in arrays})
            cells[name] = [{"test": arrays[f"{stage}/test"]} for stage in stages]
    return Found(sets, [cells], {"test": sets[0].words()})


def test_each_cell_differs_from_the_full_one_in_what_its_name_says():
    cells = {cell.name: cell.recipe for cell in bge_m3_cells("all", 3, batch_size=8, **SIZES)}
    assert list(cells) == [FULL, *OTHERS]
    objectives = {}
    for name, recipe in cells.items():
        *_, unified = recipe.stages
        assert (recipe.seed, unified.batch_size, unified.steps) == (3, 8, 1)
        assert isinstance(unified.objective, Unified)
        objectives[name] = asdict(unified.objective)
        stages = M3_CELLS["stages"]
        assert [s.name for s in recipe.stages] == (
            name.split("-") if name in stages else ["unified"]
        )
    full = objectives.pop(FULL)
    assert full["kinds"] == KINDS and full["distilled"] == 1
    changed = {
        name: {field: value for field, value in each.items() if value != full[field]}
        for name, each in objectives.items()
    }
    assert changed == {
        "no-distillation": {"distilled": 0.0},
        "retromae-unified": {},
        "retromae-contrastive-unified": {},
        "dense": {"kinds": ("dense",)},
        "dense-sparse": {"kinds": ("dense", "sparse")},
        "dense-multi": {"kinds": ("dense", "multi")},
        "teacher-0.5": {"distilled": 0.5},
        "teacher-2": {"distilled": 2.0},
    }


@pytest.mark.parametrize("part", list(M3_CELLS))
def test_a_part_has_its_own_cells_and_the_full_one(part):
    assert [cell.name for cell in bge_m3_cells(part, 0)] == [FULL, *M3_CELLS[part]]


def test_answers_are_the_ndcg_of_each_kind_and_of_the_sum(found, folder):
    data = RetrievalSet.from_examples(folder / "test.jsonl")
    for cell in (FULL, "dense-sparse", "dense"):
        model = Embedder.load(folder / "out/cells" / cell / "model")
        expected = measure_kinds(model, data)
        answers = found.cells[0][cell][-1]["test"]
        assert answers.shape == (9, len(COLUMNS))
        for column, name in enumerate((*KINDS, expected.total)):
            if name in expected.results:
                scores = expected.results[name].scores["ndcg@10"]
                np.testing.assert_array_equal(answers[:, column], scores)
            else:
                assert np.isnan(answers[:, column]).all()
    several = found.cells[0]["retromae-contrastive-unified"]
    assert len(several) == 3
    assert np.isnan(several[0]["test"][:, 1:3]).all()  # heads that nothing has trained yet
    assert not np.isnan(several[-1]["test"]).any()


def test_tables_have_a_row_a_cell_and_what_a_cell_does_not_make_is_left_open(found, folder):
    tables = dict(kinds_tables(found))
    assert len(tables) == 8
    rows = tables["Kinds trained together"]
    assert rows[0] == ["nDCG@10", "dense", "sparse", "multi", "sum"]
    assert [row[0] for row in rows[1:]] == [FULL, *M3_CELLS["kinds"], "words (BM25)"]
    assert [cell == "-" for cell in rows[2]] == [False, False, True, True, False]
    data = RetrievalSet.from_examples(folder / "test.jsonl")
    words = interval(measure_bm25(data).scores["ndcg@10"])
    assert rows[-1] == ["words (BM25)", "-", "-", "-", str(words)]
    one, other = (found.cells[0][cell][-1]["test"] for cell in (FULL, "no-distillation"))
    leads = tables["Self-distillation: differences on the same queries, with 95 % intervals"]
    assert leads[0] == ["full minus", *COLUMNS] and leads[1][0] == "no-distillation"
    for column in range(len(COLUMNS)):
        figure = of_column(found, column).figures(FULL)[AVERAGE]
        assert figure.mean == pytest.approx(one[:, column].mean())
        lead = paired_difference(one[:, column], other[:, column])
        shown = f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
        assert leads[1][column + 1] == shown


def test_tables_and_figures_are_written(found, folder):
    lines = (folder / "out/table.md").read_text().splitlines()
    tables = dict(kinds_tables(found))
    assert sum(line.startswith("|---") for line in lines) == len(tables)
    record = json.loads((folder / "out/results.json").read_text())
    assert record["tables"] == tables and record["ablation"] == "bge-m3"
    assert len(record["rows"]) == 4 * 6 + 2 + 3 + 3 + 1  # six of all kinds, one and two of two
    assert {path.stem for path in (folder / "out").glob("*.png")} == set(M3_CELLS)


def test_a_part_given_again_runs_no_cell_again(found, folder, capsys):
    command(folder, folder / "out", "--part", "teacher", "--keep-models")
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if line.startswith("cell ")] == [
        f"cell {number} of 3: {name} is done already"
        for number, name in enumerate((FULL, *M3_CELLS["teacher"]), start=1)
    ]
    assert "Weight of self-distillation" in said.out and "Stages" not in said.out


def test_of_several_seeds_the_spread_is_shown(found):
    cells = found.cells[0]
    other = {name: [{"test": s["test"] * 0.5} for s in stages] for name, stages in cells.items()}
    both = Found(found.sets, [cells, other], found.words)
    rows = dict(kinds_tables(both))["Self-distillation"]
    mean = cells[FULL][-1]["test"][:, 0].mean()
    assert rows[2][0] == "full, spread over seeds"
    assert float(rows[2][1]) == pytest.approx(mean / 2 / np.sqrt(2), abs=5e-4)


def test_what_is_no_retrieval_set_is_refused(tmp_path):
    file = tmp_path / "alike.jsonl"
    file.write_text(json.dumps({"text1": "a", "text2": "b", "score": 1}) + "\n")
    with pytest.raises(RecipeError, match="is no retrieval set"):
        open_sets([file], open_kinds_set)
