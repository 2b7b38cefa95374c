"""Tokenizing: from texts to one row of token ids, with the tokens that are pooled."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from tokenizers import Encoding, normalizers
from tokenizers import Tokenizer as FastTokenizer

from tercet.errors import ModelError, RecipeError
from tercet.models.foreign_code import refuse_code
from tercet.segments import Packed, batches_within, offsets_of, row_of
from tercet.types import Role

_NONE: Final = np.empty(0, np.int32)
_AT_ONCE: Final = 1_024  # texts that are tokenized together,
_LETTERS_AT_ONCE: Final = 1 << 23  # and characters of them
_LETTERS_A_TOKEN: Final = 16  # read of a long text at first, more than most texts need
_MORE: Final = 256  # tokens that are read beyond those that are kept
_MARGIN: Final = 1_024  # characters before a cut whose tokens are not trusted
_SAMPLED: Final = 1_024  # tokens by which a vocabulary is recognized, and texts
_SAMPLE: Final = (
    "The Harbour froze, and 3 ferries stopped at 10:45.",
    "Größe; la bibliothèque ferme à dix-huit heures",
    "明日の朝は雪が降るでしょう。 고양이가 매트 위에 앉아 있다",
    "def area(r):\n    return 3.14159 * r ** 2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What surrounds texts besides their prompts, and which of it is part of the vector."""

    pool_prompt: bool = True
    suffix: str = ""  # after every text, such as a chat's closing marker
    pool_suffix: bool = False
    pool_special: bool = True  # false: the tokenizer's special tokens are not pooled
    end: bool = False  # the end-of-text token last, pooled
    pool_end: bool = False  # of a text without tokens, pool what the tokenizer puts behind it
    echo: Role | None = None  # the text twice, only the second pooled, in this role's template
    cls_every: int | None = None  # MCLS: repeat the start token after this many tokens
    cuts: Literal["start", "end"] | None = None  # of long texts; None: what the tokenizer says

    def __post_init__(self) -> None:
        if self.cls_every is not None and (self.cls_every < 1 or self.echo is not None):
            raise RecipeError(
                f"cls_every must be at least 1, and without echo; got {self.cls_every}"
                f"{' with echo' if self.echo else ''}"
            )
        if self.cuts == "start" and self.echo is not None:
            raise RecipeError('cuts must be "end" with echo, which repeats the start; got "start"')


PLAIN: Final = Form()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of some texts, which can be packed in any order.

    ``spans`` and ``read`` are filled on request.
    """

    ids: list[np.ndarray]  # int32, one array a text, none of them empty
    skipped: list[int]  # leading tokens that are read but not pooled: the prompt
    truncated: int  # texts that were cut to the limit
    left_out: list[tuple[int, int]] = field(default_factory=list)  # of suffixes; empty: no text's
    spans: list[np.ndarray] = field(default_factory=list)  # characters of a token, -1 outside
    read: list[int] = field(default_factory=list)  # characters that were kept
    cuts: list[bool] = field(default_factory=list)  # whether each text was cut

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each text."""
        return [len(ids) for ids in self.ids]

    def pack(self, texts: Sequence[int] | None = None) -> Packed:
        """Return these texts end to end, or all of them."""
        chosen = range(len(self.ids)) if texts is None else texts
        rows = [self.ids[i] for i in chosen]
        offsets = offsets_of(torch.tensor([len(row) for row in rows], dtype=torch.int64))
        ids = torch.from_numpy(np.concatenate(rows or [_NONE]).astype(np.int64))
        if not any(self.skipped) and not self.left_out:
            return Packed(ids, offsets, torch.ones_like(ids, dtype=torch.bool))
        owner = row_of(offsets)
        place = torch.arange(len(ids)) - offsets[owner]  # inside its text
        pooled = place >= torch.tensor([self.skipped[i] for i in chosen])[owner]
        if self.left_out:
            bounds = torch.tensor([self.left_out[i] for i in chosen], dtype=torch.int64)
            begin, end = bounds.reshape(-1, 2)[owner].unbind(1)
            pooled &= (place < begin) | (place >= end)
        return Packed(ids, offsets, pooled)

    def take(self, texts: Sequence[int]) -> "Tokens":
        """Return these texts, in this order."""

        def of(values: list[Any]) -> list[Any]:
            return [values[i] for i in texts] if values else []

        cuts = of(self.cuts)
        return Tokens(
            *(of(self.ids), of(self.skipped), sum(cuts), of(self.left_out)),
            *(of(self.spans), of(self.read), cuts),
        )

    @staticmethod
    def join(parts: Sequence["Tokens"]) -> "Tokens":
        """Return the texts of all ``parts``, in order."""
        return Tokens(
            [ids for part in parts for ids in part.ids],
            [count for part in parts for count in part.skipped],
            sum(part.truncated for part in parts),
            [bounds for part in parts for bounds in part.left_out or [(0, 0)] * len(part)]
            if any(part.left_out for part in parts)
            else [],
            [spans for part in parts for spans in part.spans],
            [count for part in parts for count in part.read],
            [cut for part in parts for cut in part.cuts],
        )


