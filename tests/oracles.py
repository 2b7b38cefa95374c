"""Encoding by the rules of the published packages, to the last quirk, to compare with."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from tercet.models.embedder import Embedder
from tercet.models.formats.llm2vec import SEPARATOR, Llm2Vec
from tercet.models.formats.nv_embed import MAX_TOKENS
from tercet.models.network.backbone import Backbone
from tercet.models.network.pooling import POOLINGS, mean
from tercet.models.tokens import Form, Tokens, load_tokenizer
from tercet.segments import Packed, offsets_of
from tercet.vectors import Terms

_BATCH_TOKENS: Final = 2_048
_UNCUT: Final = 1 << 30


class Llm2VecEncoder:
    """A backbone with adapters merged, and texts read by the rules of llm2vec 0.2.3.

    The package counts the tokens of the text alone and pools as many from the end of the input.
    Where a text alone is cut into other tokens than after its instruction, that is off by some;
    where the input was cut to its limit, it pools the end of the instruction. Vectors are not
    scaled.

    One thing is not repeated: the package pools the padding of a text without tokens, so that its
    vector depends on the batch; here it is what the package gives for that text alone.
    """

    def __init__(self, backbone: Backbone, published: Llm2Vec) -> None:
        self.backbone = backbone
        self.published = published
        self._tokenizer = load_tokenizer(published.tokenizer)

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> Packed:
        """The tokens of instructions and texts, and which of them the package pools."""
        rules = self.published
        texts = self._shortened([text for _, text in pairs])
        parts = [
            rules.joined(instruction, text).split(SEPARATOR)
            for (instruction, _), text in zip(pairs, texts, strict=True)
        ]
        ids = self._ids(["".join(part) for part in parts], special=True)
        counts = [len(row) for row in self._ids([part[1] for part in parts], special=False)]
        pooled = [
            torch.arange(len(row)) >= (0 if rules.pool_instruction else len(row) - count)
            for row, count in zip(ids, counts, strict=True)
        ]
        lengths = torch.tensor([len(row) for row in ids])
        joined = torch.tensor([number for row in ids for number in row])
        return Packed(joined, offsets_of(lengths), torch.cat(pooled))

    def encode(self, pairs: Sequence[tuple[str, str]]) -> Float[np.ndarray, "texts hidden"]:
        """Vectors of instructions and texts, float32, in the order given."""
        vectors = np.empty((len(pairs), self.backbone.hidden), dtype=np.float32)
        if not pairs:
            return vectors
        texts = self.tokenize(pairs)
        pool = POOLINGS[self.published.pooling]
        self.backbone.eval()
        order = np.argsort(texts.lengths, kind="stable")[::-1]
        size = max(1, _BATCH_TOKENS // max(texts.lengths))
        with torch.inference_mode():
            for start in range(0, len(order), size):
                rows = order[start : start + size].tolist()
                batch = texts.take(rows).to(self.backbone.device)
                vectors[rows] = pool(self.backbone(batch), batch).float().cpu().numpy()
        return vectors

    def _shortened(self, texts: Sequence[str]) -> list[str]:
        """Texts of too many tokens lose the same share of their words, until they fit."""
        limit, shortened = self.published.text_tokens, list(texts)
        waiting = list(range(len(shortened)))
        while waiting:
            counts = [len(row) for row in self._ids([shortened[i] for i in waiting], special=False)]
            long = [(i, n) for i, n in zip(waiting, counts, strict=True) if n > limit]
            for i, count in long:
                words = shortened[i].split()
                shortened[i] = " ".join(words[: int(len(words) * (limit / count))])
            waiting = [i for i, _ in long]
        return shortened

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        return self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self.published.max_tokens,
            add_special_tokens=special,
        )["input_ids"]


class NvEmbedEncoder:
    """An NV-Embed model, and texts read by the reference's rules; each may be switched off.

    - ``count_mask``: it counts the tokens of the instruction alone, without the one before every
      text, and leaves as many out of the mean, from the first on. Exact only where the tokenizer
      puts one token before a text and cuts off the space that ends the instruction.
    - ``eos_before_truncation``: a text that is cut loses its end token.
    - ``autocast_fp16``: on a GPU it computes in float16, whatever the weights are.

    One thing is not repeated: where an instruction fills the window nothing is left to pool, and
    the reference gives no numbers; here it is the mean of all tokens.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        count_mask: bool = True,
        eos_before_truncation: bool = True,
        autocast_fp16: bool = True,
    ) -> None:
        self.embedder = embedder
        self.count_mask = count_mask
        self.eos_before_truncation = eos_before_truncation
        self.autocast_fp16 = autocast_fp16

    def tokenize(
        self, texts: Sequence[str], instruction: str = "", max_tokens: int = MAX_TOKENS
    ) -> Packed:
        """The tokens of instruction, text and end, and which of them are pooled.

        The instruction is put before each text as it stands, so it is a whole prompt.
        """
        tokenizer = self.embedder.tokenizer
        form = Form(pool_prompt=self.embedder.settings.pool_prompt, end=True)
        limit = _UNCUT if self.eos_before_truncation else max_tokens
        tokens = tokenizer(texts, limit, instruction, form)
        skipped = tokens.skipped
        if self.count_mask and not form.pool_prompt:
            alone = tokenizer.stock(instruction, add_special_tokens=False)["input_ids"]
            skipped = [len(alone)] * len(texts)
        ids = [row[:max_tokens] for row in tokens.ids]
        return Tokens(ids, skipped, tokens.truncated).pack()

    def encode(
        self, texts: Sequence[str], instruction: str = "", max_tokens: int = MAX_TOKENS
    ) -> Float[np.ndarray, "texts hidden"]:
        """Vectors of texts after one instruction, float32, in the order given."""
        embedder = self.embedder
        vectors = np.empty((len(texts), embedder.dim), dtype=np.float32)
        if not texts:
            return vectors
        packed = self.tokenize(texts, instruction, max_tokens)
        order = np.argsort(packed.lengths, kind="stable")[::-1]
        size = max(1, _BATCH_TOKENS // max(packed.lengths))
        embedder.eval()
        with torch.inference_mode(), self._precision():
            for start in range(0, len(order), size):
                rows = order[start : start + size].tolist()
                batch = packed.take(rows).to(embedder.device)
                pooled = mean(embedder.states(batch), batch).float()
                pooled = F.normalize(pooled, dim=1) if embedder.settings.normalize else pooled
                vectors[rows] = pooled.cpu().numpy()
        return vectors

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast_fp16 and self.embedder.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.float16)
        return nullcontext()


def terms_of(weights: Sequence[Mapping[str, float]]) -> Terms:
    """Return FlagEmbedding's lexical weights as terms, tokens in the order of each mapping."""
    lengths = torch.tensor([len(each) for each in weights], dtype=torch.int64)
    ids = [int(token) for each in weights for token in each]
    values = [float(weight) for each in weights for weight in each.values()]
    return Terms(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float32),
        offsets_of(lengths),
    )
