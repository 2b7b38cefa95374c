"""POST /v1/vectors: all kinds at once, in JSON and in safetensors."""

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load

from tercet.serve import served
from tercet.serve.endpoint import Limits
from tests.serving import serving
from tests.toy import SENTENCES

LONG = " ".join(SENTENCES)
TEXTS = ["a small web server", "", LONG, "read mail"]


def test_all_kinds_are_those_of_encode_vectors(server):
    answer = server.post("/v1/vectors", {"texts": TEXTS, "role": "query"}).json()
    embedder = server.embedder("hybrid")
    expected = embedder.encode_vectors(TEXTS, "query")
    vocabulary = embedder.tokenizer.stock.get_vocab()
    tokens = embedder.tokenize(TEXTS, "query")
    for place, row in enumerate(answer["texts"]):
        alone = expected.take([place])
        assert (row["tokens"], row["truncated"]) == (tokens.lengths[place], place == 2)
        np.testing.assert_allclose(row["dense"], alone.dense[0], atol=1e-6)
        assert row["sparse"]["ids"] == alone.sparse.ids.tolist()
        assert [vocabulary[token] for token in row["sparse"]["tokens"]] == row["sparse"]["ids"]
        np.testing.assert_allclose(row["sparse"]["weights"], alone.sparse.weights, atol=1e-6)
        rows = np.frombuffer(base64.b64decode(row["multi"]["float16"]), "<f2")
        expected_rows = alone.multi.vectors.numpy()
        assert tuple(row["multi"]["shape"]) == expected_rows.shape
        np.testing.assert_allclose(rows.reshape(expected_rows.shape), expected_rows, atol=6e-4)
    assert answer["model"] == "hybrid"
    assert answer["usage"] == {"texts": 4, "tokens": sum(tokens.lengths), "truncated": 1}


def test_safetensors_hold_the_same(server):
    asked = {"texts": TEXTS, "role": "document", "dims": 16, "format": "safetensors"}
    answer = server.post("/v1/vectors", asked)
    assert answer.headers["content-type"] == "application/octet-stream"
    found = load(answer.content)
    embedder = server.embedder("hybrid")
    expected = embedder.encode_vectors(TEXTS, "document", dims=16)
    tokens = embedder.tokenize(TEXTS, "document")
    assert found["tokens"].tolist() == tokens.lengths
    assert found["truncated"].tolist() == [int(cut) for cut in tokens.cuts]
    np.testing.assert_allclose(found["dense"], expected.dense, atol=1e-6)
    assert found["sparse.ids"].tolist() == expected.sparse.ids.tolist()
    assert found["sparse.offsets"].tolist() == expected.sparse.offsets.tolist()
    np.testing.assert_allclose(found["sparse.weights"], expected.sparse.weights, atol=1e-6)
    assert found["multi.offsets"].tolist() == expected.multi.offsets.tolist()
    assert found["multi.vectors"].dtype == np.float16
    np.testing.assert_allclose(found["multi.vectors"], expected.multi.vectors, atol=6e-4)


def test_a_text_and_its_vector_do_not_depend_on_what_arrives_beside_it(server):
    random = np.random.default_rng(0)
    words = LONG.split()
    asked = []
    for _ in range(60):
        texts = [" ".join(random.choice(words, random.integers(1, 40))) for _ in range(3)]
        kinds = [["dense"], ["sparse"], ["multi"], ["dense", "sparse", "multi"]][random.integers(4)]
        asked.append({"texts": texts, "kinds": kinds, "role": "document"})
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: server.post("/v1/vectors", body).json(), asked))
    embedder = server.embedder("hybrid")
    for body, answer in zip(asked, answers, strict=True):
        alone = embedder.encode_vectors(body["texts"], "document")
        for place, row in enumerate(answer["texts"]):
            assert {*row} - {"tokens", "truncated"} == {*body["kinds"]}
            if "dense" in row:
                np.testing.assert_allclose(row["dense"], alone.dense[place], atol=1e-6)
            if "sparse" in row:
                weights = alone.take([place]).sparse.weights
                np.testing.assert_allclose(row["sparse"]["weights"], weights, atol=1e-6)


