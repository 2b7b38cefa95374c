"""The endpoints of OpenAI, asked by its own client."""

import base64

import numpy as np
import openai
import pytest

from tercet.serve.endpoint import Limits
from tests.serving import serving
from tests.toy import SENTENCES

TEXTS = list(SENTENCES[:5])
LONG = "web server " * 40


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def vectors(answer):
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return np.array([each.embedding for each in answer.data])


def test_vectors_are_those_of_encode(server, client):
    true = server.embedder("hybrid").encode(TEXTS)
    found = client.embeddings.create(model="hybrid", input=TEXTS)
    assert found.model == "hybrid" and found.object == "list"
    np.testing.assert_allclose(vectors(found), true, atol=1e-6)
    alone = client.embeddings.create(model="hybrid", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(vectors(alone), true[:1], atol=1e-6)


def test_base64_is_little_endian_float32(server):
    asked = {"model": "plain", "input": TEXTS, "encoding_format": "base64"}
    rows = server.post("/v1/embeddings", asked).json()["data"]
    found = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]
    np.testing.assert_allclose(found, server.embedder("plain").encode(TEXTS), atol=1e-6)


def test_dimensions_shorten_vectors_to_unit_length(server, client):
    found = vectors(client.embeddings.create(model="plain", input=TEXTS, dimensions=16))
    np.testing.assert_allclose(found, server.embedder("plain").encode(TEXTS, dims=16), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="from 1 to 64, the width of plain; got 65"):
        client.embeddings.create(model="plain", input=TEXTS, dimensions=65)


@pytest.mark.parametrize(
    ("model", "role", "extra"),
    [
        ("hybrid-query", "query", {}),
        ("hybrid-document", "document", {}),
        ("hybrid", "query", {"input_type": "query"}),
        ("hybrid", "query", {"input_type": "search_query"}),
        ("hybrid", "document", {"input_type": "passage"}),
        ("hybrid", "document", {"input_type": "search_document"}),
        ("hybrid-document", "query", {"input_type": "query"}),
    ],
)
def test_a_role_is_said_by_the_models_name_or_by_input_type(server, client, model, role, extra):
    found = client.embeddings.create(model=model, input=TEXTS, extra_body=extra)
    embedder = server.embedder("hybrid")
    np.testing.assert_allclose(vectors(found), embedder.encode(TEXTS, role), atol=1e-6)
    assert found.model == model
    assert not np.allclose(embedder.encode(TEXTS, "query"), embedder.encode(TEXTS, "document"))


def test_input_type_may_be_a_task_of_the_model(server, client):
    task = {"input_type": "clustering"}
    found = client.embeddings.create(model="hybrid-query", input=TEXTS, extra_body=task)
    true = server.embedder("hybrid").encode(TEXTS, "query", task="clustering")
    np.testing.assert_allclose(vectors(found), true, atol=1e-6)
    message = (
        '"input_type" must be a role or a prompt of hybrid: "query", "document", "clustering"; '
        'got "classification"'
    )
    with pytest.raises(openai.BadRequestError, match=message):
        client.embeddings.create(
            model="hybrid", input=TEXTS, extra_body={"input_type": "classification"}
        )


def test_token_ids_are_read_as_the_text_they_stand_for(server, client):
    embedder = server.embedder("hybrid")
    ids = embedder.tokenizer.stock(TEXTS, add_special_tokens=False)["input_ids"]
    true = embedder.encode(TEXTS)
    np.testing.assert_allclose(
        vectors(client.embeddings.create(model="hybrid", input=ids)), true, atol=1e-6
    )
    np.testing.assert_allclose(
        vectors(client.embeddings.create(model="hybrid", input=ids[0])), true[:1], atol=1e-6
    )
    strange = "mountains \u2603 and a server"
    ids = [embedder.tokenizer.stock(strange, add_special_tokens=False)["input_ids"]]
    assert embedder.tokenizer.stock.unk_token_id in ids[0]
    found = vectors(client.embeddings.create(model="hybrid", input=ids))
    np.testing.assert_allclose(found, embedder.encode([strange]), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match=r'"input\[1\]" must hold token ids of hybrid'):
        client.embeddings.create(model="hybrid", input=[ids[0], [1, 100_000]])
    with pytest.raises(openai.BadRequestError, match=r"whole numbers from 0 to .*; got -1"):
        client.embeddings.create(model="hybrid", input=[-1])


