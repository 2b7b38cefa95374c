"""What is on the disk when a process ends, is killed, or is not alone."""

import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tercet.errors import TercetError
from tests.search import conformance as c

ROOT = Path(__file__).parents[2]
BATCH = 3  # records that are upserted and flushed together

# Upserts batch after batch for ever, and says how many were flushed. Batch 0 replaces others too.
WRITER = """
import sys
from itertools import count
from pathlib import Path
from tercet.search.engine.engine import Record
from tests.search import conformance as c
from {module} import {function} as opened

engine = opened(Path(sys.argv[1]))
for batch in count(int(sys.argv[2])):
    records = [Record(f"{{batch}} {{i}}", f"text of {{batch}} {{i}}") for i in range({batch})]
    records.append(Record("latest", str(batch)))
    engine.upsert(records, c.vectors({batch} + 1, seed=batch))
    engine.delete([f"{{batch - 2}} 0"])
    engine.flush()
    print(batch, flush=True)
"""


@pytest.fixture(params=[s for s in c.STORES if s.durable], ids=lambda store: store.name)
def store(request):
    if request.param.needs:
        pytest.importorskip(request.param.needs)
    return request.param


def program(source, store):
    opened = store.opened
    return source.format(module=opened.__module__, function=opened.__name__, batch=BATCH)


def ids(hits):
    return [hit.record.id for hit in hits]


def test_what_was_flushed_is_there_when_opened_again(store, tmp_path):
    with closing(store.opened(tmp_path / "index")) as engine:
        engine.upsert(c.records()[:30], c.DOCUMENTS.take(slice(0, 30)))
        engine.flush()
        engine.upsert(c.records()[30:], c.DOCUMENTS.take(slice(30, 40)))
        engine.delete(c.names()[:2])
        before = engine.search(c.QUESTIONS, 9, fusion=c.EXHAUSTIVE)
        stats = engine.stats()
    with closing(store.opened(tmp_path / "index")) as engine:  # to close is to flush
        assert engine.stats().records == stats.records == 38
        assert engine.stats().kinds == stats.kinds
        after = engine.search(c.QUESTIONS, 9, fusion=c.EXHAUSTIVE)
        assert [ids(hits) for hits in after] == [ids(hits) for hits in before]
        assert engine.fetch(c.names()[:3]) == [None, None, c.records()[2]]
        engine.optimize()
    with closing(store.opened(tmp_path / "index")) as engine:
        after = engine.search(c.QUESTIONS, 9, fusion=c.EXHAUSTIVE)
        assert [ids(hits) for hits in after] == [ids(hits) for hits in before]
        assert engine.stats().disk_bytes > 0


def test_deletes_alone_are_there_when_opened_again(store, tmp_path):
    for gone in (0, 3, 5):
        with closing(store.opened(tmp_path / "index")) as engine:
            if not gone:
                engine.upsert(c.records(), c.DOCUMENTS)
            engine.flush()
            engine.delete(c.names()[:gone])
            engine.flush()
        with closing(store.opened(tmp_path / "index")) as engine:
            left = c.names()[gone:]
            assert engine.fetch(c.names()[:gone]) == [None] * gone
            assert {record.id for record in engine.scan()} == set(left)
            found = engine.search(c.QUESTIONS.take([0]), 40, fusion=c.EXHAUSTIVE)
            assert set(ids(found[0])) == set(left)


def test_a_kill_in_mid_write_loses_nothing_that_was_flushed(store, tmp_path):
    """Twice, at moments that nobody chose; what a kill cut off is whole or not there."""
    folder, begin = tmp_path / "index", 0
    for pause in (0.03, 0.071):
        words = [sys.executable, "-c", program(WRITER, store), str(folder), str(begin)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            flushed = -1
            while flushed < begin + 4:
                flushed = int(writer.stdout.readline())
            time.sleep(pause)
            writer.send_signal(signal.SIGKILL)
            flushed = max([flushed, *map(int, writer.stdout.read().split())])
        with closing(store.opened(folder)) as engine:
            found = {record.id: record for record in engine.scan()}
            last = int(found["latest"].text)
            assert last >= flushed
            wanted = {
                f"{batch} {i}": f"text of {batch} {i}"
                for batch in range(flushed + 1)
                for i in range(BATCH)
                if i or batch > flushed - 2
            }
            deleted = {f"{batch} 0" for batch in range(last)}  # by batches that were not told of
            for name, text in wanted.items():
                assert name in deleted or found[name].text == text
            for batch in range(flushed + 1):
                queries = c.vectors(BATCH + 1, seed=batch).take([1, 2]).only(["dense"])
                for i, hits in enumerate(engine.search(queries, len(found)), start=1):
                    (hit,) = (hit for hit in hits if hit.record.id == f"{batch} {i}")
                    true = c.score("dense", queries, i - 1, store.held(queries), i - 1)
                    assert abs(hit.score - true) <= store.tolerance
            assert engine.stats().records == len(found)
        begin = last + 1


SECOND = """
import sys
from pathlib import Path
from tercet.errors import TercetError
from {module} import {function} as opened
try:
    opened(Path(sys.argv[1]))
except TercetError as error:
    sys.exit(f"refused: {{error}}")
"""


def test_a_second_process_is_refused_and_told_why(store, tmp_path):
    folder = tmp_path / "index"
    words = [sys.executable, "-c", program(SECOND, store), str(folder)]
    with closing(store.opened(folder)) as engine:
        engine.upsert(c.records(), c.DOCUMENTS)
        ended = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        assert ended.returncode == 1
        assert f"refused: {folder}: process " in ended.stderr, ended.stderr
        with pytest.raises(TercetError, match="index: process "):
            store.opened(folder)
        assert engine.stats().records == c.RECORDS
    with closing(store.opened(folder)) as engine:  # once it is closed, the next one may
        assert engine.stats().records == c.RECORDS
