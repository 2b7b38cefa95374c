"""The endpoints of Text Embeddings Inference, in the form of its documentation."""

import numpy as np
import pytest

from tercet.models.pairs import score_pairs
from tercet.serve import served
from tercet.serve.endpoint import Limits
from tests.serving import serving
from tests.toy import SENTENCES

TEXTS = list(SENTENCES[:5])
LONG = "web server " * 60
EVERY = {
    "/embed": {"inputs": TEXTS},
    "/embed_sparse": {"inputs": TEXTS},
    "/embed_all": {"inputs": TEXTS},
    "/similarity": {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}},
    "/rerank": {"query": TEXTS[0], "texts": TEXTS[1:]},
}


def answer(server, path, **body):
    found = server.post(path, body)
    assert found.status_code == 200, found.text
    return found.json()


def refused(server, path, **body):
    """Status, type and message of an error, whose body has these two fields only."""
    found = server.post(path, body)
    error = found.json()
    assert set(error) == {"error", "error_type"}
    return found.status_code, error["error_type"], error["error"]


@pytest.mark.parametrize("path", ["/embed", "/"])
@pytest.mark.parametrize("model", ["hybrid", "plain"])
def test_embed_returns_the_vectors_of_encode(server, path, model):
    true = server.embedder(model).encode(TEXTS)
    found = answer(server, path, inputs=TEXTS, model=model)
    np.testing.assert_allclose(found, true, atol=1e-6)
    np.testing.assert_allclose(
        answer(server, path, inputs=TEXTS[0], model=model), true[:1], atol=1e-6
    )
    short = server.embedder(model).encode(TEXTS, dims=8)
    found = answer(server, path, inputs=TEXTS, dimensions=8, model=model)
    np.testing.assert_allclose(found, short, atol=1e-6)


def test_without_normalize_vectors_are_as_pooled(server):
    embedder = server.embedder("plain")
    found = np.array(answer(server, "/embed", inputs=TEXTS, normalize=False, model="plain"))
    states = embedder.encode(TEXTS, output="tokens")
    np.testing.assert_allclose(found, [each.mean(0) for each in states], atol=1e-5)
    short = answer(server, "/embed", inputs=TEXTS, normalize=False, dimensions=5, model="plain")
    np.testing.assert_array_equal(short, found[:, :5])


def test_a_prompts_name_is_a_role_or_a_task(server):
    embedder = server.embedder("hybrid")
    for name, role, task in (
        ("query", "query", None),
        ("document", "document", None),
        ("passage", "document", None),
        ("clustering", "default", "clustering"),
    ):
        found = answer(server, "/embed", inputs=TEXTS, prompt_name=name)
        np.testing.assert_allclose(found, embedder.encode(TEXTS, role, task=task), atol=1e-6)
    found = refused(server, "/embed", inputs=TEXTS, prompt_name="other")
    assert found[:2] == (422, "Validation")
    assert found[2].startswith('"prompt_name" must be a role or a prompt of hybrid: "query", "doc')


def test_token_ids_are_read_as_the_text_they_stand_for(server):
    embedder = server.embedder("hybrid")
    ids = embedder.tokenizer.stock(TEXTS, add_special_tokens=False)["input_ids"]
    true = embedder.encode(TEXTS)
    np.testing.assert_allclose(answer(server, "/embed", inputs=ids[0]), true[:1], atol=1e-6)
    mixed = [ids[0], TEXTS[1], ids[2]]
    np.testing.assert_allclose(answer(server, "/embed", inputs=mixed), true[:3], atol=1e-6)
    found = refused(server, "/embed", inputs=[[1], [10_000]])
    assert found[:2] == (422, "Validation") and '"inputs[1]" must hold token ids' in found[2]


def test_embed_sparse_returns_the_weight_of_each_token(server):
    true = server.embedder("hybrid").encode_vectors(TEXTS, "query", kinds=["sparse"]).sparse
    found = answer(server, "/embed_sparse", inputs=TEXTS, prompt_name="query")
    bounds = true.offsets.tolist()
    assert len(found) == 5 and sum(map(len, found)) > 10
    for place, rows in enumerate(found):
        here = slice(bounds[place], bounds[place + 1])
        assert [row["index"] for row in rows] == true.ids[here].tolist()
        weights = [row["value"] for row in rows]
        np.testing.assert_allclose(weights, true.weights[here], atol=1e-6)
    (alone,) = answer(server, "/embed_sparse", inputs=TEXTS[0], prompt_name="query")
    assert alone == [{**row, "value": pytest.approx(row["value"], abs=1e-6)} for row in found[0]]
    assert refused(server, "/embed_sparse", inputs=TEXTS, model="plain") == (
        *(424, "Backend"),
        "the model plain makes dense vectors only",
    )


