import json
import subprocess
import sys

import numpy as np
import pytest

from tercet.errors import DataError, IndexFolderError, ModelError
from tercet.search import exact
from tercet.search.exact import ExactIndex, top_k

BOTH_WAYS = pytest.mark.parametrize("use_faiss", [False, True])


@pytest.fixture
def random():
    return np.random.default_rng(0)


def vectors(random, rows, dim=8):
    return random.standard_normal((rows, dim)).astype(np.float32)


def coarse(random, rows, dim=5):
    """Vectors of small whole numbers: exact in float32, with very many equal scores."""
    return random.integers(-1, 2, (rows, dim)).astype(np.float32)


def by_sorting(queries, docs, k):
    """The obvious slow formula: a stable sort of all scores."""
    scores = (queries @ docs.T).astype(np.float32)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@BOTH_WAYS
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_top_k_equals_a_full_sort(random, use_faiss, k, block):
    queries, docs = vectors(random, 300), vectors(random, 200)
    hits = top_k(queries, docs, k, block=block, use_faiss=use_faiss)
    scores, rows = by_sorting(queries, docs, k)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_allclose(hits.scores, scores, atol=1e-5)


@BOTH_WAYS
@pytest.mark.parametrize("k", [1, 3, 20, 149, 150])
@pytest.mark.parametrize("block", [1, 16, 150])
def test_equal_scores_are_ranked_by_lower_row(random, use_faiss, k, block):
    queries, docs = coarse(random, 20), coarse(random, 150)
    hits = top_k(queries, docs, k, block=block, use_faiss=use_faiss)
    scores, rows = by_sorting(queries, docs, k)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_array_equal(hits.scores, scores)


