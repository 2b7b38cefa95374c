"""The whole ablation of NV-Embed on a toy: every cell, killed and gone on with, and its tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.report.intervals import paired_difference
from tercet.evaluate.suites.suite import average, open_sets
from tercet.studies import run as ablation_run
from tercet.studies.cells import cell_name, nv_embed_cells, schedule_cell
from tercet.studies.run import Bench, baselines, run_cells
from tercet.studies.tables import AVERAGE, Found, grid_table, tables, write_findings
from tercet.train.recipe import Run
from tercet.types import Example
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False)


def prepare(folder: Path) -> None:
    pairs = [
        Example(f"{text.split()[-1]} {i}", (text,), (SENTENCES[(i + 3) % 12],), task="pairs")
        for i, text in enumerate(SENTENCES)
    ]
    write_examples(folder / "pairs.jsonl", pairs)
    write_examples(folder / "test.jsonl", pairs)
    labels = [
        Example(text, (SENTENCES[(i + 2) % 12],), (SENTENCES[(i + 1) % 12],), in_batch="none")
        for i, text in enumerate(SENTENCES)
    ]
    write_examples(folder / "labels.jsonl", labels)
    records = [{"text": text, "label": f"kind {i % 2}"} for i, text in enumerate(SENTENCES)]
    (folder / "groups.jsonl").write_text("".join(json.dumps(it) + "\n" for it in records))
    pairs_of = [
        {"text1": text, "text2": SENTENCES[(i + 1) % 12], "score": i % 5}
        for i, text in enumerate(SENTENCES)
    ]
    (folder / "alike.jsonl").write_text("".join(json.dumps(it) + "\n" for it in pairs_of))


def bench_of(folder: Path, out: Path, **changes: Any) -> Bench:
    pairs, labels = (open_source(folder / f"{name}.jsonl") for name in ("pairs", "labels"))
    sets = open_sets([folder / f"{name}.jsonl" for name in ("test", "groups", "alike")])
    data = {"retrieval": [pairs], "blended": [pairs, labels]}
    return Bench(data, sets, out, QUIET, **changes)


def cells_of(base: Path, part: Any = "all", **changes: Any):
    numbers = {"steps": 1, "blended_steps": 1, "batch_size": 6, "latents": 6, "max_tokens": 48}
    return list(nv_embed_cells(part, 0, base=str(base), **(numbers | changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder, decoder_folder) -> Found:
    bench = bench_of(folder, folder / "out")
    answers = run_cells(cells_of(decoder_folder), bench, lambda line: None)
    return Found(bench.sets, [answers], baselines(bench.sets))


def test_the_grid_has_eight_runs_and_the_schedules_three_more(decoder_folder):
    names = [cell.name for cell in cells_of(decoder_folder)]
    assert len(names) == len(set(names)) == 11
    assert [len(cell.recipe.stages) for cell in cells_of(decoder_folder)] == [2] * 8 + [1, 1, 2]


def test_every_cell_has_the_same_steps_seed_and_data(decoder_folder):
    for cell in cells_of(decoder_folder):
        assert sum(stage.steps or 0 for stage in cell.recipe.stages) == 2
        assert cell.recipe.seed == 0
    for name, policy in (("one-stage-in-batch", "all"), ("one-stage-own", "none")):
        (cell,) = (cell for cell in cells_of(decoder_folder) if cell.name == name)
        assert [(s.data, s.in_batch) for s in cell.recipe.stages] == [("blended", policy)]
    (cell,) = (cell for cell in cells_of(decoder_folder) if cell.name == "reversed")
    assert [(s.data, s.in_batch) for s in cell.recipe.stages] == [
        ("blended", "none"),
        ("retrieval", "all"),
    ]


def test_each_cell_is_measured_after_each_stage_and_leaves_no_model(found, folder):
    assert len(found.cells[0]) == 11
    assert sum(len(stages) for stages in found.cells[0].values()) == 8 * 2 + 1 + 1 + 2
    for cell in found.cells[0]:
        assert sorted(path.name for path in (folder / "out/cells" / cell).iterdir()) == [
            "answers.npz",
            "cell.json",
        ]


def test_figures_are_means_of_categories_and_differences_are_paired(found):
    mean, latent = (cell_name("bidirectional", pooling) for pooling in ("mean", "latent"))
    figures = found.figures(mean)
    assert list(figures) == ["Retrieval", "Clustering", "STS", AVERAGE]
    parts = [figures[name].mean for name in ("Retrieval", "Clustering", "STS")]
    assert figures[AVERAGE].mean == pytest.approx(np.mean(parts))
    scores = [found.cells[0][cell][1]["test"] for cell in (latent, mean)]
    lead = found.differences(latent, mean, (-1, -1))["Retrieval"]
    expected = paired_difference(*scores)
    assert (lead.mean, lead.low, lead.high) == (expected.mean, expected.low, expected.high)


def test_an_average_adds_half_widths_as_squares(found):
    figures = list(found.figures(cell_name("causal", "eos")).values())[:-1]
    half = np.sqrt(sum(((f.high - f.low) / 2) ** 2 for f in figures)) / len(figures)
    got = average(figures)
    assert got.high - got.mean == pytest.approx(half)
    assert got.mean - got.low == pytest.approx(half)


def test_the_tables_have_the_papers_layout_and_are_written(found, tmp_path):
    table = grid_table(found, 0)
    assert table[0] == ["both ways / causal", "EOS", "mean", "latent", "self-att.", "words"]
    assert [row[0] for row in table[1:]] == [
        "Retrieval, nDCG@10",
        "Clustering, v-measure",
        "STS, Spearman",
        "Average",
        "95 % of the average",
    ]
    both = found.figures(cell_name("bidirectional", "eos"), 0)["Retrieval"].mean
    causal = found.figures(cell_name("causal", "eos"), 0)["Retrieval"].mean
    assert table[1][1] == f"{both:.3f} / {causal:.3f}"
    assert len(list(tables(found))) == 5
    write_findings(tmp_path, found, {"numbers": {"keep_layers": 4, "x": None}})
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "keep_layers 4, seeds 1"
    assert sum(line.startswith("|---") for line in lines) == 5
    assert "| " + " | ".join(table[1]) + " |" in lines
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["rows"]) == 20 * 4 + 4
    assert list(record["tables"].values()) == [table for _, table in tables(found)]
    latent, mean = (cell_name("bidirectional", pooling) for pooling in ("latent", "mean"))
    lead = found.differences(latent, mean, (0, 0))[AVERAGE]
    first = next(table for title, table in tables(found) if "same texts after stage 1" in title)
    shown = next(row for row in first if row[0] == "latent - mean")[1]
    assert shown == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
    assert {path.name for path in tmp_path.glob("*.png")} == {"poolings.png", "schedules.png"}


def test_what_is_done_is_not_run_again_and_another_ablation_is_refused(
    found, folder, decoder_folder, monkeypatch
):
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("this cell is done")

    monkeypatch.setattr(ablation_run, "train", fails)
    said: list[str] = []
    again = run_cells(cells_of(decoder_folder), bench_of(folder, folder / "out"), said.append)
    assert all(line.endswith("is done already") for line in said)
    for name, stages in again.items():
        for one, other in zip(stages, found.cells[0][name], strict=True):
            assert all(np.array_equal(one[examined], other[examined]) for examined in other)
    with pytest.raises(RecipeError, match="was run with another recipe; give another --out"):
        run_cells(cells_of(decoder_folder, latents=5), bench_of(folder, folder / "out"), print)


def test_other_weights_or_other_places_of_the_files_are_another_ablation(
    found, folder, decoder_folder
):
    bench = bench_of(folder, folder / "out")
    pairs, labels = bench.data["blended"]
    for blended in ([pairs, replace(labels, weight=5.0)], [labels, pairs]):
        other = replace(bench, data={"retrieval": [pairs], "blended": blended})
        with pytest.raises(RecipeError, match="was run with another data"):
            run_cells(cells_of(decoder_folder), other, lambda line: None)


def test_a_cell_that_was_stopped_goes_on_and_the_others_stay(
    folder, decoder_folder, tmp_path, monkeypatch
):
    cells = cells_of(decoder_folder, "schedules")[:2]
    bench = bench_of(folder, tmp_path / "out", keep_models=True)
    real, calls = ablation_run.train, []

    def stopped(*given: Any, **more: Any) -> Any:
        calls.append(given[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(ablation_run, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, bench, lambda line: None)
    said: list[str] = []
    found = run_cells(cells, bench, said.append)
    assert said[0] == f"cell 1 of 2: {schedule_cell('two stages')} is done already"
    assert list(found) == [cell.name for cell in cells]
    assert (tmp_path / "out/cells/bidirectional-latent/model").is_dir()


def test_two_sets_of_one_name_are_refused(folder, tmp_path):
    write_examples(tmp_path / "test.jsonl", [Example("a", ("b",)), Example("c", ("d",))])
    with pytest.raises(RecipeError, match="two evaluation sets are named 'test'"):
        open_sets([folder / "test.jsonl", tmp_path / "test.jsonl"])
