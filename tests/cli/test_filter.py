import json
import os

import pyarrow.parquet as pq
import pytest

from tercet.data.files.folders import open_sources
from tercet.data.files.sources import iter_examples
from tests.cli.lines import cells, write
from tests.toy import SENTENCES


@pytest.fixture
def pairs(tmp_path):
    """A file of pairs in two languages, one of them there twice."""
    rows = [
        {"query": text.split()[-1], "positives": [text], "lang": lang}
        for lang in ("en", "de")
        for text in (*SENTENCES, SENTENCES[0])
    ]
    return write(tmp_path / "toys.jsonl", *rows)


@pytest.fixture
def start(pairs, encoder_folder, tmp_path):
    """The words of a filtering."""
    words = ["filter", pairs, "--model", encoder_folder, "--shard", "1000"]
    return [*words, "--work", tmp_path / "work", "--runner", "loop"]


def lines(out: str, title: str) -> list[dict[str, str]]:
    """The rows of the table under a title."""
    after = out.split(title)[1].splitlines()[1:]
    header, found = cells(after[0]), []
    for line in after[1:]:
        row = cells(line)
        if len(row) != len(header):
            break
        found.append(dict(zip(header, row, strict=True)))
    return found


def test_pairs_are_written_counted_and_ready_for_a_training(tercet, start, tmp_path):
    out = tmp_path / "out"
    ended = tercet(*start, "--out", out, "--k", "3")
    assert ended.status == 0
    counted = lines(ended.out, "which rule dropped them")
    ranked = lines(ended.out, "how many each k keeps")
    report = json.loads((out / "report.json").read_text())["sources"]
    for row, levels, written, lang in zip(counted, ranked, report, ("de", "en"), strict=True):
        kept = list(iter_examples(out / f"pairs/toys/lang={lang}/0000.parquet"))
        assert (row["lang"], row["pairs"], row["duplicate"]) == (lang, "13", "1")
        assert row["kept"] == str(len(kept)) == levels["3"] == str(written["kept"])
        assert row["dropped"] == f"{1 - len(kept) / 13:.1%}"
        assert (levels["ranked"], levels["shards"], levels["of"], levels["k"]) == (
            "12",
            "1",
            "12",
            "3",
        )
        assert {example.lang for example in kept} == {lang}
        assert {example.task for example in kept} == {"toys"}
        assert pq.read_table(out / f"verdicts/toys/lang={lang}/rules.parquet").num_rows == 1
    assert "shards are smaller than 1,000: toys de 12, toys en 12; the same rank" in ended.err


def test_a_finished_command_says_so_and_loads_nothing(tercet, start, tmp_path, monkeypatch):
    first = tercet(*start, "--out", tmp_path / "out")
    monkeypatch.setattr("tercet.curate.filtering.judge.Judge.load", None)
    again = tercet(*start, "--out", tmp_path / "out")
    assert (again.status, again.out) == (0, first.out)
    assert f"{tmp_path / 'out'}: has finished already" in again.err


def test_another_k_takes_another_folder_and_the_ranks_that_are_there(
    tercet, refused, start, tmp_path, monkeypatch
):
    tercet(*start, "--out", tmp_path / "out")
    said = refused(*start, "--out", tmp_path / "out", "--k", "1")
    assert said.startswith(
        f"{tmp_path / 'out'}: was made with different k (20); choose another --out"
    )
    monkeypatch.setattr("tercet.curate.filtering.judge.StoredVectors.shard", None)
    assert tercet(*start, "--out", tmp_path / "more", "--k", "1").status == 0


def test_a_report_is_drawn(tercet, start, tmp_path):
    pytest.importorskip("matplotlib")
    share = ["--top-share", "0.3"]
    ended = tercet(*start, "--out", tmp_path / "out", "--plot", tmp_path / "a.png", *share)
    assert ended.status == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    again = tercet(*start, "--out", tmp_path / "out", "--top-share", "0.3")
    assert again.status == 0 and "has finished already" in again.err