@BOTH_WAYS
def test_more_than_there_are_returns_all_documents(random, use_faiss):
    hits = top_k(vectors(random, 3), vectors(random, 4), 10, use_faiss=use_faiss)
    assert hits.rows.shape == hits.scores.shape == (3, 4)
    assert np.sort(hits.rows).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(("queries", "docs", "k"), [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_nothing_to_search_or_to_find_is_no_error(random, queries, docs, k):
    hits = top_k(vectors(random, queries), vectors(random, docs), k)
    assert hits.rows.shape == (queries, min(k, docs))


@pytest.mark.parametrize("use_faiss", [False, True, None])
def test_a_file_of_documents_is_searched_where_it_lies(random, tmp_path, use_faiss):
    docs, queries = vectors(random, 90), vectors(random, 4)
    np.save(tmp_path / "docs.npy", docs)
    mapped = np.load(tmp_path / "docs.npy", mmap_mode="r")
    hits = top_k(queries, mapped, 5, block=32, use_faiss=use_faiss)
    np.testing.assert_array_equal(hits.rows, by_sorting(queries, docs, 5)[1])


def test_half_precision_documents_are_compared_in_float32(random):
    docs, queries = vectors(random, 50).astype(np.float16), vectors(random, 2)
    expected = by_sorting(queries, docs.astype(np.float32), 50)
    np.testing.assert_array_equal(top_k(queries, docs, 50, block=8).rows, expected[1])


def test_faiss_is_chosen_for_few_and_for_many_queries_only(random):
    docs = vectors(random, 10, dim=128)
    chosen = [n for n in (1, 3, 4, 999, 1000, 5000) if exact._faiss_is_faster(n, docs)]
    assert chosen == [1, 3, 1000, 5000]
    assert not exact._faiss_is_faster(1, docs[:, :64])
    assert not exact._faiss_is_faster(1, docs.astype(np.float16))


def test_vectors_of_two_models_are_refused(random):
    with pytest.raises(ModelError) as error:
        top_k(vectors(random, 2, dim=8), vectors(random, 3, dim=9), 1)
    assert str(error.value) == (
        "queries have 8 dimensions and documents 9; "
        "embed both with the same model and the same number of dimensions"
    )


def test_a_query_that_is_not_finite_is_named(random):
    queries = vectors(random, 4)
    queries[2, 5] = np.nan
    with pytest.raises(ModelError, match="the vector of query 2 holds NaN or infinity"):
        top_k(queries, vectors(random, 3), 1)


@BOTH_WAYS
def test_documents_that_are_not_numbers_are_refused(random, use_faiss):
    docs = np.full((3, 8), np.nan, np.float32)
    with pytest.raises(ModelError, match="the documents' vectors hold NaN"):
        top_k(vectors(random, 2), docs, 2, use_faiss=use_faiss)


@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_torch_and_faiss_work_in_one_process(first):
    """Two OpenMP runtimes in a process can abort it or hang it; these two do not."""
    program = f"""
import {first}, numpy, torch, faiss
from tercet.search.exact import top_k
docs = numpy.eye(600, 256, dtype=numpy.float32)
square = torch.rand(600, 600)
for _ in range(3):
    square = square @ square / 300
    assert (top_k(docs, docs, 2, use_faiss=True).rows[:256, 0] == numpy.arange(256)).all()
    assert (top_k(docs, docs, 2, use_faiss=False).rows[:256, 0] == numpy.arange(256)).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def documents(count):
    return [(f"id{i}", f"title {i}", f"text {i} \N{HANGUL SYLLABLE GA}") for i in range(count)]


def build(folder, docs, **settings):
    return ExactIndex.build(folder, vectors=docs, documents=documents(len(docs)), settings=settings)


def test_an_index_finds_ids_titles_and_texts_across_row_groups(random, tmp_path):
    docs, queries = vectors(random, 1300), vectors(random, 3)
    index = build(tmp_path / "index", docs, model="m")
    scores, rows = by_sorting(queries, docs, 40)
    found = ExactIndex.open(tmp_path / "index").search(queries, 40)
    for hits, best, row in zip(found, scores, rows, strict=True):
        assert [(h.id, h.title, h.text) for h in hits] == [documents(1300)[i] for i in row]
        np.testing.assert_allclose([h.score for h in hits], best, atol=1e-5)
    assert len(index) == 1300
    assert index.settings == {"model": "m"}


def test_an_index_from_blocks_equals_one_from_an_array(random, tmp_path):
    docs = vectors(random, 20)
    build(tmp_path / "whole", docs)
    blocks = (docs[start:stop] for start, stop in [(0, 0), (0, 7), (7, 19), (19, 20)])
    named = iter(documents(20))
    ExactIndex.build(tmp_path / "blocks", vectors=blocks, documents=named, settings={})
    for name in ("vectors.npy", "index.json", "documents.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "blocks" / "vectors.npy"), docs)


def test_a_new_index_replaces_the_old_and_its_readers_keep_the_old(random, tmp_path):
    folder, query = tmp_path / "index", np.ones((1, 8), np.float32)
    old = build(folder, vectors(random, 5))
    before = old.search(query, 5)
    build(folder, vectors(random, 9))
    assert len(ExactIndex.open(folder)) == 9
    assert old.search(query, 5) == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_build_that_fails_leaves_the_old_index_as_it_was(random, tmp_path):
    def failing():
        yield vectors(random, 5)
        raise KeyboardInterrupt

    folder = tmp_path / "index"
    build(folder, vectors(random, 5))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        ExactIndex.build(folder, vectors=failing(), documents=documents(9), settings={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_build_killed_between_its_two_renames_is_undone_by_opening(random, tmp_path):
    folder = tmp_path / "index"
    build(folder, vectors(random, 5))
    folder.rename(tmp_path / ".index.old-host-1-0")
    assert len(ExactIndex.open(folder)) == 5


def test_a_folder_of_other_things_is_not_overwritten(random, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(IndexFolderError, match="is not an index and would be overwritten"):
        build(tmp_path, vectors(random, 2))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("docs", "names", "error", "message"),
    [
        (np.ones((2, 3)), ["a", "a"], DataError, "documents:2: id 'a' occurs twice"),
        (np.ones((2, 3)), ["a"], DataError, "documents: 1 documents but 2 vectors"),
        (np.full((1, 3), np.inf), ["a"], ModelError, "the vector of document 0 holds NaN"),
        (np.ones((0, 3)), [], DataError, "documents: there are none; give at least one"),
        ([np.ones((1, 3)), np.ones((1, 4))], ["a", "b"], ModelError, "vectors of 3 and of 4"),
    ],
)
def test_what_cannot_be_indexed_is_named_and_nothing_is_left(tmp_path, docs, names, error, message):
    texts = [(name, "", "") for name in names]
    with pytest.raises(error, match=message):
        ExactIndex.build(tmp_path / "index", vectors=docs, documents=texts, settings={})
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_id_is_named_by_its_number_among_all_documents(tmp_path):
    texts = [*documents(700), documents(1)[0]]
    with pytest.raises(DataError, match="documents:701: id 'id0' occurs twice"):
        ExactIndex.build(tmp_path / "index", vectors=[], documents=texts, settings={})


def test_a_missing_folder_and_a_folder_without_index_are_told_apart(tmp_path):
    with pytest.raises(IndexFolderError, match="gone: no such folder; build one with: tercet"):
        ExactIndex.open(tmp_path / "gone")
    with pytest.raises(IndexFolderError, match="is not an index; build one with: tercet index"):
        ExactIndex.open(tmp_path)


@pytest.mark.parametrize("name", ["vectors.npy", "documents.parquet", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_file_is_told_at_opening(random, tmp_path, name, damage):
    folder = tmp_path / "index"
    build(folder, vectors(random, 5))
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(IndexFolderError, match=r"build (it again|one) with: tercet index"):
        ExactIndex.open(folder)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"count": 4}, {"dim": 7}, {"settings": None}, {"dim": "8"}]
)
def test_files_that_disagree_are_told_at_opening(random, tmp_path, change):
    folder = tmp_path / "index"
    build(folder, vectors(random, 5))
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | change))
    with pytest.raises(IndexFolderError, match=r"the index is damaged \(.*\); build it again"):
        ExactIndex.open(folder)


def test_documents_of_another_index_are_told_at_opening(random, tmp_path):
    build(tmp_path / "five", vectors(random, 5))
    build(tmp_path / "six", vectors(random, 6))
    (tmp_path / "six" / "documents.parquet").replace(tmp_path / "five" / "documents.parquet")
    with pytest.raises(IndexFolderError, match=r"documents.parquet has 6 rows"):
        ExactIndex.open(tmp_path / "five")


def test_an_index_of_another_model_is_refused(random, tmp_path):
    index = build(tmp_path / "index", vectors(random, 2), fingerprint="abc")
    index.require({"fingerprint": "abc"})
    with pytest.raises(IndexFolderError, match="was built with fingerprint 'abc', not 'xyz'"):
        index.require({"fingerprint": "xyz"})
