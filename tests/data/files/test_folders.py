import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files import readers, sources
from tercet.data.files.folders import find_groups, open_sources, shard_examples
from tercet.data.files.sources import open_source, write_examples
from tercet.data.files.texts import text_format
from tercet.errors import DataError
from tercet.types import Example


def rows_of(name, count, lang="", begin=0):
    return [
        Example(f"{name} {lang} {i}", (f"answer {i}",), lang=lang)
        for i in range(begin, begin + count)
    ]


@pytest.fixture
def folder(tmp_path):
    """Two files, a folder of shards of both kinds, and one of languages by path."""
    base = tmp_path / "sources"
    write_examples(base / "nq.jsonl", rows_of("nq", 5))
    mixed = [
        row
        for pair in zip(rows_of("w", 4, "de"), rows_of("w", 4, "fr"), strict=True)
        for row in pair
    ]
    write_examples(base / "wiki.parquet", [*mixed, *rows_of("w", 2)])
    write_examples(base / "news" / "b.jsonl", rows_of("news", 3, "de", begin=2))
    write_examples(base / "news" / "a.parquet", rows_of("news", 2, "de"))
    write_examples(base / "news" / "2024" / "a.jsonl", rows_of("news", 4, "en"))
    write_examples(base / "faq" / "lang=pl" / "1.jsonl", rows_of("faq", 3))
    write_examples(
        base / "faq" / "lang=pt-BR" / "1.jsonl", [*rows_of("faq", 2), *rows_of("f", 1, "es")]
    )
    return base


def by_name(found):
    return {source.name: source for source in found}


def test_each_child_of_a_folder_is_a_source_and_each_language_one_of_its_own(folder):
    found = by_name(open_sources(folder))
    assert {name: (len(it), it.lang, it.task) for name, it in found.items()} == {
        "nq": (5, "", "nq"),
        "wiki": (2, "", "wiki"),
        "wiki/de": (4, "de", "wiki"),
        "wiki/fr": (4, "fr", "wiki"),
        "news/de": (5, "de", "news"),
        "news/en": (4, "en", "news"),
        "faq/pl": (3, "pl", "faq"),
        "faq/pt-BR": (2, "pt-BR", "faq"),
        "faq/es": (1, "es", "faq"),  # what a row says goes before its path
    }
    assert found["faq/pl"].path == folder / "faq"
    assert found["wiki/de"].path == folder / "wiki.parquet"


def test_the_rows_of_a_language_are_read_in_any_order_across_shards(folder):
    found = by_name(open_sources(folder))
    news = found["news/de"]  # a.parquet before b.jsonl
    assert [example.query for example in news.examples([4, 0, 2, 1, 4])] == [
        f"news de {i}" for i in (4, 0, 2, 1, 4)
    ]
    assert [example.query for example in found["wiki/fr"].examples([3, 0])] == ["w fr 3", "w fr 0"]
    assert [(e.lang, e.task) for e in found["faq/pl"].examples([1])] == [("pl", "faq")]
    assert news.sizes.tolist() == [9] * 5


def test_all_rows_of_a_folder_come_once_with_task_and_language(folder):
    rows = [row for it in find_groups(folder) for each in it.shards for row in shard_examples(each)]
    opened = [each for it in open_sources(folder) for each in it.examples(range(len(it)))]
    assert sorted(map(repr, rows)) == sorted(map(repr, opened))
    assert len(rows) == 30


def test_a_file_is_a_source_and_one_without_languages_is_as_it_always_was(folder):
    (only,) = open_sources(folder / "nq.jsonl", weight=2)
    plain = open_source(folder / "nq.jsonl", weight=2)
    assert (only.name, only.weight, only.fingerprint) == ("nq", 2, plain.fingerprint)
    assert only.sizes.tolist() == plain.sizes.tolist()
    assert only.blocks.tolist() == plain.blocks.tolist()


def test_a_folder_of_languages_is_one_source(folder):
    assert [source.name for source in open_sources(folder / "faq")] == [
        "faq/es",
        "faq/pl",
        "faq/pt-BR",
    ]


def test_the_row_groups_of_all_shards_are_the_blocks_of_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_PER_GROUP", 4)
    mixed = [
        row
        for pair in zip(rows_of("x", 6, "de"), rows_of("x", 6, "fr"), strict=True)
        for row in pair
    ]
    write_examples(tmp_path / "s" / "x" / "1.parquet", mixed)
    write_examples(tmp_path / "s" / "x" / "2.parquet", rows_of("x", 9, "de", begin=6))
    german, french = open_sources(tmp_path / "s")
    assert german.blocks.tolist() == [0, 2, 4, 6, 10, 14]
    assert french.blocks.tolist() == [0, 2, 4]
    assert german.window == 8
    queries = [example.query for example in german.examples(range(15))]
    assert queries == [f"x de {i}" for i in range(15)]