def test_long_texts_are_cut_at_the_side_that_is_asked_for(server):
    def first(text, **how):
        asked = {"texts": [text], "role": "document", "kinds": ["dense"], **how}
        return server.post("/v1/vectors", asked).json()["texts"][0]

    head, tail = " ".join(LONG.split()[:70]), " ".join(LONG.split()[-70:])
    assert first(LONG)["truncated"] and first(LONG)["tokens"] == 64
    assert first(LONG) == first(LONG, truncate="end")
    np.testing.assert_allclose(first(LONG)["dense"], first(head)["dense"], atol=1e-6)
    start = first(LONG, truncate="start")
    assert start["truncated"] and start["tokens"] == 64
    assert np.abs(np.subtract(start["dense"], first(LONG)["dense"])).max() > 0.01
    np.testing.assert_allclose(start["dense"], first(tail, truncate="start")["dense"], atol=1e-6)
    refused = server.post("/v1/vectors", {"texts": ["x", LONG], "truncate": "error"})
    assert refused.status_code == 413
    message = refused.json()["error"]["message"]
    assert message.startswith("a text must have at most 64 tokens") and "text 1 has" in message


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({}, 400, '"texts" is missing; it must be a list of strings'),
        ({"texts": "a"}, 400, '"texts" must be a list of strings; got "a"'),
        ({"texts": []}, 400, '"texts" must not be empty'),
        ({"texts": ["a", 1]}, 400, '"texts[1]" must be a string; got 1'),
        ({"texts": ["a"], "kind": ["dense"]}, 400, 'unknown field "kind"; did you mean "kinds"?'),
        ({"texts": ["a"], "kinds": ["dens"]}, 400, '"kinds[0]" must be "dense", "sparse" or'),
        ({"texts": ["a"], "dims": 0}, 400, '"dims" must be 1 or more; got 0'),
        ({"texts": ["a"], "dims": True}, 400, '"dims" must be a whole number, 1 or more; got true'),
        ({"texts": ["a"], "dims": 99}, 400, '"dims" must be from 1 to 64, the width of hybrid'),
        ({"texts": ["a"], "role": "quer"}, 400, '"query", "document", "clustering"; got "quer"'),
        ({"texts": ["a"], "task": "sts"}, 400, "no prompt for the task 'sts'"),
        ({"texts": ["a"], "model": "gpt"}, 404, 'no model is named "gpt"; there are: hybrid'),
        ({"texts": ["a"], "model": "plain", "kinds": ["sparse"]}, 422, "plain makes dense only"),
        ({"texts": ["a"] * 2_049}, 413, "at most 2,048 elements; got 2,049; send several"),
        (["a"], 400, "the body must be a JSON object; got a list of 1"),
    ],
)
def test_what_is_wrong_is_named(server, asked, status, message):
    refused = server.post("/v1/vectors", asked)
    assert refused.status_code == status
    assert message in refused.json()["error"]["message"]


def test_the_surrounding_of_a_request_is_checked(server):
    def ask(content, **headers):
        headers = {"content-type": "application/json", **headers}
        return server.http.post("/v1/vectors", content=content, headers=headers)

    assert ask(b"{").status_code == 400
    assert "the body must be JSON" in ask(b"{").json()["error"]["message"]
    assert ask(b'{"texts": ["\\ud800"]}').status_code == 400
    assert ask(b"[" * 100_000).status_code == 400
    plain = ask(b'{"texts": ["a"]}', **{"content-type": "text/plain"})
    assert plain.status_code == 415
    assert 'must be application/json; got "text/plain"' in plain.json()["error"]["message"]
    assert server.get("/v1/vectors").status_code == 405
    assert server.get("/v1/vector").json()["error"]["code"] == "not_found"


def test_without_a_key_only_names_of_this_machine_are_answered(server, hybrid_folder):
    def ask(running, host):
        headers = {"host": host}
        return running.http.post("/v1/vectors", json={"texts": ["a"]}, headers=headers)

    port = server.url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}"):
        assert ask(server, host).status_code == 200, host
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", "a:localhost"):
        refused = ask(server, host)
        assert refused.status_code == 403, host
        assert "Host must be localhost, 127.0.0.1, [::1]" in refused.json()["error"]["message"]
    with serving({"hybrid": hybrid_folder}, key="k") as running:
        headers = {"host": "vectors.example", "authorization": "Bearer k"}
        asked = {"json": {"texts": ["a"]}, "headers": headers}
        assert running.http.post("/v1/vectors", **asked).status_code == 200


def test_an_answer_with_too_many_token_vectors_is_refused_before_it_is_made(server, monkeypatch):
    monkeypatch.setattr(served, "_MOST_NUMBERS", 8 * 20)  # rows of 8 numbers
    refused = server.post("/v1/vectors", {"texts": ["read mail"] * 5})
    assert refused.status_code == 413
    assert "at most 20 tokens together where each token has" in refused.json()["error"]["message"]
    dense = {"texts": ["read mail"] * 5, "kinds": ["dense", "sparse"]}
    assert server.post("/v1/vectors", dense).status_code == 200


def test_limits_are_named(hybrid_folder):
    limits = Limits(body_bytes=1_000, texts=3, queue_tokens=50)
    with serving({"hybrid": hybrid_folder}, limits=limits) as running:
        for texts, message in (
            (["read mail" * 200], "a body must have at most 1,000 bytes; got 1,"),
            (["a"] * 4, '"texts" must have at most 3 elements; got 4'),
            ([LONG[:300]], "a request must have at most 50 tokens; got "),
        ):
            refused = running.post("/v1/vectors", {"texts": texts, "role": "document"})
            assert refused.status_code == 413
            assert message in refused.json()["error"]["message"]
        assert running.post("/v1/vectors", {"texts": ["a"]}).status_code == 200


def test_what_was_done_is_counted_and_logged_without_texts(hybrid_folder):
    with serving({"hybrid": hybrid_folder}) as running:
        running.post("/v1/vectors", {"texts": ["read mail", LONG]})
        running.post("/v1/vectors", {"texts": 3})
        lines = [line for line in running.lines if line["path"] == "/v1/vectors"]
        metrics = running.get("/metrics").text
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["texts"] == 2 and lines[0]["cut"] == 1 and lines[0]["tokens"] > 64
    assert not any("mail" in str(line) for line in lines)
    assert 'tercet_texts_total{model="hybrid"} 2.0' in metrics
    assert 'tercet_texts_cut_total{model="hybrid"} 1.0' in metrics
    assert 'tercet_requests_total{path="/v1/vectors",status="400"} 1.0' in metrics
    assert 'tercet_queue_tokens{model="hybrid"} 0.0' in metrics
