"""The description of all endpoints: /openapi.json for programs, /docs for people."""

from collections.abc import Iterable, Mapping
from html import escape
from importlib.metadata import version
from inspect import cleandoc
from typing import Any, Final

from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from tercet.serve.endpoint import Call, Endpoint, Service, json_response, route

_ERRORS: Final[Mapping[str, str]] = {
    "400": "a field is wrong; the message says which, and what it must be",
    "401": "the API key is missing or wrong",
    "403": "the server asks for no key and is local, and Host is not this machine",
    "404": "there is no such model, index or document",
    "408": "the body arrived too slowly",
    "409": "the index has become another one",
    "413": "a body, a text or a list is too large; the message names number and limit",
    "415": "the body is not application/json",
    "422": "the model or the index cannot do what was asked",
    "429": "too many tokens wait; Retry-After says when to try again",
    "503": "models are being loaded, the server stops, or another process writes the index",
    "504": "the answer took too long",
}
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem } code { font: .9em ui-monospace, monospace }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
:root { color-scheme: light dark }
"""
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def routes(service: Service, described: Iterable[Route]) -> list[Route]:
    """Return the routes that describe the others."""
    content = document(described)

    async def openapi(call: Call) -> Response:
        """Describe all endpoints in OpenAPI 3.1."""
        return json_response(content)

    async def docs(call: Call) -> Response:
        """Describe all endpoints on a page."""
        return HTMLResponse(page(content), headers=_HEADERS)

    return [
        route(service, "/openapi.json", openapi, method="GET", is_open=True),
        route(service, "/docs", docs, method="GET", is_open=True),
    ]


def document(described: Iterable[Route]) -> dict[str, Any]:
    """Return an OpenAPI document of these routes."""
    paths: dict[str, dict[str, Any]] = {}
    for each in described:
        endpoint = each.endpoint
        if isinstance(endpoint, Endpoint):
            paths.setdefault(each.path.replace(":path", ""), {})[endpoint.method.lower()] = (
                _operation(endpoint)
            )
    return {
        "openapi": "3.1.0",
        "info": {"title": "tercet", "version": version("tercet")},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": paths,
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    text = cleandoc(endpoint.handler.__doc__ or "")
    found: dict[str, Any] = {
        "summary": text.partition("\n")[0],
        "description": text,
        "responses": {"200": {"description": "the answer"}},
    }
    if not endpoint.is_open:
        found["security"] = [{"key": []}]
        found["responses"] |= {
            status: {"description": description} for status, description in _ERRORS.items()
        }
    if endpoint.method == "POST":
        fields = {
            name: {**_schema(kind), "description": about}
            for name, (kind, about) in endpoint.fields.items()
        }
        schema = {"type": "object", "properties": fields}
        found["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    elif endpoint.fields:
        found["parameters"] = [
            _parameter(endpoint.path, name, kind, about)
            for name, (kind, about) in endpoint.fields.items()
        ]
    return found


def _parameter(path: str, name: str, kind: str, about: str) -> dict[str, Any]:
    """Return a parameter in the path of an endpoint or behind its question mark."""
    in_path = f"{{{name}" in path
    return {
        "name": name,
        "in": "path" if in_path else "query",
        "required": in_path,
        "description": about,
        "schema": _schema(kind),
    }


def _schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema of a type such as "string", "[integer]" or "string | [string]"."""
    options = [each.strip() for each in kind.split(" | ")]
    if len(options) > 1:
        return {"anyOf": [_schema(each) for each in options]}
    if kind.startswith("["):
        return {"type": "array", "items": _schema(kind[1:-1])}
    return {"type": kind}


def page(content: Mapping[str, Any]) -> str:
    """Return the document as HTML."""
    parts = []
    for path, operations in content["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts += [f"<p>{escape(each)}</p>" for each in operation["description"].split("\n\n")]
            fields = (
                operation.get("requestBody", {})
                .get("content", {})
                .get("application/json", {})
                .get("schema", {})
                .get("properties", {})
            )
            rows = [
                f"<tr><td><code>{escape(name)}</code><td>{escape(field['description'])}"
                for name, field in [
                    *fields.items(),
                    *((each["name"], each) for each in operation.get("parameters", ())),
                ]
            ]
            parts.append(f"<table>{''.join(rows)}</table>" if rows else "")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>tercet: endpoints</title><style>{_STYLE}</style><h1>Endpoints</h1>"
        '<p><a href="/">Search</a> · <a href="/openapi.json">OpenAPI</a></p>'
        f"{''.join(parts)}"
    )
