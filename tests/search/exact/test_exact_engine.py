"""What is particular to the exact engine; ``test_conformance.py`` has what every engine does."""

import json
import shutil
import threading
from contextlib import closing

import numpy as np
import pytest
import torch

from tercet.data.files.readers import RowGroupCache
from tercet.errors import DataError, IndexFolderError, ModelError, RecipeError, StorageError
from tercet.kinds import Weights
from tercet.rank.topk import top_k
from tercet.search.engine.engine import ReciprocalRank, Record, Rerank, Weighted
from tercet.search.exact import exact_engine, manifest, scanning, segment
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.exact.segment import RecordTable
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors
from tests import toy
from tests.search import conformance as c

DENSE = Weighted(weights=Weights(1.0, 0.0, 0.0), candidates=None)


def named(count, start=0):
    return [Record(f"id{i}", f"text {i}") for i in range(start, start + count)]


def filled(folder, **how):
    engine = ExactEngine(folder, **how)
    engine.upsert(c.records(), c.DOCUMENTS)
    return engine


def ids(hits):
    return [hit.record.id for hit in hits]


def test_small_blocks_find_what_large_ones_do(tmp_path, monkeypatch):
    with closing(filled(tmp_path / "index", precision="float32")) as engine:
        large = [engine.search(c.QUESTIONS, 9, fusion=fusion) for fusion in c.FUSIONS.values()]
        monkeypatch.setattr(scanning, "DOCS_AT_ONCE", 7)
        monkeypatch.setattr(scanning, "TOKENS_AT_ONCE", 5)
        monkeypatch.setattr(scanning, "SCORES_AT_ONCE", 80)  # two queries at a time
        small = [engine.search(c.QUESTIONS, 9, fusion=fusion) for fusion in c.FUSIONS.values()]
    for one, other in zip(large, small, strict=True):
        assert [ids(hits) for hits in one] == [ids(hits) for hits in other]


@pytest.mark.parametrize("fusion", [DENSE, Weighted(), ReciprocalRank(), Rerank(), c.EXHAUSTIVE])
def test_equal_scores_are_ranked_by_order_of_upserting(tmp_path, monkeypatch, fusion):
    """Copies of one text, in several segments and blocks; a replaced one comes last."""
    monkeypatch.setattr(scanning, "DOCS_AT_ONCE", 4)
    with closing(ExactEngine(tmp_path / "index")) as engine:
        for start in (0, 10, 20):
            same = c.DOCUMENTS.take([3] * 10)
            engine.upsert(named(10, start), same)
            if start < 20:
                engine.flush()
        engine.upsert(named(1, 4), c.DOCUMENTS.take([3]))
        order = [f"id{i}" for i in range(30) if i != 4] + ["id4"]
        for _ in range(2):
            for k in (1, 8, 30):
                assert ids(engine.search(c.QUESTIONS.take([0]), k, fusion=fusion)[0]) == order[:k]
            engine.optimize()


def test_dense_search_is_top_k(tmp_path):
    random = np.random.default_rng(0)
    docs = random.standard_normal((1300, 8)).astype(np.float32)
    queries = random.standard_normal((3, 8)).astype(np.float32)
    with closing(ExactEngine(tmp_path / "index")) as engine:
        engine.upsert(named(1300), Vectors(torch.from_numpy(docs)))
        engine.flush()
        found = engine.search(Vectors(torch.from_numpy(queries)), 40)
    hits = top_k(queries, docs, 40)
    assert [ids(h) for h in found] == [[f"id{row}" for row in rows] for rows in hits.rows]
    scores = [[hit.score for hit in h] for h in found]
    np.testing.assert_allclose(scores, hits.scores, atol=1e-5)


def test_half_precision_of_unit_vectors_moves_a_score_by_less_than_a_thousandth(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(300, 64), dim=1)
    docs = Vectors(multi=TokenRows(rows, offsets_of(torch.full((30,), 10))))
    queries = docs.take([3, 7])
    found = []
    for precision in ("float16", "float32"):
        with closing(ExactEngine(tmp_path / precision, precision=precision)) as engine:
            engine.upsert(named(30), docs)
            engine.flush()
            hits = engine.search(queries, 30)
            found.append([{h.record.id: h.score for h in query} for query in hits])
            wide = engine.stats().disk_bytes
    for half, full in zip(*found, strict=True):
        assert max(abs(half[name] - full[name]) for name in full) < 1e-3
        assert half != full
    with closing(ExactEngine(tmp_path / "float16")) as engine:
        assert wide - engine.stats().disk_bytes >= 300 * 64 * 2


