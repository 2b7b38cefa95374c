import re

import numpy as np
import pytest

from tercet.errors import StorageError
from tercet.evaluate.report.charts import Line, histogram, interval_chart, line_chart
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.report.page import (
    Page,
    Quoted,
    Section,
    commands,
    example,
    facts,
    figure,
    folded,
    heading,
    interval_table,
    messages,
    note,
    paragraph,
    ranked,
    side_by_side,
    table,
    write_page,
)
from tests.evaluate.report.pages import assert_self_contained, spoken, text_of

NAUGHTY = "<script>alert('x')</script> & \"more\""


def interval(mean):
    return Interval(mean, mean - 0.01, mean + 0.01, 1234)


def parts_with(text):
    """Every part that a page can have, with this text wherever there is one."""
    rows = {text: {text: interval(0.5)}}
    return [
        paragraph(text),
        heading(text),
        note(text),
        figure(line_chart([Line(text, [1, 2], [1, 2])] * 2, name=text, x=text, y=text), text),
        side_by_side([histogram({text: [0.5]}, name=text, x=text)]),
        interval_chart(rows, name=text),
        facts({text: text}),
        table([text], [[text]]),
        interval_table(text, rows),
        commands([text]),
        messages([("note", text), ("warning", text)]),
        ranked(text, [(text, 0.5)]),
        example(Quoted(text, text, [(text, text)])),
        folded(text, [paragraph(text)]),
    ]


@pytest.fixture
def page():
    results = {
        "mine": {"ndcg@10": interval(0.8), "mrr@10": interval(0.65)},
        "BM25": {"ndcg@10": interval(0.7)},
    }
    gains = {"BM25": {"ndcg@10": interval(0.08), "mrr@10": interval(0.005)}}
    return Page(
        "A run",
        ["What was done.", "What it gained."],
        [
            Section("Results", [interval_table("model", results)]),
            Section("Differences", [interval_table("mine minus", gains, signed=True)]),
            Section("Empty", []),
            Section("Settings", [facts({"seed": "17"})]),
        ],
    )


def written(path, page):
    write_page(path, page)
    return path.read_text(encoding="utf-8")


def test_a_page_has_its_summary_results_with_intervals_and_settings(page, tmp_path):
    text = text_of(written(tmp_path / "report.html", page))
    for part in (
        "A run What was done. What it gained. Results",
        "mine 0.800 [0.790, 0.810] 0.650",
        "Over 1,234 queries, with 95% bootstrap intervals (10,000 resamples of the queries, seed",
        "+0.080 [+0.070, +0.090]",
        "Settings seed 17",
    ):
        assert part in text
    assert "Empty" not in text


def test_only_a_difference_whose_interval_excludes_zero_is_bold(page, tmp_path):
    assert re.findall(r"<b>(.*?)</b>", written(tmp_path / "report.html", page)) == ["+0.080"]


def test_a_system_that_lacks_a_metric_has_a_dash_there(page, tmp_path):
    html = written(tmp_path / "report.html", page)
    row = next(line for line in html.split("<tr>") if '<th scope="row">BM25' in line)
    assert "<td>-</td></tr>" in row


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    html = written(tmp_path / "report.html", Page("A", ["b"], [Section("c", parts_with("d"))]))
    assert_self_contained(html)


def test_every_text_is_escaped(tmp_path):
    page = Page(NAUGHTY, [NAUGHTY], [Section(NAUGHTY, parts_with(NAUGHTY))])
    html = written(tmp_path / "report.html", page)
    assert "<script" not in html
    assert "alert('x')" not in html
    assert text_of(html).count(NAUGHTY) >= 30


def test_a_page_is_dark_where_the_system_is_and_narrow_tables_scroll(page, tmp_path):
    html = written(tmp_path / "report.html", page)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    tables = html.count("<table")
    assert html.count('<div class="wide" tabindex="0" role="region"') == tables == 3


def test_the_same_page_gives_the_same_bytes(page, tmp_path):
    assert written(tmp_path / "a.html", page) == written(tmp_path / "b.html", page)


def test_only_columns_of_numbers_stand_at_the_right():
    html = table(["name", "rows", "share"], [["7z", "1,200", "4.5%"], ["12", "3", "-"]])
    assert re.findall(r'<th scope="col"( class="count")?>(\w+)', html) == [
        ("", "name"),
        (' class="count"', "rows"),
        (' class="count"', "share"),
    ]


def test_a_page_that_cannot_be_written_is_told_and_leaves_nothing_else(page, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report.html: could not be written"):
        write_page(tmp_path / "report.html", page)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_long_run_is_still_a_light_page(tmp_path):
    long = np.random.default_rng(0).random(200_000).tolist()
    lines = [Line("loss", list(range(len(long))), long)]
    parts = [
        line_chart(lines, name="a", x="step", y="loss"),
        histogram({"a": long}, name="b", x=""),
    ]
    html = written(tmp_path / "report.html", Page("A", [], [Section("b", parts)]))
    assert len(html) < 100_000
    assert len(spoken(html)) == 2