def test_embed_all_returns_the_state_of_every_token(server):
    embedder = server.embedder("hybrid")
    true = embedder.encode(TEXTS, "query", output="tokens")
    found = answer(server, "/embed_all", inputs=TEXTS, prompt_name="query")
    assert list(map(len, found)) == embedder.tokenize(TEXTS, "query").lengths
    for ours, theirs in zip(found, true, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_embed_all_refuses_an_answer_that_is_too_large(server, monkeypatch):
    monkeypatch.setattr(served, "_MOST_NUMBERS", 640)
    status, error_type, message = refused(server, "/embed_all", inputs=TEXTS)
    assert (status, error_type) == (413, "Validation")
    assert message.startswith("texts must have at most 10 tokens together where each token")


def test_rerank_sorts_by_the_weighted_sum_of_all_kinds(server):
    embedder, query, texts = server.embedder("hybrid"), "a small web editor", list(SENTENCES)
    true = score_pairs(embedder, [query] * len(texts), texts)["dense+sparse+multi"].numpy()
    found = answer(server, "/rerank", query=query, texts=texts, raw_scores=True)
    order = [each["index"] for each in found]
    assert sorted(order) == list(range(len(texts)))
    np.testing.assert_allclose([each["score"] for each in found], true[order], atol=1e-5)
    scores = [each["score"] for each in found]
    assert scores == sorted(scores, reverse=True) and all("text" not in each for each in found)

    usual = answer(server, "/rerank", query=query, texts=texts, return_text=True)
    assert [each["index"] for each in usual] == order
    assert [each["text"] for each in usual] == [texts[place] for place in order]
    sigmoid = 1 / (1 + np.exp(-true[order].astype(float)))
    np.testing.assert_allclose([each["score"] for each in usual], sigmoid, atol=1e-5)


def test_a_model_of_one_kind_reranks_by_that(server):
    embedder = server.embedder("plain")
    true = score_pairs(embedder, [TEXTS[0]] * 4, TEXTS[1:])["dense"].numpy()
    found = answer(
        server, "/rerank", query=TEXTS[0], texts=TEXTS[1:], raw_scores=True, model="plain"
    )
    for each in found:
        assert each["score"] == pytest.approx(true[each["index"]], abs=1e-6)


def test_query_and_texts_are_read_in_one_forward(hybrid_folder):
    with serving({"hybrid": hybrid_folder}) as server:
        answer(server, "/rerank", query=TEXTS[0], texts=TEXTS[1:])
        counts = server.get("/metrics").text
        assert 'tercet_batch_tokens_count{model="hybrid"} 1.0' in counts


def test_similarity_returns_cosines(server):
    embedder = server.embedder("hybrid")
    for parameters, role in (({}, "default"), ({"prompt_name": "query"}, "query")):
        unit = embedder.encode(TEXTS, role)
        inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
        found = answer(server, "/similarity", inputs=inputs, parameters=parameters)
        np.testing.assert_allclose(found, unit[1:] @ unit[0], atol=1e-6)


def test_tokenize_says_where_each_token_is_in_bytes(server):
    (found,) = answer(server, "/tokenize", inputs="web é server", model="plain")
    stock = server.embedder("plain").tokenizer.stock
    assert [each["id"] for each in found] == stock("web é server")["input_ids"]
    assert found[0] == {
        "id": stock.cls_token_id,
        "text": "[CLS]",
        "special": True,
        "start": None,
        "stop": None,
    }
    assert [(each["text"], each["start"], each["stop"]) for each in found[1:-1]] == [
        ("web", 0, 3),
        ("é", 4, 6),
        ("server", 7, 13),
    ]
    bare = answer(server, "/tokenize", inputs=["web"], add_special_tokens=False, model="plain")
    assert [[each["text"] for each in text] for text in bare] == [["web"]]
    prompted = answer(server, "/tokenize", inputs=["web"], prompt_name="query")
    count = server.embedder("hybrid").tokenize(["web"], "query").lengths
    assert [len(each) for each in prompted] == count


def test_decode_returns_texts(server):
    stock = server.embedder("plain").tokenizer.stock
    ids = stock(TEXTS[:2])["input_ids"]
    assert answer(server, "/decode", ids=ids, model="plain") == TEXTS[:2]
    assert answer(server, "/decode", ids=ids[0], model="plain") == TEXTS[:1]
    whole = answer(server, "/decode", ids=ids[0], skip_special_tokens=False, model="plain")
    assert whole == [f"[CLS] {TEXTS[0]} [SEP]"]
    assert refused(server, "/decode", ids=[]) == (400, "Empty", '"ids" must not be empty')
    assert refused(server, "/decode", ids=[ids[0], 3])[2].startswith('"ids[1]" must be a list')
    assert refused(server, "/decode", ids="a")[:2] == (422, "Validation")


def test_info_describes_model_and_limits(server):
    found = server.get("/info").json()
    assert (found["model_id"], found["served_model_name"]) == ("hybrid", "hybrid")
    assert found["model_type"] == {"embedding": {"pooling": "mean"}}
    assert found["model_dtype"] == "float32" and found["auto_truncate"] is True
    assert (found["max_input_length"], found["max_client_batch_size"]) == (64, 2_048)
    assert server.get("/info?model=plain").json()["max_input_length"] == 128
    assert {name for name, value in found.items() if value is None} == {
        *("model_sha", "max_batch_requests", "sha", "docker_label")
    }


@pytest.mark.parametrize("path", EVERY)
def test_headers_say_tokens_and_times(server, path):
    found = server.post(path, EVERY[path])
    tokens = server.embedder("hybrid").tokenize(TEXTS, "document").lengths
    if path == "/rerank":
        tokens[0] = server.embedder("hybrid").tokenize(TEXTS[:1], "query").lengths[0]
    assert found.headers["x-compute-tokens"] == str(sum(tokens))
    assert found.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))
    assert found.headers["x-truncated"] == "0"
    times = ("x-tokenization-time", "x-queue-time", "x-inference-time")
    total = int(found.headers["x-total-time"])
    assert 0 <= sum(int(found.headers[name]) for name in times) <= total + 2


