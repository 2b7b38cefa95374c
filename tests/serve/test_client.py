"""The client, sync and async, beside the embedder and the index that the server has."""

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tercet import AsyncClient, Client, Document, ServerError, client
from tercet.errors import MissingExtraError, TextError
from tercet.kinds import KINDS, Weights
from tercet.search.engine.engine import Record, Weighted
from tercet.search.text_index import open_index
from tercet.serve.endpoint import Limits
from tests.answering import Reply, endpoint
from tests.serve.indexed import DOCUMENTS, make_index
from tests.serving import Running, load, serving
from tests.toy import SENTENCES

TEXTS = list(SENTENCES)


class Awaited:
    """An async client whose methods are awaited here."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._made(url, options))

    async def _made(self, url: str, options: dict[str, Any]) -> AsyncClient:
        return await AsyncClient(url, **options).__aenter__()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            return self._runner.run(getattr(self._client, name)(*given, **options))

        return call

    def __enter__(self) -> "Awaited":
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def make(request):
    return request.param


@pytest.fixture(scope="module")
def server(hybrid_folder, encoder_folder, tmp_path_factory) -> Iterator[Running]:
    made = tmp_path_factory.mktemp("indexes")
    indexes = {name: make_index(made / name, hybrid_folder) for name in ("fixed", "changing")}
    models = {"hybrid": hybrid_folder, "plain": encoder_folder}
    with serving(models, indexes=indexes) as running:
        yield running


@pytest.fixture
def ours(make, server):
    with make(server.url) as ours:
        yield ours


def test_encode_returns_what_the_embedder_returns(server, ours):
    embedder = server.embedder("hybrid")
    for given, options in (
        ((), {}),
        (("query",), {}),
        (("passage",), {"dims": 16}),
        (("query",), {"task": "clustering"}),
    ):
        found = ours.encode(TEXTS, *given, **options)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, embedder.encode(TEXTS, *given, **options), atol=1e-6)
    plain = ours.encode(tuple(TEXTS), model="plain")
    np.testing.assert_allclose(plain, server.embedder("plain").encode(TEXTS), atol=1e-6)
    query = ours.encode(TEXTS, model="hybrid-query")
    np.testing.assert_allclose(query, embedder.encode(TEXTS, "query"), atol=1e-6)


def test_encode_vectors_returns_all_kinds(server, ours):
    true = server.embedder("hybrid").encode_vectors(TEXTS, "query")
    found = ours.encode_vectors(TEXTS, "query")
    assert found.kinds == KINDS and len(found) == len(TEXTS)
    torch.testing.assert_close(found.dense, true.dense, atol=1e-6, rtol=0)
    for name in ("ids", "offsets"):
        assert getattr(found.sparse, name).equal(getattr(true.sparse, name))
    torch.testing.assert_close(found.sparse.weights, true.sparse.weights, atol=1e-6, rtol=0)
    assert found.multi.offsets.equal(true.multi.offsets)
    assert found.multi.vectors.dtype == torch.float32
    torch.testing.assert_close(found.multi.vectors, true.multi.vectors, atol=1e-3, rtol=0)
    some = ours.encode_vectors(TEXTS, kinds=("sparse",))
    assert some.kinds == ("sparse",)


def test_of_no_text_there_are_no_vectors_of_the_right_width(server, ours):
    assert ours.encode([]).shape == (0, 64) and ours.encode([], dims=8).shape == (0, 8)
    found = ours.encode_vectors([])
    assert found.kinds == KINDS and len(found) == 0
    assert found.dense.shape == (0, 64) and found.multi.vectors.shape == (0, 8)
    assert len(found.sparse) == 0 and len(found.sparse.ids) == 0
    assert ours.search([]) == [] and ours.upsert([]) == 0 and ours.delete([]) == 0


def test_long_lists_are_sent_in_parts(server, ours, monkeypatch):
    monkeypatch.setattr(client, "_TEXTS", 5)
    before = len(server.lines)
    found = ours.encode_vectors(TEXTS)
    sent = [line for line in list(server.lines)[before:] if line["path"] == "/v1/vectors"]
    assert [line["texts"] for line in sent] == [5, 5, 2]
    true = server.embedder("hybrid").encode_vectors(TEXTS)
    torch.testing.assert_close(found.dense, true.dense, atol=1e-6, rtol=0)
    assert found.sparse.offsets.equal(true.sparse.offsets)
    monkeypatch.setattr(client, "_CHARACTERS", 60)
    before = len(server.lines)
    ours.encode(["a" * 40, "b" * 20, "c", "d" * 200, "e"])
    assert [line["texts"] for line in list(server.lines)[before:]] == [2, 1, 1, 1]


def test_a_server_with_a_lower_limit_gets_shorter_lists(make, encoder_folder):
    limits = Limits(texts=3, body_bytes=400)
    with serving({"plain": encoder_folder}, limits=limits) as server, make(server.url) as ours:
        found = ours.encode(TEXTS)
        np.testing.assert_allclose(found, server.embedder("plain").encode(TEXTS), atol=1e-6)
        with pytest.raises(ServerError, match="at most 400 bytes") as caught:
            ours.encode(["a", "b" * 500])
        assert caught.value.status == 413


def test_search_returns_the_hits_of_the_index(server, ours, hybrid_folder, tmp_path):
    queries = ["a music player", "files on a web server"]
    with open_index(make_index(tmp_path / "index", hybrid_folder), load=load) as opened:
        for weights, where in (
            (None, None),
            (Weights(0.0, 1.0, 0.0), None),
            ({"dense": 0.5, "sparse": 0.0, "multi": 0.0}, {"lang": "de"}),
        ):
            given = weights if isinstance(weights, Weights) else opened.weights
            if isinstance(weights, dict):
                given = Weights(**weights)
            true = opened.search(queries, 3, fusion=Weighted(weights=given), where=where)
            found = ours.search(queries, 3, weights=weights, where=where, index="fixed")
            assert [len(hits) for hits in found] == [3, 3]
            for ours_, theirs in zip(found, true, strict=True):
                assert [hit.record for hit in ours_] == [hit.record for hit in theirs]
                for hit, other in zip(ours_, theirs, strict=True):
                    assert hit.score == pytest.approx(other.score, abs=1e-5)
                    assert hit.scores == pytest.approx(other.scores, abs=1e-5)
    assert len(ours.search(queries)[0]) == 5  # the first index, five hits


def test_documents_are_added_replaced_fetched_and_removed(ours):
    new = [
        Document("new/1?", "a violin of the moon", "Violin", {"lang": "en"}),
        Record("new 2", "chess on the moon"),
    ]
    dots = [Record(".", "one dot"), Record("..", "two dots")]
    assert ours.upsert(dots, index="changing") == 2
    assert ours.fetch([".", ".."], index="changing") == dots
    assert ours.delete([".", ".."], index="changing") == 2
    assert ours.upsert(new, index="changing") == 2
    assert ours.upsert(new, index="changing") == 0
    found = ours.fetch(["new/1?", "nothing", "new 2", "d3"], index="changing")
    assert found == [
        Record("new/1?", "a violin of the moon", "Violin", {"lang": "en"}),
        None,
        Record("new 2", "chess on the moon"),
        Record("d3", SENTENCES[3], "Title 3", dict(DOCUMENTS[3].fields)),
    ]
    ((hit,),) = ours.search(["violin of the moon"], 1, index="changing")
    assert hit.record.id == "new/1?"
    assert ours.delete(["new/1?", "new 2", "nothing"], index="changing") == 2
    assert ours.fetch(["new 2"], index="changing") == [None]
    assert [each["name"] for each in ours.indexes()] == ["fixed", "changing"]


def test_models_have_kinds_widths_and_limits(ours):
    found = {each["id"]: each for each in ours.models()}
    assert (found["plain"]["kinds"], found["plain"]["dims"]) == (["dense"], 64)
    assert found["hybrid-query"]["max_tokens"] == 32


def test_errors_have_message_status_and_field(ours):
    with pytest.raises(ServerError) as caught:
        ours.encode(["a"], model="other")
    assert str(caught.value) == ('no model is named "other"; there are: hybrid, plain (status 404)')
    error = caught.value
    assert (error.status, error.code, error.field) == (404, "not_found", "model")
    with pytest.raises(ServerError, match="from 1 to 64, the width of hybrid; got 65"):
        ours.encode(["a"], dims=65)
    with pytest.raises(ServerError, match="makes dense only; got sparse"):
        ours.encode_vectors(["a"], model="plain", kinds=["sparse"])
    with pytest.raises(ServerError, match="no index is named"):
        ours.fetch(["d1"], index="other")
    with pytest.raises(TextError, match="texts must be a list of strings; got a single str"):
        ours.encode("a")


def test_texts_that_are_cut_are_reported_once(ours, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours.encode(["a", "web server " * 50], "query")
    assert caplog.messages == ["1 of 2 query texts were cut to the model's limit"]


def test_the_key_is_sent(make, encoder_folder):
    with serving({"plain": encoder_folder}, key="right") as server:
        with make(server.url, api_key="right") as ours:
            assert ours.encode(["a"]).shape == (1, 64)
        with make(server.url) as ours, pytest.raises(ServerError, match="key is missing"):
            ours.encode(["a"])


@contextmanager
def overloaded(times: int, status: int, headers: dict[str, str]):
    """A server that refuses the first requests."""

    def reply(body, number):
        if number < times:
            error = {"code": "overloaded", "message": "much waits"}
            return Reply(status, {"error": error}, headers)
        return Reply(body={"deleted": 1})

    with endpoint(reply) as served:
        yield served


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "waited"),
    [({"Retry-After": "7"}, [7.0, 7.0]), ({"Retry-After": "500"}, [30.0, 30.0]), ({}, [1.0, 2.0])],
)
def test_a_request_that_may_succeed_later_is_sent_again(make, monkeypatch, status, headers, waited):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(client, "asyncio", SimpleNamespace(sleep=sleep))
    with overloaded(2, status, headers) as served:
        url = served.url.removesuffix("/v1")
        with make(url, retries=2) as ours:
            assert ours.delete(["a"]) == 1
        assert slept == waited and len(served.calls) == 3
        served.calls.clear()
        with make(url, retries=1) as ours, pytest.raises(ServerError, match="much waits") as caught:
            ours.delete(["a"])
        assert caught.value.status == status and len(served.calls) == 2


def test_a_request_that_is_wrong_is_not_sent_again(make):
    with overloaded(9, 400, {}) as served, make(served.url.removesuffix("/v1")) as ours:
        with pytest.raises(ServerError, match="much waits"):
            ours.delete(["a"])
        assert len(served.calls) == 1


def test_another_server_and_none_are_named(make):
    with endpoint(lambda body, number: Reply(404, b"<html>nothing here")) as served:
        with make(served.url) as ours, pytest.raises(ServerError, match="<html>nothing here"):
            ours.encode(["a"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with make(url) as ours, pytest.raises(ServerError) as caught:
            ours.encode(["a"])
    assert str(caught.value).startswith(f"{url}: no answer (")
    assert str(caught.value).endswith("); is the server running there?")
    assert caught.value.status is None


def test_without_httpx2_the_extra_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"tercet\[client\]"):
        Client("http://127.0.0.1:1")


def test_encoding_needs_no_torch(server):
    code = (
        "import sys, tercet; client = tercet.Client(sys.argv[1]); "
        "print(client.encode(['a']).shape, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, server.url], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "(1, 64) False False\n"
