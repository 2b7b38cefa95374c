"""A collection of a server; the client's local mode stands in for one."""

import traceback
from dataclasses import replace

import httpx
import pytest
import torch

from tercet.errors import IndexFolderError, ModelError, RecipeError
from tercet.kinds import Weights
from tercet.search.engine.engine import ReciprocalRank, Record, Weighted
from tercet.vectors import Terms, TokenRows, Vectors

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient
from qdrant_client import models as api
from qdrant_client.http.exceptions import UnexpectedResponse

from tercet.search.qdrant import qdrant_engine
from tercet.search.qdrant import server as qdrant_cluster
from tercet.search.qdrant.points import facts_of
from tercet.search.qdrant.qdrant_engine import QdrantEngine
from tercet.search.qdrant.queries import PointQuery, Prefetch, RankFusion, SumFusion
from tercet.search.qdrant.server import ClusterStore

DOCS = Vectors(
    torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
    Terms(torch.tensor([3, 3, 5]), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0, 1, 3, 3])),
    TokenRows(torch.eye(3), torch.tensor([0, 1, 1, 3])),
)


def cluster(server, collection, **how):
    return QdrantEngine(ClusterStore(server, collection, **how))


RECORDS = [Record("a", "one"), Record("b", "two"), Record("c", "three")]


@pytest.fixture
def client():
    local = QdrantClient(":memory:")
    yield local
    local.close()


def test_a_second_engine_sees_the_collection_that_the_first_one_made(client):
    first = cluster(client, "texts")
    assert first.kinds == ()
    first.upsert(RECORDS, DOCS)
    first.close()  # the client is not the engine's own, and stays open
    second = cluster(client, "texts")
    assert second.kinds == ("dense", "sparse", "multi")
    assert second.fetch(["c", "d"]) == [RECORDS[2], None]
    assert cluster(client, "others").stats().records == 0
    with pytest.raises(ModelError, match="dimensions"):
        second.upsert(RECORDS, replace(DOCS, dense=torch.ones(3, 3)))


def test_the_collection_is_made_as_the_data_model_says(client):
    cluster(client, "texts").upsert(RECORDS, DOCS)
    params = client.get_collection("texts").config.params
    assert set(params.vectors) == {"dense", "multi"}
    assert params.vectors["dense"].distance == api.Distance.DOT
    multi = params.vectors["multi"]
    assert multi.multivector_config.comparator == api.MultiVectorComparator.MAX_SIM
    assert (multi.datatype, multi.hnsw_config.m) == (api.Datatype.FLOAT16, 0)
    assert set(params.sparse_vectors) == {"sparse"}


@pytest.mark.parametrize("stored", ["float32", "int8", "int4", "binary"])
def test_a_collection_has_codes_in_memory_and_keeps_vectors_on_the_disk(client, stored):
    cluster(client, "texts", stored=stored).upsert(RECORDS, DOCS)
    dense = client.get_collection("texts").config.params.vectors["dense"]
    said = {} if dense.quantization_config is None else dense.quantization_config.model_dump()
    assert dense.on_disk == (None if stored == "float32" else True)
    assert list(said) == {"int8": ["scalar"], "int4": ["turbo"], "binary": ["binary"]}.get(
        stored, []
    )
    assert all(codes["always_ram"] for codes in said.values())
    assert cluster(client, "texts", stored=stored).stats().records == 3
    other = "binary" if stored != "binary" else "int8"
    with pytest.raises(RecipeError, match=f"holds dense vectors in {stored}, not {other}"):
        cluster(client, "texts", stored=other)


def test_a_server_without_codes_of_4_bits_is_told_with_what_to_do(monkeypatch, client):
    def refuse(*_, **__):
        raise UnexpectedResponse(400, "Bad Request", b"unknown variant turbo", httpx.Headers())

    engine = cluster(client, "texts", stored="int4")
    monkeypatch.setattr(client, "create_collection", refuse)
    with pytest.raises(RecipeError, match=r"refuses codes of 4 bits.*or int8 or binary"):
        engine.upsert(RECORDS, DOCS)


