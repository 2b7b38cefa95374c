"""From texts to one row of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import PostProcessor, TemplateProcessing
from tokenizers.processors import Sequence as ProcessorSequence
from torch import Tensor

from tercet.errors import ModelError
from tercet.segments import offsets_of, row_of
from tercet.types import Packed

_NONE: Final = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of some texts, each ready to be packed in any order.

    ``skipped`` counts the leading tokens of each text that are read but not pooled (its prompt);
    ``truncated`` counts the texts that were cut to the limit.
    """

    ids: list[np.ndarray]  # int32, one array a text, none of them empty
    skipped: list[int]
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.ids]

    def pack(self, texts: Sequence[int] | None = None) -> Packed:
        """These texts end to end, or all of them."""
        chosen = range(len(self.ids)) if texts is None else texts
        rows = [self.ids[i] for i in chosen]
        offsets = offsets_of(torch.tensor([len(row) for row in rows], dtype=torch.int64))
        ids = torch.from_numpy(np.concatenate(rows or [_NONE]).astype(np.int64))
        skipped = torch.tensor([self.skipped[i] for i in chosen])
        return Packed(ids, offsets, _places(offsets) >= skipped[row_of(offsets)])

    @staticmethod
    def join(parts: Sequence["Tokens"]) -> "Tokens":
        """The texts of all ``parts``, in order."""
        return Tokens(
            [ids for part in parts for ids in part.ids],
            [count for part in parts for count in part.skipped],
            sum(part.truncated for part in parts),
        )


def _places(offsets: Int[Tensor, "bounds"]) -> Int[Tensor, "tokens"]:
    """Each token's place inside its text."""
    return torch.arange(int(offsets[-1])) - offsets[row_of(offsets)]


class Tokenizer:
    """A transformers tokenizer, seen as a function from texts to :class:`Tokens`.

    With ``append_end`` every text ends with the end-of-text token, for models that pool the last
    token; the wrapped tokenizer is changed too, so that a saved model does the same elsewhere.
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
        self._fast: FastTokenizer = FastTokenizer.from_str(fast.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        bare = self._fast.encode("a", add_special_tokens=False).ids
        full = self._fast.encode("a").ids
        self._tail = next(
            (
                full[at + len(bare) :]
                for at in range(len(full))
                if full[at : at + len(bare)] == bare
            ),
            [],
        )
        self._filler = _first_known(
            tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, 0
        )

    def __call__(
        self,
        texts: Sequence[str],
        max_tokens: int,
        prompts: str | Sequence[str] = "",
        *,
        pool_prompt: bool = True,
    ) -> Tokens:
        """Tokenize each text after its prompt, once, and cut what is longer than ``max_tokens``.

        The end of the text is cut; special tokens stay. A prompt is left out of the pooled tokens
        by character offsets, so the border is exact for any tokenizer: a token that begins in the
        prompt and ends in the text is pooled. A text without any token gets one filler token.
        """
        before = [prompts] * len(texts) if isinstance(prompts, str) else list(prompts)
        joined = [prompt + text for prompt, text in zip(before, texts, strict=True)]
        if pool_prompt or not any(before):
            encoded = self._fast.encode_batch_fast(joined)
            skipped = [0] * len(texts)
        else:
            encoded = self._fast.encode_batch(joined)
            skipped = [
                _skip(encoding.offsets, len(prompt))
                for encoding, prompt in zip(encoded, before, strict=True)
            ]
        ids, truncated = [], 0
        for number, encoding in enumerate(encoded):
            row = encoding.ids or [self._filler]
            if len(row) > max_tokens:
                truncated += 1
                row = row[: max_tokens - len(self._tail)] + self._tail
                # A prompt that fills the window leaves nothing of the text: pool all of it.
                if skipped[number] >= max_tokens - len(self._tail):
                    skipped[number] = 0
            ids.append(np.array(row, dtype=np.int32))
        return Tokens(ids, skipped, truncated)


def _skip(offsets: Sequence[tuple[int, int]], text_start: int) -> int:
    """Tokens before the first one that reaches into the text; 0 when none does, or no prompt."""
    if text_start == 0:
        return 0
    return next((i for i, (_, end) in enumerate(offsets) if end > text_start), 0)


def _first_known(*ids: int | None) -> int:
    return next(i for i in ids if i is not None)


def _append_end(fast: FastTokenizer, tokenizer: Any) -> None:
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None:
        raise ModelError(
            "pooling the last token needs an end-of-text token, and this tokenizer has none; "
            'choose the pooling "mean", or set eos_token'
        )
    number = tokenizer.convert_tokens_to_ids(end)
    ids = fast.encode("a").ids
    if ids and ids[-1] == number:
        return
    ending = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
    before: PostProcessor | None = fast.post_processor
    fast.post_processor = ending if before is None else ProcessorSequence([before, ending])  # pyright: ignore
