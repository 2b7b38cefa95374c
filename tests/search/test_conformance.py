"""What every engine has to do; the engines are listed in ``conformance.py``."""

import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from tercet.errors import DataError, ModelError, RecipeError
from tercet.kinds import KINDS, Weights
from tercet.search.engine.engine import Engine, ReciprocalRank, Record, Rerank, Weighted
from tercet.segments import offsets_of
from tercet.vectors import Terms, TokenRows, Vectors
from tests.search import conformance as c


@pytest.fixture(params=c.STORES, ids=lambda store: store.name)
def store(request):
    if request.param.needs:
        pytest.importorskip(request.param.needs)
    return request.param


@pytest.fixture
def engine(store, tmp_path):
    with closing(store.opened(tmp_path / "index")) as opened:
        assert isinstance(opened, Engine)
        yield opened


@pytest.fixture
def filled(engine):
    engine.upsert(c.records(), c.DOCUMENTS)
    return engine


def ids(hits):
    return [hit.record.id for hit in hits]


def check(engine, store, fusion, *, k=7, allowed=None, where=None, **sides):
    """Every query finds what the slow formulas find."""
    queries = sides.get("queries", c.QUESTIONS)
    docs = store.held(sides.get("docs", c.DOCUMENTS))
    found = engine.search(queries, k, fusion=fusion, where=where)
    assert len(found) == len(queries)
    for query, hits in enumerate(found):
        scores = c.expected(queries, query, docs, fusion, k=k, allowed=allowed)
        c.agree(hits, {c.names()[doc]: score for doc, score in scores.items()}, k, store.tolerance)


@pytest.mark.parametrize("fusion", c.FUSIONS.values(), ids=c.FUSIONS.keys())
def test_a_fusion_ranks_as_the_slow_formula_does(filled, store, fusion):
    check(filled, store, fusion)
    filled.optimize()
    check(filled, store, fusion)


@pytest.mark.parametrize("fusion", c.FUSIONS.values(), ids=c.FUSIONS.keys())
def test_b20_each_hit_has_its_true_score_by_every_kind_that_counts(filled, store, fusion):
    """Also by a kind in whose list of candidates it is missing (B20)."""
    if isinstance(fusion, ReciprocalRank):
        counting = fusion.kinds
    else:
        counting = [kind for kind in KINDS if fusion.weights.of(kind)]
    for query, hits in enumerate(filled.search(c.QUESTIONS, 7, fusion=fusion)):
        for hit in hits:
            assert set(hit.scores) == set(counting)
            doc = c.names().index(hit.record.id)
            for kind, found in hit.scores.items():
                true = c.score(kind, c.QUESTIONS, query, store.held(c.DOCUMENTS), doc)
                assert math.isclose(found, true, abs_tol=store.tolerance)


def test_b20_a_document_that_one_list_misses_is_not_taken_to_score_zero_there(engine, store):
    """Dense finds a and d, sparse finds b and e; c is third in both, and would be the best."""
    if store.stored == "int4":
        pytest.skip("of so few bits, some of these values are equal")
    dense = {"a": 1.0, "b": 0.5, "c": 0.9, "d": 0.95, "e": 0.4}
    sparse = {"a": 0.1, "b": 1.0, "c": 0.9, "d": 0.6, "e": 0.95}
    first = torch.eye(c.DIM)[:1]
    docs = Vectors(
        torch.tensor(list(dense.values()))[:, None] * first,
        Terms(torch.full((5,), 9), torch.tensor(list(sparse.values())), torch.arange(6)),
    )
    query = Vectors(
        first,
        Terms(torch.tensor([9]), torch.tensor([1.0]), torch.tensor([0, 1])),
    )
    engine.upsert([Record(name, "") for name in dense], docs)
    weights = Weights(1.0, 1.0, 0.0)
    ((best, second),) = engine.search(query, 2, fusion=Weighted(weights=weights, candidates=2))
    # With zeros: a and b 1.0, d and e 0.95. Truly: d 0.95 + 0.6, b 0.5 + 1.0, e 1.35, a 1.1.
    assert (best.record.id, second.record.id) == ("d", "b")
    kept = store.held(docs).dense[:, 0].tolist()  # nearly 0.95 and 0.5, if it keeps codes
    assert math.isclose(best.score, kept[3] + 0.6, abs_tol=store.tolerance)
    assert math.isclose(second.score, kept[1] + 1.0, abs_tol=store.tolerance)
    ((best,),) = engine.search(query, 1, fusion=Weighted(weights=weights, candidates=3))
    assert best.record.id == "c"


def test_without_a_fusion_the_usual_weights_rank(filled, store):
    for usual, plain in zip(
        filled.search(c.QUESTIONS, 5, fusion=Weighted()),
        filled.search(c.QUESTIONS, 5),
        strict=True,
    ):
        assert ids(usual) == ids(plain)
    check(filled, store, Weighted())


