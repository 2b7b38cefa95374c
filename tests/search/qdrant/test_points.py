"""How a record is stored in Qdrant, and what the embedded engine does beyond what all do."""

import math
import sys
from contextlib import closing
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import pytest
import torch

from tercet.errors import DataError, IndexFolderError, MissingExtraError, RecipeError
from tercet.kinds import Weights
from tercet.search.engine.engine import Record, Weighted
from tercet.search.qdrant.points import (
    TermRow,
    facts_of,
    parts_of,
    payload_of,
    points_of,
    uuid_of,
)
from tercet.search.qdrant.queries import Prefetch, weight_of
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors

pytest.importorskip("qdrant_edge")

from tercet.search.qdrant.edge import EdgeStore
from tercet.search.qdrant.qdrant_engine import QdrantEngine
from tests.rank.formulas import weighted_scores


def edge(folder, **how):
    return QdrantEngine(EdgeStore(folder, **how))


def vectors(count, *, dim=16, width=8, tokens=5):
    """Random vectors of all kinds, of unit length where they should be."""
    lengths = torch.randint(1, tokens + 1, (count,))
    rows = torch.nn.functional.normalize(torch.randn(int(lengths.sum()), width), dim=1)
    ids = torch.randint(0, 200, (count * tokens,))
    return Vectors(
        torch.nn.functional.normalize(torch.randn(count, dim), dim=1),
        Terms(ids, torch.rand(len(ids)), torch.arange(0, len(ids) + 1, tokens)),
        TokenRows(rows, offsets_of(lengths)),
    )


def records(count):
    return [Record(str(number), f"text {number}") for number in range(count)]


def test_a_point_is_numbered_by_the_uuid5_of_the_id_and_any_string_can_be_asked_for():
    for name in ("", "7", "한국어", "x" * 5000):
        assert uuid_of(name) == uuid5(NAMESPACE_URL, name)
    assert uuid_of("\ud800") != uuid_of("\ud801")


def test_facts_tell_types_apart_but_not_a_whole_number_from_the_same_with_a_point():
    stored = payload_of(Record("a", "", fields={"n": [1, 2.5], "t": True, "s": "1"}))["facts"]
    assert [group for group in facts_of({"n": 1.0}) if group[0] in stored]
    assert not [group for group in facts_of({"n": True}) if group[0] in stored]
    assert not [group for group in facts_of({"n": "1"}) if group[0] in stored]
    assert not [group for group in facts_of({"t": 1}) if group[0] in stored]
    assert facts_of({"n": [2.5, 3]})[0][0] in stored
    assert facts_of({"s": "1", "t": True}) == (('["s", "1"]',), ('["t", true]',))


def test_a_long_value_is_found_by_its_digest():
    text = "word " * 500
    stored = payload_of(Record("a", "", fields={"about": text}))
    assert stored["fields"] == {"about": text}
    ((fact,),) = facts_of({"about": text})
    assert stored["facts"] == [fact]
    assert len(fact) < 50
    assert facts_of({"about": text + "x"}) != ((fact,),)


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**63, "\udfff", [1, math.nan]])
def test_a_field_that_cannot_be_stored_is_refused_with_its_name(value):
    many = [Record("a", ""), Record("b", "", fields={"odd": value})]
    with pytest.raises(DataError, match=r"^records:2: field 'odd' of 'b' is .*; give text"):
        points_of(many, vectors(2), {"dense": 16, "sparse": 0, "multi": 8})


def test_a_text_has_no_part_of_a_kind_that_it_has_nothing_of():
    two = Vectors(
        torch.ones(2, 3),
        Terms(torch.tensor([4, 4, 9]), torch.tensor([0.5, 2, 0]), torch.tensor([0, 3, 3])),
        TokenRows(torch.ones(2, 4), torch.tensor([0, 0, 2])),
    )
    first, second = parts_of(two)
    assert set(first) == {"dense", "sparse"}
    assert isinstance(first["sparse"], TermRow)
    assert (first["sparse"].ids.tolist(), first["sparse"].weights.tolist()) == ([4], [2.0])
    assert set(second) == {"dense", "multi"}
    assert isinstance(second["multi"], np.ndarray)
    assert second["multi"].shape == (2, 4)


