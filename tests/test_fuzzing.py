"""Arbitrary bytes, arbitrary JSON and mutated valid files: a value or a TercetError, nothing else.

A hang is a failure by the time limit of each input, growth by the memory after the last one.
"""

import gzip
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.curate.convert.arctic import TablesReport, examples_of_tables, write_tables
from tercet.curate.convert.flagembedding import FileLimits, convert_flag_rows, flag_set
from tercet.curate.jobs import job
from tercet.curate.synthesis.answers import answer_log
from tercet.curate.synthesis.endpoint import _answer_in
from tercet.curate.synthesis.generators import QuestionPrompt
from tercet.data.files.beir import read_folder
from tercet.data.files.conll import read_labelled
from tercet.data.files.documents import read_documents
from tercet.data.files.labelled import read_label_texts, read_labelled_texts
from tercet.data.files.similarity import SimilaritySet
from tercet.data.files.sources import open_source
from tercet.data.files.texts import open_texts, read_texts
from tercet.data.report import check_data
from tercet.errors import TercetError
from tercet.evaluate.insight.lookahead import read_triples
from tercet.evaluate.sets.label_sets import read_label_set
from tercet.files.arrays import read_vectors
from tercet.files.artifacts import KeptResults
from tercet.files.outputs import json_object
from tercet.models.embedder import Embedder
from tercet.models.formats.bge_m3_files import FlagRows
from tercet.models.formats.lora_adapters import _read_adapter
from tercet.models.formats.manifest import manifest
from tercet.models.formats.nv_embed import read_nv_embed
from tercet.models.formats.parts import settings_of
from tercet.models.network.loading import check_sizes
from tercet.search.engine.engine import Record
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.opening import about_index
from tercet.training import checkpoint, log, plan
from tercet.types import Example
from tercet.vectors import Vectors

# peft warns of what it does not know in a config, and reads the rest.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))  # of copies of packed files


SECONDS = 10  # for one input, on a machine that does other things
GROWTH = 300 << 10  # KiB, of all inputs of a reader together
TOTAL = 10_000  # inputs of the long run, of all readers

Reader = Callable[[Path], Any]


def _every(source: Any) -> Any:
    return source.examples(range(len(source)))


def _flag(path: Path) -> Any:
    limits = FileLimits()
    return list(convert_flag_rows(flag_set([path], limits), FlagRows(), limits, lambda _: None))


def _arctic(folder: Path) -> Any:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    mined = folder / "mined.parquet"
    return list(examples_of_tables(folder, TablesReport(), work=work, mined=mined))


def _answers(path: Path) -> Any:
    with answer_log(path, {"model": "m"}) as found:
        return found


def _engine(folder: Path) -> Any:
    with ExactEngine(folder, read_only=True) as engine:
        found = engine.search(Vectors(dense=torch.eye(4)[:1]), 3, where={"a": 1})
        return found, list(engine.scan())


def _of_unit(folder: Path) -> Any:
    return job.recorded(_Job(folder), UNIT, folder)


@dataclass
class _Job:
    folder: Path
    name: str = "job"
    settings: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Any:
        raise NotImplementedError

    def files(self, unit: job.WorkUnit) -> list[Path]:
        return [self.folder / "made.jsonl"]


UNIT = job.WorkUnit("unit", {})