def test_values_too_large_for_halves_are_refused(tmp_path):
    large = Vectors(multi=TokenRows(torch.full((1, 4), 1e5), torch.tensor([0, 1])))
    with closing(ExactEngine(tmp_path / "half")) as engine:
        with pytest.raises(ModelError, match="too large for float16"):
            engine.upsert(named(1), large)
        assert engine.stats().records == 0
    with closing(ExactEngine(tmp_path / "full", precision="float32")) as engine:
        engine.upsert(named(1), large)
        assert engine.search(large, 1)[0][0].score == pytest.approx(4e10)


def test_another_precision_than_the_folder_has_is_refused(tmp_path):
    filled(tmp_path / "index").close()
    with pytest.raises(RecipeError, match="holds token vectors in float16, not float32"):
        ExactEngine(tmp_path / "index", precision="float32")
    filled(tmp_path / "index").close()  # and the lock is not kept


def test_flushes_of_one_record_each_leave_few_segments(tmp_path):
    with closing(ExactEngine(tmp_path / "index")) as engine:
        for i in range(40):
            engine.upsert([c.records()[i]], c.DOCUMENTS.take([i]))
            engine.flush()
            folders = [p for p in (tmp_path / "index").iterdir() if p.is_dir()]
            assert len(folders) <= 7  # one more than the logarithm of 40
        found = engine.search(c.QUESTIONS, 40, fusion=c.EXHAUSTIVE)
    with closing(filled(tmp_path / "whole")) as engine:
        whole = engine.search(c.QUESTIONS, 40, fusion=c.EXHAUSTIVE)
    assert [ids(hits) for hits in found] == [ids(hits) for hits in whole]


def test_more_than_memory_is_for_waits_on_the_disk_and_counts_from_the_flush_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(exact_engine, "MEMORY", 2000)
    folder = tmp_path / "index"
    with closing(ExactEngine(folder)) as engine:
        for i in range(0, 40, 2):
            engine.upsert(c.records()[i : i + 2], c.DOCUMENTS.take([i, i + 1]))
        assert any(path.name.startswith("segment-") for path in folder.iterdir())
        with closing(ExactEngine(folder, read_only=True)) as reader:
            assert reader.stats().records == 0
        before = engine.search(c.QUESTIONS, 9)
        engine.flush()
        with closing(ExactEngine(folder, read_only=True)) as reader:
            after = reader.search(c.QUESTIONS, 9)
    assert [ids(hits) for hits in before] == [ids(hits) for hits in after]


def test_processes_that_read_only_see_the_last_flush(tmp_path):
    folder = tmp_path / "index"
    with closing(filled(folder)) as writer:
        writer.flush()
        readers = [ExactEngine(folder, read_only=True) for _ in range(2)]
        before = writer.search(c.QUESTIONS, 5)
        writer.delete(c.names()[:20])
        writer.optimize()  # deletes the files that the readers have open
        for reader in readers:
            assert reader.stats().records == c.RECORDS
            assert reader.search(c.QUESTIONS, 5) == before
        with closing(ExactEngine(folder, read_only=True)) as late:
            assert late.stats().records == 20


@pytest.mark.parametrize("act", ["upsert", "delete", "flush", "optimize"])
def test_what_was_opened_for_reading_or_closed_is_not_written_to(tmp_path, act):
    engine = filled(tmp_path / "index")
    engine.close()
    words = {"upsert": (c.records(), c.DOCUMENTS), "delete": (["a"],)}.get(act, ())
    for opened in (engine, ExactEngine(tmp_path / "index", read_only=True)):
        with pytest.raises(RecipeError, match="is closed or read-only"):
            getattr(opened, act)(*words)


