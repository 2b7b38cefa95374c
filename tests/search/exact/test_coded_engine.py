"""The exact engine with dense vectors in codes; ``test_conformance.py`` runs on it as well."""

import json
import re
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch

from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.kinds import Weights
from tercet.rank.coded import top_k_coded
from tercet.rank.quantized import STORED, Ranges, bytes_of, codes_of
from tercet.rank.topk import top_k
from tercet.search.engine.engine import Record, Weighted
from tercet.search.exact.exact_engine import ExactEngine
from tercet.vectors import Vectors
from tests.search import conformance as c

CODED = [stored for stored in STORED if stored != "float32"]
DIMS = 24
ALL = Weighted(weights=Weights(1.0, 0.0, 0.0), candidates=None)


def unit(count, seed=0, dims=DIMS):
    """Vectors far to one side, as those of many models are."""
    random = np.random.default_rng(seed)
    found = random.standard_normal((count, dims)) + 1.5 * np.eye(dims)[0]
    return torch.from_numpy(found / np.linalg.norm(found, axis=1, keepdims=True)).float()


DOCS, QUERIES = unit(700), unit(9, seed=1)


def named(count, start=0):
    return [Record(f"id{i}", f"text {i}") for i in range(start, start + count)]


def filled(folder, stored, docs=DOCS):
    engine = ExactEngine(folder, stored=stored)
    engine.settle(Ranges.learned(docs.numpy()))
    engine.upsert(named(len(docs)), Vectors(docs))
    return engine


def found_by(engine, k=10, fusion=None):
    hits = engine.search(Vectors(QUERIES), k, fusion=fusion)
    return [[int(hit.record.id[2:]) for hit in each] for each in hits], [
        [hit.score for hit in each] for each in hits
    ]


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_it_finds_what_a_search_of_decoded_vectors_finds(tmp_path, stored):
    decoded = Ranges.learned(DOCS.numpy()).quantizer(stored).codes(DOCS.numpy()).decoded()
    wanted = top_k(QUERIES.numpy(), decoded, 10)
    with closing(filled(tmp_path / "index", stored)) as engine:
        for fusion in (None, ALL):
            rows, scores = found_by(engine, fusion=fusion)
            assert rows == wanted.rows.tolist()
            np.testing.assert_allclose(scores, wanted.scores, atol=1e-5)
            engine.flush()


@pytest.mark.parametrize("stored", ["binary", "binary+int8"])
def test_bits_find_candidates_that_the_finest_codes_score(tmp_path, stored):
    ranges = Ranges.learned(DOCS.numpy())
    coarse, *finer = (ranges.quantizer(sort).codes(DOCS.numpy()) for sort in codes_of(stored))
    many = top_k_coded(QUERIES.numpy(), coarse, 100, finer=finer[0] if finer else None)
    exact = top_k(QUERIES.numpy(), (finer or [coarse])[0].decoded(), 10)
    with closing(filled(tmp_path / "index", stored)) as engine:
        rows, scores = found_by(engine)
        assert rows == many.rows[:, :10].tolist()
        np.testing.assert_allclose(scores, many.scores[:, :10], atol=1e-5)
        if finer:
            assert found_by(engine, fusion=ALL)[0] == exact.rows.tolist()


@pytest.mark.parametrize("stored", CODED)
def test_a_vector_takes_on_the_disk_what_its_codes_take(tmp_path, stored):
    docs = unit(600, dims=256)
    with closing(filled(tmp_path / "index", stored, docs)) as engine:
        engine.optimize()
        assert engine.widths == {"dense": 256}
    (segment,) = (tmp_path / "index").glob("segment-*")
    headers = 128 * len(codes_of(stored))
    kept = sum(path.stat().st_size for path in segment.glob("*.npy")) - headers
    assert kept == 600 * bytes_of(stored, 256)
    assert (
        bytes_of(stored, 256)
        == {"int8": 256, "int4": 128, "binary": 32, "binary+int8": 288}[stored]
    )


@pytest.mark.parametrize("stored", CODED)
def test_codes_survive_merges_deletions_and_a_new_start(tmp_path, stored):
    with closing(filled(tmp_path / "whole", stored)) as engine:
        engine.delete([f"id{i}" for i in range(0, 700, 7)])
        wanted = found_by(engine)
    folder = tmp_path / "index"
    with closing(ExactEngine(folder, stored=stored)) as engine:
        engine.settle(Ranges.learned(DOCS.numpy()))
        for start in range(0, 700, 100):
            engine.upsert(named(100, start), Vectors(DOCS[start : start + 100]))
            engine.flush()
    with closing(ExactEngine(folder)) as engine:
        engine.delete([f"id{i}" for i in range(0, 700, 7)])
        for step in (engine.flush, engine.optimize, lambda: None):
            rows, scores = found_by(engine)
            assert rows == wanted[0]
            np.testing.assert_allclose(scores, wanted[1], atol=1e-5)
            step()


