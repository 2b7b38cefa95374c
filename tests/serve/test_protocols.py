"""What holds in every protocol: fields that are read, and equal vectors whatever comes beside."""

import asyncio

import httpx2
import numpy as np
import pytest
from starlette.routing import Route

from tercet.serve.endpoint import Endpoint, Service
from tercet.serve.server import application
from tests.toy import SENTENCES

BODIES = {
    "/v1/vectors": {"texts": ["a"]},
    "/v1/embeddings": {"input": "a"},
    "/v2/embed": {"texts": ["a"]},
    "/": {"inputs": "a"},
    "/embed": {"inputs": "a"},
    "/embed_sparse": {"inputs": "a"},
    "/embed_all": {"inputs": "a"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/rerank": {"query": "a", "texts": ["b"]},
    "/tokenize": {"inputs": "a"},
    "/decode": {"ids": [5]},
}
DESCRIBED = [
    (route.endpoint.path, field)
    for route in application(Service()).routes
    if isinstance(route, Route) and isinstance(route.endpoint, Endpoint)
    for field in route.endpoint.fields
    if route.endpoint.path in BODIES
]


def test_the_bodies_of_these_tests_are_accepted(server):
    for path, body in BODIES.items():
        assert server.post(path, body).status_code == 200, path


@pytest.mark.parametrize(("path", "field"), DESCRIBED)
def test_each_described_field_is_read(server, path, field):
    refused = server.post(path, {**BODIES[path], field: 3.5})
    assert refused.status_code in (400, 422)
    assert f'"{field}" must be' in refused.text.replace("\\", ""), refused.text


def test_vectors_do_not_depend_on_the_requests_beside_them(server):
    """Every protocol at once, with texts of other lengths and roles in the same batches."""
    embedder = server.embedder("hybrid")
    texts = [*SENTENCES, "x " * 50, *SENTENCES[:3]]
    role = ["query", "document"]
    true = {each: embedder.encode(texts, each) for each in role}

    async def ask():
        async with httpx2.AsyncClient(base_url=server.url, trust_env=False) as http:

            async def one(path, body, found):
                answer = await http.post(path, json=body)
                return np.array(found(answer.json()))

            calls = []
            for place, text in enumerate(texts):
                each = role[place % 2]
                openai = {"input": text, "input_type": each, "truncate": "end"}
                calls += [
                    one("/v1/embeddings", openai, lambda it: it["data"][0]["embedding"]),
                    one(
                        "/v2/embed",
                        {"texts": [text], "input_type": f"search_{each}"},
                        lambda it: it["embeddings"]["float"][0],
                    ),
                    one("/embed", {"inputs": text, "prompt_name": each}, lambda it: it[0]),
                    one(
                        "/v1/vectors",
                        {"texts": [text], "role": each, "kinds": ["dense", "multi"]},
                        lambda it: it["texts"][0]["dense"],
                    ),
                ]
            return await asyncio.gather(*calls)

    found = iter(asyncio.run(ask()))
    for place in range(len(texts)):
        for _ in range(4):
            np.testing.assert_allclose(next(found), true[role[place % 2]][place], atol=1e-6)
