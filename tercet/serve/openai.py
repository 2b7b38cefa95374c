"""The protocol of OpenAI: POST /v1/embeddings, GET /v1/models."""

import time
from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Final, Literal

from starlette.responses import Response
from starlette.routing import Route

from tercet.serve.endpoint import (
    Call,
    Described,
    Protocol,
    Service,
    json_response,
    route,
    rows_in_json,
)
from tercet.serve.requests import RequestError
from tercet.serve.served import SUFFIXES, TRUNCATE, Models, ServedModel, Truncate
from tercet.types import Role

_FIELDS: Final[Described] = {
    "input": ("string | [string] | [integer] | [[integer]]", "Texts, or token ids of the model."),
    "model": ("string", "Name of the model; -query or -document after it says the role."),
    "input_type": ("string", '"query" or "document", or a task or a prompt of the model.'),
    "dimensions": ("integer", "Leading coordinates to keep. Default: all."),
    "encoding_format": ("string", '"float" (default), or "base64" of little-endian float32.'),
    "truncate": ("string", 'What is cut of long texts: "end" or "start"; or "error" (default).'),
}
_FORMATS: Final[tuple[Literal["float", "base64"], ...]] = ("float", "base64")
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_CODES: Final[Mapping[int, str]] = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def routes(service: Service) -> list[Route]:
    """Return the routes of this protocol."""
    began = int(time.time())

    async def models(call: Call) -> Response:
        """List the names of models."""
        return json_response(
            {"object": "list", "data": list(_entries(call.models, began).values())}
        )

    async def model(call: Call) -> Response:
        """Describe a model by its name."""
        name = call.request.path_params["name"]
        call.models.find(name)
        return json_response(_entries(call.models, began)[name])

    protocol = Protocol(_error, _status)
    return [
        route(service, "/v1/embeddings", embeddings, protocol=protocol, fields=_FIELDS),
        route(service, "/v1/models", models, method="GET", protocol=protocol),
        route(service, "/v1/models/{name:path}", model, method="GET", protocol=protocol),
    ]


async def embeddings(call: Call) -> Response:
    """Return dense vectors.

    The role of the texts is that of ``input_type``, or the end of the model's name, such as
    ``NAME-query``. A text that is too long is refused, as OpenAI does, unless ``truncate`` says
    which part may be cut. Fields that mean nothing here are ignored.
    """
    fields = call.fields()
    asked = fields.text("model")
    model, of_name = call.models.find(asked)
    role, task = model.role_and_task(fields.text("input_type"), of_name, "input_type")
    dims = fields.whole("dimensions", lowest=1)
    model.require_dims(dims, "dimensions")
    binary = fields.choice("encoding_format", _FORMATS, "float") == "base64"
    truncate: Truncate = fields.choice("truncate", TRUNCATE, "error")
    texts = await model.texts(fields, "input", call.limits.texts)
    prepared = await model.prepare(texts, role, task=task, truncate=truncate)
    answer = await call.read(model, prepared, ["dense"])
    vectors = model.dense(answer, dims).astype("<f4", copy=False)
    data = (
        {
            "object": "embedding",
            "index": place,
            "embedding": b64encode(vector.tobytes()).decode() if binary else vector,
        }
        for place, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": prepared.total, "total_tokens": prepared.total}
    rows, name = await rows_in_json(data), asked or model.name
    answered = {"object": "list", "data": rows, "model": name, "usage": usage}
    return json_response(answered, headers=prepared.headers)


def _entries(models: Models, began: int) -> dict[str, dict[str, Any]]:
    """Return what is said about each name of a model; the names that say a role are listed too."""
    found = {}
    for name, model in models.by_name.items():
        for suffix, role in {"": None, **SUFFIXES}.items():
            found.setdefault(name + suffix, _entry(model, name + suffix, role, began))
    return found


def _entry(model: ServedModel, name: str, role: Role | None, began: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": began,
        "owned_by": "tercet",
        "kinds": model.kinds,
        "dims": model.dim,
        "max_tokens": model.embedder.settings.max_tokens(role or "document"),
    }


def _error(error: RequestError) -> Mapping[str, Any]:
    """Return the body of an error."""
    code = _CODES.get(error.status, error.name)
    if error.too_long:
        code = "context_length_exceeded"
    elif error.status == 404 and error.field == "model":
        code = "model_not_found"
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(error.status, "invalid_request_error"),
            "param": "input" if error.too_long else error.field,
            "code": code,
        }
    }


def _status(error: RequestError) -> int:
    """Return the status of an error: that of OpenAI for texts that are too long is 400."""
    return 400 if error.too_long else error.status
