"""Encoding as llm2vec 0.2.3 does it, to the last quirk; tercet's own way is ``Embedder.encode``.

The package counts the tokens of the text alone and pools as many from the end of the whole input.
Where a text alone is cut into other tokens than after its instruction, that is off by some; where
the input was cut to its limit, it pools the end of the instruction. Vectors are not scaled.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from tercet.models.formats.llm2vec_files import SEPARATOR, Llm2Vec
from tercet.models.network.backbone import Backbone
from tercet.models.network.pooling import POOLINGS
from tercet.models.tokens import load_tokenizer
from tercet.segments import offsets_of
from tercet.types import Packed

_BATCH_TOKENS = 2_048


class Llm2VecEncoder:
    """A backbone with adapters merged, and texts read by the package's rules.

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