def test_a_language_that_a_row_group_lacks_has_no_block_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_PER_GROUP", 4)
    rows = [*rows_of("x", 4, "de"), *rows_of("x", 4, "fr"), *rows_of("x", 2, "de", begin=4)]
    write_examples(tmp_path / "x.parquet", rows)
    german, french = open_sources(tmp_path / "x.parquet")
    assert german.blocks.tolist() == [0, 4]
    assert french.blocks.tolist() == [0]
    assert [example.query for example in german.examples([5, 3])] == ["x de 5", "x de 3"]


def test_long_files_of_lines_are_shuffled_in_blocks_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LINES_BYTES", 300)
    write_examples(tmp_path / "a.jsonl", rows_of("a", 20))
    source = open_source(tmp_path / "a.jsonl")
    line = len((tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert source.window == 8 and len(source.blocks) > 2
    assert source.blocks[:2].tolist() == [0, -(-300 // line)]
    monkeypatch.undo()
    assert open_source(tmp_path / "a.jsonl").blocks.tolist() == [0]


def test_the_fingerprint_of_a_source_follows_its_own_language_alone(folder):
    before = by_name(open_sources(folder))
    write_examples(folder / "news" / "b.jsonl", rows_of("news", 4, "de", begin=2))
    after = by_name(open_sources(folder))
    changed = {name for name in before if before[name].fingerprint != after[name].fingerprint}
    assert changed == {"news/de"}


def test_a_shard_that_changed_is_not_read(folder):
    news = by_name(open_sources(folder))["news/de"]
    write_examples(folder / "news" / "b.jsonl", rows_of("other", 3, "de"))
    assert news.examples([1])[0].query == "news de 1"  # of the other shard
    with pytest.raises(DataError, match=r"b.jsonl: has changed since it was opened"):
        news.examples([1, 3])


def test_an_error_names_the_shard_and_the_line(folder):
    (folder / "news" / "2024" / "b.jsonl").write_text('{"query": "q", "positives": ["p"]}\n{}\n')
    with pytest.raises(DataError) as caught:
        open_sources(folder)
    assert str(caught.value).startswith(f'{folder}/news/2024/b.jsonl:2: "query" is missing')


def test_two_sources_of_one_name_are_refused(folder):
    write_examples(folder / "nq.parquet", rows_of("nq", 1))
    with pytest.raises(DataError) as caught:
        open_sources(folder)
    assert str(caught.value) == (
        f"{folder}: two sources are called 'nq'; rename one of them: nq.jsonl, nq.parquet"
    )


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"empty: is a folder that holds no .jsonl, .csv, .tsv or .parquet file"
    ):
        open_sources(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        open_sources(tmp_path / "lost")


def test_files_of_other_types_are_reported_and_hidden_ones_skipped(folder, caplog):
    for name in ("README.md", ".cache.jsonl", "_SUCCESS"):
        (folder / name).write_text("not read")
    (folder / "news" / "notes.txt").write_text("not read")
    with caplog.at_level(logging.WARNING):
        assert len(open_sources(folder)) == 9
    (record,) = caplog.records
    assert (
        record.getMessage() == f"{folder}: skipped files of other types: README.md, news/notes.txt"
    )


def test_languages_that_are_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tercet.data.files.scan.MAX_LANGUAGES", 3)
    rows = [Example(f"q{i}", ("p",), lang=f"text {i}") for i in range(4)]
    write_examples(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r'a.jsonl:4: "lang" names more than 3 languages'):
        open_sources(tmp_path / "a.jsonl")


def test_prompts_and_missing_negatives_are_those_of_all_shards(tmp_path):
    base = tmp_path / "s"
    some = [Example("q", ("p",), ("n",), query_prompt=""), Example("r", ("p",))]
    write_examples(base / "x" / "1.jsonl", some)
    write_examples(base / "x" / "2.jsonl", [Example("s", ("p",), query_prompt="Ask: ")])
    (source,) = open_sources(base)
    assert source.prompts == {"x": {"query": "Ask: "}}
    assert source.without_negatives == 2


def test_progress_rises_to_one_over_all_shards(folder):
    reported = []
    open_sources(folder, progress=reported.append)
    assert reported == sorted(reported) and reported[-1] == pytest.approx(1.0)
    assert len(reported) == 7


def test_texts_are_opened_from_folders_too(tmp_path):
    (tmp_path / "t" / "books").mkdir(parents=True)
    (tmp_path / "t" / "books" / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "t" / "books" / "b.jsonl").write_text('{"text": "three"}\n')
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "t" / "web.parquet")
    books, web = open_sources(tmp_path / "t", record_format=text_format())
    assert [it.query for it in books.examples(range(3))] == ["one", "two", "three"]
    assert [it.query for it in web.examples([0])] == ["four"]
    assert books.sizes.dtype == np.int32
    assert [group.name for group in find_groups(tmp_path / "t")] == ["books", "web"]
