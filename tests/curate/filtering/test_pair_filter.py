from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tercet.curate.filtering import judge as judging
from tercet.curate.filtering.judge import FilterFolders, Filtering, Judge, shards_of
from tercet.curate.filtering.pair_filter import (
    filter_sources,
    finished,
    settings_of,
    write_report,
)
from tercet.curate.filtering.pair_rules import PairRules
from tercet.curate.filtering.screen import ScreenedPairs, ScreenJob, SourceLanguage, screen_sources
from tercet.data.files.sources import Source, iter_examples, open_source, write_examples
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.types import Example
from tests.damage import unnoticed
from tests.toy import SENTENCES

EXAMPLES = [
    Example(f"{text.split()[-1]} {n}", (f"{text} {n}",), lang=lang, task="toys", negatives=("x",))
    for n in range(3)
    for lang in ("en", "de")
    for text in SENTENCES
]


@pytest.fixture
def source(tmp_path) -> Source:
    write_examples(tmp_path / "toys.parquet", EXAMPLES)
    return open_source(tmp_path / "toys.parquet")


@pytest.fixture
def run(tmp_path, encoder_folder):
    """Filter sources; the reports by language."""

    def filtered(source: Source, out: str = "out", **settings):
        given: dict[str, Any] = {"k": 2, "shard": 1000, **settings}
        filtering = Filtering(**given)
        places = FilterFolders(out=tmp_path / out, work=tmp_path / "work")
        judge = Judge(model=str(encoder_folder))
        reports = filter_sources([source], judge, filtering, places)
        return {report["lang"]: report for report in reports}

    return filtered


def written(folder: Path, lang: str) -> list[Example]:
    files = sorted((folder / "pairs/toys" / f"lang={lang}").glob("*.parquet"))
    return [example for file in files for example in iter_examples(file)]