def test_the_weight_of_a_sum_over_query_tokens_is_divided_by_their_number():
    rows = torch.ones(7, 4).numpy()
    assert weight_of(Prefetch("multi", rows, 1), Weights(1.0, 0.3, 0.7)) == pytest.approx(0.1)
    assert weight_of(Prefetch("dense", rows[0], 1), Weights(0.4, 0.3, 0.7)) == 0.4


def test_a_graph_of_dense_vectors_finds_nearly_what_a_scan_finds(tmp_path):
    """Beyond some megabytes ``optimize`` builds one, and candidates come from it."""
    count, dim = 1_500, 2_048  # 12 MB, in as few records as that takes
    centres = torch.randn(30, dim)
    dense = centres[torch.randint(0, 30, (count + 20,))] + torch.randn(count + 20, dim)
    dense = torch.nn.functional.normalize(dense, dim=1)
    docs, queries = Vectors(dense[:count]), Vectors(dense[count:])
    with closing(edge(tmp_path / "index", threads=1)) as engine:
        engine.upsert(records(count), docs)
        assert engine.stats().pending == count
        engine.optimize()
        assert engine.stats().pending == 0
        built = list((tmp_path / "index").rglob("vector_index-dense/*"))
        assert any(path.name.startswith(("links", "graph")) for path in built), built
        found = engine.search(queries, 10, fusion=Weighted(weights=Weights(1.0, 0.0, 0.0)))
    true = weighted_scores(queries, docs, Weights()).topk(10).indices.tolist()
    recalled = [
        len({hit.record.id for hit in hits} & {str(row) for row in rows})
        for hits, rows in zip(found, true, strict=True)
    ]
    assert sum(recalled) >= 0.9 * 10 * len(recalled)


@pytest.mark.parametrize(
    ("stored", "bytes_each"),
    [("int8", 0), ("int4", 128), ("binary", 32)],  # int8 codes are made of 10 MB and more
)
def test_codes_find_candidates_that_the_vectors_themselves_score(tmp_path, stored, bytes_each):
    count, dim = 2_000, 256  # 2 MB
    centres = torch.randn(30, dim)
    dense = centres[torch.randint(0, 30, (count + 20,))] + torch.randn(count + 20, dim)
    dense = torch.nn.functional.normalize(dense, dim=1)
    docs, queries = Vectors(dense[:count]), Vectors(dense[count:])
    folder = tmp_path / "index"
    with closing(edge(folder, threads=1, stored=stored)) as engine:
        engine.upsert(records(count), docs)
        engine.optimize()
    with closing(edge(folder, threads=1)) as engine:  # it knows what it has
        found = engine.search(queries, 10, fusion=Weighted(weights=Weights(1.0, 0.0, 0.0)))
    true = weighted_scores(queries, docs, Weights())
    for hits, scores in zip(found, true, strict=True):
        for hit in hits:
            assert hit.score == pytest.approx(float(scores[int(hit.record.id)]), abs=1e-5)
    best = [{str(row) for row in rows} for rows in true.topk(10).indices.tolist()]
    recalled = [
        len({hit.record.id for hit in hits} & rows) for hits, rows in zip(found, best, strict=True)
    ]
    assert sum(recalled) >= 0.9 * 10 * len(recalled)
    codes = [path for path in folder.rglob("quantized_data/chunk_*") if path.is_file()]
    assert sum(path.stat().st_size for path in codes) >= count * bytes_each


def test_other_codes_than_a_folder_has_are_refused(tmp_path):
    with closing(edge(tmp_path / "index", stored="int8")) as engine:
        engine.upsert(records(8), vectors(8))
    with pytest.raises(RecipeError, match="holds dense vectors in int8, not binary"):
        edge(tmp_path / "index", stored="binary")
    with pytest.raises(RecipeError, match="take binary in place of binary"):
        edge(tmp_path / "other", stored="binary+int8")
    assert not (tmp_path / "other").exists()
    edge(tmp_path / "index", stored="int8").close()  # and the lock is not kept
    path = tmp_path / "index/points/stored.json"
    path.write_text('"int2"')
    with pytest.raises(IndexFolderError, match=r"stored.json has invalid .*--fresh"):
        edge(tmp_path / "index")
    path.unlink()  # as in a folder from before there were codes
    with closing(edge(tmp_path / "index", stored="float32")) as engine:
        assert engine.stats().records == 8


