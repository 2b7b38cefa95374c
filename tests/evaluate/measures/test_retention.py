import numpy as np
import pytest

from tercet.errors import RecipeError
from tercet.evaluate.measures.retention import STORED, measure_coded, retention
from tercet.evaluate.measures.retrieval import evaluate_hits, measure
from tercet.evaluate.report.figures import CurvePoint, curves, drawing, write_png
from tercet.evaluate.report.intervals import Interval
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.rank.coded import top_k_coded
from tercet.rank.quantized import Quantizer, Ranges, truncated
from tests.toy import SENTENCES


@pytest.fixture(scope="module")
def data():
    """Each sentence is to be found by its last words."""
    names = tuple(map(str, range(len(SENTENCES))))
    queries = tuple(" ".join(text.split()[-4:]) for text in SENTENCES)
    judgements = Judgements.of([{i: 1} for i in range(len(SENTENCES))])
    of_documents = tuple(f"d{name}" for name in names)
    return RetrievalSet("toy", queries, names, SENTENCES, of_documents, judgements)


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder)


def test_every_way_to_store_vectors_is_measured_from_one_encoding(embedder, data, monkeypatch):
    texts = []
    encode = Embedder.encode

    def counted(self, some, *words, **how):
        texts.extend(some)
        return encode(self, some, *words, **how)

    monkeypatch.setattr(Embedder, "encode", counted)
    found = retention(embedder, data, dims=(16, 7))
    assert sorted(texts) == sorted([*data.queries, *data.documents])
    assert [each.name for each in found] == [f"{d} {s}" for d in (64, 16, 7) for s in STORED]
    sizes = {each.name: each.bytes for each in found}
    assert [sizes[f"64 {s}"] for s in STORED] == [256, 64, 32, 72, 8]
    assert [sizes[f"7 {s}"] for s in STORED] == [28, 7, 4, 8, 1]
    assert all(each.learned == (each.stored != "float32") for each in found)


def test_what_is_measured_is_a_search_of_the_codes(embedder, data):
    """A6: vectors that are cut have unit length before they become codes."""
    queries, documents = embedder.encode(data.queries, "query"), embedder.encode(data.documents)
    for each in retention(embedder, data, dims=(16,), names=("ndcg@10",)):
        q, d = truncated(queries, each.dims), truncated(documents, each.dims)
        if each.stored == "float32":
            same = measure(embedder, data, dims=each.dims).result.scores["ndcg@10"]
        else:
            precision = "binary" if each.stored == "binary+int8" else each.stored
            codes = Quantizer.learned(d, precision).codes(d)
            finer = Quantizer.learned(d, "int8").codes(d) if precision != each.stored else None
            hits = top_k_coded(q, codes, 10, finer=finer)
            same = evaluate_hits(data, hits, names=("ndcg@10",)).scores["ndcg@10"]
        assert each.result.scores["ndcg@10"] == pytest.approx(same), each.name


def test_a_loss_is_that_of_the_same_queries(embedder, data):
    full, *others = retention(embedder, data, dims=(3,), stored=("float32", "binary"))
    assert [each.name for each in others] == ["64 binary", "3 float32", "3 binary"]
    worst = others[-1].minus(full, "ndcg@10", seed=3)
    mean = others[-1].result.mean("ndcg@10") - full.result.mean("ndcg@10")
    assert worst.mean == pytest.approx(mean) and worst.low <= mean <= worst.high
    assert full.minus(full, "ndcg@10") == Interval(0.0, 0.0, 0.0, 12)


def test_full_float32_comes_first_even_if_it_was_not_asked_for(embedder, data):
    found = retention(embedder, data, dims=(8,), stored=("int4",))
    assert [each.name for each in found] == ["64 float32", "64 int4", "8 int4"]


def test_ranges_of_the_model_are_used_where_it_has_some(encoder_folder, embedder, data):
    kept = Ranges((0.0,) * 16, 0.9, 0.01, 0.2)
    knowing = Embedder.load(encoder_folder, ranges={16: kept})
    found = measure_coded(knowing, data, "int4", dims=16)
    assert (found.limit, found.learned, found.bytes) == (0.01, False, 8)
    documents = truncated(embedder.encode(data.documents), 16)
    hits = top_k_coded(
        truncated(embedder.encode(data.queries, "query"), 16),
        kept.quantizer("int4").codes(documents),
        10,
    )
    same = evaluate_hits(data, hits, names=("ndcg@10",)).scores["ndcg@10"]
    assert found.result.scores["ndcg@10"] == pytest.approx(same)
    assert measure_coded(knowing, data, "int4", dims=32).learned


def test_queries_are_never_looked_at_to_learn_ranges(embedder, data, monkeypatch):
    seen = []
    learned = Quantizer.learned

    def watched(vectors, precision):
        seen.append(vectors)
        return learned(vectors, precision)

    monkeypatch.setattr(Quantizer, "learned", watched)
    measure_coded(embedder, data, "int8")
    assert len(seen) == 1 and np.allclose(seen[0], embedder.encode(data.documents))


@pytest.mark.parametrize("dims", [0, 65])
def test_numbers_of_coordinates_that_there_are_not_are_refused(embedder, data, dims):
    with pytest.raises(RecipeError, match="dims must be between 1 and 64"):
        retention(embedder, data, dims=(dims,))


def test_curves_are_drawn_with_every_point_and_its_interval(tmp_path):
    lines = {
        "int8": [
            CurvePoint(64.0, Interval(0.5, 0.4, 0.6, 9), "64"),
            CurvePoint(16.0, Interval(0.3, 0.0, 1.0, 9)),
        ],
        "float32": [CurvePoint(256.0, Interval(0.5, 0.4, 0.6, 9))],
    }
    with drawing():
        figure = curves(lines, x="bytes a vector", y="ndcg@10")
        write_png(tmp_path / "sizes.png", figure)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "bytes a vector")
    first = axes.get_lines()[0]
    assert np.asarray(first.get_xydata()).tolist() == [[16, 0.3], [64, 0.5]]
    assert "64" in [text.get_text() for text in axes.texts]
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
