import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.files.beir import read_folder
from tercet.data.files.documents import read_documents
from tercet.data.files.folders import open_sources
from tercet.data.files.sources import open_source
from tercet.data.files.texts import read_texts
from tercet.data.report import check_data
from tercet.errors import DataError, IndexFolderError, ModelError, TercetError
from tercet.files.artifacts import fingerprint_of_file, read_json
from tercet.files.limits import MAX_RECORD_BYTES, unreadable_inside
from tercet.files.records import iter_lines
from tercet.models.embedder import Embedder
from tercet.search.text_index import IndexOptions, index, open_index
from tercet.training import checkpoint
from tests.toy import SENTENCES

GOOD = '{"query": "a", "positives": ["b"]}\n'
REMEDY = "write what it gives to a file and name that"


@pytest.fixture(autouse=True)
def in_time():
    """Nothing here may wait for a pipe."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


@pytest.fixture
def pipe(tmp_path):
    def made(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    return made


@pytest.mark.parametrize(
    "read",
    [
        open_source,
        lambda path: list(read_documents(path)),
        lambda path: list(iter_lines(path)),
        lambda path: list(read_texts(path)),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_pipe_a_socket_or_a_device_is_refused_and_not_waited_for(pipe, tmp_path, read, suffix):
    path = pipe(f"a{suffix}")
    with pytest.raises(DataError, match=f"a{suffix}: is a pipe, not a file; {REMEDY}"):
        read(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(DataError, match=f"a{suffix}: is a socket, not a file"):
            read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"a{suffix}: is a device, not a file"):
        read(path)


def test_a_pipe_inside_a_folder_of_data_is_named(pipe, tmp_path):
    path = pipe("data/news/1.jsonl")
    (report,) = check_data([tmp_path / "data"]).errors
    assert report == f"{path}: is a pipe, not a file; {REMEDY}"
    with pytest.raises(DataError, match=r"data/news/1\.jsonl: is a pipe"):
        open_sources(tmp_path / "data")
    (tmp_path / "set").mkdir()
    shutil.move(path, tmp_path / "set/corpus.jsonl")
    with pytest.raises(TercetError, match=r"corpus\.jsonl"):
        read_folder(tmp_path / "set")


def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(GOOD)
    (folder / "b.jsonl").symlink_to("gone/b.jsonl")
    (error,) = check_data([folder]).errors
    assert error == f"{folder}/b.jsonl: is a link to gone/b.jsonl, which does not exist"
    with pytest.raises(DataError, match=r"b.jsonl: is a link to gone/b.jsonl, which does not"):
        open_sources(folder)


def test_a_link_to_a_folder_that_it_is_in_is_not_followed_for_ever(tmp_path):
    (tmp_path / "data/one").mkdir(parents=True)
    (tmp_path / "data/one/a.jsonl").write_text(GOOD)
    for name in ("loop", "more"):
        (tmp_path / f"data/one/{name}").symlink_to(tmp_path / "data")
    with pytest.raises(DataError, match="is a link to a folder that it is in; remove the link"):
        open_sources(tmp_path / "data")


@pytest.fixture(scope="module")
def model(encoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits") / "model"
    Embedder.load(encoder_folder).save(folder)
    return folder


@pytest.fixture
def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "tercet.json", "modules.json"]
)
def test_a_pipe_or_a_dead_link_inside_a_models_folder_is_refused(copied, name):
    path = copied / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match=f"{name}: is a pipe, not a file"):
        Embedder.load(copied)
    path.unlink()
    path.symlink_to("blobs/123")
    with pytest.raises(ModelError, match=f"{name}: is a link to blobs/123, which does not exist"):
        Embedder.load(copied)


@pytest.mark.parametrize(
    "name", ["index.json", "exact/manifest.json", "exact/segment-1/dense.npy", "exact/.lock"]
)
def test_a_pipe_inside_an_index_is_refused(model, tmp_path, name):
    documents = tmp_path / "docs.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    out = tmp_path / "index"
    index(lambda: read_documents(documents), str(model), out, IndexOptions())
    path = out / name
    if "segment" in name:
        path = next((out / "exact").glob("segment-*/*.npy"))
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(IndexFolderError, match="is a pipe, not a file"), open_index(out):
        pass


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_is_nested_too_deeply_is_an_error_in_every_file_of_a_model(copied, deep):
    refused = []
    for path in sorted(copied.rglob("*.json")):
        whole = path.read_text()
        path.write_text(deep)
        try:
            Embedder.load(copied)
        except ModelError as error:
            assert "\n" not in str(error)
            refused.append(path.name)
        path.write_text(whole)
    assert {"config.json", "tercet.json", "tokenizer.json"} <= set(refused)


def test_json_that_is_nested_too_deeply_is_a_value_error(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="JSON is nested too deeply"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers must be a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to 10,000"),
        ({"num_attention_heads": -4}, "got -4"),
        ({"hidden_size": 1_000_000_000}, "hidden_size must be a whole number from 1 to 1,000,000"),
        ({"hidden_size": "64"}, "got '64'"),
        ({"vocab_size": 10**12}, "vocab_size must be"),
        ({"num_hidden_layers": 900}, "config.json describes a network of"),
        ({"hidden_size": 64_000}, "config.json describes a network of"),
        ({"intermediate_size": 90_000_000}, "config.json describes a network of"),
        ({"max_position_embeddings": 900_000_000}, "config.json describes a network of"),
        ({"pad_token_id": 10**9}, "config.json describes no network"),
        ({"num_attention_heads": 7}, "cannot be loaded"),
    ],
)
def test_an_absurd_config_is_refused_before_weights_are_made(copied, changes, said):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=said):
        Embedder.load(copied)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_record_of_more_than_16_mib_is_refused_with_its_row(tmp_path, suffix):
    path, long = tmp_path / f"a{suffix}", "x" * (MAX_RECORD_BYTES + 1)
    if suffix == ".parquet":
        rows = [{"text": "a", "query": "a", "positives": ["b"]}, {"text": long, "query": long}]
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(GOOD + json.dumps({"query": long, "positives": ["b"]}) + "\n")
    with pytest.raises(DataError, match=f"a{suffix}:2: is longer than 16,777,216 bytes"):
        list(read_texts(path, "query"))
    if suffix != ".txt":
        assert ":2: is longer than 16,777,216 bytes" in check_data([path]).errors[0]


_BOMBS = """
import sys, resource
from pathlib import Path
import tercet.data.report as report
from tercet.data.files.sources import open_source
from tercet.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    (error,) = report.check_data([path]).errors
    try:
        open_source(path)
    except DataError as refused:
        assert str(refused) == error
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_small_parquet_files_of_huge_texts_are_refused_in_little_memory(tmp_path):
    """A text of 50 MB that 3,000 rows share, one of 12 MB, one in a list, and packed texts."""
    paths = []
    for name, size in {"query": 50_000_000, "lists": 50_000_000, "below": 12_000_000}.items():
        shared = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["x" * size])
        plain, bounds = pa.array(list(map(str, range(3000)))), pa.array(range(3001), pa.int32())
        query, inner = (shared, plain) if name == "query" else (plain, shared)
        table = pa.table({"query": query, "positives": pa.ListArray.from_arrays(bounds, inner)})
        paths.append(tmp_path / f"{name}.parquet")
        how = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
        pq.write_table(table, paths[-1], **how)
        assert paths[-1].stat().st_size < 20_000
    how = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["x" * 12_000_000])
    bounds = pa.array([0, 3000], pa.int32())
    table = pa.table({"query": ["a"], "positives": pa.ListArray.from_arrays(bounds, shared)})
    paths.append(tmp_path / "one.parquet")
    pq.write_table(table, paths[-1], **how)
    rows = [{"query": str(row), "positives": ["y" * 5_000_000]} for row in range(300)]
    paths.append(tmp_path / "packed.parquet")
    pq.write_table(pa.Table.from_pylist(rows), paths[-1], compression="zstd", use_dictionary=False)
    words = [sys.executable, "-c", _BOMBS, *map(str, paths)]
    *errors, grown = subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    for error, said in zip(
        errors,
        [
            "query.parquet:1: is longer than 16,777,216 bytes; split its text",
            "lists.parquet:1: is longer than 16,777,216 bytes; split its text",
            "unpacks to 12,288,0",
            "one.parquet:1: is longer than 16,777,216 bytes; split its text",
            "unpacks to 1,500,0",
        ],
        strict=True,
    ):
        assert said in error
    assert int(grown) < 600  # MiB


