"""The endpoint of Cohere, asked by its own client."""

import base64
import re

import cohere
import httpx
import numpy as np
import pytest

from tercet.rank.quantized import truncated
from tercet.serve.endpoint import Limits
from tests.serving import serving
from tests.toy import SENTENCES

TEXTS = list(SENTENCES[:5])
LONG = "web server " * 60


@pytest.fixture
def client(server):
    with httpx.Client(timeout=30, trust_env=False) as http:
        yield cohere.ClientV2("any", base_url=server.url, httpx_client=http, max_retries=0)


def embed(client, texts=TEXTS, **given):
    options = {"model": "hybrid", "input_type": "search_document", **given}
    return client.embed(texts=texts, **options)


@pytest.mark.parametrize(
    ("given", "role", "task"),
    [
        ({"input_type": "search_document"}, "document", None),
        ({"input_type": "search_query"}, "query", None),
        ({"input_type": "clustering"}, "default", "clustering"),
        ({"input_type": "classification"}, "default", None),  # for which the model has no prompt
        ({"input_type": "classification", "model": "hybrid-query"}, "query", None),
    ],
)
def test_vectors_are_those_of_encode(server, client, given, role, task):
    found = embed(client, **given)
    true = server.embedder("hybrid").encode(TEXTS, role, task=task)
    np.testing.assert_allclose(found.embeddings.float_, true, atol=1e-6)
    assert found.response_type == "embeddings_by_type" and found.texts == TEXTS and found.id
    alone = embed(client, TEXTS[:1], **given)
    np.testing.assert_allclose(alone.embeddings.float_, true[:1], atol=1e-6)
    count = sum(server.embedder("hybrid").tokenize(TEXTS, role, task and "group : ").lengths)
    assert found.meta.billed_units.input_tokens == count
    assert found.meta.api_version.version == "2" and found.meta.warnings is None


@pytest.mark.parametrize("dims", [None, 16])
def test_codes_are_those_of_the_models_ranges(server, client, dims):
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    found = embed(client, embedding_types=types, output_dimension=dims).embeddings
    embedder = server.embedder("hybrid")
    true = embedder.encode(TEXTS, "document", dims=dims)
    width = dims or 64
    ranges = embedder.settings.ranges[width]
    centre = np.array(ranges.centre)
    np.testing.assert_allclose(found.float_, true, atol=1e-6)
    raw = np.frombuffer(base64.b64decode("".join(found.base64[:1])), "<f4")
    np.testing.assert_array_equal(raw, np.array(found.float_[0], np.float32))

    codes = np.array(found.int8)
    assert codes.shape == (5, width) and codes.min() >= -128 and codes.max() <= 127
    step = 2 * ranges.int8 / 255
    decoded = centre + step * (codes + 0.5)
    inside = np.abs(true - centre) < ranges.int8
    assert inside.mean() > 0.8
    assert np.abs(decoded - true)[inside].max() <= step / 2 + 1e-6
    np.testing.assert_array_equal(np.array(found.uint8), codes + 128)

    bits = np.packbits(np.array(found.float_, np.float32) > centre.astype(np.float32), axis=1)
    np.testing.assert_array_equal(found.ubinary, bits)
    np.testing.assert_array_equal(found.binary, bits.astype(int) - 128)
    assert 0 < bits.astype(int).mean() < 255


def test_without_types_there_are_floats_alone_of_unit_length(server, client):
    found = embed(client, model="plain", output_dimension=8).embeddings
    true = truncated(server.embedder("plain").encode(TEXTS), 8)
    np.testing.assert_allclose(found.float_, true, atol=1e-6)
    assert (found.int8, found.uint8, found.binary, found.ubinary, found.base64) == (None,) * 5


@pytest.mark.parametrize("name", ["int8", "uint8", "binary", "ubinary"])
def test_a_model_without_ranges_says_the_command_that_makes_them(client, name):
    command = "tercet tune codes texts.jsonl --model MODEL --dims 32 --save"
    with pytest.raises(cohere.UnprocessableEntityError, match=command) as caught:
        embed(client, embedding_types=[name], output_dimension=32)
    assert "it has some for: 16, 64" in caught.value.body["message"]
    with pytest.raises(cohere.UnprocessableEntityError, match="--dims 64 --save"):
        embed(client, model="plain", embedding_types=["float", name])


