"""Models and indexes that a server offers, by name; texts become tokens here."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import ne, or_
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from tercet.errors import RecipeError
from tercet.kinds import Kind
from tercet.models.embedder import Embedder
from tercet.models.texts import ROLES, role_of
from tercet.models.tokens import Tokens
from tercet.serve.queue import Answer, Batch, Need, PackedQueue
from tercet.serve.requests import Fields, RequestError, require_count, shown, valid, wrong
from tercet.types import Role, RoleName

Truncate: TypeAlias = Literal["end", "start", "error"]
"""What is cut of a text that is longer than the model reads; "error" refuses it."""

TRUNCATE: Final[tuple[Truncate, ...]] = ("end", "start", "error")
_MOST_NUMBERS: Final = 1 << 24  # of an answer's vectors of tokens: 200 MB of JSON
_TINY: Final = np.float32(1e-12)  # the least length to divide by, as in torch
_A_TOKEN: Final = 256  # characters, many more than usual ones have
_HUGE: Final = 1_000_000  # characters that are read of any text
_COUNTED: Final = 100_000  # characters of a text whose tokens are counted to say how many
_AT_ONCE: Final = 4_000  # characters that are tokenized in the event loop; more in a thread
SUFFIXES: Final[Mapping[str, Role]] = {"-query": "query", "-document": "document"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """Texts of a request as tokens, and what was cut."""

    tokens: Tokens

    @property
    def counts(self) -> list[int]:
        """The number of tokens of each text, special ones and prompt included."""
        return self.tokens.lengths

    @property
    def total(self) -> int:
        """The number of tokens of all texts."""
        return sum(self.counts)

    @property
    def cut(self) -> list[bool]:
        """Whether each text was cut."""
        return self.tokens.cuts

    @property
    def headers(self) -> dict[str, str]:
        """The header that says how many texts were cut, for protocols without a field for it."""
        return {"x-truncated": str(sum(self.cut))}


class ServedModel:
    """A model with its queue.

    Args:
        name: by which requests choose it; the first, if it has several.
        embedder: the model.
        most: tokens that may wait in its queue.
        on_batch: is called after each batch that was read.
    """

    def __init__(
        self,
        name: str,
        embedder: Embedder,
        *,
        most: int,
        on_batch: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self.name, self.embedder = name, embedder
        self.dim = embedder.dim
        self._normalizes = embedder.settings.normalize
        embedder.encode_vectors(["a"])  # what is made once, such as packed weights, is made now
        self.queue = PackedQueue(embedder, most=most, on_batch=on_batch)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of vectors that the model makes."""
        return self.embedder.kinds

    async def prepare(
        self,
        texts: Sequence[str],
        role: str = "default",
        *,
        task: str | None = None,
        truncate: Truncate | None = None,
        longest: int | None = None,
    ) -> Prepared:
        """Tokenize texts: long ones in a thread, so that others are not held up.

        ``truncate`` None cuts the side that the model's tokenizer cuts, mostly the end.
        ``longest`` is the most tokens to read of a text, at most the model's own limit.

        Raises:
            RequestError: 400 for an unknown role or task, 413 with ``too_long`` if a text is too
                long and ``truncate`` is "error", 422 if the model refuses empty texts.
        """
        if sum(map(len, texts)) <= _AT_ONCE:
            return self._prepare(texts, role, task, truncate, longest)
        return await asyncio.to_thread(self._prepare, texts, role, task, truncate, longest)

    def _prepare(
        self,
        texts: Sequence[str],
        role: str,
        task: str | None,
        truncate: Truncate | None,
        longest: int | None,
    ) -> Prepared:
        embedder = self.embedder
        if truncate == "start" and embedder.settings.echo:
            problem = "reads each text twice, so only the end of long texts can be cut"
            raise RequestError(422, f"the model {self.name} {problem}")
        limit = embedder.settings.max_tokens(role_of(role))
        around = sum(map(len, embedder.tokenizer.around))
        if longest is not None and longest <= around:
            raise RequestError(
                400,
                f'"max_tokens" must be above {around}, the special tokens of each text; got '
                f"{longest}",
                field="max_tokens",
            )
        limit = min(longest or limit, limit)
        given, most = texts, _A_TOKEN * limit
        if (truncate or embedder.tokenizer.cuts) == "start":  # all of a text would be read
            texts = [_ending(text, most) for text in texts]
        else:  # and all of one without spaces
            texts = [text[: max(most, _HUGE)] for text in texts]
        try:
            tokens = embedder.tokenize(
                texts,
                role,
                embedder.settings.prompt(role, task),
                limit,
                cuts="end" if truncate == "error" else truncate,
            )
        except RecipeError as error:
            raise RequestError(400, str(error)) from error
        shorter = map(ne, map(len, texts), map(len, given))
        tokens = replace(tokens, cuts=list(map(or_, tokens.cuts, shorter)))
        refuses = embedder.settings.on_empty == "error"
        if refuses and not all(text.strip() for text in texts):
            raise RequestError(422, "a text is empty, and the model refuses empty texts")
        if truncate == "error" and any(tokens.cuts):
            text = tokens.cuts.index(True)
            raise self._too_long(given, text, limit)
        return Prepared(tokens)

    def _too_long(self, texts: Sequence[str], text: int, limit: int) -> RequestError:
        has = f"{len(texts[text]):,} characters"
        if len(texts[text]) <= _COUNTED:
            count = len(self.embedder.tokenizer.bare([texts[text]])[0].ids)
            has = f"{count:,} without them"
        return RequestError(
            413,
            f"a text must have at most {limit:,} tokens with its prompt and special tokens; text "
            f"{text} has {has}; shorten it, or let it be cut",
            too_long=True,
        )

    async def read(self, prepared: Prepared, needs: Sequence[Need]) -> Answer:
        """Return what is needed of texts, from one forward with those of other requests.

        Raises:
            RequestError: 422 for a kind that the model does not make; see also
                :meth:`PackedQueue.read`.
        """
        for need in needs:
            if need != "states" and need not in {*self.kinds, "dense"}:
                raise RequestError(
                    422, f"the model {self.name} makes {' and '.join(self.kinds)} only; got {need}"
                )
        return await self.queue.read(prepared.tokens, needs)

    def require_room(self, prepared: Prepared, needs: Sequence[Need]) -> None:
        """Raise RequestError, before any work, if an answer would have too many token vectors."""
        widths = {"multi": self.embedder.heads.width or 0, "states": self.embedder.backbone.hidden}
        numbers = prepared.total * max(widths.get(need, 0) for need in needs)
        if numbers > _MOST_NUMBERS:
            most = _MOST_NUMBERS * prepared.total // numbers
            raise RequestError(
                413,
                f"texts must have at most {most:,} tokens together where each token has a vector; "
                f"got {prepared.total:,}; send several requests",
            )

    def dense(self, answer: Answer, dims: int | None = None) -> np.ndarray:
        """Return the dense vectors of an answer as :meth:`Embedder.encode` returns them.

        Raises:
            RequestError: 400 for ``dims`` out of range.
        """
        self.require_dims(dims)
        rows = answer.dense[0] if len(answer.dense) == 1 else np.concatenate(answer.dense)
        rows = rows[:, : dims or self.dim]
        if not self._normalizes and dims is None:
            return rows
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)

    def require_dims(self, dims: int | None, field: str = "dims") -> None:
        """Raise RequestError, before any work, unless a width is one that the model has."""
        if dims is not None and not 0 < dims <= self.dim:
            raise RequestError(
                400,
                f'"{field}" must be from 1 to {self.dim}, the width of {self.name}; got {dims}',
                field=field,
            )

    @cached_property
    def vocabulary(self) -> list[str]:
        """The string of each token id."""
        stock = self.embedder.tokenizer.stock
        return stock.convert_ids_to_tokens(list(range(len(stock))))

    def role_and_task(
        self, name: str | None, of_model: Role | None, field: str
    ) -> tuple[RoleName, str | None]:
        """Return the role and the task that a field means: a role, a task, or a prompt's name.

        Before a role, "search_" may stand. Without a name the role is that of the model's name.

        Raises:
            RequestError: 400 for any other name.
        """
        if name is None:
            return of_model or "default", None
        settings = self.embedder.settings
        tasks = {*settings.task_prompts, *settings.prompts} - {"query", "document"}
        if name in tasks:
            return of_model or "default", name
        role = name.removeprefix("search_")
        if role in (*ROLES, "default"):
            return role, None
        named = "".join(f', "{task}"' for task in sorted(tasks))
        raise RequestError(
            400,
            f'"{field}" must be a role or a prompt of {self.name}: "query", "document"{named}; got '
            f"{shown(name)}",
            field=field,
        )

    async def texts(self, fields: Fields, name: str, most: int) -> list[str]:
        """Return the texts of a field: a string, token ids, or a list of such.

        Ids are those of the model's own tokenizer; the text that they stand for is read.

        Raises:
            RequestError: 400 for anything else, 413 for more than ``most`` texts.
        """
        value = fields.raw(name)
        if not isinstance(value, list) or all(isinstance(each, str) for each in value):
            return fields.texts(name, most, single=True)
        if isinstance(value[0], int | float):
            return [await asyncio.to_thread(self.text_of, value, name)]
        require_count(name, len(value), most)
        return await asyncio.to_thread(self._texts_of, value, name)

    def _texts_of(self, values: list[Any], name: str) -> list[str]:
        found = []
        for place, value in enumerate(values):
            where = f"{name}[{place}]"
            if isinstance(value, list):
                found.append(self.text_of(value, where))
            elif isinstance(value, str):
                found.append(valid(value, where))
            else:
                raise wrong(where, "a string or a list of token ids", value)
        return found

    def text_of(self, ids: Sequence[Any], name: str, *, special: bool = False) -> str:
        """Return the text that token ids stand for, without special tokens or with them.

        An unknown token stays, unless it also begins, ends or pads texts, so that the text has the
        tokens that were given.

        Raises:
            RequestError: 400 for an id that is not in the vocabulary.
        """
        size = len(self.vocabulary)
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < size:
                raise RequestError(
                    400,
                    f'"{name}" must hold token ids of {self.name}, whole numbers from 0 to '
                    f"{size - 1}; got {shown(each)}",
                    field=name,
                )
        stock = self.embedder.tokenizer.stock
        left_out = set[int]()
        if not special:
            around = ("bos", "eos", "pad", "cls", "sep", "mask")
            left_out = {*stock.all_special_ids} - {stock.unk_token_id}
            left_out |= {getattr(stock, f"{name}_token_id") for name in around}
        return stock.decode([each for each in ids if each not in left_out])

    def close(self) -> None:
        """Answer what waits, and end the queue."""
        self.queue.close()