def test_rows_are_the_same_however_many_are_read_at_once(tmp_path, monkeypatch):
    rows = [
        {"query": f"q{row % 7}", "positives": [f"{row % 5} " * 300, "x"], "lang": "de"}
        for row in range(3000)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    wanted = open_source(path)
    assert wanted.examples([0, 2999, 700])[1].positives == ("4 " * 300, "x")
    from tercet.files import parquet as records

    monkeypatch.setattr(records, "BYTES_AT_ONCE", 2000)
    few = open_source(path)
    assert few.fingerprint == wanted.fingerprint and (few.sizes == wanted.sizes).all()


def test_a_pipe_beside_the_files_of_a_folder_leaves_its_fingerprint_alone(tmp_path):
    (tmp_path / "a").write_text("a")
    before = fingerprint_of_file(tmp_path)
    os.mkfifo(tmp_path / "b")
    assert fingerprint_of_file(tmp_path) == before


def test_a_checkpoint_that_lacks_keys_or_is_a_pipe_is_damaged(tmp_path):
    import torch

    path = tmp_path / "checkpoint.pt"
    for value in ({}, {"version": 1}, [1], {"what": {}, "version": 1, "progress": {"x": 1}}):
        torch.save(value, path)
        with pytest.raises(TercetError, match="this file of an earlier run is gone or damaged"):
            checkpoint.load(path, {})
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TercetError, match="this file of an earlier run is gone or damaged"):
        checkpoint.load(path, {})


def test_a_folder_that_another_process_drops_meanwhile_is_no_problem(tmp_path, monkeypatch):
    (tmp_path / "segment").mkdir()
    listed = Path.iterdir

    def dropped(folder: Path):
        if folder.name == "segment":
            folder.rmdir()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", dropped)
    assert unreadable_inside(tmp_path) is None
    assert not (tmp_path / "segment").exists()
