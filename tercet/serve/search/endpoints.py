"""Endpoints of indexes: search, documents, and what there is."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from starlette.responses import Response
from starlette.routing import Route

from tercet.kinds import KINDS, Kind, Weights
from tercet.search.engine.conditions import unfulfilled
from tercet.search.engine.engine import CANDIDATES, Hit, Record, Where
from tercet.search.engine.fusion import FusionName, fusion_of
from tercet.search.exact.exact_engine import ExactEngine
from tercet.search.text_index import TextIndex, check_texts
from tercet.serve.endpoint import Call, Described, Service, json_response, route
from tercet.serve.requests import Fields, RequestError, require_count, valid, wrong
from tercet.serve.search.indexes import ServedIndex
from tercet.serve.served import Prepared, ServedModel
from tercet.vectors import Vectors

_SEARCH: Final[Described] = {
    "index": ("string", "Name of the index. Default: the first."),
    "model": ("string", "Who reads the queries: distilled from the index's model, the default."),
    "queries": ("[string]", "What to look for."),
    "query": ("string", "One query, instead of queries."),
    "k": ("integer", "Hits of each query. Default: 5."),
    "weights": ("object", "Weight of each kind of score. Default: the model's."),
    "where": ("object", "Fields, and the value or a list of values that documents must have."),
    "fusion": ("string", '"weighted" (default), "rrf" or "rerank".'),
    "candidates": ("integer", "Of each kind, to be scored; 0: all documents. Default: 100."),
    "highlight": ("boolean", "Whether hits have the tokens that match. Default: false."),
}
_UPSERT: Final[Described] = {
    "index": _SEARCH["index"],
    "documents": ("[object]", "Each with id and text; title and fields are optional."),
}
_DELETE: Final[Described] = {"index": _SEARCH["index"], "ids": ("[string]", "Of documents.")}
_ADDRESS: Final[Described] = {"id": ("string", "Of the document."), "index": _SEARCH["index"]}
_DOCUMENT: Final = ("id", "text", "title", "fields")
_FUSIONS: Final[tuple[FusionName, ...]] = ("weighted", "rrf", "rerank")
_MOST_HITS: Final = 1_000
_MOST_ALL_HITS: Final = 100_000  # of a request
_MOST_MARKED: Final = 1_000  # hits whose whole texts are read for highlight
_MOST_CANDIDATES: Final = 100_000
_MOST_ALL_CANDIDATES: Final = 250_000  # of a request
_MOST_CONDITIONS: Final = 100
_MOST_VALUES: Final = 1_000  # of all conditions
_MOST_WEIGHT: Final = 1_000_000  # scores are finite
_EXPLAINED: Final = 10_000  # documents that are read to explain a condition: 0.3 seconds
_SCALARS: Final = "a text, a number, true or false, or a list of these"


def routes(service: Service) -> list[Route]:
    """Return the routes of indexes."""
    return [
        route(service, "/v1/search", search, fields=_SEARCH),
        route(service, "/v1/documents", upsert, fields=_UPSERT),
        route(service, "/v1/documents/delete", delete, fields=_DELETE),
        route(service, "/v1/documents", fetch, method="GET", fields=_ADDRESS),
        route(service, "/v1/documents", delete_one, method="DELETE", fields=_ADDRESS),
        route(service, "/v1/documents/{id:path}", fetch, method="GET", fields=_ADDRESS),
        route(service, "/v1/documents/{id:path}", delete_one, method="DELETE", fields=_ADDRESS),
        route(service, "/v1/indexes", indexes, method="GET"),
        route(service, "/v1/state", state, method="GET"),
    ]


# ---- search --------------------------------------------------------------------------------------


async def search(call: Call) -> Response:
    """Return the best documents of each query, with their scores by each kind.

    With ``highlight`` a hit has its tokens that match, the product of their weights in query and
    document, and where they are in the text.
    """
    began = time.perf_counter()
    fields = call.fields(_SEARCH)
    queries = _queries(fields, call.limits.texts)
    index = call.indexes.find(fields.text("index"))
    opened, model = index.opened(), index.model
    if (name := fields.text("model")) is not None:
        model, _ = call.models.find(name)
        await index.require_reader(opened, model)
    candidates = fields.whole("candidates", lowest=0, highest=_MOST_CANDIDATES)
    fusion = fusion_of(
        fields.choice("fusion", _FUSIONS, "weighted"),
        _weights(fields),
        opened.weights,
        CANDIDATES if candidates is None else candidates,
    )
    k = fields.whole("k", lowest=1, highest=_MOST_HITS) or 5
    where, highlight = _where(fields), fields.flag("highlight", False)
    _require_few("k", '"k"', k, queries, _MOST_ALL_HITS)
    if highlight:
        _require_few("k", 'with highlight, "k"', k, queries, _MOST_MARKED)
    if candidates != 0:
        each = CANDIDATES if candidates is None else candidates
        _require_few("candidates", '"candidates"', each, queries, _MOST_ALL_CANDIDATES)
    elif len(queries) > 1:
        stats = await index.run(lambda _: opened.engine.stats())
        what = 'with "candidates" 0, the number of documents'
        _require_few("candidates", what, stats.records, queries, _MOST_ALL_CANDIDATES)
    vectors, prepared = await index.encode(opened, queries, "query", call.read, model)
    encoded = time.perf_counter()
    found = await index.run(lambda _: opened.nearest(vectors, k, fusion=fusion, where=where))
    searched = time.perf_counter()
    results = _results(queries, prepared, found)
    notes: list[str] = []
    if highlight and (why := _no_matches(opened)):
        notes.append(why)
    elif highlight:
        await index.run(lambda _: _add_matches(index, opened, vectors, found, results))
    if where and not any(found):
        notes += await index.run(lambda _: _unfulfilled(opened, where))
    answer: dict[str, Any] = {"index": index.name, "results": results}
    if notes:
        answer["notes"] = notes
    now = time.perf_counter()
    times = {"encode": encoded - began, "search": searched - encoded, "total": now - began}
    answer["ms"] = {name: round(1000 * seconds, 3) for name, seconds in times.items()}
    return json_response(answer)


def _require_few(field: str, what: str, each: int, queries: Sequence[str], most: int) -> None:
    """Refuse more work than a request may ask for: nothing ends a search that has begun."""
    if each * len(queries) > most:
        raise RequestError(
            413,
            f"{what} times the number of queries must be at most {most:,}; got "
            f"{each * len(queries):,}; send several requests",
            field=field,
        )


def _queries(fields: Fields, most: int) -> list[str]:
    if "query" in fields and "queries" in fields:
        raise RequestError(400, 'give "queries" or "query", not both', field="query")
    queries = (
        [fields.required_text("query")] if "query" in fields else fields.texts("queries", most)
    )
    check_texts(queries)
    return queries


def _weights(fields: Fields) -> dict[Kind, float] | None:
    """Return the weights of kinds that are given."""
    given = fields.raw("weights")
    if given is None:
        return None
    example = 'an object of numbers, such as {"dense": 1, "sparse": 0.3, "multi": 1}'
    if not isinstance(given, Mapping):
        raise wrong("weights", example, given)
    found: dict[Kind, float] = {}
    for name, value in given.items():
        if name not in KINDS:
            raise wrong("weights", f"of the kinds {', '.join(KINDS)}", name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= _MOST_WEIGHT:
            raise wrong(f"weights.{name}", f"a number from 0 to {_MOST_WEIGHT:,}", value)
        found[name] = float(value)
    return found


def _where(fields: Fields) -> Where | None:
    """Return the conditions, by field."""
    given = fields.raw("where")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise wrong("where", 'an object of fields and values, such as {"lang": "en"}', given)
    for name, value in given.items():
        _require_value(f"where.{name}", value)
        if value == []:
            raise RequestError(400, f'"where.{name}" must not be empty', field=f"where.{name}")
    values = sum(len(_listed(value)) for value in given.values())
    for what, count, most in (
        ("conditions", len(given), _MOST_CONDITIONS),
        ("values", values, _MOST_VALUES),
    ):
        if count > most:
            raise RequestError(
                413, f'"where" must have at most {most:,} {what}; got {count:,}', field="where"
            )
    return given


def _require_value(name: str, value: object) -> None:
    """Raise RequestError unless this is what a field of a document may hold."""
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, str | int | float):
            raise wrong(name, _SCALARS, each)
        if isinstance(each, str):
            valid(each, name)


def _results(
    queries: Sequence[str], prepared: Prepared, found: Sequence[Sequence[Hit]]
) -> list[dict[str, Any]]:
    return [
        {
            "query": query,
            "tokens": count,
            "truncated": cut,
            "hits": [
                {
                    "id": hit.record.id,
                    "score": hit.score,
                    "scores": hit.scores,
                    "title": hit.record.title,
                    "text": hit.record.text,
                    "fields": hit.record.fields,
                }
                for hit in hits
            ],
        }
        for query, count, cut, hits in zip(
            queries, prepared.counts, prepared.cut, found, strict=True
        )
    ]


def _no_matches(opened: TextIndex) -> str | None:
    """Return why tokens that match cannot be shown."""
    if "sparse" not in opened.kinds:
        return "highlight: the index has no sparse vectors, whose tokens could match"
    if not isinstance(opened.engine, ExactEngine):
        return "highlight: only indexes of the exact engine can say which tokens match"
    return None


def _add_matches(
    index: ServedIndex,
    opened: TextIndex,
    queries: Vectors,
    found: Sequence[Sequence[Hit]],
    results: Sequence[dict[str, Any]],
) -> None:
    """Add the tokens that match to each hit."""
    assert queries.sparse is not None, "the index has sparse vectors"
    terms = queries.sparse.merged()
    ids, weights = terms.ids.tolist(), terms.weights.tolist()
    bounds = pairwise(terms.offsets.tolist())
    for (low, high), hits, result in zip(bounds, found, results, strict=True):
        asked = dict(zip(ids[low:high], weights[low:high], strict=True))
        matches = index.matches(opened, asked, [hit.record for hit in hits])
        for hit, those in zip(result["hits"], matches, strict=True):
            hit["matches"] = those


def _unfulfilled(opened: TextIndex, where: Where) -> list[str]:
    """Explain conditions that no document fulfils, unless there are many documents to read."""
    if opened.engine.stats().records > _EXPLAINED:
        return []
    conditions = [(name, _shown(value), _listed(value)) for name, value in where.items()]
    return [f"where {problem}" for problem in unfulfilled(opened.engine, conditions)]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _shown(value: Any) -> str:
    return ", ".join(
        str(each).lower() if isinstance(each, bool) else str(each) for each in _listed(value)
    )


# ---- documents -----------------------------------------------------------------------------------


async def upsert(call: Call) -> Response:
    """Add or replace documents; the answer comes when they are on the disk and can be found.

    Those that are there already are not encoded again. ``truncated`` names those that were cut.
    """
    fields = call.fields(_UPSERT)
    index = call.indexes.find(fields.text("index"))
    records = _records(fields.raw("documents"), call.limits.texts)
    done = await index.upsert(records, call.read)
    return json_response(
        {
            "index": index.name,
            "upserted": done.encoded,
            "unchanged": done.unchanged,
            "truncated": done.cut,
        }
    )


def _records(given: Any, most: int) -> list[Record]:
    """Return the documents of a request."""
    if not isinstance(given, list):
        raise wrong("documents", "a list of objects", given)
    require_count("documents", len(given), most)
    records = [_record(each, f"documents[{place}]") for place, each in enumerate(given)]
    places: dict[str, int] = {}
    for place, record in enumerate(records):
        first = places.setdefault(record.id, place)
        if first != place:
            raise RequestError(
                400,
                f'"documents[{place}].id" must be unique; "documents[{first}].id" is the same',
                field=f"documents[{place}].id",
            )
    return records


def _record(given: Any, name: str) -> Record:
    if not isinstance(given, Mapping):
        raise wrong(name, "an object with id and text", given)
    for key in given:
        if key not in _DOCUMENT:
            raise RequestError(
                400, f'"{name}" has the unknown field "{key}"; put it into "fields"', field=name
            )
    id_ = given.get("id")
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)  # as in files of documents
    fields = given.get("fields")
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise wrong(f"{name}.fields", "an object", fields)
    for key, value in fields.items():
        _require_value(f"{name}.fields.{valid(key, name)}", value)
    return Record(
        id=_filled(id_, f"{name}.id"),
        text=_filled(given.get("text"), f"{name}.text"),
        title=_title(given.get("title"), f"{name}.title"),
        fields=dict(fields),
    )


def _filled(value: Any, name: str) -> str:
    """Return a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise wrong(name, "a string that is not blank", value)
    return valid(value, name)


