"""POST /v1/vectors: all kinds of vectors from one forward, with what was read of each text."""

from base64 import b64encode
from typing import Any, Final, Literal

import numpy as np
from safetensors.numpy import save
from starlette.responses import Response
from starlette.routing import Route

from tercet.kinds import KINDS, Kind
from tercet.serve.endpoint import Call, Described, Service, json_response, route, rows_in_json
from tercet.serve.queue import Answer
from tercet.serve.served import TRUNCATE, Prepared, ServedModel, Truncate

_FIELDS: Final[Described] = {
    "texts": ("[string]", "Texts, at least one."),
    "model": ("string", "Name of the model. Default: the first."),
    "role": ("string", '"query" or "document". Default: the model\'s default prompt.'),
    "task": ("string", "Task whose prompt is put before the texts."),
    "kinds": ("[string]", "Of dense, sparse and multi. Default: all that the model makes."),
    "dims": ("integer", "Leading coordinates of dense vectors to keep. Default: all."),
    "truncate": ("string", 'Side of long texts that is cut: "end" or "start"; "error": none.'),
    "format": ("string", '"json" (default) or "safetensors", which is binary.'),
}
_FORMATS: Final[tuple[Literal["json", "safetensors"], ...]] = ("json", "safetensors")


def routes(service: Service) -> list[Route]:
    """Return the routes of this protocol."""
    return [route(service, "/v1/vectors", vectors, fields=_FIELDS)]


async def vectors(call: Call) -> Response:
    """Return vectors of all kinds that are asked for.

    In JSON, token vectors are the base64 of little-endian float16 rows, and all else are numbers.
    In safetensors everything is an array, dense vectors and sparse weights in float32.
    """
    fields = call.fields(_FIELDS)
    texts = fields.texts("texts", call.limits.texts)
    model, of_name = call.models.find(fields.text("model"))
    role, task = model.role_and_task(fields.text("role"), of_name, "role")
    kinds = fields.choices("kinds", KINDS) or list(model.kinds)
    dims = fields.whole("dims", lowest=1)
    model.require_dims(dims)
    binary = fields.choice("format", _FORMATS, "json") == "safetensors"
    side: Truncate = fields.choice("truncate", TRUNCATE, "end")
    prepared = await model.prepare(
        texts,
        role,
        task=fields.text("task") or task,
        truncate=side if "truncate" in fields else None,
    )
    model.require_room(prepared, kinds)
    answer = await call.read(model, prepared, kinds)
    dense = model.dense(answer, dims) if "dense" in kinds else None
    if binary:
        content = save(_arrays(prepared, answer, dense, kinds))
        return Response(
            content, headers={"x-model": model.name}, media_type="application/octet-stream"
        )
    read = zip(prepared.counts, prepared.cut, strict=True)
    rows = await rows_in_json(
        {"tokens": count, "truncated": cut, **_of_text(place, model, answer, dense, kinds)}
        for place, (count, cut) in enumerate(read)
    )
    usage = {"texts": len(texts), "tokens": prepared.total, "truncated": sum(prepared.cut)}
    return json_response({"model": model.name, "texts": rows, "usage": usage})


def _of_text(
    place: int, model: ServedModel, answer: Answer, dense: np.ndarray | None, kinds: list[Kind]
) -> dict[str, Any]:
    """Return the vectors of one text for JSON."""
    found: dict[str, Any] = {}
    if dense is not None:
        found["dense"] = dense[place]
    if "sparse" in kinds:
        ids, weights = answer.sparse[place]
        names = [model.vocabulary[each] for each in ids.tolist()]
        found["sparse"] = {"ids": ids, "tokens": names, "weights": weights}
    if "multi" in kinds:
        rows = answer.multi[place].astype("<f2")
        found["multi"] = {"shape": rows.shape, "float16": b64encode(rows.tobytes()).decode()}
    return found


def _arrays(
    prepared: Prepared, answer: Answer, dense: np.ndarray | None, kinds: list[Kind]
) -> dict[str, np.ndarray]:
    """Return the vectors of all texts as arrays; text i has rows offsets[i] to offsets[i + 1]."""
    found = {
        "tokens": np.array(prepared.counts, np.int32),
        "truncated": np.array(prepared.cut, np.uint8),
    }
    if dense is not None:
        found["dense"] = np.ascontiguousarray(dense)
    if "sparse" in kinds:
        found["sparse.ids"] = np.concatenate([ids for ids, _ in answer.sparse]).astype(np.int32)
        found["sparse.weights"] = np.concatenate([weights for _, weights in answer.sparse])
        found["sparse.offsets"] = _offsets([len(ids) for ids, _ in answer.sparse])
    if "multi" in kinds:
        found["multi.vectors"] = np.concatenate(answer.multi).astype(np.float16)
        found["multi.offsets"] = _offsets([len(rows) for rows in answer.multi])
    return found


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int64)
