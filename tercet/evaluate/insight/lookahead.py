"""How a decoder uses the words that follow: two analyses of LLM2Vec (arXiv 2404.05961, section 5).

Prefix sensitivity (5.1): ``prefix + query``, ``prefix + positive`` and ``prefix + negative``, where
query and positive mean the same and the negative does not. Only the prefix is pooled. For a causal
model all cosines are 1; in one that uses what follows, the positive is nearer.

Direction map (5.2): the cosine of each token's causal and bidirectional state, by layer, with the
same weights. If it is high, the model needs little training for bidirectional attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64

from tercet.data.files.examples import as_object, nonblank, text_of
from tercet.errors import ModelError, RecipeError
from tercet.evaluate.report.intervals import Interval, interval
from tercet.files.records import FileRecord, iter_records, parsed
from tercet.models.choices import Attention
from tercet.models.embedder import Embedder
from tercet.models.network.pooling import mean
from tercet.models.tokens import Form
from tercet.segments import Packed, offsets_of

NOISE: Final = 1e-5  # of a cosine of float32 states; a smaller gap counts as 0
_FIELDS: Final = ("prefix", "query", "positive", "negative")
_TRIPLES_AT_ONCE: Final = 64
_TEXT_TOKENS: Final = 256  # of a mapped text; more columns cannot be seen


@dataclass(frozen=True, slots=True)
class PrefixTriple:
    """A prefix and three continuations; query and positive mean the same, the negative does not."""

    prefix: str
    query: str
    positive: str
    negative: str

    def texts(self) -> list[str]:
        """Return the prefix with each continuation, without a separator."""
        return [self.prefix + rest for rest in (self.query, self.positive, self.negative)]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixResult:
    """Cosines of the prefix's vector before the query with those before the other two."""

    positive: Float64[np.ndarray, "triples"]
    negative: Float64[np.ndarray, "triples"]
    skipped: int  # triples too long for the model, or whose prefix shares no token

    @property
    def gap(self) -> Float64[np.ndarray, "triples"]:
        """By how much the positive is nearer; exactly 0 if the difference is only noise."""
        gap = self.positive - self.negative
        return np.where(np.abs(gap) > NOISE, gap, 0.0)

    @property
    def accuracy(self) -> float:
        """The share of triples whose positive is nearer than the negative."""
        return float((self.gap > 0).mean())

    def intervals(self, seed: int = 0) -> dict[str, Interval]:
        """Return the figures of a table, by column."""
        numbers = {
            "cosine, same": self.positive,
            "cosine, other": self.negative,
            "gap": self.gap,
            "gap > 0": (self.gap > 0).astype(np.float64),
        }
        return {name: interval(values, seed=seed) for name, values in numbers.items()}


@dataclass(frozen=True, slots=True, eq=False)
class DirectionMap:
    """Cosines of the causal and the bidirectional state of each token of a text.

    Layer 0 is the embeddings and always 1; so is the last token in layer 1, which attends to the
    same tokens in both directions (within the model's sliding window). The last layer is taken
    after the final norm.
    """

    tokens: tuple[str, ...]  # as written in the text
    cosines: Float64[np.ndarray, "layers tokens"]


def read_triples(path: Path | None = None) -> list[PrefixTriple]:
    """Read triples from a .jsonl or .parquet file; None: the 40 English ones of the package.

    Raises:
        DataError: at the first record that is not a triple, naming the line.
    """
    if path is None:
        with as_file(files("tercet.evaluate.insight") / "prefix_triples.jsonl") as own:
            return read_triples(own)
    needs = [(field,) for field in _FIELDS]
    return [parsed(path, record, _triple) for record in iter_records(path, _FIELDS, needs=needs)]


def _triple(record: FileRecord) -> PrefixTriple:
    fields = as_object(record.value)
    lost = [field for field in _FIELDS if fields.get(field) is None]
    if lost:
        raise ValueError(f'"{lost[0]}" is missing; a triple has {", ".join(_FIELDS)}')
    return PrefixTriple(*(nonblank(text_of(fields[field], field), field) for field in _FIELDS))