def test_without_ranges_codes_are_learned_from_the_first_vectors_and_stay_so(tmp_path):
    with closing(ExactEngine(tmp_path / "index", stored="int8")) as engine:
        assert not engine.is_settled
        engine.upsert(named(300), Vectors(DOCS[:300]))
        assert engine.is_settled
    learned = Ranges.learned(DOCS[:300].numpy())
    with closing(ExactEngine(tmp_path / "index")) as engine:
        engine.upsert(named(400, 300), Vectors(DOCS[300:]))
        assert engine._manifest.ranges == learned
        decoded = learned.quantizer("int8").codes(DOCS.numpy()).decoded()
        wanted = top_k(QUERIES.numpy(), decoded, 10)
        assert found_by(engine)[0] == wanted.rows.tolist()
        engine.settle(Ranges.learned(DOCS.numpy()))  # too late: codes are there
        assert engine._manifest.ranges == learned


def test_vectors_that_teach_nothing_are_refused_and_nothing_is_settled(tmp_path):
    with closing(ExactEngine(tmp_path / "index", stored="int4")) as engine:
        with pytest.raises(ModelError, match="1 vectors that do not differ"):
            engine.upsert(named(1), Vectors(DOCS[:1]))
        assert engine.stats().records == 0 and not engine.is_settled
        engine.settle(Ranges.learned(DOCS.numpy()))
        with pytest.raises(ModelError, match=r"settled for 24 dimensions, and these .* have 16"):
            engine.upsert(named(1), Vectors(unit(1, dims=16)))
        engine.upsert(named(1), Vectors(DOCS[:1]))


def test_another_way_to_store_vectors_than_the_folder_has_is_refused(tmp_path):
    filled(tmp_path / "index", "int8").close()
    for other in ("float32", "int4", "binary+int8"):
        with pytest.raises(RecipeError, match=re.escape(f"in int8, not {other}")):
            ExactEngine(tmp_path / "index", stored=other)
    ExactEngine(tmp_path / "index", stored="int8").close()  # and the lock is not kept


def test_a_folder_from_before_there_were_codes_opens(tmp_path):
    folder = tmp_path / "index"
    with closing(ExactEngine(folder)) as engine:
        engine.upsert(c.records(), c.DOCUMENTS)
        wanted = engine.search(c.QUESTIONS, 5)
    path = folder / "manifest.json"
    about = json.loads(path.read_text())
    assert about.pop("stored") == "float32" and about.pop("ranges") is None
    del about["checksum"], about["checksums"]
    path.write_text(json.dumps(about))
    with closing(ExactEngine(folder, stored="float32")) as engine:
        assert engine.search(c.QUESTIONS, 5) == wanted
        engine.upsert([Record("new", "")], c.DOCUMENTS.take([0]))
    assert json.loads(path.read_text())["stored"] == "float32"


def test_damaged_codes_are_told_at_opening(tmp_path):
    whole = tmp_path / "whole"
    filled(whole, "binary+int8").close()
    (segment,) = whole.glob("segment-*")
    for name in ("codes.npy", "finer.npy"):
        for damage in ("cut", "emptied", "removed", "of another width"):
            folder = tmp_path / "broken"
            shutil.copytree(whole, folder)
            broken = folder / segment.name / name
            content = broken.read_bytes()
            broken.unlink()
            if damage == "of another width":
                np.save(broken, np.zeros((700, 2), np.uint8))
            elif damage != "removed":
                broken.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
            with pytest.raises(IndexFolderError, match="tercet index"):
                ExactEngine(folder, read_only=True)
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"stored": "int2"},
        {"stored": "float32"},
        {"ranges": None},
        {"ranges": {"centre": [0.0], "int8": 1, "int4": 1, "binary": 1}},
        {"ranges": {"centre": [0.0] * DIMS, "int8": 0, "int4": 1, "binary": 1}},
        {"ranges": {"centre": [float("nan")] * DIMS, "int8": 1, "int4": 1, "binary": 1}},
        {"ranges": {"centre": [0.0] * DIMS, "int8": 1}},
        {"ranges": 3},
    ],
)
def test_a_manifest_whose_codes_cannot_be_read_is_told_at_opening(tmp_path, change):
    folder = tmp_path / "index"
    filled(folder, "int8").close()
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | change))
    with pytest.raises(IndexFolderError, match=r"the index is damaged \(.*\); build it again"):
        ExactEngine(folder)