def test_inputs_hold_texts_in_parts(server, client):
    inputs = [
        {"content": [{"type": "text", "text": TEXTS[0]}]},
        {"content": [{"type": "text", "text": TEXTS[1]}, {"type": "text", "text": TEXTS[2]}]},
    ]
    found = client.embed(model="hybrid", input_type="search_query", inputs=inputs)
    true = server.embedder("hybrid").encode([TEXTS[0], f"{TEXTS[1]}\n{TEXTS[2]}"], "query")
    np.testing.assert_allclose(found.embeddings.float_, true, atol=1e-6)
    image = [{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
    message = re.escape('"inputs[0].content[0]" must be a text; models here read no images')
    with pytest.raises(cohere.UnprocessableEntityError, match=message):
        client.embed(model="hybrid", input_type="search_query", inputs=image)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", '"inputs" must be a list of objects with content; got "text"'),
        ([], '"inputs" must not be empty'),
        (["text"], '"inputs[0].content" must be a list of {"type": "text", "text": "..."}'),
        ([{"content": [3]}], '"inputs[0].content[0].text" must be a string; got null'),
        ([{"content": [{"text": 3}]}], '"inputs[0].content[0].text" must be a string; got 3'),
    ],
)
def test_malformed_inputs_are_refused(server, inputs, message):
    answer = server.post("/v2/embed", {"model": "hybrid", "inputs": inputs})
    assert answer.status_code == 400 and answer.json()["message"].startswith(message)


def test_long_texts_are_cut_as_asked_and_that_is_said(server, client):
    embedder = server.embedder("hybrid")
    texts = [TEXTS[0], LONG + "music"]
    for cut, side in (("END", "end"), ("START", "start")):
        found = embed(client, texts, truncate=cut)
        assert found.meta.warnings == ["1 of 2 texts were cut to 64 tokens"]
        tokens = embedder.tokenize(texts, "document", cuts=side)
        assert found.meta.billed_units.input_tokens == sum(tokens.lengths)
    end, start = (embed(client, texts, truncate=cut).embeddings.float_ for cut in ("END", "START"))
    np.testing.assert_allclose(end, embedder.encode(texts, "document"), atol=1e-6)
    assert not np.allclose(end[1], start[1], atol=1e-3)
    np.testing.assert_allclose(embed(client, texts).embeddings.float_, end, atol=1e-6)
    with pytest.raises(cohere.BadRequestError, match=r"at most 64 tokens .* text 1 has"):
        embed(client, texts, truncate="NONE")


def test_max_tokens_is_a_lower_limit(client):
    found = embed(client, TEXTS, max_tokens=6)
    assert found.meta.billed_units.input_tokens == 30
    assert found.meta.warnings == ["5 of 5 texts were cut to 6 tokens"]
    with pytest.raises(cohere.BadRequestError, match="at most 6 tokens"):
        embed(client, TEXTS, max_tokens=6, truncate="NONE")
    for few in (1, 2):  # special tokens alone would be one vector for all texts
        with pytest.raises(cohere.BadRequestError, match=f"must be above 2, the special .* {few}"):
            embed(client, TEXTS, max_tokens=few)
    assert embed(client, [LONG], max_tokens=1_000).meta.billed_units.input_tokens == 64


def test_errors_are_the_clients_own_classes(encoder_folder, client):
    with pytest.raises(cohere.NotFoundError, match='no model is named "other"'):
        embed(client, model="other")
    with pytest.raises(
        cohere.BadRequestError, match=r'"embedding_types.0." must be "float", "int8"'
    ):
        embed(client, embedding_types=["int4"])
    with pytest.raises(cohere.BadRequestError, match='"truncate" must be "END", "START" or "NONE"'):
        embed(client, truncate="MIDDLE")
    with pytest.raises(cohere.BadRequestError, match='"input_type" must be a role or a prompt'):
        embed(client, input_type="image")
    with serving({"plain": encoder_folder}, key="right", limits=Limits(queue_tokens=64)) as server:
        with httpx.Client(timeout=30, trust_env=False) as http:
            options = {"base_url": server.url, "httpx_client": http, "max_retries": 0}
            with pytest.raises(cohere.UnauthorizedError, match="the API key is wrong"):
                embed(cohere.ClientV2("wrong", **options), model="plain")
            assert server.service.models is not None
            queue = server.service.models.by_name["plain"].queue
            queue.tokens += 63  # as if others waited
            with pytest.raises(cohere.TooManyRequestsError, match="63 tokens wait"):
                embed(cohere.ClientV2("right", **options), TEXTS[:1], model="plain")
            queue.tokens -= 63
