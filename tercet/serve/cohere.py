"""The protocol of Cohere: POST /v2/embed.

Codes are those of indexes (:mod:`tercet.rank.quantized`), by the centre and the range b that
``tercet tune codes --save`` keeps with a model for a number of dimensions. Of a coordinate x:

    int8     k from -128 to 127, where x ~ centre + (2 b / 255) (k + 1/2)
    uint8    k + 128
    ubinary  the bit x > centre; 8 to a byte, the first in its highest bit
    binary   ubinary - 128

So products of codes are, up to scale, those of vectors as seen from the centre.
"""

from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias
from uuid import uuid4

import numpy as np
from starlette.responses import Response
from starlette.routing import Route

from tercet.errors import RecipeError
from tercet.models.settings import Settings, quantizer_of
from tercet.rank.quantized import CodePrecision, Codes, Quantizer
from tercet.serve.endpoint import (
    Call,
    Described,
    Protocol,
    Service,
    json_response,
    route,
    rows_in_json,
)
from tercet.serve.requests import Fields, RequestError, require_count, valid, wrong
from tercet.serve.served import Prepared, Truncate

_FIELDS: Final[Described] = {
    "texts": ("[string]", "Texts, at least one."),
    "inputs": ("[object]", 'Instead of them: {"content": [{"type": "text", "text": "..."}]}.'),
    "model": ("string", "Name of the model. Default: the first."),
    "input_type": (
        "string",
        "search_document, search_query, classification, clustering, or a prompt of the model.",
    ),
    "embedding_types": (
        "[string]",
        "Of float, int8, uint8, binary, ubinary and base64. Default: float.",
    ),
    "output_dimension": ("integer", "Leading coordinates to keep. Default: all."),
    "max_tokens": ("integer", "Tokens to read of a text. Default: the model's limit."),
    "truncate": ("string", "What is cut of long texts: END (default), START; or NONE."),
}
_Type: TypeAlias = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
_Codes: TypeAlias = Mapping[CodePrecision, Codes]
_CODES: Final[Mapping[_Type, CodePrecision]] = {
    "int8": "int8",
    "uint8": "int8",
    "binary": "binary",
    "ubinary": "binary",
}
_TYPES: Final[tuple[_Type, ...]] = ("float", *_CODES, "base64")
_CUTS: Final[Mapping[str, Truncate]] = {"END": "end", "START": "start", "NONE": "error"}
_TASKS: Final = ("classification", "clustering")


def routes(service: Service) -> list[Route]:
    """Return the routes of this protocol."""
    protocol = Protocol(
        lambda error: {"message": str(error)},
        lambda error: 400 if error.too_long else error.status,
    )
    return [route(service, "/v2/embed", embed, protocol=protocol, fields=_FIELDS)]


async def embed(call: Call) -> Response:
    """Return dense vectors as numbers or codes.

    A text that is too long is cut at its end, unless ``truncate`` says otherwise, and
    ``meta.warnings`` says how many were. The tasks "classification" and "clustering" have the
    model's prompt of that name, if there is one.
    """
    fields = call.fields()
    model, of_name = call.models.find(fields.text("model"))
    settings = model.embedder.settings
    task = fields.text("input_type")
    if task in _TASKS and task not in {*settings.task_prompts, *settings.prompts}:
        task = None
    role, task = model.role_and_task(task, of_name, "input_type")
    dims = fields.whole("output_dimension", lowest=1)
    model.require_dims(dims, "output_dimension")
    types = fields.choices("embedding_types", _TYPES) or ["float"]
    quantizers = _quantizers(settings, types, dims or model.dim)
    texts = _texts(fields, call.limits.texts)
    prepared = await model.prepare(
        texts,
        role,
        task=task,
        truncate=_CUTS[fields.choice("truncate", list(_CUTS), "END")],
        longest=fields.whole("max_tokens", lowest=1),
    )
    answer = await call.read(model, prepared, ["dense"])
    vectors = model.dense(answer, dims)
    codes: _Codes = {kind: each.codes(vectors) for kind, each in quantizers.items()}
    answered = {
        "id": str(uuid4()),
        "response_type": "embeddings_by_type",
        "embeddings": {name: await rows_in_json(_as(name, vectors, codes)) for name in types},
        "texts": texts,
        "meta": _meta(prepared),
    }
    return json_response(answered, headers=prepared.headers)


def _texts(fields: Fields, most: int) -> list[str]:
    """Return the texts of ``texts``, or of ``inputs``, whose parts become lines of one text."""
    if "inputs" not in fields:
        return fields.texts("texts", most)
    inputs = fields.raw("inputs")
    if not isinstance(inputs, list):
        raise wrong("inputs", "a list of objects with content", inputs)
    require_count("inputs", len(inputs), most)
    return [_text_of(each, f"inputs[{place}]") for place, each in enumerate(inputs)]


def _text_of(value: Any, name: str) -> str:
    """Return the text of one input: {"content": [{"type": "text", "text": "..."}]}."""
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, list) or not content:
        raise wrong(f"{name}.content", 'a list of {"type": "text", "text": "..."}', content)
    lines = []
    for place, part in enumerate(content):
        where = f"{name}.content[{place}]"
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise RequestError(422, f'"{where}" must be a text; models here read no images')
        if not isinstance(text, str):
            raise wrong(f"{where}.text", "a string", text)
        lines.append(valid(text, where))
    return "\n".join(lines)


def _quantizers(
    settings: Settings, types: list[_Type], width: int
) -> dict[CodePrecision, Quantizer]:
    """Return what makes the codes, before any text is read."""
    try:
        return {
            _CODES[name]: quantizer_of(settings, _CODES[name], width)
            for name in types
            if name in _CODES
        }
    except RecipeError as error:
        raise RequestError(422, str(error), field="embedding_types") from error


def _as(name: _Type, vectors: np.ndarray, codes: _Codes) -> np.ndarray | list[str]:
    """Return vectors in one of the types."""
    if name == "float":
        return vectors
    if name == "base64":
        return [b64encode(row.tobytes()).decode() for row in vectors.astype("<f4", copy=False)]
    packed = codes[_CODES[name]].packed
    if name == "ubinary":
        return packed
    shifted = packed ^ 128  # the bits of a byte, and of that byte minus 128
    return {"int8": packed.view(np.int8), "uint8": shifted, "binary": shifted.view(np.int8)}[name]


def _meta(prepared: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": prepared.total},
    }
    cut = sum(prepared.cut)
    if cut:
        longest = max(prepared.counts)
        found["warnings"] = [f"{cut} of {len(prepared.cut)} texts were cut to {longest} tokens"]
    return found