def test_presets_are_those_of_the_papers(tercet, pairs, encoder_folder, tmp_path):
    words = ["filter", pairs, "--model", encoder_folder, "--work", tmp_path / "work"]
    words += ["--runner", "loop"]
    for preset, k in (("arctic", "20"), ("e5", "2"), ("nomic", "2")):
        ended = tercet(*words, "--out", tmp_path / preset, "--preset", preset)
        assert lines(ended.out, "how many each k keeps")[0]["k"] == k
        size = "3,000,000" if preset == "arctic" else "1,000,000"
        assert f"shards are smaller than {size}:" in ended.err


def test_rules_have_flags(tercet, start, tmp_path):
    numbers = ["--min-characters", "5", "24", "--max-characters", "7", "36", "--letters", "0.9"]
    ended = tercet(*start, "--out", tmp_path / "out", *numbers, "--without", "duplicate")
    row = lines(ended.out, "which rule dropped them")[0]
    assert row["short"] == str(sum(len(t.split()[-1]) < 5 or len(t) < 24 for t in SENTENCES))
    assert row["duplicate"] == "0" and int(row["long"]) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "0"], "k and shard must be at least 1; got k=0"),
        (["--min-characters", "3"], "Option '--min-characters' requires 2 arguments"),
        (
            ["--without", "spam"],
            "without must name rules of same, short, long, letters, script, duplicate; got 'spam'",
        ),
        (["--top-share", "2"], "top_share must be between 0 and 1; got 2"),
        (["--letters", "1", "--min-characters", "99", "99"], "no pair is left by the rules: short"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(refused, start, tmp_path, words, said):
    assert said in refused(*start, "--out", tmp_path / "out", *words)


def test_a_folder_that_is_read_or_holds_other_things_is_not_written_to(refused, start, tmp_path):
    assert "is or contains the input" in refused(*start, "--out", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    said = refused(*start, "--out", tmp_path / "mine")
    assert said.startswith(
        f"{tmp_path / 'mine'}: is not a folder of filtered pairs and would be overwritten"
    )


def test_a_model_or_a_file_that_is_not_there_is_named(refused, start, tmp_path):
    said = refused(*start, "--out", tmp_path / "out", "--model", tmp_path / "nothing")
    assert "nothing" in said
    said = refused("filter", tmp_path / "no.jsonl", "--out", tmp_path / "other")
    assert said == f"{tmp_path / 'no.jsonl'}: no such file"


def test_a_source_that_has_changed_asks_for_another_folder(tercet, refused, start, pairs, tmp_path):
    tercet(*start, "--out", tmp_path / "out")
    os.utime(pairs, (1, 1))
    assert "was made with different files;" in refused(*start, "--out", tmp_path / "out")


def test_a_command_that_ranked_nothing_leaves_the_folder_to_the_next(tercet, start, tmp_path):
    out = tmp_path / "out"
    assert (
        tercet(*start, "--out", out, "--letters", "1", "--min-characters", "99", "99").status == 2
    )
    assert tercet(*start, "--out", out, "--without", "duplicate").status == 0
    assert not list((out / "verdicts").rglob("rules.parquet"))


def test_a_folder_is_filtered_by_source_and_language_and_its_output_is_one(
    tercet, encoder_folder, tmp_path
):
    for name in ("news", "web"):
        (tmp_path / "data" / name / "lang=de").mkdir(parents=True)
        rows = [{"query": f"{name} {text}", "positives": [text]} for text in SENTENCES]
        write(tmp_path / "data" / name / "lang=de" / "1.jsonl", *rows[:6])
        write(tmp_path / "data" / name / "2.jsonl", *rows[6:])
    words = ["--model", encoder_folder, "--work", tmp_path / "work", "--runner", "loop"]
    ended = tercet("filter", tmp_path / "data", *words, "--out", tmp_path / "out")
    found = lines(ended.out, "which rule dropped them")
    assert sorted((row["source"], row["lang"], row["kept"]) for row in found) == [
        ("news", "-", "6"), ("news", "de", "6"), ("web", "-", "6"), ("web", "de", "6"),
    ]  # fmt: skip
    sources = open_sources(tmp_path / "out/pairs")
    assert [source.name for source in sources] == ["news", "news/de", "web", "web/de"]
    assert {len(source) for source in sources} == {6}
