import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from benchmarks.index_memory import measured
from tercet.data.files.documents import Document
from tercet.search import indexing
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.indexing import Indexed, bytes_of, expected_bytes, index_documents
from tercet.vectors import Vectors
from tests.search import conformance as c

ROOT = Path(__file__).parents[2]


def documents(count, start=0):
    return [
        Document(f"d{i}", f"text {i}", fields={"even": i % 2 == 0}) for i in range(start, count)
    ]


class Encoder:
    """Vectors that tell texts apart, and how many texts were encoded."""

    def __init__(self):
        self.count = 0

    def __call__(self, texts):
        self.count += len(texts)
        numbers = [float(text.split()[1]) for text in texts]
        return Vectors(torch.tensor([[number, 1.0] for number in numbers]))


def test_documents_are_indexed_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "DOCUMENTS_AT_ONCE", 7)
    with closing(ExactEngine(tmp_path / "index")) as engine:
        assert index_documents(engine, documents(40), Encoder(), total=40) == Indexed(40, 0, 0)
        assert engine.stats().records == 40
        ((hit,),) = engine.search(Vectors(torch.tensor([[1.0, 0.0]])), 1, where={"even": True})
        assert (hit.record.id, hit.record.text, hit.score) == ("d38", "text 38", 38.0)
        assert engine.stats().pending == 0


def test_only_what_is_new_or_changed_is_encoded(tmp_path):
    with closing(ExactEngine(tmp_path / "index")) as engine:
        index_documents(engine, documents(10), Encoder())
        changed = [*documents(9), Document("d9", "text 90"), *documents(12, start=10)]
        encode = Encoder()
        assert index_documents(engine, changed, encode) == Indexed(3, 9, 0)
        assert encode.count == 3
        assert engine.fetch(["d9"])[0] == c.Record("d9", "text 90")


def test_what_the_file_lacks_is_removed_unless_it_is_to_be_kept(tmp_path):
    with closing(ExactEngine(tmp_path / "index")) as engine:
        index_documents(engine, documents(10), Encoder())
        assert index_documents(engine, documents(4), Encoder(), keep=True) == Indexed(0, 4, 0)
        assert engine.stats().records == 10
        assert index_documents(engine, documents(4), Encoder()) == Indexed(0, 4, 6)
        assert sorted(record.id for record in engine.scan()) == ["d0", "d1", "d2", "d3"]


def test_a_job_that_fails_goes_on_after_its_last_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "DOCUMENTS_AT_ONCE", 4)

    class Failing(Encoder):
        def __call__(self, texts):
            if self.count == 8:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with closing(ExactEngine(tmp_path / "index")) as engine:
        with pytest.raises(KeyboardInterrupt):
            index_documents(engine, documents(20), Failing())
    with closing(ExactEngine(tmp_path / "index")) as engine:
        encode = Encoder()
        assert index_documents(engine, documents(20), encode) == Indexed(12, 8, 0)
        assert encode.count == 12


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.search import test_indexing as t
from tercet.search.exact.exact_engine import ExactEngine

t.indexing.DOCUMENTS_AT_ONCE = 4

class Dying(t.Encoder):
    def __call__(self, texts):
        if self.count == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(texts)

t.index_documents(ExactEngine(Path(sys.argv[1])), t.documents(20), Dying())
"""


def test_a_job_that_was_killed_goes_on_after_its_last_batch(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "index")]
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    with closing(ExactEngine(tmp_path / "index")) as engine:
        assert index_documents(engine, documents(20), Encoder()) == Indexed(12, 8, 0)
        assert engine.stats().records == 20


def test_batches_of_long_documents_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "CHARACTERS_AT_ONCE", 20)
    sizes = [
        len(batch) for batch in indexing.document_batches(documents(8), lambda it: len(it.text))
    ]
    assert sizes == [4, 4]  # of six characters each


def test_the_estimate_is_exact_where_documents_are_alike(tmp_path):
    """40 copies of one text, of which the first 32 are encoded."""
    one = c.DOCUMENTS.take([3])

    def encode(texts):
        return one.take([0] * len(texts))

    copies = [Document(f"d{i}", "the same text") for i in range(40)]
    count, sizes = expected_bytes(copies, encode)
    assert count == 40
    assert sizes == {kind: 40 * size for kind, size in bytes_of(one).items()}
    with closing(ExactEngine(tmp_path / "index")) as engine:
        index_documents(engine, copies, encode)
        (part,) = engine._parts
        assert part.segment.dense is not None and part.segment.multi is not None
        assert part.segment.sparse is not None
        assert part.segment.dense.nbytes == sizes["dense"]
        assert part.segment.multi.vectors.nbytes == sizes["multi"]
        terms = part.segment.sparse
        assert terms.rows.nbytes + terms.weights.nbytes == sizes["sparse"]


def test_of_no_documents_nothing_is_expected():
    assert expected_bytes([], Encoder()) == (0, {})


@pytest.mark.slow
def test_an_index_takes_little_memory_for_each_document():
    few, many = (measured(count, 100, "fake")["peak"] for count in (10_000, 60_000))
    assert many - few < 50_000 * 160  # the benchmark's target is 100, of more documents