def prefix_sensitivity(
    embedder: Embedder,
    triples: Sequence[PrefixTriple],
    *,
    attention: Attention | None = None,
    echo: bool = False,
) -> PrefixResult:
    """Measure how the vector of a prefix changes with what follows it (arXiv 2404.05961, 5.1).

    The mean is over tokens that lie inside the prefix and are the same in all three texts, which
    one across the border may not be. Texts are read without prompts. ``attention`` defaults to the
    model's own. With ``echo`` each text is repeated and the prefix of the second copy is pooled.

    Raises:
        RecipeError: if no triple can be used.
        ModelError: for an encoder with causal attention.
    """
    limit = embedder.settings.document_tokens
    form = Form(end=embedder.settings.ends, echo="document" if echo else None)
    rows = [_prefix_rows(embedder, triple, limit, form) for triple in triples]
    rows = [each for each in rows if each is not None]
    if not rows:
        raise RecipeError(
            f"none of {len(triples)} triples can be used: a prefix needs a token that stays the "
            f"same whatever follows, and each text at most {limit} tokens"
        )
    cosines = []
    with embedder.reading(attention) as reader:
        for start in range(0, len(rows), _TRIPLES_AT_ONCE):
            texts = _joined(rows[start : start + _TRIPLES_AT_ONCE]).to(embedder.device)
            vectors = mean(reader.backbone(texts), texts).cpu().double()
            vectors = vectors.unflatten(0, (-1, 3))  # [triples, 3, hidden]
            cosines.append(F.cosine_similarity(vectors[:, :1], vectors[:, 1:], dim=-1))
    positive, negative = torch.cat(cosines).T.numpy()
    return PrefixResult(positive, negative, len(triples) - len(rows))


def _prefix_rows(embedder: Embedder, triple: PrefixTriple, limit: int, form: Form) -> Packed | None:
    """Return the three texts, with the shared tokens of the prefix pooled; None without any."""
    texts = triple.texts()
    tokens = embedder.tokenizer(texts, limit, "", form, spans=True)
    starts = [int((spans[:, 0] >= 0).argmax()) for spans in tokens.spans]  # of the (second) copy
    bodies = [ids[start:].tolist() for ids, start in zip(tokens.ids, starts, strict=True)]
    ends = tokens.spans[0][starts[0] :, 1].tolist()
    shared = 0
    for end, *ids in zip(ends, *bodies, strict=False):
        if len(set(ids)) > 1 or not 0 <= end <= len(triple.prefix):
            break
        shared += 1
    if tokens.truncated or not shared:
        return None
    packed = tokens.pack()
    places = packed.offsets[:-1] + torch.tensor(starts)
    pooled = torch.zeros_like(packed.pooled)
    pooled[(places[:, None] + torch.arange(shared)).flatten()] = True
    return Packed(packed.ids, packed.offsets, pooled)


def _joined(parts: Sequence[Packed]) -> Packed:
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return Packed(
        torch.cat([part.ids for part in parts]),
        offsets_of(lengths),
        torch.cat([part.pooled for part in parts]),
    )


def direction_map(embedder: Embedder, text: str) -> DirectionMap:
    """Compare the causal and bidirectional states of a text's tokens (arXiv 2404.05961, 5.2).

    Only the first 256 tokens of a long text are read, without the model's prompt.

    Raises:
        ModelError: for an encoder.
    """
    backbone = embedder.backbone
    if not backbone.is_decoder:
        raise ModelError(
            f"a direction map needs a decoder; {type(backbone.model).__name__} is an encoder, "
            "which has no causal states"
        )
    limit = min(_TEXT_TOKENS, embedder.settings.document_tokens)
    tokens = embedder.tokenizer([text], limit, spans=True)
    packed = tokens.pack().to(embedder.device)
    states = []
    for attention in ("causal", "bidirectional"):
        with embedder.reading(attention) as reader:
            states.append(reader.backbone.layer_states(packed).cpu().double())
    names = embedder.tokenizer.stock.convert_ids_to_tokens(tokens.ids[0].tolist())
    spans = zip(tokens.spans[0].tolist(), names, strict=True)
    shown = tuple(text[max(start, 0) : max(end, 0)].strip() or name for (start, end), name in spans)
    return DirectionMap(shown, F.cosine_similarity(states[0], states[1], dim=-1).numpy())
