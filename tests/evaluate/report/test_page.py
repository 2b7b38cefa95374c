import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from tercet.errors import MissingExtraError, StorageError
from tercet.evaluate.report.figures import drawing, histograms, running_mean
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.report.page import (
    ExampleSearch,
    PageFigure,
    RunReport,
    ScoreSample,
    Section,
    write_report,
)

NAUGHTY = "<script>alert('x')</script> & \"more\""


def interval(mean):
    return Interval(mean, mean - 0.01, mean + 0.01, 1234)


@pytest.fixture
def report():
    random = np.random.default_rng(0)
    return RunReport(
        title="A run",
        summary=["What was done.", "What it gained."],
        results={
            "BM25": {"ndcg@10": interval(0.7)},
            "before": {"ndcg@10": interval(0.72), "mrr@10": interval(0.61)},
            "after": {"ndcg@10": interval(0.8), "mrr@10": interval(0.65)},
        },
        differences={"after - before": {"ndcg@10": interval(0.08), "mrr@10": interval(0.005)}},
        losses=random.random(60).tolist(),
        learning_rates=np.linspace(1e-5, 0, 60).tolist(),
        scores={
            "before": ScoreSample(random.random(50).tolist(), random.random(40).tolist()),
            "after": ScoreSample(random.random(50).tolist(), random.random(40).tolist()),
        },
        searches=[ExampleSearch("a query", [("first title", 0.91), ("second title", 0.5)])],
        settings={"seed": "17", "split": "test"},
    )


def written(path, report):
    write_report(path, report)
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_data(self, data):
        self.seen.append(data)


def text_of(page):
    """What a reader sees, tags taken away."""
    parser = Reader()
    parser.feed(page)
    return " ".join(" ".join(parser.seen).split())


def test_the_page_tells_results_with_intervals_searches_and_settings(report, tmp_path):
    page = written(tmp_path / "report.html", report)
    for part in (
        "A run",
        "What it gained.",
        "0.800 [0.790, 0.810]",
        "Mean over 1,234 queries and 95% bootstrap interval (10,000 resamples",
        "after - before",
        "+0.080 [+0.070, +0.090]",
        "a query",
        "0.910 first title",
        "seed 17",
    ):
        assert part in text_of(page)
    assert page.count("<figure>") == page.count("<svg") == 3


def test_only_a_difference_whose_interval_excludes_zero_is_bold(report, tmp_path):
    page = written(tmp_path / "report.html", report)
    assert re.findall(r"<b>(.*?)</b>", page) == ["+0.080"]


def test_a_system_that_lacks_a_metric_has_a_dash_there(report, tmp_path):
    page = written(tmp_path / "report.html", report)
    row = next(line for line in page.split("<tr>") if line.startswith("<th>BM25"))
    assert row.endswith("<td>-</td></tr>")


def test_nothing_is_fetched_and_nothing_runs(report, tmp_path):
    page = written(tmp_path / "report.html", report)
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    for sign in ("http:", "https:", "<script", "<link", "@import", "url(//", "src="):
        assert sign not in without_names
    assert set(re.findall(r'href="(.)', page)) <= {"#"}


def test_every_text_is_escaped(report, tmp_path):
    naughty = replace(
        report,
        title=NAUGHTY,
        summary=[NAUGHTY],
        results={NAUGHTY: {NAUGHTY: interval(0.5)}},
        differences={NAUGHTY: {NAUGHTY: interval(0.5)}},
        scores={NAUGHTY: ScoreSample([1.0], [0.0])},
        searches=[ExampleSearch(NAUGHTY, [(NAUGHTY, 0.5)])],
        sections=[Section(NAUGHTY, [NAUGHTY], {NAUGHTY: {NAUGHTY: interval(0.5)}})],
        settings={NAUGHTY: NAUGHTY},
    )
    page = written(tmp_path / "report.html", naughty)
    assert "<script" not in page
    assert text_of(page).count(NAUGHTY) >= 18