def _title(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise wrong(name, "a string", value)
    return valid(value or "", name)


async def delete(call: Call) -> Response:
    """Remove documents by their ids; the answer comes when that is on the disk."""
    fields = call.fields(_DELETE)
    index = call.indexes.find(fields.text("index"))
    ids = list(dict.fromkeys(fields.texts("ids", call.limits.texts)))
    return json_response({"index": index.name, "deleted": await index.delete(ids)})


async def delete_one(call: Call) -> Response:
    """Remove a document.

    Its id is in the path, or in the query as ``?id=``, which can also be ``.`` or ``..``.
    """
    index, name = _named(call)
    return json_response({"index": index.name, "deleted": await index.delete([name])})


async def fetch(call: Call) -> Response:
    """Return a document; an unknown id is an error 404 with the code "no_document".

    Its id is in the path, or in the query as ``?id=``, which can also be ``.`` or ``..``: HTTP
    clients remove these from a path.
    """
    index, name = _named(call)
    (record,) = await index.fetch([name])
    if record is None:
        raise RequestError(
            404,
            f'the index {index.name} has no document with the id "{name}"',
            code="no_document",
        )
    return json_response(
        {"id": record.id, "text": record.text, "title": record.title, "fields": record.fields}
    )


def _named(call: Call) -> tuple[ServedIndex, str]:
    """Return the index and the id in the address of a request."""
    given = {**call.request.query_params, **call.request.path_params}
    index = call.indexes.find(given.get("index"))
    if "id" not in given:
        raise RequestError(
            400, '"id" is missing; give it in the address: /v1/documents?id=ID', field="id"
        )
    return index, valid(given["id"], "id")


# ---- state ---------------------------------------------------------------------------------------


async def indexes(call: Call) -> Response:
    """Return what each index holds and how it is."""
    return json_response({"indexes": await _index_states(call)})


async def state(call: Call) -> Response:
    """Return models, indexes and limits."""
    limits = call.limits
    return json_response(
        {
            "models": [_model_state(model) for model in call.models],
            "indexes": await _index_states(call),
            "limits": {
                "texts": limits.texts,
                "body_bytes": limits.body_bytes,
                "seconds": limits.seconds,
            },
        }
    )


async def _index_states(call: Call) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*(index.state() for index in call.indexes)))


def _model_state(model: ServedModel) -> dict[str, Any]:
    settings = model.embedder.settings
    return {
        "name": model.name,
        "kinds": model.kinds,
        "dim": model.embedder.dim,
        "max_tokens": {role: settings.max_tokens(role) for role in ("query", "document")},
        "weights": {kind: settings.weights.get("", Weights()).of(kind) for kind in model.kinds},
        "queue": {"tokens": model.queue.tokens, "most": model.queue.most},
    }
