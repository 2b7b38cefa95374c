"""The description of the endpoints, on a page and for programs."""

import re

from starlette.routing import Route

from tercet.serve.endpoint import Service
from tercet.serve.server import application


def test_every_endpoint_is_described(server):
    found = server.get("/openapi.json").json()
    described = {
        (path, method.upper()) for path, entry in found["paths"].items() for method in entry
    }
    routes = {
        (route.path.replace(":path", ""), method)
        for route in application(Service()).routes
        if isinstance(route, Route)
        for method in set(route.methods or ()) - {"HEAD"}
    }
    assert routes - described == {("/openapi.json", "GET"), ("/docs", "GET")}
    assert described <= routes
    for entry in found["paths"].values():
        for operation in entry.values():
            assert len(operation["summary"]) > 10, operation
            assert "401" in operation["responses"] or "security" not in operation


def test_each_field_that_an_endpoint_takes_is_described(server):
    """An endpoint that refuses unknown fields names those that it takes."""
    paths = server.get("/openapi.json").json()["paths"]
    body = paths["/v1/vectors"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    refused = server.post("/v1/vectors", {"nonsense": 1}).json()["error"]["message"]
    assert refused == f'unknown field "nonsense"; use {", ".join(body["properties"])}'


def test_parameters_in_addresses_are_described(server):
    paths = server.get("/openapi.json").json()["paths"]
    for path, place in (("/v1/documents", "query"), ("/v1/documents/{id}", "path")):
        for method in ("get", "delete"):
            found = {each["name"]: each for each in paths[path][method]["parameters"]}
            assert (found["id"]["in"], found["index"]["in"]) == (place, "query")
            assert found["id"]["required"] == (place == "path")
    assert "<code>id</code><td>Of the document." in server.get("/docs").text


def test_the_page_of_endpoints_loads_nothing_from_outside(server):
    answer = server.get("/docs")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<code>POST /v1/vectors</code>" in answer.text
    assert not re.search(r"(src|href)=.?https?:", answer.text) and "<script" not in answer.text
