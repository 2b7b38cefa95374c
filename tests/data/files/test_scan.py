import logging
import os
from pathlib import Path

import numpy as np
import pytest

from tercet.data.files import scan as scanning
from tercet.data.files.folders import open_sources
from tercet.data.files.sources import write_examples
from tercet.types import Example


def rows(count, lang="de", begin=0):
    return [Example(f"q {i}", (f"p {i}",), lang=lang) for i in range(begin, begin + count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scanning, "LARGE_BYTES", 0)
    monkeypatch.setattr(scanning, "LARGE_ROWS", 0)
    write_examples(tmp_path / "s" / "x" / "1.jsonl", [*rows(5), *rows(3, "fr")])
    write_examples(tmp_path / "s" / "x" / "2.parquet", [*rows(2, "fr", 3), *rows(4, "de", 5)])
    return tmp_path / "s"


@pytest.fixture
def read(monkeypatch):
    """The files that were read from end to end."""
    names: list[str] = []
    scan = scanning.scan

    def noted(path, *more):
        names.append(path.name)
        return scan(path, *more)

    monkeypatch.setattr(scanning, "scan", noted)
    return names


def facts_of(sources):
    return [
        (it.name, it.sizes.tolist(), it.blocks.tolist(), it.fingerprint, it.without_negatives)
        for it in sources
    ]


def test_a_known_file_is_not_read_again_and_gives_the_same_rows(folder, read):
    first = open_sources(folder)
    assert read == ["1.jsonl", "2.parquet"]
    again = open_sources(folder)
    assert read == ["1.jsonl", "2.parquet"]
    assert facts_of(again) == facts_of(first)
    german, french = again
    assert [it.query for it in german.examples(range(9))] == [f"q {i}" for i in range(9)]
    assert [it.query for it in french.examples([4, 0])] == ["q 4", "q 0"]


def test_what_is_known_is_mapped_and_not_held(folder):
    for source in open_sources(folder):
        assert isinstance(source.sizes, np.memmap)
    (alone,) = open_sources(folder / "x" / "1.jsonl")[:1]
    assert isinstance(alone.sizes, np.memmap)


@pytest.mark.parametrize("how", ["grown", "same size", "same size and time"])
def test_a_file_that_changed_is_read_again(folder, read, how):
    open_sources(folder)
    path = folder / "x" / "1.jsonl"
    status, content = path.stat(), path.read_bytes()
    if how == "grown":
        write_examples(path, [*rows(5), *rows(4, "fr")])
    else:
        path.write_bytes(content.replace(b"q 1", b"q 9"))
    if how == "same size and time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    read.clear()
    german, french = open_sources(folder)
    assert read == ["1.jsonl"]
    assert len(french) == (6 if how == "grown" else 5)
    assert german.examples([1])[0].query == ("q 1" if how == "grown" else "q 9")


@pytest.mark.parametrize("name", ["about.json", "0-where.npy", "1-sizes.npy"])
def test_a_damaged_entry_is_made_again(folder, read, name):
    before = facts_of(open_sources(folder))
    cache = Path(os.environ["TERCET_CACHE"]) / "sources"
    for path in cache.glob(f"*/{name}"):
        path.write_bytes(path.read_bytes()[:30])
    read.clear()
    assert facts_of(open_sources(folder)) == before
    assert read == ["1.jsonl", "2.parquet"]


def test_a_cache_that_cannot_be_written_is_reported_and_done_without(folder, monkeypatch, caplog):
    before = facts_of(open_sources(folder))
    (folder / "file").touch()
    monkeypatch.setenv("TERCET_CACHE", str(folder / "file"))
    with caplog.at_level(logging.WARNING):
        assert facts_of(open_sources(folder / "x")[:0]) == []
        assert facts_of(open_sources(folder)) == before
    assert any("will be read again next time" in record.getMessage() for record in caplog.records)


def test_small_files_leave_nothing_in_the_cache(folder, monkeypatch, read):
    monkeypatch.setattr(scanning, "LARGE_BYTES", 1 << 23)
    monkeypatch.setattr(scanning, "LARGE_ROWS", 1 << 20)
    open_sources(folder)
    open_sources(folder)
    assert len(read) == 4
    assert not (Path(os.environ["TERCET_CACHE"]) / "sources").exists()