ROWS = [
    {"query": "a", "positives": ["b"], "negatives": ["c"], "lang": "de", "task": "t"},
    {"query": "d", "pos": "e", "pos_scores": [1.5], "prompt": "p"},
]
LABELLED = [{"text": "a", "label": "x", "split": "train"}, {"text": "b", "labels": ["y", 2]}]
SCORED = [{"text1": "a", "text2": "b", "score": 1}, {"sentence1": "c", "text2": "b", "score": 2.5}]
WORDS = [{"tokens": ["a", "b"], "labels": ["X", None]}]
CORPUS = [{"_id": "1", "title": "t", "text": "a"}, {"id": "2", "text": "b", "lang": "de"}]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _zstd(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


def _parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


CONLLU = b"# c\n1\tA\ta\tNOUN\t_\t_\t0\t_\t_\t_\n2\tb\tb\tVERB\t_\t_\t1\t_\t_\t_\n\n"
SETTINGS = {
    "version": 1,
    "attention": "bidirectional",
    "window": "keep",
    "settings": {"pooling": "mean", "prompts": {"query": "q: "}, "query_tokens": 32},
}

# File that is damaged, what it may hold (the first is valid), and who reads it: of the file itself.
FILES: dict[str, tuple[str, list[bytes], Reader]] = {
    "examples": ("a.jsonl", [_lines(ROWS)], lambda p: _every(open_source(p))),
    "check": ("a.jsonl", [_lines(ROWS)], lambda p: check_data([p])),
    "documents": ("a.jsonl", [_lines(CORPUS)], lambda p: list(read_documents(p, keep_others=True))),
    "texts": ("a.jsonl", [_lines(CORPUS)], lambda p: _every(open_texts(p))),
    "lines": ("a.txt", [b"one\ntwo\n\n"], lambda p: [list(read_texts(p)), _every(open_texts(p))]),
    "labelled": ("a.jsonl", [_lines(LABELLED)], lambda p: list(read_labelled_texts(p))),
    "label set": (
        "a.jsonl",
        [_lines([{**row, "split": split} for row in LABELLED for split in ("train", "test")])],
        read_label_set,
    ),
    "label names": ("a.json", [b'{"0": "sad", "1": "glad"}'], read_label_texts),
    "similarity": ("a.jsonl", [_lines(SCORED)], SimilaritySet.from_file),
    "words": ("a.jsonl", [_lines(WORDS)], read_labelled),
    "examples, gzip": (
        "a.jsonl.gz",
        [gzip.compress(_lines(ROWS), mtime=0)],
        lambda p: [_every(open_source(p)), check_data([p])],
    ),
    "examples, zstd": ("a.jsonl.zst", [_zstd(_lines(ROWS))], lambda p: _every(open_source(p))),
    "table": (
        "a.csv",
        [b'query,positive,negative_1\na,"b ""c""\n d",e\n\nf,g,\n'],
        lambda p: [_every(open_source(p)), check_data([p])],
    ),
    "table with tabs": (
        "a.tsv",
        [b'text\tid\tlabel\n"a\tb"\t1\tx\nc\t2\ty\n'],
        lambda p: [list(read_documents(p, keep_others=True)), list(read_labelled_texts(p))],
    ),
    "table, gzip": (
        "a.csv.gz",
        [gzip.compress(b"text1,text2,score\na,b,1\na,c,2.5\n", mtime=0)],
        SimilaritySet.from_file,
    ),
    "lines, zstd": (
        "a.txt.zst",
        [_zstd(b"one\ntwo\n\n")],
        lambda p: [list(read_texts(p)), _every(open_texts(p))],
    ),
    "conll": ("a.conll", [CONLLU, b"a X\nb Y\n\nc X\n"], read_labelled),
    "triples": (
        "a.jsonl",
        [_lines([dict.fromkeys(("prefix", "query", "positive", "negative"), "a")])],
        read_triples,
    ),
    "flagembedding": ("a.jsonl", [_lines([{**ROWS[1], "type": "symmetric_sts"}])], _flag),
    "prompt": ("a.txt", [b"Ask about {passage}"], QuestionPrompt.of_file),
    "answer log": (
        "a.jsonl",
        [b'{"kind": "answers of tercet synthesize", "version": 1, "model": "m"}\n'],
        _answers,
    ),
    "training log": ("log.jsonl", [b'{"step": 1, "loss": 2.0}\n'], log.read),
    "endpoint": (
        "answer",
        [b'{"choices": [{"message": {"content": "a"}}]}'],
        lambda p: _answer_in(p.read_bytes()),
    ),
    "filter": ("filter.json", [b'{"version": 1, "inputs": {}}'], json_object),
}


def _in_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_bytes(_lines(CORPUS))
    (folder / "queries.jsonl").write_bytes(_lines([{"_id": "q", "text": "a", "answers": ["b"]}]))
    (folder / "qrels/test.tsv").write_bytes(b"query-id\tcorpus-id\tscore\nq\t1\t1\nq\t2\t0\n")
    return folder


def _in_training(folder: Path) -> Path:
    _in_beir(folder)
    (folder / "qrels/test.tsv").rename(folder / "qrels/train.tsv")
    return folder


def _in_flag(folder: Path) -> Path:
    (folder / "corpus.jsonl").write_bytes(_lines(CORPUS))
    (folder / "test_queries.jsonl").write_bytes(_lines([{"id": "q", "text": "a"}]))
    judged = [{"qid": "q", "docid": "1", "relevance": 1}]
    (folder / "test_qrels.jsonl").write_bytes(_lines(judged))
    return folder


def _in_arctic(folder: Path) -> Path:
    write_tables(folder, [Example("a", ("b",), ("c",)), Example("d", ("e", "b"))])
    return folder


def _in_parquet(folder: Path) -> Path:
    _parquet(folder / "a.parquet", [{"query": "a", "positives": ["b"], "text": "c"}] * 3)
    return folder


def _in_index(folder: Path) -> Path:
    with ExactEngine(folder / "exact") as engine:
        records = [Record(str(i), f"text {i}", fields={"a": i}) for i in range(4)]
        engine.upsert(records, Vectors(dense=torch.eye(4)))
        engine.flush()
    about = {"settings": {"model": "m"}, "engine": "exact", "url": None, "collection": None}
    (folder / "index.json").write_text(json.dumps({**about, "complete": True, "version": 2}))
    return folder


def _in_model(folder: Path) -> Path:
    (folder / "tercet.json").write_text(json.dumps(SETTINGS))
    (folder / "config.json").write_text('{"hidden_size": 8, "text_config": {}}')
    return folder


def _in_foreign(folder: Path) -> Path:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "1").mkdir()
    pooling = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
    for name, value in {
        "modules.json": modules,
        "1/config.json": pooling,
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
        "sentence_bert_config.json": {"max_seq_length": 128},
        "tokenizer_config.json": {"model_max_length": 128},
        "config.json": {"max_position_embeddings": 128},
    }.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def _in_nv_embed(folder: Path) -> Path:
    text = {"model_type": "mistral", "hidden_size": 4096}
    config = {"model_type": "nvembed", "text_config": text, "latent_attention_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "instructions.json").write_text('{"task": {"query": "q", "corpus": ""}}')
    return folder


def _in_adapter(folder: Path) -> Path:
    from safetensors.torch import save_file

    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    save_file({"a.lora_A.weight": torch.zeros(2, 4)}, folder / "adapter_model.safetensors")
    return folder


def _in_run(folder: Path) -> Path:
    progress = checkpoint.StageProgress()
    checkpoint.save(folder / "checkpoint.pt", {"seed": 0}, progress, weights={})
    stages = [{"weights": "w", "made_with": {"seed": 0}}]
    (folder / "tercet.json").write_text(json.dumps({**SETTINGS, "about": {"stages": stages}}))
    return folder


def _in_arrays(folder: Path) -> Path:
    np.save(folder / "dense.npy", np.eye(3, dtype=np.float32))
    np.save(folder / "sparse_offsets.npy", np.arange(4))
    np.save(folder / "sparse_ids.npy", np.arange(3, dtype=np.int32))
    np.save(folder / "sparse_weights.npy", np.ones(3, np.float32))
    return folder


def _in_results(folder: Path) -> Path:
    KeptResults(folder).keep({"a": 1}, {"x": np.arange(3)}, "key")
    return folder


def _in_units(folder: Path) -> Path:
    (folder / "made.jsonl").write_text("{}\n")
    job.record(_Job(folder), UNIT, folder, {"a": 1})
    return folder


def _read_run(folder: Path) -> Any:
    found = checkpoint.load(folder / "checkpoint.pt", {"seed": 0})
    plan.is_saved(folder, [{"weights": "w"}])
    return found


def _read_arrays(folder: Path) -> Any:
    rows = np.arange(2)
    return [read_vectors(folder, rows, "dense"), read_vectors(folder, rows, "sparse")]


# A folder of which one file is damaged, and who reads the folder.
FOLDERS: dict[str, tuple[Callable[[Path], Path], Reader]] = {
    "beir": (_in_beir, read_folder),
    "beir to train on": (_in_training, lambda p: [_every(open_source(p)), check_data([p])]),
    "flagembedding set": (_in_flag, read_folder),
    "arctic": (_in_arctic, _arctic),
    "parquet": (_in_parquet, lambda p: _every(open_source(p / "a.parquet"))),
    "parquet texts": (
        _in_parquet,
        lambda p: list(read_documents(p / "a.parquet", keep_others=True)),
    ),
    "index": (_in_index, lambda p: [about_index(p), _engine(p / "exact")]),
    "settings": (_in_model, lambda p: [settings_of(p, p), manifest(str(p)), check_sizes(p)]),
    "sentence-transformers": (_in_foreign, lambda p: settings_of(p, p)),
    "nv-embed": (_in_nv_embed, read_nv_embed),
    "adapter": (_in_adapter, _read_adapter),
    "run": (_in_run, _read_run),
    "arrays": (_in_arrays, _read_arrays),
    "kept results": (_in_results, lambda p: KeptResults(p).find("key")),
    "work units": (_in_units, _of_unit),
}

_names = st.sampled_from(
    "query positives negatives text label labels score _id id title tokens version settings "
    "prompts pooling attention weights hidden_size num_hidden_layers path type idx".split()
)
_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "", " ", "mean", "x" * 3000, 10**400])
)
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(_names | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
_LONG = {  # short names in messages of what is written
    b"@lists@": b"[" * 100_000,
    b"@objects@": b'{"a":' * 100_000,
    b"@digits@": b"9" * 5_000,
}
_PIECES = [
    *_LONG,
    b"\xff\xfe",
    b"\x00",
    b"\n",
    b"\t",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b'"\\ud800"',
    b"\xef\xbb\xbf",
    b"PAR1",
]


def _mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    places = st.integers(0, max(len(valid), 1))
    pieces = st.integers(0, len(_PIECES) - 1).map(_PIECES.__getitem__)
    edits = st.tuples(places, st.integers(0, 40), pieces | st.binary(max_size=6))

    def edited(changes: list[tuple[int, int, bytes]]) -> bytes:
        content = valid
        for at, gone, piece in changes:
            content = content[:at] + piece + content[at + gone :]
        return content

    return st.lists(edits, max_size=3).map(edited) | places.map(lambda at: valid[:at])


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def contents(*valid: bytes) -> st.SearchStrategy[bytes]:
    """What a damaged file may hold."""
    lines = st.lists(_values, max_size=3).map(lambda them: b"\n".join(map(_json_bytes, them)))
    return st.binary(max_size=200) | lines | st.one_of(*map(_mutated, valid))


def _swapped(value: Any) -> st.SearchStrategy[Any]:
    """A JSON value of which one part is another value."""
    if isinstance(value, dict) and value:
        return st.sampled_from(sorted(value)).flatmap(
            lambda key: (_values | _swapped(value[key])).map(lambda new: {**value, key: new})
        )
    if isinstance(value, list) and value:
        return _swapped(value[0]).map(lambda new: [new, *value[1:]])
    return _values


def _damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    found = contents(valid)
    if len(valid) < 100_000:
        try:
            rows = [json.loads(line) for line in valid.splitlines()]
        except ValueError:
            return found
        return found | _swapped(rows).map(lambda them: b"\n".join(map(_json_bytes, them)))
    return found


def _run(inputs: int, files: list[Path], read: Callable[[], Any]) -> tuple[int, float, int]:
    """Damage one of the files at a time; return the number of inputs, seconds and growth in KiB."""
    originals = {path: path.read_bytes() for path in files}
    some = st.sampled_from(files).flatmap(
        lambda path: st.tuples(st.just(path), _damaged(originals[path]))
    )
    done = [0, 0]
    began = time.monotonic()

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(some)
    def once(damage: tuple[Path, bytes]) -> None:
        path, content = damage
        for name, long in _LONG.items():
            content = content.replace(name, long)
        path.write_bytes(content)
        start = time.monotonic()
        try:
            read()
        except TercetError as error:
            assert "\n" not in str(error), "one line"
        finally:
            path.write_bytes(originals[path])
        assert time.monotonic() - start < SECONDS, f"{path.name}: too slow"
        done[0] += 1
        if done[0] == max(inputs // 10, 1):  # after what is loaded once
            done[1] = _peak()

    read()  # what is valid can be read
    once()
    return done[0], time.monotonic() - began, _peak() - (done[1] or _peak())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "place").mkdir()
    yield tmp_path / "place"
    shutil.rmtree(tmp_path / "place")


def _fuzz(name: str, place: Path, inputs: int) -> tuple[int, float, int]:
    if name in FILES:
        file, valid, read_file = FILES[name]
        (place / file).write_bytes(valid[0])
        return _run(inputs, [place / file], lambda: read_file(place / file))
    make, read_folder_of = FOLDERS[name]
    folder = make(place)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return _run(inputs, files, lambda: read_folder_of(folder))


EVERY = [*FILES, *FOLDERS]


@pytest.mark.parametrize("name", EVERY)
def test_what_a_reader_cannot_read_is_an_error_of_one_line(name, place):
    _fuzz(name, place, 15)


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_ten_thousand_inputs_neither_escape_nor_hang_nor_grow(name, place, capsys):
    inputs, seconds, growth = _fuzz(name, place, -(-TOTAL // len(EVERY)))
    report = f"{name}: {inputs} inputs, {seconds:.0f} s, {growth >> 10} MiB\n"
    with capsys.disabled():
        sys.stdout.write(report)
    assert growth < GROWTH


@pytest.mark.slow
def test_a_damaged_model_folder_is_refused_in_one_line(encoder_folder, place):
    folder = place / "model"
    Embedder.load(encoder_folder).save(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    _run(40, files, lambda: Embedder.load(folder).encode(["a small web server"]))