def load_tokenizer(place: str | Path, *, lower_case: bool = False) -> Any:
    """Load the transformers tokenizer of a folder or a hub id; it may put texts in lower case.

    Raises:
        ModelError: if it is missing or damaged.
    """
    from transformers import AutoTokenizer  # slow to import

    refuse_code(place, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0].strip(" :.")
        raise ModelError(
            f"{place}: the tokenizer cannot be loaded ({line}); is tokenizer.json there and whole?"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # a made-up one
        raise ModelError(
            f"{place}: has no tokenizer (tokenizer.json); copy it there from the model's origin"
        )
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if lower_case and fast is not None:
        first = [fast.normalizer] if fast.normalizer is not None else []
        fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])
    return tokenizer


class Tokenizer:
    """A transformers tokenizer as a function from texts to :class:`Tokens`.

    With ``append_end`` every text ends with the end-of-text token, for models that pool the last
    token; the wrapped tokenizer is changed too, so that other libraries do the same.
    """

    def __init__(self, tokenizer: Any, *, append_end: bool = False) -> None:
        self.stock = tokenizer
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast form (tokenizer.json); convert it with "
                "transformers' AutoTokenizer and save it beside the model"
            )
        if append_end:
            _append_end(fast, tokenizer)
        self.refresh()

    def refresh(self) -> None:
        """Apply changes of the wrapped tokenizer, such as an added token."""
        tokenizer = self.stock
        self._fast: FastTokenizer = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        bare = self._fast.encode("a", add_special_tokens=False).ids
        full = self._fast.encode("a").ids
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        self._head: list[int] = [] if at is None else full[:at]  # put before every text
        self._tail: list[int] = [] if at is None else full[at + len(bare) :]  # and after it
        self._cuts_start = getattr(tokenizer, "truncation_side", "right") == "left"
        known = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
        self._filler: int = next((i for i in known if i is not None), 0)

    def sample(self) -> list[object]:
        """Return the ids of built-in texts and 1,024 tokens, which differ between most tokenizers.

        It is as fast for a large vocabulary; a change to other tokens goes unnoticed.
        """
        size = self._fast.get_vocab_size()
        some = range(0, size, max(1, size // _SAMPLED))
        ids = [encoding.ids for encoding in self.encodings(_SAMPLE, special=True)]
        return [size, ids, [self._fast.id_to_token(each) for each in some]]

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What is put before and after every text."""
        return self._head, self._tail

    def bare(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize whole texts without special tokens, with the characters of each token."""
        return self.encodings(texts, special=False)

    @property
    def cuts(self) -> Literal["start", "end"]:
        """What the tokenizer itself leaves out of texts that are too long."""
        return "start" if self._cuts_start else "end"

    def encodings(self, texts: Sequence[str], *, special: bool) -> list[Encoding]:
        """Tokenize whole texts, with or without special tokens around them."""
        return self._fast.encode_batch(list(texts), add_special_tokens=special)

    def __call__(
        self,
        texts: Sequence[str],
        max_tokens: int,
        prompts: str | Sequence[str] = "",
        form: Form = PLAIN,
        *,
        spans: bool = False,
    ) -> Tokens:
        """Tokenize each text with its prompt, once, and cut what is longer than ``max_tokens``.

        The end of the text is cut; prompt, suffix and special tokens stay. With ``form.cuts``
        "start", or a tokenizer whose truncation side is left, the start of prompt and text is lost
        instead, unless ``spans`` are asked for. Character offsets decide
        what is pooled, so the borders are exact for any tokenizer: a token that lies partly in the
        text is pooled. A text without any token gets one filler token. If nothing is left to pool
        (an empty text, or no room beside the prompt, and no end-of-text token), all tokens are.

        With ``form.echo`` the text is tokenized alone and its ids occur twice, in
        ``Instruct:{prompt},``, ``Query:{text}``, ``Query again:{text}``, a line each (or
        ``Document``; the first line only with a prompt), and end-of-text. The second copy and the
        end are pooled (arXiv 2402.15449).

        With ``form.cls_every`` n the start token (CLS) stands before every n tokens of the text,
        its prompt and its suffix (MCLS, arXiv 2402.03216, sec. 3.4): at the places 0, n + 1, 2n + 2
        and so on. They count towards the limit.

        Raises:
            ModelError: if an end-of-text or start token is needed and the tokenizer has none.
        """
        before = [prompts] * len(texts) if isinstance(prompts, str) else list(prompts)
        tail = self._ending() if form.end or form.echo else self._tail
        room = max(0, max_tokens - len(self._head) - len(tail))
        if form.cls_every is not None:
            room -= -(-(room + 1) // (form.cls_every + 1)) - 1  # of room + 1 places with the first
        lay = self._lay_twice if form.echo else self._lay
        found = Tokens([], [], 0)
        for number, laid in enumerate(lay(texts, before, room, form, spans=spans)):
            body = [*laid.before, *laid.text, *laid.after]
            row = [*self._head, *body, *tail] or [self._filler]
            skipped, left_out = self._not_pooled(laid, form, len(tail))
            found.ids.append(np.array(row, dtype=np.int32))
            found.skipped.append(skipped)
            if form.suffix or not form.pool_special:
                found.left_out.append(left_out)
            found.cuts.append(laid.cut)
            if spans:
                start = len(self._head) + len(laid.before)
                inside = np.full((len(row), 2), -1)
                inside[start : start + len(laid.text)] = np.reshape(laid.spans, (-1, 2))
                found.spans.append(inside)
                ends = [end for _, end in laid.spans]
                found.read.append(max(ends, default=0) if laid.cut else len(texts[number]))
        found = replace(found, truncated=sum(found.cuts))
        return found if form.cls_every is None else self._with_cls(found, form.cls_every, len(tail))

    def _with_cls(self, tokens: Tokens, every: int, tail: int) -> Tokens:
        """Insert a CLS token before every ``every`` tokens between head and tail."""
        if len(self._head) != 1:
            raise ModelError(
                f"cls_every repeats the one token before a text, and this tokenizer puts "
                f"{len(self._head)} there; leave cls_every out"
            )
        rows, skipped, left_out, spans = [], [], [], []
        for number, ids in enumerate(tokens.ids):
            places = np.arange(1 + every, len(ids) - tail, every)  # of the tokens after each
            rows.append(np.insert(ids, places, self._head[0]))
            count = tokens.skipped[number]
            skipped.append(count + int((places < count).sum()))
            if tokens.left_out:
                start, end = tokens.left_out[number]
                before = int((places <= start).sum()), int((places < end).sum())
                left_out.append((start + before[0], max(start + before[0], end + before[1])))
            if tokens.spans:
                spans.append(np.insert(tokens.spans[number], places, -1, axis=0))
        return replace(tokens, ids=rows, skipped=skipped, left_out=left_out, spans=spans)

    def _lay(
        self, texts: Sequence[str], before: Sequence[str], room: int, form: Form, *, spans: bool
    ) -> "Iterator[_Laid]":
        """Yield each text between its prompt and the suffix, in at most ``room`` tokens."""
        located = spans or bool(form.suffix) or (not form.pool_prompt and any(before))
        encode = self._fast.encode_batch if located else self._fast.encode_batch_fast
        head, tail = len(self._head), len(self._tail)
        cuts_start = self._cuts_start if form.cuts is None else form.cuts == "start"
        rooms = [sys.maxsize if cuts_start else room] * len(texts)  # all of a text decides
        parts = self._in_parts(encode, texts, before, rooms, form.suffix)
        for (encoding, text), prompt in zip(parts, before, strict=True):
            ids = encoding.ids
            ids = ids[head : len(ids) - tail]
            cut = len(ids) > room
            start = len(ids) - room if cut and cuts_start and not spans else 0
            ids = ids[start:]
            if not located:
                yield _Laid([], ids[:room], [], cut=cut, prompted=False)
                continue
            offsets = encoding.offsets[head + start : head + start + len(ids)]
            first, stop = _borders(offsets, len(prompt), len(prompt) + len(text))
            after = ids[stop:][:room]
            kept = max(first, min(stop, room - len(after)))
            yield _Laid(
                ids[: min(first, room - len(after))],
                ids[first:kept],
                after,
                cut=cut,
                prompted=bool(prompt),
                spans=[(a - len(prompt), b - len(prompt)) for a, b in offsets[first:kept] if spans],
            )

    def _lay_twice(
        self, texts: Sequence[str], before: Sequence[str], room: int, form: Form, *, spans: bool
    ) -> "Iterator[_Laid]":
        """Yield each text in the echo template, whose pieces are tokenized separately."""
        name = str(form.echo).capitalize()
        starts = {p: self._piece(f"Instruct:{p},\n{name}:" if p else f"{name}:") for p in {*before}}
        between = self._piece(f"\n{name} again:")[:room]
        after = self._piece(form.suffix)[: room - len(between)]
        encode = self._fast.encode_batch if spans else self._fast.encode_batch_fast
        encode = partial(encode, add_special_tokens=False)
        spare = room - len(between) - len(after)
        rooms = [max(0, spare - len(starts[prompt][:spare])) // 2 for prompt in before]
        parts = self._in_parts(encode, texts, [""] * len(texts), rooms)
        for (encoding, _), prompt in zip(parts, before, strict=True):
            start = starts[prompt][:spare]
            kept = (spare - len(start)) // 2
            ids = encoding.ids[:kept]
            yield _Laid(
                [*start, *ids, *between],
                ids,
                after,
                cut=len(encoding.ids) > kept or len(starts[prompt]) > spare,
                prompted=bool(start),
                spans=encoding.offsets[:kept] if spans else [],
            )

    def _in_parts(
        self,
        encode: Callable[[list[str]], list[Encoding]],
        texts: Sequence[str],
        before: Sequence[str],
        rooms: Sequence[int],
        suffix: str = "",
    ) -> Iterator[tuple[Encoding, str]]:
        """Yield the encoding of each text, between its prompt and the suffix, and what was read.

        Few at a time: an encoding takes some hundred bytes per token. Of long texts only what
        decides their first ``room`` tokens is read.
        """
        for rows in batches_within(
            range(len(texts)), _LETTERS_AT_ONCE, lambda row: len(texts[row]), most=_AT_ONCE
        ):
            some = self._decisive(
                [texts[row] for row in rows],
                [before[row] for row in rows],
                [rooms[row] for row in rows],
                suffix,
            )
            whole = [before[row] + text + suffix for row, text in zip(rows, some, strict=True)]
            yield from zip(encode(whole), some, strict=True)

    def _decisive(
        self, texts: list[str], before: Sequence[str], rooms: Sequence[int], suffix: str
    ) -> list[str]:
        """Cut texts that are much longer than ``room`` tokens, so that those tokens stay the same.

        What follows a token decides it within its word only, and in BPE, which merges the first of
        equal pairs first, only if it is near. So a beginning is enough if more than ``room`` tokens
        end a margin before its end, in words that end as well; otherwise a longer one is tried.
        With a suffix the end of the text stays too, since the suffix may share a token with it.
        """
        found, factor = list(texts), _LETTERS_A_TOKEN
        is_bpe = type(self._fast.model).__name__ == "BPE"

        def size(row: int) -> int:
            return factor * (rooms[row] + _MORE)

        waiting = range(len(texts))
        while waiting := [row for row in waiting if len(texts[row]) > 2 * size(row)]:
            begins = [_before_space(texts[row], size(row)) for row in waiting]
            encodings = self._fast.encode_batch(
                [before[row] + begin for row, begin in zip(waiting, begins, strict=True)],
                add_special_tokens=False,
            )
            for row, begin, encoding in zip(waiting, begins, encodings, strict=True):
                limit, words = len(before[row]) + len(begin) - _MARGIN, encoding.word_ids
                unfinished = -1 if is_bpe else next((w for w in words[::-1] if w is not None), -1)
                trusted = sum(
                    end <= limit and word != unfinished
                    for (_, end), word in zip(encoding.offsets, words, strict=True)
                )
                if trusted > rooms[row]:
                    found[row] = begin + (texts[row][-4 * _MARGIN :] if suffix else "")
            waiting = [row for row in waiting if len(found[row]) == len(texts[row])]
            factor *= 4
        return found

    def _piece(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def _not_pooled(self, laid: "_Laid", form: Form, tail: int) -> tuple[int, tuple[int, int]]:
        """Return how many leading tokens are not pooled, and the bounds of those after the text."""
        head, before, after = len(self._head), len(laid.before), len(laid.after)
        prompted = form.pool_prompt and not form.echo
        ended = tail if form.end or (form.pool_end and form.pool_special) else 0
        pooled = len(laid.text) + prompted * before + form.pool_suffix * after + ended
        if pooled == 0:
            return 0, (0, 0)
        skipped = 0 if form.pool_special else head
        if laid.prompted and not prompted:
            skipped = head + before
        start = head + before + len(laid.text)
        end = start + after
        if form.pool_suffix:
            start = end
        asked_for = form.end or form.echo is not None
        return skipped, (start, end if form.pool_special or asked_for else end + tail)

    def _ending(self) -> list[int]:
        """Return the tokens after every text that has to end with the end-of-text token."""
        end = self.stock.convert_tokens_to_ids(_end_of(self.stock))
        return self._tail if self._tail[-1:] == [end] else [*self._tail, end]


@dataclass(frozen=True, slots=True)
class _Laid:
    """The token ids of one text and its surroundings, cut to size."""

    before: list[int]
    text: list[int]
    after: list[int]
    cut: bool
    prompted: bool  # even if every token of the prompt reaches into the text
    spans: list[tuple[int, int]] = field(default_factory=list)  # of the text's tokens, if requested


def _before_space(text: str, size: int) -> str:
    """Return the first ``size`` characters, up to the last white space of the last few if any."""
    last = next((at for at in range(size, size - _MARGIN, -1) if text[at].isspace()), size)
    return text[:last]


def _borders(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return bounds of the tokens that reach into the characters from ``start`` to ``end``."""
    stop = len(offsets)
    # Byte-level tokenizers trim spaces from offsets: an empty one is part of what is before it.
    while stop and offsets[stop - 1][0] >= end and offsets[stop - 1][1] > end:
        stop -= 1
    first = next((i for i in range(stop) if offsets[i][1] > start), stop) if start else 0
    return first, stop


def _end_of(tokenizer: Any) -> str:
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None:
        raise ModelError(
            "pooling the last token, or echo, needs an end-of-text token, and this tokenizer has "
            'none; choose the pooling "mean" without echo, or set eos_token'
        )
    return end


def _append_end(fast: FastTokenizer, tokenizer: Any) -> None:
    end = _end_of(tokenizer)
    number = tokenizer.convert_tokens_to_ids(end)
    ids = fast.encode("a").ids
    if ids and ids[-1] == number:
        return
    content = json.loads(fast.to_str())
    content["post_processor"] = _with_end(content["post_processor"], end, number)
    fast.post_processor = FastTokenizer.from_str(json.dumps(content)).post_processor


def _with_end(processor: dict[str, Any] | None, end: str, number: int) -> dict[str, Any]:
    """Return a post-processor that adds a token; of two templates only the first takes effect."""
    known = {end: {"id": end, "ids": [number], "tokens": [end]}}
    last = {"SpecialToken": {"id": end, "type_id": 0}}
    parts = [] if processor is None else processor.get("processors", [processor])
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    if template is None:
        one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        template = {"type": "TemplateProcessing", "single": [one], "pair": [one, two]}
        parts = [*parts, template]
    template["single"] = [*template["single"], last]
    template["pair"] = [*template["pair"], {"SpecialToken": {"id": end, "type_id": 1}}]
    template["special_tokens"] = {**template.get("special_tokens", {}), **known}
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "processors": parts}