def test_reading_needs_a_folder_that_is_an_index(tmp_path):
    with pytest.raises(IndexFolderError, match="gone: no such folder; build one with: tercet"):
        ExactEngine(tmp_path / "gone", read_only=True)
    with pytest.raises(IndexFolderError, match="is not an index; build one with: tercet index"):
        ExactEngine(tmp_path, read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_things_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(IndexFolderError, match="is not an index and would be overwritten"):
            ExactEngine(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    folder = tmp_path / "index"
    filled(folder).close()
    before = sorted(path.name for path in folder.iterdir())
    (segment,) = folder.glob("segment-*")
    shutil.copytree(segment, folder / "segment-9")
    (folder / ".segment-4.new-host-1-0").mkdir()
    (folder / "deleted-7.npy").touch()
    ExactEngine(folder).close()
    assert sorted(path.name for path in folder.iterdir()) == before


def files_of(folder):
    filled(folder).close()
    with closing(ExactEngine(folder)) as engine:
        engine.delete([c.names()[3]])
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_damaged_file_is_told_at_opening(tmp_path):
    paths = files_of(tmp_path / "whole")
    assert len(paths) == 10  # seven arrays, records, what was deleted, and the manifest
    for path in paths:
        for damage in ("cut", "emptied", "removed"):
            folder = tmp_path / "broken"
            shutil.copytree(tmp_path / "whole", folder)
            broken = folder / path.relative_to(tmp_path / "whole")
            content = broken.read_bytes()
            broken.unlink()
            if damage != "removed":
                broken.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
            with pytest.raises(IndexFolderError, match="tercet index"):
                ExactEngine(folder, read_only=True)
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"widths": {"dense": 9, "sparse": 0, "multi": 6}},
        {"widths": {"lexical": 3}},
        {"precision": "int8"},
        {"segments": ["../elsewhere"]},
        {"segments": None},
        {"deleted": "segment-1"},
        {"surplus": 1},
    ],
)
def test_a_manifest_that_cannot_be_true_is_told_at_opening(tmp_path, change):
    folder = tmp_path / "index"
    filled(folder).close()
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | change))
    with pytest.raises(IndexFolderError, match=r"the index is damaged \(.*\); build it again"):
        ExactEngine(folder)


def test_a_full_disk_loses_nothing_and_the_same_call_works_later(tmp_path):
    folder = tmp_path / "index"
    with closing(filled(folder)) as engine:
        engine.flush()
        more = Vectors.join([c.vectors(40, seed=3)] * 20)
        engine.upsert(named(800), more)
        with toy.small_disk(10_000), pytest.raises(StorageError, match="could not be written"):
            engine.flush()
        with closing(ExactEngine(folder, read_only=True)) as reader:
            assert reader.stats().records == c.RECORDS
        assert engine.stats().records == 818  # of 40 and 800, 22 have the same ids
        engine.flush()
    with closing(ExactEngine(folder, read_only=True)) as reader:
        assert reader.stats().records == 818


def test_fields_and_texts_that_cannot_be_written_are_refused(tmp_path):
    one = c.DOCUMENTS.take([0])
    with closing(ExactEngine(tmp_path / "index")) as engine:
        with pytest.raises(DataError, match="'a' are not valid Unicode"):
            engine.upsert([Record("a", "half of a pair: \ud800")], one)
        with pytest.raises(DataError, match="the fields of 'a' cannot be kept"):
            engine.upsert([Record("a", "", fields={"years": range(3)})], one)
        assert engine.stats().records == 0


def test_a_weight_below_zero_is_refused(tmp_path):
    terms = Terms(torch.tensor([3]), torch.tensor([-0.5]), torch.tensor([0, 1]))
    with closing(ExactEngine(tmp_path / "index")) as engine:
        with pytest.raises(ModelError, match="'id0' hold NaN, infinity or a negative weight"):
            engine.upsert(named(1), Vectors(sparse=terms))


def test_threads_search_while_another_upserts(tmp_path):
    folder, problems = tmp_path / "index", []
    with closing(filled(folder)) as engine:
        ended = threading.Event()

        def search():
            while not ended.is_set():
                for hits in engine.search(c.QUESTIONS, 40, fusion=c.EXHAUSTIVE):
                    if len(set(ids(hits))) != 40:
                        problems.append(ids(hits))

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(60):
            engine.upsert([c.records()[i % 40]], c.DOCUMENTS.take([i % 40]))
            if i % 7 == 0:
                engine.flush()
        ended.set()
        for thread in threads:
            thread.join()
    assert problems == []


def test_a_hit_is_read_together_with_few_others_however_often_segments_were_merged(tmp_path):
    dense = torch.eye(8)[torch.arange(1300) % 8]
    with closing(ExactEngine(tmp_path / "index")) as engine:
        for start in range(0, 1300, 130):
            engine.upsert(named(130, start), Vectors(dense[start : start + 130]))
            engine.flush()
        engine.optimize()
        (part,) = engine._parts
        sizes = [len(block) for block in part.segment.documents.blocks()]
        assert sizes == [512, 512, 276]
        assert ids(engine.search(Vectors(torch.eye(8)[:1]), 3)[0]) == ["id0", "id8", "id16"]


