"""Figures, leads and tables of made-up answers, worked by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tercet.evaluate.report.intervals import interval, paired_difference, relative_change
from tercet.evaluate.suites.suite import average
from tercet.studies.tables import (
    WORDS,
    Column,
    Results,
    Table,
    columns_by_category,
    leads_over,
    write_results,
)
from tests.studies.toy_studies import made_set

SETS = [made_set("a"), made_set("b"), made_set("c", "STS")]
EVERY = Column("all", (("a", "b"), ("c",)))


@pytest.fixture
def results() -> Results:
    random = np.random.default_rng(0)
    answers = {
        cell: [[{each.name: random.random(4) for each in SETS}] for _ in range(seeds)]
        for cell, seeds in (("one", 2), ("other", 2), ("untrained", 1))
    }
    return Results({each.name: each for each in SETS}, answers)


def answer(results: Results, cell: str, name: str, seed: int) -> np.ndarray:
    return results.answers[cell][seed][0][name]


def test_scores_are_averaged_over_seeds_and_then_drawn(results):
    figure = results.figure("one", Column("a", (("a",),)))
    assert figure == interval((answer(results, "one", "a", 0) + answer(results, "one", "a", 1)) / 2)


def test_a_column_is_the_mean_of_groups_of_sets(results):
    means = {n: np.mean([answer(results, "one", n, s) for s in (0, 1)]) for n in "abc"}
    figure = results.figure("one", EVERY)
    assert figure.mean == pytest.approx(((means["a"] + means["b"]) / 2 + means["c"]) / 2)
    parts = [results.figure("one", Column("", (names,))) for names in (("a", "b"), ("c",))]
    assert figure == average(parts)


def test_other_answers_than_scores_are_averaged_as_figures(results):
    of_c = Column("c", (("c",),))
    alone = [interval(answer(results, "one", "c", seed)) for seed in (0, 1)]
    assert results.figure("one", of_c).low == pytest.approx((alone[0].low + alone[1].low) / 2)
    pairs = [(answer(results, "one", "c", s), answer(results, "untrained", "c", 0)) for s in (0, 1)]
    leads = [paired_difference(*pair) for pair in pairs]
    lead = results.lead("one", "untrained", of_c)
    assert lead.high == pytest.approx((leads[0].high + leads[1].high) / 2)


def test_leads_are_paired_and_changes_are_shares(results):
    of_a = Column("a", (("a",),))
    one, other = (
        np.mean([answer(results, cell, "a", seed) for seed in (0, 1)], axis=0)
        for cell in ("one", "other")
    )
    assert results.lead("one", "other", of_a) == paired_difference(one, other)
    assert results.change("one", "other", of_a) == relative_change([one], [other])


def test_the_spread_is_that_of_the_seeds_figures(results):
    alone = [replace(results, answers={"one": [s]}, computed={}) for s in results.answers["one"]]
    means = [each.figure("one", EVERY).mean for each in alone]
    assert results.spread("one", EVERY) == pytest.approx(np.std(means, ddof=1))
    assert results.spread("untrained", EVERY) is None


def test_columns_by_category_begin_with_their_average():
    average_of_all, retrieval, similarity = columns_by_category(SETS, stage=1)
    assert average_of_all == Column("Average", (("a", "b"), ("c",)), 1)
    assert retrieval == Column("Retrieval, nDCG@10", (("a", "b"),), 1)
    assert similarity == Column("STS, Spearman", (("c",),), 1)


def test_a_table_has_rows_for_cells_their_spreads_and_leads(results):
    cells = {"first": "one", "raw": "untrained", "gone": "gone", "by words": WORDS}
    table = results.table("Title", cells, [EVERY], leads_over("one", ("one", "other", "gone")), "x")
    assert table.rows[0] == ["x", "all"]
    assert [row[0] for row in table.rows[1:]] == [
        "first",
        "first, spread over seeds",
        "raw",
        "by words",
        "other - one",
    ]
    figure, lead = results.figure("one", EVERY), results.lead("other", "one", EVERY)
    assert table.rows[1][1] == f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
    assert table.rows[4][1].startswith("0.250 [")  # 0.1, 0.2, 0.3, 0.4
    assert table.rows[5][1] == f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"


def test_a_part_of_the_answers_that_a_model_lacks_is_left_open():
    scores = np.array([[0.5, np.nan], [1.0, np.nan]])
    both = np.array([[0.5, 0.25], [1.0, 0.75]])
    answers = {"full": [[{"a": both}]], "dense": [[{"a": scores}]]}
    results = Results({"a": made_set("a")}, answers)
    columns = [Column(name, (("a",),), part=part) for part, name in enumerate(("dense", "multi"))]
    cells = {name: name for name in answers}
    table = results.table("", cells, columns, {"full - dense": ("full", "dense")})
    assert [row[2] for row in table.rows[1:]] == ["0.500 [0.250, 0.750]", "-", "-"]
    assert table.rows[3][1] == "+0.000 [+0.000, +0.000]"
    drawn = results.bars("kinds", cells, columns).draw.args[0]  # pyright: ignore
    assert {label: list(row) for label, row in drawn.items()} == {
        "full": ["dense", "multi"],
        "dense": ["dense"],
    }


def test_tables_figures_and_pictures_are_written(results, tmp_path):
    table = results.table("Title", {"one": "one"}, [EVERY], {"lead": ("one", "other")})
    parts = [table, Table("Empty", [["header"]]), results.bars("picture", {"one": "one"}, [EVERY])]
    assert write_results(tmp_path, results, parts, {"steps": 4, "flags": {"dims": 8}}) == [table]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "steps 4" and "## Title" in lines and "## Empty" not in lines
    assert "| " + " | ".join(table.rows[1]) + " |" in lines
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "results.json").read_text())
    assert (
        record["steps"] == 4
        and record["flags"] == {"dims": 8}
        and record["tables"] == {"Title": [list(r) for r in table.rows]}
    )
    assert record["sets"]["c"]["category"] == "STS"
    figure, lead = results.figure("one", EVERY), results.lead("one", "other", EVERY)
    assert [row["mean"] for row in record["figures"]] == [figure.mean, lead.mean]
    assert [row["what"] for row in record["figures"]] == ["figure", "lead"]
    assert record["figures"][1]["compared_with"] == "other"