def test_long_texts_are_cut_at_the_end_by_default(server):
    embedder = server.embedder("plain")
    inputs = [TEXTS[0], "music " + LONG * 2 + "mail"]
    tokens = embedder.tokenize(inputs, "document").lengths
    assert max(tokens) == 128
    true = embedder.encode(inputs)
    for options in ({}, {"truncate": True}, {"truncate": None}, {"truncation_direction": "Right"}):
        found = server.post("/embed", {"inputs": inputs, "model": "plain", **options})
        np.testing.assert_allclose(found.json(), true, atol=1e-6)
        assert found.headers["x-truncated"] == "1"
        assert found.headers["x-compute-tokens"] == str(sum(tokens))
    left = answer(server, "/embed", inputs=inputs, truncation_direction="Left", model="plain")
    words = f"{' '.join((LONG * 2).split()[-125:])} mail"
    np.testing.assert_allclose(left[1], embedder.encode([words])[0], atol=1e-6)
    assert not np.allclose(left[1], true[1], atol=1e-3)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": LONG}),
        ("/embed", {"inputs": [LONG]}),
        ("/embed_sparse", {"inputs": LONG}),
        ("/embed_all", {"inputs": LONG}),
        ("/rerank", {"query": "a", "texts": [LONG]}),
        ("/rerank", {"query": LONG, "texts": ["a"]}),
    ],
)
def test_truncate_false_refuses_a_long_text_with_the_limit(server, path, body):
    status, error_type, message = refused(server, path, truncate=False, **body)
    limit = 32 if body.get("query") == LONG else 64
    assert (status, error_type) == (413, "Validation")
    assert f"at most {limit} tokens with its prompt" in message


def test_similarity_takes_its_truncation_from_its_parameters(server):
    inputs = {"source_sentence": "a", "sentences": [LONG]}
    assert len(answer(server, "/similarity", inputs=inputs)) == 1
    found = refused(server, "/similarity", inputs=inputs, parameters={"truncate": False})
    assert found[:2] == (413, "Validation")