@pytest.mark.parametrize(
    "vectors",
    [
        api.VectorParams(size=2, distance=api.Distance.DOT),
        {"text": api.VectorParams(size=2, distance=api.Distance.DOT)},
        {"dense": api.VectorParams(size=2, distance=api.Distance.COSINE)},
    ],
)
def test_a_collection_of_somebody_else_is_refused(client, vectors):
    client.create_collection("texts", vectors_config=vectors)
    with pytest.raises(
        IndexFolderError, match=r"collection texts: .*not one of ours.*another name"
    ):
        cluster(client, "texts")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no.such.host.invalid:6333"])
def test_a_server_that_does_not_answer_is_named(address):
    with pytest.raises(IndexFolderError, match=f"^{address}, collection texts: .*does not answer"):
        cluster(address, "texts", timeout_seconds=2)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(IndexFolderError, match=r"ftp://x, collection texts: .*give an address"):
        cluster("ftp://x", "texts")


def test_a_server_is_asked_for_exact_scores_of_candidates_and_for_its_graph_to_find_them(
    monkeypatch, client
):
    """What local mode ignores: the parameters of each stage."""
    engine = cluster(client, "texts", ef=77)
    engine.upsert(RECORDS, DOCS)
    asked = []
    monkeypatch.setattr(ClusterStore, "_is_local", False)
    monkeypatch.setattr(
        client, "query_batch_points", lambda _, requests: asked.extend(requests) or []
    )
    assert DOCS.dense is not None and DOCS.multi is not None
    source = Prefetch("dense", DOCS.dense[0].numpy(), 9)
    facts = facts_of({"section": ["web", "mail"]})
    over = Prefetch("multi", DOCS.multi.vectors.numpy(), 9, exact=True, among=(source,))
    engine.store.ask(
        [PointQuery((over,), 5, SumFusion((0.5,)), facts), PointQuery((source,), 5, RankFusion(60))]
    )
    summed, ranked = asked
    (stage,) = summed.prefetch
    assert (stage.using, stage.params.exact, stage.filter) == ("multi", True, None)
    (candidates,) = stage.prefetch
    assert (candidates.using, candidates.limit) == ("dense", 9)
    assert (candidates.params.exact, candidates.params.hnsw_ef) == (False, 77)
    coded = candidates.params.quantization
    assert (coded.rescore, coded.oversampling, coded.ignore) == (True, 4, False)
    assert candidates.filter.must[0].match.any == ['["section", "web"]', '["section", "mail"]']
    assert summed.query.formula.sum[0].mult == [0.5, "$score[0]"]
    assert summed.query.defaults == {"$score[0]": 0.0}
    assert ranked.query.rrf.k == 61  # its ranks begin with 0, Cormack's with 1


def test_optimize_waits_for_the_server_and_says_when_it_took_too_long(monkeypatch, client):
    engine = cluster(client, "texts", timeout_seconds=0)
    engine.upsert(RECORDS, DOCS)
    engine.optimize()
    about = client.get_collection("texts")
    states = [api.CollectionStatus.YELLOW, api.CollectionStatus.GREEN]
    monkeypatch.setattr(qdrant_cluster, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(
        client, "get_collection", lambda _: about.model_copy(update={"status": states.pop(0)})
    )
    assert isinstance(engine.store, ClusterStore)
    engine.store._timeout = 60
    engine.optimize()
    assert states == []
    states += [api.CollectionStatus.YELLOW] * 9
    engine.store._timeout = 0
    with pytest.raises(IndexFolderError, match="not optimized after 0 seconds"):
        engine.optimize()


def test_a_hit_worked_by_hand(client):
    engine = cluster(client, "texts")
    engine.upsert(RECORDS, DOCS)
    query = Vectors(
        torch.tensor([[0.0, 1.0]]),
        Terms(torch.tensor([5, 9]), torch.tensor([0.5, 1.0]), torch.tensor([0, 2])),
        TokenRows(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 2])),
    )
    # b: dense 1, sparse 2 * 0.5, no rows. c: dense 0.8, no terms, multi (1 + 1) / 2. a: 0.
    usual = Weighted(weights=Weights(1.0, 0.3, 1.0))
    ((first, second, last),) = engine.search(query, 3, fusion=usual)
    assert [hit.record.id for hit in (first, second, last)] == ["c", "b", "a"]
    assert first.scores == pytest.approx({"dense": 0.8, "sparse": 0.0, "multi": 1.0})
    assert second.scores == pytest.approx({"dense": 1.0, "sparse": 1.0, "multi": 0.0})
    assert [first.score, second.score, last.score] == pytest.approx([1.8, 1.3, 0.0])
    ((best, *_),) = engine.search(query, 3, fusion=ReciprocalRank())
    assert (best.record.id, best.score) == ("b", pytest.approx(2 / 61))