@pytest.mark.parametrize("kinds", [("dense",), ("sparse",), ("multi",), ("dense", "multi")])
@pytest.mark.parametrize("side", ["queries", "engine"])
def test_kinds_that_one_side_lacks_do_not_count(engine, store, kinds, side):
    docs = c.DOCUMENTS.only(kinds) if side == "engine" else c.DOCUMENTS
    queries = c.QUESTIONS.only(kinds) if side == "queries" else c.QUESTIONS
    engine.upsert(c.records(), docs)
    if side == "engine":
        assert engine.stats().kinds == kinds
    check(engine, store, c.EXHAUSTIVE, queries=queries, docs=docs)
    check(engine, store, Weighted(), queries=queries, docs=docs)


def test_nothing_in_common_is_refused(engine):
    engine.upsert(c.records(), c.DOCUMENTS.only(["dense"]))
    with pytest.raises(RecipeError, match="nothing to rank by"):
        engine.search(c.QUESTIONS.only(["sparse"]), 3)
    with pytest.raises(RecipeError, match="nothing to rank by"):
        engine.search(c.QUESTIONS, 3, fusion=Weighted(weights=Weights(0.0, 1.0, 1.0)))
    with pytest.raises(RecipeError, match="nothing to rank by"):
        engine.search(c.QUESTIONS, 3, fusion=ReciprocalRank(kinds=("multi",)))


def test_candidates_by_dense_vectors_need_some(engine):
    engine.upsert(c.records(), c.DOCUMENTS.only(["sparse", "multi"]))
    with pytest.raises(RecipeError, match="dense"):
        engine.search(c.QUESTIONS, 3, fusion=Rerank())


@pytest.mark.parametrize("fusion", [None, c.EXHAUSTIVE, ReciprocalRank(), Rerank()])
def test_a_query_without_terms_is_found_by_the_other_kinds(filled, store, fusion):
    query = c.QUESTIONS.take([c.QUERY_WITHOUT_TERMS])
    check(filled, store, fusion or Weighted(), queries=query)
    assert len(filled.search(query, 4, fusion=fusion)[0]) == 4


def test_a_query_without_terms_finds_nothing_where_terms_alone_count(filled):
    query = c.QUESTIONS.take([c.QUERY_WITHOUT_TERMS]).only(["sparse"])
    assert filled.search(query, 4) == [[]]
    assert filled.search(query, 4, fusion=c.EXHAUSTIVE) == [[]]


def test_more_than_there_are_returns_all(filled, store):
    check(filled, store, c.EXHAUSTIVE, k=200)
    check(filled, store, Weighted(candidates=2), k=200)  # k is more than the candidates asked for


def test_no_queries_and_no_hits_are_no_error(filled):
    assert filled.search(c.QUESTIONS.take([]), 3) == []
    assert filled.search(c.QUESTIONS, 0) == [[]] * c.QUERIES


def test_an_engine_of_nothing_finds_nothing(engine):
    assert engine.search(c.QUESTIONS, 3) == [[]] * c.QUERIES
    assert engine.stats().records == 0
    assert engine.fetch(["a"]) == [None]
    assert list(engine.scan()) == []
    assert engine.delete(["a"]) == 0
    engine.optimize()
    engine.flush()
    engine.upsert([], c.DOCUMENTS.take([]))
    assert engine.stats().records == 0


def test_records_come_back_as_they_went_in(filled):
    wanted = c.records()
    assert filled.fetch([record.id for record in wanted]) == wanted
    assert filled.fetch(["no such", wanted[4].id]) == [None, wanted[4]]
    assert sorted(filled.scan(), key=lambda r: r.id) == sorted(wanted, key=lambda r: r.id)
    for hits in filled.search(c.QUESTIONS, 9):
        for hit in hits:
            assert hit.record == wanted[c.names().index(hit.record.id)]
    filled.optimize()
    assert filled.fetch([record.id for record in wanted]) == wanted


def test_stats_count_what_is_there(filled):
    stats = filled.stats()
    assert (stats.records, stats.kinds) == (c.RECORDS, KINDS)
    filled.delete(c.names()[:3])
    filled.optimize()
    filled.flush()
    assert filled.stats().records == c.RECORDS - 3
    assert filled.stats().pending == 0