def verdicts(folder: Path, lang: str) -> list[dict]:
    files = sorted((folder / "verdicts/toys" / f"lang={lang}").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def by_hand(model: Path, examples: Sequence[Example]) -> list[int]:
    """The rank of each example's document among all."""
    embedder = Embedder.load(model)
    queries = embedder.encode([example.query for example in examples], "query")
    documents = embedder.encode([example.positives[0] for example in examples], "document")
    scores = queries @ documents.T
    return (1 + (scores > scores.diagonal()[:, None] + 1e-6).sum(axis=1)).tolist()


def test_a_pair_stays_when_its_rank_among_its_language_is_good(
    run, source, tmp_path, encoder_folder
):
    reports = run(source)
    for lang in ("en", "de"):
        own = [example for example in EXAMPLES if example.lang == lang]
        ranks = by_hand(encoder_folder, own)
        found = verdicts(tmp_path / "out", lang)
        assert [row["rank"] for row in found] == ranks
        assert [row["keep"] for row in found] == [rank <= 2 for rank in ranks]
        assert {row["reason"] for row in found} == {"", "rank"}
        kept = [example for example, rank in zip(own, ranks, strict=True) if rank <= 2]
        assert written(tmp_path / "out", lang) == kept and 0 < len(kept) < len(own)
        report = reports[lang]
        assert (report["pairs"], report["kept"], report["shard"]) == (36, len(kept), 36)
        assert report["levels"] == {
            str(k): sum(rank <= k for rank in ranks) for k in (1, 2, 3, 5, 10, 20, 30)
        }


def test_files_hold_the_rank_and_the_score_of_each_positive(run, source, tmp_path):
    run(source)
    table = pq.read_table(tmp_path / "out/pairs/toys/lang=en/0000.parquet").to_pylist()
    kept = [row for row in verdicts(tmp_path / "out", "en") if row["keep"]]
    assert [row["rank"] for row in table] == [[row["rank"]] for row in kept]
    assert [row["score"] for row in table] == [[row["score"]] for row in kept]
    assert {row["lang"] for row in table} == {"en"} and {row["task"] for row in table} == {"toys"}


def test_an_example_keeps_the_positives_that_pass_and_their_scores(run, tmp_path):
    far = "chess against a strong opponent"
    rows = [
        Example(text, (text + " now", far + " here"), positive_scores=(1.0, 0.5))
        for text in SENTENCES
    ]
    write_examples(tmp_path / "toys.jsonl", rows)
    report = run(open_source(tmp_path / "toys.jsonl"), k=1)[""]
    found = [
        example
        for file in (tmp_path / "out/pairs/toys").glob("*.parquet")
        for example in iter_examples(file)
    ]
    assert report["kept"] == sum(len(example.positives) for example in found)
    singles = [example for example in found if len(example.positives) == 1]
    assert singles
    for example in singles:
        first = example.positives[0].endswith("now")
        assert example.positive_scores == ((1.0,) if first else (0.5,))


def test_another_k_embeds_nothing_again(run, source, tmp_path, monkeypatch):
    run(source)
    monkeypatch.setattr(judging.StoredVectors, "shard", None)  # a call of it would break
    again = run(source, out="more", k=5)
    assert again["en"]["kept"] == again["en"]["levels"]["5"]
    assert len(written(tmp_path / "more", "en")) == again["en"]["kept"]


def test_vectors_are_gone_when_a_shard_is_done(run, source, tmp_path):
    run(source)
    assert not list((tmp_path / "work").rglob("*.npy"))
    assert not list((tmp_path / "out").rglob("*.np?"))


def test_a_run_that_was_killed_goes_on_with_the_vectors_that_are_there(
    run, source, tmp_path, monkeypatch
):
    made: list[str] = []
    shard = judging.StoredVectors.shard

    def stopping(self, texts, role, prompts):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(role)
        return shard(self, texts, role, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "SHARD", 16)
        patch.setattr(judging.StoredVectors, "shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    assert len(list((tmp_path / "work").rglob("*.npy"))) == 3
    encoded: list[int] = []
    encode = Embedder.encode
    with monkeypatch.context() as patch:
        patch.setattr(judging, "SHARD", 16)
        patch.setattr(
            Embedder,
            "encode",
            lambda self, texts, role: encoded.append(len(texts)) or encode(self, texts, role),
        )
        run(source)
    # Of the first language three blocks of 16, 16 and 4, each twice: three of six were there.
    assert sum(encoded) == 2 * 72 - 48
    fresh = run(source, out="fresh")
    assert written(tmp_path / "out", "en") == written(tmp_path / "fresh", "en")
    assert fresh["de"]["kept"] == len(written(tmp_path / "out", "de"))


def test_a_pair_that_comes_again_and_pairs_that_break_a_rule_are_reported_but_not_ranked(
    run, tmp_path
):
    rows = [
        Example("the moon", ("a language of the moon", "The  Moon"), lang="en"),
        Example("The Moon", ("A language of the moon",), lang="en"),
        Example("the moon", ("a language of the moon",), lang="de"),  # another source and language
        Example("a map", ("rivers and mountains",), lang="en"),
    ]
    write_examples(tmp_path / "toys.jsonl", rows)
    reports = run(open_source(tmp_path / "toys.jsonl"))
    assert reports["en"]["dropped"] == {
        "same": 1, "short": 0, "long": 0, "letters": 0, "script": 0, "duplicate": 1, "rank": 0,
    }  # fmt: skip
    assert (reports["en"]["pairs"], reports["en"]["ranked"], reports["de"]["ranked"]) == (4, 2, 1)
    found = {(row["row"], row["positive"]): row for row in verdicts(tmp_path / "out", "en")}
    assert {place: row["reason"] for place, row in found.items()} == {
        (0, 0): "", (0, 1): "same", (1, 0): "duplicate", (3, 0): "",
    }  # fmt: skip
    assert found[0, 1]["rank"] is None and not found[0, 1]["keep"]
    assert [example.positives for example in written(tmp_path / "out", "en")] == [
        ("a language of the moon",),
        ("rivers and mountains",),
    ]


def test_no_pair_left_is_an_error_that_says_which_rules(run, tmp_path):
    write_examples(tmp_path / "toys.jsonl", [Example("a map", ("A map",)), Example("x", ("yy",))])
    with pytest.raises(RecipeError, match="no pair is left by the rules: same 1, short 1;"):
        run(open_source(tmp_path / "toys.jsonl"))


def test_a_language_cannot_lead_out_of_the_folder():
    assert SourceLanguage("news", "../../etc").folder == "news/lang=..%2F..%2Fetc"
    assert SourceLanguage("news/de", "de").folder == "news/lang=de"


def screened_of(count: int, per_row: int = 1) -> ScreenedPairs:
    return ScreenedPairs(
        SourceLanguage("news", "de"),
        np.repeat(np.arange(count), per_row),
        np.tile(np.arange(per_row, dtype=np.int32), count),
        np.zeros(count * per_row, np.int8),
        np.arange(count * per_row, dtype=np.uint64),
    )


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1000, [1000]), (1499, [1499]), (1501, [751, 750]), (3100, [1034, 1033, 1033])],
)
def test_shards_are_of_equal_size(count, sizes):
    shards = shards_of(screened_of(count), Filtering(shard=1000))
    assert [len(shard.rows) for shard in shards] == sizes
    assert sorted(np.concatenate([shard.rows for shard in shards])) == list(range(count))