def test_a_collection_is_left_alone_unless_it_carries_the_mark(client):
    ours = cluster(client, "texts", mark="a1")
    ours.upsert(RECORDS, DOCS)
    assert cluster(client, "texts", mark="a1").stats().records == 3
    assert client.get_collection("texts").config.metadata == {"tercet": "a1"}
    with pytest.raises(IndexFolderError, match=r"collection texts: another index made this .*name"):
        cluster(client, "texts", mark="b2")
    cluster(client, "plain").upsert(RECORDS, DOCS)
    with pytest.raises(IndexFolderError, match=r"collection plain: no index of tercet made this"):
        cluster(client, "plain", mark="a1")
    assert client.count("texts").count == client.count("plain").count == 3


def test_a_server_that_keeps_no_marks_is_refused_and_nothing_stays_there(monkeypatch, client):
    made = client.create_collection
    monkeypatch.setattr(
        client, "create_collection", lambda name, metadata, **how: made(name, **how)
    )
    with pytest.raises(IndexFolderError, match=r"use Qdrant 1\.17 or newer"):
        cluster(client, "texts", mark="a1").upsert(RECORDS, DOCS)
    assert not client.collection_exists("texts")


def test_a_cleared_collection_takes_vectors_of_another_model(client):
    engine = cluster(client, "texts")
    engine.upsert(RECORDS, DOCS)
    with pytest.raises(ModelError):
        engine.upsert(RECORDS, Vectors(torch.ones(3, 7)))
    assert isinstance(engine.store, ClusterStore)
    engine.store.clear()
    engine.store.clear()
    assert (engine.stats().records, engine.search(DOCS, 2)) == (0, [[]] * 3)
    engine.upsert(RECORDS, Vectors(torch.ones(3, 7)))
    assert engine.stats().kinds == cluster(client, "texts").kinds == ("dense",)


def test_no_request_names_more_points_than_a_page_holds(monkeypatch, client):
    monkeypatch.setattr(qdrant_engine, "POINTS_AT_ONCE", 2)
    engine = cluster(client, "texts")
    engine.upsert(RECORDS, DOCS)
    sizes = []

    def counting(name):
        real = getattr(client, name)

        def call(collection, points, **how):
            sizes.append(len(points.points if name == "delete" else points))
            return real(collection, points, **how)

        monkeypatch.setattr(client, name, call)

    counting("retrieve")
    counting("delete")
    assert [record.id for record in engine.fetch(["c", "b", "a"]) if record] == ["c", "b", "a"]
    assert sorted(record.id for record in engine.scan()) == ["a", "b", "c"]
    assert sizes == [2, 1]
    assert engine.delete(["a", "x", "a", "b", "c", "y"]) == 3
    assert sizes[2:] == [2, 1, 2, 2, 1]  # of a, x: a is deleted; b, c; y is not there
    assert engine.stats().records == 0


def test_a_point_of_somebody_else_is_told_and_not_taken_for_a_record(client):
    engine = cluster(client, "texts")
    engine.upsert(RECORDS, DOCS)
    foreign = api.PointStruct(id=5, vector={"dense": [9.0, 9.0]}, payload={"id": "a"})
    client.upsert("texts", [foreign])
    for act in (lambda: engine.search(DOCS.only(["dense"]), 9), lambda: list(engine.scan())):
        with pytest.raises(IndexFolderError, match=r"collection texts: a point holds no record"):
            act()


def test_a_key_that_a_server_repeats_is_not_said(monkeypatch):
    key = "qd-secret-0123456789"
    body = b'{"status": {"error": "' + b"x" * 160 + key.encode() + b'"}}'
    error = UnexpectedResponse(401, f"no {key}", body, httpx.Headers())

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(QdrantClient, "collection_exists", refuse)
    with pytest.raises(IndexFolderError, match="or refuses") as caught:
        ClusterStore("https://localhost:1", "texts", api_key=key)
    said = "".join(traceback.format_exception(caught.value))
    assert "qd-secret" not in said and "***" in said
    with pytest.raises(RecipeError, match="contains a user or password") as refusal:
        ClusterStore("http://me:password1@localhost:1", "texts")
    assert "password1" not in str(refusal.value)