def test_an_upsert_replaces_the_record_and_all_its_vectors(filled, store):
    new = c.vectors(3, seed=5)
    chosen = [2, 9, c.WITHOUT_TERMS]
    replaced = [Record(c.names()[i], f"new {i}", fields={"section": "new"}) for i in chosen]
    filled.upsert(replaced, new)
    docs = store.held(Vectors.join([c.DOCUMENTS, new]))
    kept = [i for i in range(c.RECORDS) if i not in chosen]
    names = [*c.names(), *(record.id for record in replaced)]
    allowed = [*kept, *range(c.RECORDS, c.RECORDS + 3)]
    for step in (filled.flush, filled.optimize, lambda: None):
        for query, hits in enumerate(filled.search(c.QUESTIONS, 8, fusion=c.EXHAUSTIVE)):
            wanted = c.expected(c.QUESTIONS, query, docs, c.EXHAUSTIVE, k=8, allowed=allowed)
            named = {names[doc]: score for doc, score in wanted.items()}
            c.agree(hits, named, 8, store.tolerance)
        assert filled.fetch([record.id for record in replaced]) == replaced
        assert filled.stats().records == c.RECORDS
        assert len(list(filled.scan())) == c.RECORDS
        assert {r.id for r in filled.scan({"section": "new"})} == {r.id for r in replaced}
        step()


def test_an_upsert_can_take_terms_and_rows_away(filled, store):
    name = c.names()[0]
    filled.upsert([c.records()[0]], c.DOCUMENTS.take([c.WITHOUT_BOTH]))
    for query, hits in enumerate(filled.search(c.QUESTIONS, 40, fusion=c.EXHAUSTIVE)):
        (hit,) = (hit for hit in hits if hit.record.id == name)
        assert hit.scores["sparse"] == 0
        assert hit.scores["multi"] == 0
        true = c.score("dense", c.QUESTIONS, query, store.held(c.DOCUMENTS), c.WITHOUT_BOTH)
        assert math.isclose(hit.score, true, abs_tol=store.tolerance)


def test_deleted_records_are_gone_from_everything(filled, store):
    gone = [0, 4, 4, 6, 17, 39]
    assert filled.delete([*(c.names()[i] for i in gone), "never there"]) == 5
    assert filled.delete([c.names()[4]]) == 0
    allowed = [i for i in range(c.RECORDS) if i not in gone]
    for step in (filled.flush, filled.optimize, lambda: None):
        for fusion in c.FUSIONS.values():
            check(filled, store, fusion, allowed=allowed)
        assert filled.fetch([c.names()[4]]) == [None]
        assert {record.id for record in filled.scan()} == {c.names()[i] for i in allowed}
        assert filled.stats().records == len(allowed)
        step()
    filled.upsert([c.records()[4]], c.DOCUMENTS.take([4]))
    assert filled.fetch([c.names()[4]]) == [c.records()[4]]


def test_all_can_be_deleted_and_filled_again(filled, store):
    assert filled.delete(c.names()) == c.RECORDS
    filled.optimize()
    filled.flush()
    assert filled.search(c.QUESTIONS, 3) == [[]] * c.QUERIES
    filled.upsert(c.records(), c.DOCUMENTS)
    check(filled, store, c.EXHAUSTIVE)


WHERE = {
    "one value": ({"section": "web"}, lambda f: f.get("section") == "web"),
    "any of": (
        {"section": ["sound", "games", "none"]},
        lambda f: f.get("section") in ("sound", "games"),
    ),
    "two fields": (
        {"section": "web", "year": 2002},
        lambda f: f.get("section") == "web" and f.get("year") == 2002,
    ),
    "a whole number": ({"year": [2001, 2003]}, lambda f: f.get("year") in (2001, 2003)),
    "a truth": ({"free": False}, lambda f: f.get("free") is False),
    "a fraction": ({"rating": 1.5}, lambda f: f.get("rating") == 1.5),
    "a member of a list": ({"tags": "odd"}, lambda f: "odd" in f.get("tags", [])),
    "any of the members of a list": (
        {"tags": ["t1", "t5"]},
        lambda f: bool({"t1", "t5"} & set(f.get("tags", []))),
    ),
    "a text is no number": ({"year": "2001"}, lambda f: False),
    "a truth is no number": ({"rating": [True, False]}, lambda f: False),
    "a number is no truth": ({"free": [0, 1]}, lambda f: False),
    "a value that no record has": ({"section": "none"}, lambda f: False),
    "a field that no record has": ({"nothing": 1}, lambda f: False),
    "any of none": ({"section": []}, lambda f: False),
    "no condition": ({}, lambda f: True),
}


@pytest.mark.parametrize(("where", "true_of"), WHERE.values(), ids=WHERE.keys())
def test_a_filter_applies_before_candidates_are_chosen(filled, store, where, true_of):
    allowed = [i for i, record in enumerate(c.records()) if true_of(record.fields)]
    for fusion in (
        c.EXHAUSTIVE,
        Weighted(candidates=3),
        ReciprocalRank(candidates=3),
        Rerank(candidates=3),
    ):
        check(filled, store, fusion, allowed=allowed, where=where, k=3)
    assert {r.id for r in filled.scan(where)} == {c.names()[i] for i in allowed}
    filled.optimize()
    check(filled, store, c.EXHAUSTIVE, allowed=allowed, where=where, k=3)


