"""The protocol of Hugging Face's Text Embeddings Inference (TEI), as its version 1.9 has it.

The first model answers, unless a field ``model`` names another one, which TEI has not. Too long
texts are cut at the end by default.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from starlette.responses import Response
from starlette.routing import Route
from tokenizers import Encoding

from tercet.kinds import Kind, Weights
from tercet.models.tokens import Tokens
from tercet.rank.scoring import scores_of
from tercet.serve.endpoint import (
    Call,
    Described,
    Protocol,
    Service,
    json_response,
    route,
    rows_in_json,
)
from tercet.serve.queue import Answer, Need
from tercet.serve.requests import Fields, RequestError, require_count, wrong
from tercet.serve.served import Prepared, ServedModel, Truncate
from tercet.types import RoleName

_ErrorType: TypeAlias = Literal["Backend", "Empty", "Overloaded", "Unhealthy", "Validation"]
_Side: TypeAlias = Literal["Left", "Right"]
_SIDES: Final[Mapping[_Side, Truncate]] = {"Right": "end", "Left": "start"}
_POOLINGS: Final[Mapping[str, str]] = {"last": "last_token"}  # by other names in TEI
_TYPES: Final[Mapping[int, _ErrorType]] = {
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Backend",
}
_MODEL: Final[Described] = {"model": ("string", "Name of the model. Default: the first.")}
_PROMPT: Final[Described] = {
    **_MODEL,
    "prompt_name": ("string", '"query" or "document", or a task or a prompt of the model.'),
}
_CUT: Final[Described] = {
    "truncate": ("boolean", "Cut texts that are too long (default), or refuse them."),
    "truncation_direction": ("string", 'The side that is cut: "Right" (default) or "Left".'),
}
_INPUTS: Final[Described] = {
    "inputs": ("string | [string] | [integer] | [[integer]]", "Texts, or token ids of the model."),
    **_PROMPT,
    **_CUT,
}
_EMBED: Final[Described] = {
    **_INPUTS,
    "dimensions": ("integer", "Leading coordinates to keep. Default: all."),
    "normalize": ("boolean", "Scale vectors to unit length (default)."),
}
_RERANK: Final[Described] = {
    "query": ("string", "What is searched for."),
    "texts": ("[string]", "Texts to be sorted, at least one."),
    "raw_scores": ("boolean", "Answer the weighted sums of scores. Default: their sigmoids."),
    "return_text": ("boolean", "Answer the texts too. Default: their places alone."),
    **_MODEL,
    **_CUT,
}
_SIMILARITY: Final[Described] = {
    "inputs": ("object", '{"source_sentence": "...", "sentences": ["..."]}'),
    "parameters": ("object", "truncate, truncation_direction and prompt_name, as of /embed."),
    **_MODEL,
}
_TOKENIZE: Final[Described] = {
    "inputs": ("string | [string]", "Texts."),
    "add_special_tokens": ("boolean", "Special tokens around each text (default)."),
    **_PROMPT,
}
_DECODE: Final[Described] = {
    "ids": ("[integer] | [[integer]]", "Token ids of the model."),
    "skip_special_tokens": ("boolean", "Leave out special tokens (default)."),
    **_MODEL,
}


def routes(service: Service) -> list[Route]:
    """Return the routes of this protocol."""
    handlers = {
        "/": (embed, _EMBED),  # clients of Hugging Face post to the address itself
        "/embed": (embed, _EMBED),
        "/embed_sparse": (embed_sparse, _INPUTS),
        "/embed_all": (embed_all, _INPUTS),
        "/rerank": (rerank, _RERANK),
        "/similarity": (similarity, _SIMILARITY),
        "/tokenize": (tokenize, _TOKENIZE),
        "/decode": (decode, _DECODE),
    }
    protocol = Protocol(_error, _status)
    return [
        *(
            route(service, path, handler, protocol=protocol, fields=fields)
            for path, (handler, fields) in handlers.items()
        ),
        route(service, "/info", info, method="GET", protocol=protocol),
    ]


async def embed(call: Call) -> Response:
    """Return dense vectors, of unit length unless ``normalize`` is false."""
    asked = _Asked(call)
    dims = asked.fields.whole("dimensions", lowest=1)
    asked.model.require_dims(dims, "dimensions")
    unit = asked.fields.flag("normalize", True)
    answer = await asked.read(await asked.texts(), "dense")
    width = dims or asked.model.dim
    found = asked.model.dense(answer, width) if unit else np.concatenate(answer.dense)[:, :width]
    return asked.response(await rows_in_json(np.ascontiguousarray(found)))


async def embed_sparse(call: Call) -> Response:
    """Return the weight of each token of a text."""
    asked = _Asked(call)
    if "sparse" not in asked.model.kinds:
        kinds = " and ".join(asked.model.kinds)
        raise _TypedError("Backend", f"the model {asked.model.name} makes {kinds} vectors only")
    answer = await asked.read(await asked.texts(), "sparse")
    rows = (
        [
            {"index": token, "value": weight}
            for token, weight in zip(ids.tolist(), weights.tolist(), strict=True)
        ]
        for ids, weights in answer.sparse
    )
    return asked.response(await rows_in_json(rows))


async def embed_all(call: Call) -> Response:
    """Return the state of every token, prompt and special ones included, not normalized."""
    asked = _Asked(call)
    answer = await asked.read(await asked.texts(), "states")
    return asked.response(await rows_in_json(answer.states))


async def similarity(call: Call) -> Response:
    """Return the cosine of a sentence with each of some others."""
    fields = call.fields()
    inputs = _object(fields, "inputs")
    sentence = inputs.required_text("source_sentence")
    sentences = _texts(inputs, "sentences", call.limits.texts)
    asked = _Asked(call, _object(fields, "parameters"))
    answer = await asked.read([sentence, *sentences], "dense")
    unit = asked.model.dense(answer, asked.model.dim)
    return asked.response(unit[1:] @ unit[0])


async def rerank(call: Call) -> Response:
    """Return the score of each text for a query, best first.

    A score is the sum of those by each kind of vectors, weighted as the model's settings say. TEI
    answers the sigmoid of a score unless ``raw_scores`` is true, and so does this.
    """
    asked = _Asked(call)
    fields, model = asked.fields, asked.model
    query = fields.required_text("query")
    texts = _texts(fields, "texts", call.limits.texts)
    shown, raw = fields.flag("return_text", False), fields.flag("raw_scores", False)
    of_query = await asked.prepare([query], "query")
    of_texts = await asked.prepare(texts, "document")
    weights = model.embedder.settings.weights.get("", Weights())
    kinds: list[Kind] = [kind for kind in model.kinds if weights.of(kind)]
    both = Prepared(Tokens.join([of_query.tokens, of_texts.tokens]))
    answer = await asked.read_prepared([query, *texts], both, *kinds)
    sums = await asyncio.to_thread(_sums, model, answer, kinds, weights)
    scores = sums if raw else 1 / (1 + np.exp(-sums))
    return asked.response(
        [
            {
                "index": place,
                **({"text": texts[place]} if shown else {}),
                "score": float(scores[place]),
            }
            for place in np.argsort(-sums, kind="stable").tolist()
        ]
    )


async def tokenize(call: Call) -> Response:
    """Return the tokens of whole texts after their prompt; places count bytes of UTF-8."""
    asked = _Asked(call)
    texts = _texts(asked.fields, "inputs", call.limits.texts, single=True)
    special = asked.fields.flag("add_special_tokens", True)
    prompt = asked.prompt()
    length, most = sum(map(len, texts)), call.limits.queue_tokens
    if length > most:
        raise RequestError(
            413,
            f'"inputs" must have at most {most:,} characters together; got {length:,}; send '
            "several requests",
        )
    tokenizer = asked.model.embedder.tokenizer

    def tokens() -> list[list[dict[str, Any]]]:
        whole = [prompt + text for text in texts]
        encodings = tokenizer.encodings(whole, special=special)
        return [_tokens(text, each) for text, each in zip(whole, encodings, strict=True)]

    return json_response(await asyncio.to_thread(tokens))


async def decode(call: Call) -> Response:
    """Return the texts that token ids stand for."""
    asked = _Asked(call)
    ids, special = asked.fields.raw("ids"), not asked.fields.flag("skip_special_tokens", True)
    if not isinstance(ids, list):
        raise wrong("ids", "a list of token ids, or a list of such lists", ids)
    lists = ids if ids and isinstance(ids[0], list) else [ids]
    if not ids:
        raise _TypedError("Empty", '"ids" must not be empty')
    require_count("ids", len(lists), call.limits.texts)

    def texts() -> list[str]:
        found = []
        for place, each in enumerate(lists):
            if not isinstance(each, list):
                raise wrong(f"ids[{place}]", "a list of token ids", each)
            found.append(asked.model.text_of(each, f"ids[{place}]", special=special))
        return found

    return json_response(await asyncio.to_thread(texts))


async def info(call: Call) -> Response:
    """Describe a model and the limits of requests."""
    model, _ = call.models.find(call.request.query_params.get("model"))
    embedder, limits = model.embedder, call.limits
    settings = embedder.settings
    return json_response(
        {
            "model_id": model.name,
            "model_sha": None,
            "model_dtype": str(next(embedder.parameters()).dtype).removeprefix("torch."),
            "served_model_name": model.name,
            "model_type": {
                "embedding": {"pooling": _POOLINGS.get(settings.pooling, settings.pooling)}
            },
            "max_concurrent_requests": limits.queue_tokens,  # which have one token or more each
            "max_input_length": settings.document_tokens,
            "max_batch_tokens": embedder.batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": limits.texts,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": version("tercet"),
            "sha": None,
            "docker_label": None,
        }
    )


class _Asked:
    """A request: its model, prompt and truncation, and how long each part of it took."""

    def __init__(self, call: Call, options: Fields | None = None) -> None:
        self._began = time.perf_counter()
        self._call = call
        self.fields = call.fields()
        options = options or self.fields
        self.model, role = call.models.find(self.fields.text("model"))
        name = options.text("prompt_name")
        self.role, self.task = self.model.role_and_task(name, role, "prompt_name")
        side: _Side = options.choice("truncation_direction", tuple(_SIDES), "Right")
        self._truncate: Truncate = _SIDES[side] if options.flag("truncate", True) else "error"
        self._headers: dict[str, str] = {}

    def prompt(self) -> str:
        """Return the prompt that is asked for."""
        return self.model.embedder.settings.prompt(self.role, self.task)

    async def texts(self) -> list[str]:
        """Return the texts of "inputs"."""
        _refuse_empty(self.fields, "inputs")
        return await self.model.texts(self.fields, "inputs", self._call.limits.texts)

    async def prepare(self, texts: Sequence[str], role: RoleName) -> Prepared:
        """Return texts as tokens."""
        return await self.model.prepare(texts, role, task=self.task, truncate=self._truncate)

    async def read(self, texts: Sequence[str], need: Need) -> Answer:
        """Return what is needed of texts."""
        prepared = await self.prepare(texts, self.role)
        self.model.require_room(prepared, [need])
        return await self.read_prepared(texts, prepared, need)

    async def read_prepared(self, texts: Sequence[str], prepared: Prepared, *needs: Need) -> Answer:
        """Return what is needed of tokens, and note the time."""
        tokenized = time.perf_counter() - self._began
        answer = await self._call.read(self.model, prepared, needs)
        self._headers = {
            **prepared.headers,
            "x-compute-characters": str(sum(map(len, texts))),
            "x-compute-tokens": str(prepared.total),
            "x-tokenization-time": _milliseconds(tokenized),
            "x-queue-time": _milliseconds(answer.waited),
            "x-inference-time": _milliseconds(answer.seconds - answer.waited),
        }
        return answer

    def response(self, value: object) -> Response:
        """Return an answer with headers that say how long it took."""
        total = _milliseconds(time.perf_counter() - self._began)
        return json_response(value, headers={**self._headers, "x-total-time": total})


class _TypedError(RequestError):
    """An error whose type does not follow from its status."""

    def __init__(self, error_type: Literal["Backend", "Empty"], message: str) -> None:
        super().__init__(422 if error_type == "Backend" else 400, message)
        self.error_type: _ErrorType = error_type


def _type(error: RequestError) -> _ErrorType:
    if isinstance(error, _TypedError):
        return error.error_type
    return _TYPES.get(error.status, "Validation")


def _error(error: RequestError) -> Mapping[str, Any]:
    """Return the body of an error."""
    start = "Model is overloaded: " if error.status == 429 else ""
    return {"error": f"{start}{error}", "error_type": _type(error)}


def _status(error: RequestError) -> int:
    """Return the status of an error: 424 where the model cannot, 422 for a wrong field."""
    if _type(error) == "Backend":
        return 424
    return 422 if error.status == 400 and error.field is not None else error.status


def _object(fields: Fields, name: str) -> Fields:
    """Return the fields of an object inside of the body; none if it is absent."""
    value = fields.raw(name)
    if value is not None and not isinstance(value, Mapping):
        raise wrong(name, "an object", value)
    return Fields(value or {})


def _refuse_empty(fields: Fields, name: str) -> None:
    if fields.raw(name) == []:
        raise _TypedError("Empty", f'"{name}" must not be empty')


def _texts(fields: Fields, name: str, most: int, *, single: bool = False) -> list[str]:
    _refuse_empty(fields, name)
    return fields.texts(name, most, single=single)


def _sums(
    model: ServedModel, answer: Answer, kinds: Sequence[Kind], weights: Weights
) -> np.ndarray:
    """Return the weighted score of the first text with each of the others."""
    vectors = answer.vectors()
    if vectors.dense is not None:
        vectors = replace(vectors, dense=torch.from_numpy(model.dense(answer)))
    query, texts = vectors.take(slice(0, 1)), vectors.take(slice(1, len(vectors)))
    parts = [scores_of(kind, query, texts)[0] * weights.of(kind) for kind in kinds]
    return torch.stack(parts).sum(0).double().numpy()


def _tokens(text: str, encoding: Encoding) -> list[dict[str, Any]]:
    """Return the tokens of a text."""
    ends = None if text.isascii() else np.cumsum([0, *(len(each.encode()) for each in text)])
    found = []
    parts = zip(
        encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
    )
    for number, token, special, (start, stop) in parts:
        place = (start, stop) if ends is None else (int(ends[start]), int(ends[stop]))
        found.append(
            {
                "id": number,
                "text": token if special else text[start:stop],
                "special": bool(special),
                "start": None if special else place[0],
                "stop": None if special else place[1],
            }
        )
    return found


def _milliseconds(seconds: float) -> str:
    return str(round(1000 * seconds))