def test_records_that_were_found_before_are_not_read_from_the_disk_again(tmp_path, monkeypatch):
    groups: list[int] = []
    read = RecordTable._group
    monkeypatch.setattr(RecordTable, "_group", lambda *a: groups.append(a[1]) or read(*a))
    monkeypatch.setattr(segment, "_ROW_GROUPS", RowGroupCache(1 << 20))
    with closing(ExactEngine(tmp_path / "i")) as engine:
        engine.upsert([Record("a", "one")], Vectors(torch.eye(2)[:1]))
        engine.flush()
    with closing(ExactEngine(tmp_path / "i", read_only=True)) as engine:
        groups.clear()
        first, second = (engine.search(Vectors(torch.ones(1, 2)), 1) for _ in range(2))
        assert (first, groups) == (second, [0])
    with closing(ExactEngine(tmp_path / "i")) as engine:
        engine.upsert([Record("a", "two")], Vectors(torch.eye(2)[:1]))
        engine.flush()
    with closing(ExactEngine(tmp_path / "i", read_only=True)) as engine:
        assert engine.search(Vectors(torch.ones(1, 2)), 1)[0][0].record.text == "two"


def test_a_reopened_engine_writes_over_nothing(tmp_path, monkeypatch):
    """More segments than commits: their numbers run ahead, and none is taken twice."""
    monkeypatch.setattr(exact_engine, "MEMORY", 1_000)
    monkeypatch.setattr(exact_engine, "MERGED", 4)

    def put(engine, start):
        engine.upsert(named(20, start), Vectors(dense=torch.full((20, 32), 1.0 + start)))

    with ExactEngine(tmp_path / "index") as engine:
        for start in range(0, 100, 20):
            put(engine, start)
        engine.flush()
    with ExactEngine(tmp_path / "index") as engine:
        put(engine, 100)
        engine.flush()
    with ExactEngine(tmp_path / "index") as engine:
        found = sorted(record.id for record in engine.scan())
    assert found == sorted(f"id{i}" for i in range(120))


def test_an_engine_like_another_reads_only_what_is_new_and_finds_the_same(tmp_path, monkeypatch):
    read = []
    checksum = manifest.altered

    def altered(folder, expected):
        read.extend({name.partition("/")[0] for name in expected})
        return checksum(folder, expected)

    monkeypatch.setattr(manifest, "altered", altered)
    folder = tmp_path / "index"
    filled(folder).close()
    with ExactEngine(folder, read_only=True) as first:
        assert first.fetch(["lost"]) == [None]
        with ExactEngine(folder, like=first) as writer:
            writer.upsert(named(1, 900), c.vectors(1, seed=5))
            writer.delete([c.names()[0]])
        read.clear()
        with ExactEngine(folder, read_only=True, like=first) as second:
            assert sorted(read) == ["deleted-3.npy", "segment-3"]
            with ExactEngine(folder, read_only=True) as plain:
                hits = plain.search(c.QUESTIONS, 50, fusion=c.EXHAUSTIVE)
                assert second.search(c.QUESTIONS, 50, fusion=c.EXHAUSTIVE) == hits
            wanted = [c.names()[0], c.names()[1], "id900"]
            assert second.fetch(wanted) == [None, c.records()[1], named(1, 900)[0]]
        assert first.fetch(wanted) == [c.records()[0], c.records()[1], None]
        assert first.stats().records == len(c.records())


def test_an_engine_made_again_under_the_same_names_is_not_taken_for_the_one_before(tmp_path):
    folder = tmp_path / "index"
    filled(folder).close()
    with ExactEngine(folder, read_only=True) as first:
        shutil.rmtree(folder)
        with ExactEngine(folder) as again:
            again.upsert(named(3), c.vectors(3, seed=5))
        with ExactEngine(folder, read_only=True, like=first) as second:
            assert {record.id for record in second.scan()} == {"id0", "id1", "id2"}
        assert {record.id for record in first.scan()} == set(c.names())


def test_weights_of_terms_are_those_that_were_upserted(tmp_path):
    with filled(tmp_path / "index") as engine:
        engine.flush()
        engine.upsert(named(1), c.vectors(1, seed=5))
        assert c.DOCUMENTS.sparse is not None
        terms = c.DOCUMENTS.sparse.merged()
        begin, end = terms.offsets[3:5].tolist()
        true = dict(
            zip(terms.ids[begin:end].tolist(), terms.weights[begin:end].tolist(), strict=True)
        )
        asked = [*list(true)[1:], 10**9, -1]
        (weights, nothing, new) = engine.term_weights([c.names()[3], "lost", "id0"], asked)
        assert weights == pytest.approx({token: true[token] for token in asked[:-2]})
        assert nothing == {}
        assert set(new) <= set(asked)