def test_a_section_brings_text_a_table_and_figures(report, tmp_path):
    shown = PageFigure(lambda: histograms(report.scores, score="likeness"), "What it shows.")
    section = Section("A look", ["What was done here."], report.results, [shown])
    page = written(tmp_path / "report.html", replace(report, sections=[section]))
    assert page.count("<figure>") == 4
    text = text_of(page)
    begin = text.index("A look What was done here. model ndcg@10")
    assert begin < text.index("likeness") < text.index("What it shows.") < text.index("Settings")


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_many_hills_stand_in_rows_of_at_most_three(report, count, rows):
    scores = {f"model {i}": report.scores["after"] for i in range(count)}
    with drawing():
        figure = histograms(scores)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    grid = shown[0].get_gridspec()
    assert grid is not None
    assert (len(shown), grid.nrows) == (count, rows)
    assert [axes.get_title(loc="left") for axes in shown] == list(scores)
    assert all(axes.get_xlabel() == "score" for axes in shown[-grid.ncols :])


def test_a_dollar_sign_is_no_formula(report, tmp_path):
    results = {"costs $5": {"$x_1$": interval(0.5)}}
    page = text_of(written(tmp_path / "report.html", replace(report, results=results)))
    assert page.count("$x_1$") == 2
    assert page.count("costs $5") == 2


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    assert written(tmp_path / "a.html", report) == written(tmp_path / "b.html", report)


def test_drawings_do_not_share_names(report, tmp_path):
    names = re.findall(r' id="([^"]*)"', written(tmp_path / "report.html", report))
    assert len(names) == len(set(names))


def test_names_that_drawings_refer_to_are_there(report, tmp_path):
    page = written(tmp_path / "report.html", report)
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]*)', page))
    assert wanted
    assert wanted <= set(re.findall(r' id="([^"]*)"', page))


def test_matplotlib_is_left_as_it_was(report, tmp_path):
    backend = matplotlib.get_backend()
    with matplotlib.rc_context({"font.size": 3, "svg.fonttype": "path", "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        write_report(tmp_path / "report.html", report)
        assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    plots = sys.modules.get("matplotlib.pyplot")
    assert plots is None or not plots.get_fignums()


def test_parts_that_are_empty_are_left_out(tmp_path):
    page = written(tmp_path / "report.html", RunReport("Short", ["Only this."], results={}))
    assert "<h2>" not in page
    assert text_of(page).endswith("Short Only this.")


@pytest.mark.parametrize("losses", [[1.0], [1.0, float("nan"), 0.5], [float("nan")]])
def test_short_and_broken_losses_are_drawn(report, tmp_path, losses):
    short = replace(report, losses=losses, learning_rates=())
    assert "Training" in written(tmp_path / "report.html", short)


def test_scores_that_are_all_equal_are_drawn(report, tmp_path):
    flat = replace(report, scores={"before": ScoreSample([1.0, 1.0], [])})
    assert "other" in written(tmp_path / "report.html", flat)


def test_a_long_run_is_still_a_light_page(report, tmp_path):
    long = np.random.default_rng(0).random(200_000).tolist()
    heavy = replace(
        report,
        losses=long,
        learning_rates=long,
        scores={"after": ScoreSample(long, long)},
    )
    write_report(tmp_path / "report.html", heavy)
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_running_mean_takes_as_many_on_either_side():
    # 60 values: two on either side.
    values = np.arange(60.0) ** 2
    expected = [values[max(i - 2, 0) : i + 3].mean() for i in range(60)]
    np.testing.assert_allclose(running_mean(values), expected)
    values[10] = np.nan
    assert running_mean(values)[11] == pytest.approx(np.mean([81, 121, 144, 169]))
    assert np.isnan(running_mean(np.full(3, np.nan))).all()


def test_a_missing_package_is_named_and_the_old_page_stays(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[plot\]'"):
        write_report(path, report)
    assert path.read_text() == "old"


def test_a_page_that_cannot_be_written_is_told(report, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report.html: could not be written"):
        write_report(tmp_path / "report.html", report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