def test_a_vocabulary_of_250_000_costs_what_the_terms_cost(filled, store):
    """The largest id there is, in a record and in a query, and nothing as wide as that."""
    token = c.VOCABULARY - 1
    one = replace(
        c.DOCUMENTS.take([0]),
        sparse=Terms(torch.tensor([token]), torch.tensor([2.0]), torch.tensor([0, 1])),
    )
    filled.upsert([Record("rare", "")], one)
    query = Vectors(
        sparse=Terms(torch.tensor([token, 3]), torch.tensor([1.5, 1.0]), torch.tensor([0, 2]))
    )
    ((hit,),) = filled.search(query, 5)
    assert hit.record.id == "rare"
    assert math.isclose(hit.scores["sparse"], 3.0, abs_tol=store.tolerance)
    filled.flush()
    filled.optimize()
    assert filled.stats().disk_bytes < 4_000_000 or not store.durable


def test_a_token_that_occurs_twice_counts_with_its_largest_weight(engine, store):
    twice = Terms(torch.tensor([5, 5, 6]), torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0, 3]))
    engine.upsert([Record("a", "")], Vectors(sparse=twice))
    ((hit,),) = engine.search(Vectors(sparse=twice), 1, fusion=c.EXHAUSTIVE)
    assert math.isclose(hit.scores["sparse"], 2.0 * 2.0 + 1.0, abs_tol=store.tolerance)


def broken(kind, value):
    """The vectors of two records, the second of them with a value that is no number."""
    good = c.DOCUMENTS.take([0, 1])
    tensors = [tensor.clone() for tensor in good.tensors()]
    tensors[KINDS.index(kind)][-1:] = value
    return good.with_tensors(tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_that_are_not_numbers_are_refused_with_the_record(filled, kind, value):
    with pytest.raises(ModelError, match=r"'second'.*NaN"):
        filled.upsert([Record("first", ""), Record("second", "")], broken(kind, value))
    assert filled.fetch(["first", "second"]) == [None, None]
    with pytest.raises(ModelError, match=r"query 1.*NaN"):
        filled.search(broken(kind, value), 3)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(c.DOCUMENTS, dense=torch.ones(c.RECORDS, c.DIM + 1)),
        replace(c.DOCUMENTS, multi=TokenRows(torch.ones(40, c.WIDTH - 1), torch.arange(41))),
    ],
    ids=["dense", "multi"],
)
def test_other_widths_are_refused(filled, wrong):
    with pytest.raises(ModelError, match="dimensions"):
        filled.upsert([Record("a", "")], wrong.take([0]))
    with pytest.raises(ModelError, match="dimensions"):
        filled.search(wrong.take([0]), 3)
    assert filled.stats().records == c.RECORDS


def test_other_kinds_are_refused(filled):
    with pytest.raises(ModelError, match="dense"):
        filled.upsert([Record("a", "")], c.DOCUMENTS.take([0]).only(["dense"]))


def test_two_records_of_one_id_and_other_counts_are_refused(engine):
    with pytest.raises(DataError, match="'a'"):
        engine.upsert([Record("a", ""), Record("a", "")], c.DOCUMENTS.take([0, 1]))
    with pytest.raises(DataError, match=r"1 .*2"):
        engine.upsert([Record("a", "")], c.DOCUMENTS.take([0, 1]))
    assert engine.stats().records == 0


def test_a_search_sees_what_was_upserted_before_it(engine):
    for i, record in enumerate(c.records()[:12]):
        engine.upsert([record], c.DOCUMENTS.take([i]))
        if i % 5 == 4:
            engine.flush()
        query = replace(c.QUESTIONS.take([0]), dense=c.DOCUMENTS.take([i]).dense)
        found = engine.search(query, 40, fusion=Weighted(weights=Weights(1.0, 0.0, 0.0)))
        assert set(ids(found[0])) == set(c.names()[: i + 1])


def test_many_terms_in_a_text_are_all_there(engine):
    tokens = torch.arange(0, c.VOCABULARY, 97)
    weights = (torch.arange(len(tokens)) % 7 + 1) / 8
    many = Terms(tokens, weights, offsets_of(torch.tensor([len(tokens)])))
    engine.upsert([Record("a", "")], Vectors(sparse=many))
    ((hit,),) = engine.search(Vectors(sparse=many), 1, fusion=c.EXHAUSTIVE)
    wanted = float((weights.double() ** 2).sum())
    assert math.isclose(hit.scores["sparse"], wanted, rel_tol=1e-4)