@pytest.mark.parametrize(
    ("path", "body", "status", "error_type", "message"),
    [
        ("/embed", {"inputs": []}, 400, "Empty", '"inputs" must not be empty'),
        ("/embed_all", {"inputs": []}, 400, "Empty", '"inputs" must not be empty'),
        ("/tokenize", {"inputs": []}, 400, "Empty", '"inputs" must not be empty'),
        ("/rerank", {"query": "a", "texts": []}, 400, "Empty", '"texts" must not be empty'),
        (
            *("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}),
            *(400, "Empty", '"sentences" must not be empty'),
        ),
        ("/similarity", {"inputs": "a"}, 422, "Validation", '"inputs" must be an object; got "a"'),
        ("/similarity", {}, 422, "Validation", '"source_sentence" is missing; it must be a string'),
        ("/embed", {}, 422, "Validation", '"inputs" is missing; it must be a string or a list'),
        ("/embed", {"inputs": 3}, 422, "Validation", '"inputs" must be a string or a list'),
        ("/embed", {"inputs": ["a", None]}, 422, "Validation", '"inputs[1]" must be a string or'),
        (
            *("/embed", {"inputs": "a", "truncation_direction": "right"}),
            *(422, "Validation", '"truncation_direction" must be "Right" or "Left"; got "right"'),
        ),
        (
            *("/embed", {"inputs": "a", "dimensions": 65}),
            *(422, "Validation", '"dimensions" must be from 1 to 64, the width of hybrid; got 65'),
        ),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "Validation", '"dimensions" must be 1'),
        ("/embed", {"inputs": "a", "model": "x"}, 404, "Validation", 'no model is named "x"'),
        ("/rerank", {"texts": ["a"]}, 422, "Validation", '"query" is missing'),
    ],
)
def test_errors_say_what_is_wrong(server, path, body, status, error_type, message):
    found = refused(server, path, **body)
    assert found[:2] == (status, error_type) and found[2].startswith(message)


def test_limits_have_the_statuses_of_tei(encoder_folder):
    limits = Limits(queue_tokens=64, texts=3)
    with serving({"plain": encoder_folder}, key="right", limits=limits) as server:
        assert refused(server, "/embed", inputs="a")[:2] == (401, "Validation")
        server.http.headers["authorization"] = "Bearer right"
        assert len(answer(server, "/embed", inputs="a")) == 1
        message = '"inputs" must have at most 3 elements; got 4; send several requests'
        assert refused(server, "/embed", inputs=["a"] * 4) == (413, "Validation", message)
        assert refused(server, "/tokenize", inputs=["a" * 65])[:2] == (413, "Validation")
        assert server.service.models is not None
        queue = server.service.models.by_name["plain"].queue
        queue.tokens += 63  # as if others waited
        for inputs in (TEXTS[0], TEXTS[:1]):  # the same rule for a text and a list
            status, error_type, message = refused(server, "/embed", inputs=inputs)
            assert (status, error_type) == (429, "Overloaded")
            assert message.startswith("Model is overloaded: 63 tokens wait for the model")
        queue.tokens -= 63
        broken = server.http.post(
            "/embed", content=b"{", headers={"content-type": "application/json"}
        )
        assert broken.status_code == 400 and broken.json()["error_type"] == "Validation"


def test_of_a_huge_text_only_the_end_that_is_kept_is_read(server):
    """A tokenizer takes half a minute and gigabytes for 30 megabytes of text."""
    embedder = server.embedder("plain")
    huge = "music " + "web server " * 2_000_000 + "mail in a terminal"
    options = {"model": "plain", "truncation_direction": "Left"}
    found = server.post("/embed", {"inputs": huge, **options})
    assert found.headers["x-truncated"] == "1" and found.elapsed.total_seconds() < 5
    near = f"{'web server ' * 100}mail in a terminal"
    assert answer(server, "/embed", inputs=near, **options) == [
        pytest.approx(found.json()[0], abs=1e-6)
    ]
    assert embedder.tokenize([near], "document").cuts == [True]
    blank = server.post("/embed", {"inputs": "web" + " " * 200_000 + "mail", **options})
    assert blank.headers["x-truncated"] == "1"  # of which more could be kept


def test_a_huge_text_is_refused_at_once(server):
    found = server.post("/embed", {"inputs": "web server " * 2_000_000, "truncate": False})
    assert found.status_code == 413 and found.elapsed.total_seconds() < 5
    assert (
        "at most 64 tokens with its prompt and special tokens; text 0 has 22,000,000 char"
        in (found.json()["error"])
    )