def _ending(text: str, size: int) -> str:
    """Return the last ``size`` characters, from the beginning of a word."""
    if len(text) <= size:
        return text
    ending = text[-size:]
    return ending.lstrip() if text[-size - 1].isspace() else ending.partition(" ")[2] or ending


class Models:
    """The models of a server; the first is taken where a request names none."""

    def __init__(self, by_name: Mapping[str, ServedModel]) -> None:
        self.by_name = by_name

    def __iter__(self) -> Iterator[ServedModel]:
        """Return each model once, though it may have several names."""
        return iter(dict.fromkeys(self.by_name.values()))

    def find(self, name: str | None) -> tuple[ServedModel, Role | None]:
        """Return the model of a name, and the role that the name's end says.

        The names ``NAME-query`` and ``NAME-document`` let clients say a role that have no field for
        it.

        Raises:
            RequestError: 404 for an unknown name.
        """
        if name is None:
            return next(iter(self)), None
        if name in self.by_name:
            return self.by_name[name], None
        for suffix, role in SUFFIXES.items():
            start = name.removesuffix(suffix)
            if start != name and start in self.by_name:
                return self.by_name[start], role
        known = ", ".join(self.by_name)
        raise RequestError(
            404, f"no model is named {shown(name)}; there are: {known}", field="model"
        )