def test_token_vectors_are_stored_in_halves_and_scored_as_a_mean(tmp_path):
    docs, queries = vectors(60), vectors(4)
    true = weighted_scores(queries, docs, Weights(0.0, 0.0, 1.0))
    with closing(edge(tmp_path / "index")) as engine:
        engine.upsert(records(60), docs)
        fusion = Weighted(weights=Weights(0.0, 0.0, 1.0), candidates=None)
        for row, hits in zip(true, engine.search(queries, 60, fusion=fusion), strict=True):
            for hit in hits:
                assert hit.score == pytest.approx(float(row[int(hit.record.id)]), abs=2e-3)


def test_more_queries_than_are_asked_together_are_all_answered(tmp_path):
    docs = vectors(40)
    with closing(edge(tmp_path / "index")) as engine:
        engine.upsert(records(40), docs)
        found = engine.search(docs, 1, fusion=Weighted(weights=Weights(1.0, 0.0, 0.0)))
    assert [hits[0].record.id for hits in found] == [str(row) for row in range(40)]


def test_how_much_is_left_to_optimize_is_known_after_a_new_start(tmp_path):
    with closing(edge(tmp_path / "index")) as engine:
        engine.upsert(records(8), vectors(8))
    with closing(edge(tmp_path / "index")) as engine:
        assert engine.stats().pending == 8
        engine.optimize()
    with closing(edge(tmp_path / "index")) as engine:
        assert engine.stats().pending == 0
        assert engine.kinds == ("dense", "sparse", "multi")


def stored(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_optimize_drops_what_was_deleted_from_the_disk(tmp_path):
    with closing(edge(tmp_path / "index")) as engine:
        engine.upsert(records(1_200), Vectors(torch.randn(1_200, 1_024)))
        engine.flush()
        before = stored(tmp_path / "index/points/shard/segments")
        engine.delete([str(number) for number in range(1_150)])
        engine.optimize()
        assert stored(tmp_path / "index/points/shard/segments") < before / 4
        assert engine.stats().records == 50


@pytest.mark.parametrize("broken", ["widths.json", "shard/edge_config.json"])
def test_a_damaged_folder_is_refused_with_what_to_do(tmp_path, broken):
    folder = tmp_path / "index"
    with closing(edge(folder)) as engine:
        engine.upsert(records(8), vectors(8))
    (folder / "points" / broken).write_text("{")
    with pytest.raises(IndexFolderError, match=r"cannot read it .*; build it again with"):
        edge(folder)
    with pytest.raises(IndexFolderError):  # and not that another one has it open
        edge(folder)


def test_a_closed_engine_does_not_begin_anew_over_what_is_there(tmp_path):
    engine = edge(tmp_path / "index")
    engine.upsert(records(8), vectors(8))
    engine.close()
    engine.close()
    with pytest.raises(AssertionError, match="closed"):
        engine.upsert(records(2), vectors(2))
    with closing(edge(tmp_path / "index")) as again:
        assert again.stats().records == 8


@pytest.mark.parametrize(
    ("package", "module"), [("qdrant_edge", "edge"), ("qdrant_client", "server")]
)
def test_without_the_extra_the_error_names_it(monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"tercet.search.qdrant.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[qdrant\]'"):
        __import__(f"tercet.search.qdrant.{module}")


def test_a_panic_of_the_engine_is_an_error_like_others(tmp_path):
    """At files of bits that were cut it panics, which is no Exception, and keeps no lock."""
    folder = tmp_path / "index"
    with closing(edge(folder)) as engine:
        engine.upsert(records(8), vectors(8))
        engine.optimize()
    paths = sorted(folder.rglob("status.dat"))
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for _ in range(2):
        with pytest.raises(IndexFolderError, match=r"cannot read it .*; build it again with"):
            edge(folder)
