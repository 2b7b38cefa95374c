"""Standard input, and data sets of the hub by a file system that only pretends to be one."""

import gzip
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tercet.data.files import inputs
from tercet.data.files.documents import read_documents
from tercet.data.files.folders import open_sources
from tercet.data.files.inputs import local_path
from tercet.data.files.sources import open_source
from tercet.errors import DataError, StorageError
from tercet.types import Example

LINES = b'{"query": "a", "positives": ["b"]}\n{"query": "c", "positives": ["d"]}\n'
TABLE = pa.table({"query": ["a", "c"], "positives": [["b"], ["d"]]})


def parquet(table=TABLE):
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def piped(content, code):
    return subprocess.run(
        [sys.executable, "-c", code], input=content, capture_output=True, check=False
    )


READ = """
from tercet import open_source
from tercet.data.files.inputs import local_path
from tercet.data.report import check_data
source = open_source("-")
assert open_source("-").fingerprint == source.fingerprint
assert not check_data([local_path("-")]).errors
print(source.name, source.examples([1])[0].positives[0], source.path)
"""


@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES, mtime=0), parquet()])
def test_standard_input_is_read_as_often_as_needed_and_deleted_at_the_end(content):
    done = piped(content, READ)
    assert done.returncode == 0, done.stderr
    name, text, path = done.stdout.decode().split()
    assert (name, text) == ("standard-input", "d")
    assert not inputs.Path(path).parent.exists()


def test_errors_in_standard_input_name_its_lines():
    done = piped(LINES + b"{}\n", 'from tercet import open_source; open_source("-")')
    assert b'standard-input.jsonl:3: "query" is missing' in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", b"-: standard input is empty"), (b"x" * (1 << 25), b"-: a line is longer than 16,777")],
)
def test_standard_input_that_is_empty_or_endless_is_refused(content, said):
    done = piped(content, 'from tercet import open_source; open_source("-")')
    assert said in done.stderr


def test_a_terminal_is_no_standard_input(monkeypatch):
    inputs._standard_input.cache_clear()
    terminal = SimpleNamespace(buffer=io.BytesIO(), isatty=lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(DataError, match="-: standard input is the terminal; write"):
        local_path("-")


class Hub(MemoryFileSystem):
    """Files in memory under the names that the hub has them under."""

    protocol = "hf"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("hf://").strip("/")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "store", {})
    monkeypatch.setattr(Hub, "pseudo_dirs", [""])
    fsspec.register_implementation("hf", Hub, clobber=True)
    system = fsspec.filesystem("hf")
    opened = []
    real = Hub.open

    def counted(self, path, mode="rb", **kwargs):
        if mode == "rb":
            opened.append(path)
        return real(self, path, mode, **kwargs)

    monkeypatch.setattr(Hub, "open", counted)

    def put(name, content):
        with system.open(f"datasets/o/nq/{name}", "wb") as file:
            file.write(content)

    return SimpleNamespace(put=put, opened=opened)


def test_a_file_of_the_hub_is_downloaded_once(hub):
    hub.put("data/train.parquet", parquet())
    url = "hf://datasets/o/nq/data/train.parquet"
    assert open_source(url).examples([1]) == [Example("c", ("d",), task="train")]
    assert open_source(inputs.Path(url)).name == "train"  # a Path has one slash of the two
    assert hub.opened == ["datasets/o/nq/data/train.parquet"]
    hub.put("data/train.parquet", parquet(TABLE.slice(1).append_column("x", pa.array([["y"]]))))
    assert len(open_source(url)) == 1  # another state of the file


def test_files_of_a_pattern_are_one_source(hub):
    hub.put("en/a.jsonl.gz", gzip.compress(LINES, mtime=0))
    hub.put("de/a.jsonl.gz", gzip.compress(LINES, mtime=0))
    (source,) = open_sources("hf://datasets/o/nq/*/a.jsonl.gz")
    assert (source.name, len(source)) == ("nq", 4)


def test_documents_come_from_the_hub_too(hub):
    hub.put("corpus.jsonl", json.dumps({"_id": "7", "text": "t"}).encode())
    assert [it.id for it in read_documents("hf://datasets/o/nq/corpus.jsonl")] == ["7"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://datasets/o/nq/lost.jsonl", "cannot be read from the hub: .*check the name and the"),
        ("hf://datasets/o/nq/*.csv", "matches no file"),
        ("hf://datasets/o/nq", "is a folder; name a file, or several with"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, url, said):
    hub.put("a.jsonl", LINES)
    with pytest.raises(DataError, match=f"^{url[:10]}.*{said}"):
        open_source(url)


def test_a_download_that_breaks_off_leaves_nothing(hub, monkeypatch, tmp_path):
    hub.put("a.jsonl", LINES)
    monkeypatch.setattr("tercet.data.files.inputs._AT_ONCE", 10)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", broken_after(2))
    with pytest.raises(DataError, match="cannot be read from the hub: connection lost"):
        open_source("hf://datasets/o/nq/a.jsonl")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("a.jsonl*"))


def broken_after(times):
    left = [times]

    def read(self, size=-1):
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionError("connection lost")
        return io.BytesIO.read(self, size)

    return read


def test_a_full_disk_is_named(hub, monkeypatch, tmp_path):
    hub.put("a.jsonl", LINES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="could not be written"):
        open_source("hf://datasets/o/nq/a.jsonl")