def test_usage_counts_every_token_with_prompts_and_special_ones(server, client):
    embedder = server.embedder("hybrid")
    for role in ("query", "document"):
        found = client.embeddings.create(model=f"hybrid-{role}", input=TEXTS)
        count = sum(embedder.tokenize(TEXTS, role).lengths)
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (count, count)


@pytest.mark.parametrize("given", [LONG, [LONG], [TEXTS[0], LONG]])
def test_a_text_that_is_too_long_is_refused_with_the_limit(client, given):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="hybrid-query", input=given)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error" and caught.value.param == "input"
    assert "a text must have at most 32 tokens with its prompt and special tokens" in str(
        caught.value
    )
    assert "has 80 without them" in str(caught.value)


def test_truncate_cuts_a_side_and_a_header_says_how_many_texts(server):
    asked = {"model": "plain", "input": [LONG * 3, TEXTS[0]]}
    embedder = server.embedder("plain")
    for side in ("start", "end"):
        found = server.post("/v1/embeddings", {**asked, "truncate": side})
        assert found.status_code == 200 and found.headers["x-truncated"] == "1"
        assert found.json()["usage"]["prompt_tokens"] == sum(
            embedder.tokenize(asked["input"], "document", cuts=side).lengths
        )
    whole = server.post("/v1/embeddings", {"input": TEXTS})
    assert whole.headers["x-truncated"] == "0" and whole.json()["model"] == "hybrid"


def test_models_are_listed_with_the_names_that_say_a_role(client):
    names = [model.id for model in client.models.list()]
    assert names == [
        *("hybrid", "hybrid-query", "hybrid-document"),
        *("plain", "plain-query", "plain-document"),
    ]
    found = client.models.retrieve("hybrid-query")
    assert (found.id, found.object, found.owned_by) == ("hybrid-query", "model", "tercet")
    assert found.created > 1_700_000_000
    assert found.model_extra == {
        "kinds": ["dense", "sparse", "multi"],
        "dims": 64,
        "max_tokens": 32,
    }
    with pytest.raises(openai.NotFoundError, match='no model is named "other"'):
        client.models.retrieve("other")


def test_errors_are_the_clients_own_classes(server, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="other", input="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match='"input" must not be empty'):
        client.embeddings.create(model="hybrid", input=[])
    with pytest.raises(openai.BadRequestError, match='"input" is missing'):
        client.post("/embeddings", body={"model": "hybrid"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match=r'"input\[1\]" must be a string'):
        client.embeddings.create(model="hybrid", input=["a", 3])  # type: ignore
    with pytest.raises(openai.BadRequestError, match='"encoding_format" must be "float" or'):
        client.post("/embeddings", body={"input": "a", "encoding_format": "int8"}, cast_to=object)


def test_the_key_and_a_full_queue_raise_the_clients_own_classes(encoder_folder):
    limits = Limits(queue_tokens=64, texts=3)
    with serving({"plain": encoder_folder}, key="right", limits=limits) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="the API key is wrong") as caught:
                client.embeddings.create(model="plain", input="a")
            assert caught.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as client:
            assert len(client.embeddings.create(model="plain", input="a").data) == 1
            with pytest.raises(openai.APIStatusError, match="at most 3 elements; got 4") as caught:
                client.embeddings.create(model="plain", input=["a"] * 4)
            assert caught.value.status_code == 413
            assert server.service.models is not None
            queue = server.service.models.by_name["plain"].queue
            queue.tokens += 63  # as if others waited
            with pytest.raises(openai.RateLimitError, match="63 tokens wait") as caught:
                client.embeddings.create(model="plain", input=TEXTS[:2])
            assert caught.value.code == "rate_limit_exceeded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            queue.tokens -= 63


def test_fields_without_meaning_here_are_ignored(client):
    assert client.embeddings.create(model="plain", input="a", user="u", extra_body={"x": [1]}).data