def test_shards_depend_on_the_seed_and_keep_the_positives_of_a_row_together():
    found = screened_of(50, per_row=3)
    shards = shards_of(found, Filtering(shard=70, seed=1))
    assert [shard.digest for shard in shards] == [
        shard.digest for shard in shards_of(found, Filtering(shard=70, seed=1))
    ]
    other = shards_of(found, Filtering(shard=70, seed=2))
    assert shards[0].digest != other[0].digest
    assert not set(shards[0].rows) & set(shards[1].rows)
    assert (np.diff(shards[0].rows) >= 0).all()


def test_a_share_of_the_shard_takes_the_place_of_k():
    share = Filtering(top_share=0.002)
    assert [share.level(size) for size in (100, 1000, 10_000)] == [1, 2, 20]
    assert Filtering(k=5).level(100) == 5


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"shard": 0}, {"k": 5, "shard": 5}, {"top_share": 1.0}]
)
def test_numbers_that_keep_nothing_or_all_are_refused(settings):
    with pytest.raises(RecipeError, match=r"must be"):
        Filtering(**settings)


def test_the_rules_are_applied_once_and_again_for_other_numbers(source, tmp_path):
    def files(rules: PairRules) -> int:
        screening = ScreenJob(sources={"toys": source}, rules=rules, work=tmp_path)
        assert (
            sum(len(found.rows) for found in screen_sources(screening, tmp_path / "manifest")) == 72
        )
        return len(list((tmp_path / "rules").iterdir()))

    assert files(PairRules()) == files(PairRules()) == 1
    assert files(PairRules(letters=0.5)) == 2


@pytest.mark.slow
def test_damage_to_a_finished_filter_is_mended_by_the_same_command(
    source, tmp_path, encoder_folder
):
    out, work = tmp_path / "out", tmp_path / "work"
    filtering, judge = Filtering(k=2, shard=1000), Judge(model=str(encoder_folder))
    settings = settings_of([source.path], judge, filtering)

    def run() -> tuple[Any, ...]:
        reports = finished(out, settings)
        if reports is None:
            folders = FilterFolders(out=out, work=work)
            reports = filter_sources([source], judge, filtering, folders)
            write_report(out, reports)
        langs = ("en", "de")
        return reports, [written(out, lang) for lang in langs], [verdicts(out, x) for x in langs]

    def again() -> tuple[Any, ...]:
        run()
        (out / "report.json").unlink()  # so that the work folder is read
        return run()

    first = run()
    for folder, ask in ((out, run), (work, again)):
        assert not unnoticed(
            folder, ask=ask, same=lambda found: found == first, refusals=RecipeError, count=2
        )
