"""FlagEmbedding's files besides a model's folder: lexical weights and training rows.

- Lexical weights: for each text a mapping of token id, as a string, to weight.
- Training rows: one JSON object a line with ``query``, ``pos``, ``neg``, and maybe ``pos_scores``,
  ``neg_scores``, ``prompt``, ``type``. A file or folder name that ends in ``no_in_batch_neg``
  excludes in-batch negatives, and the files of one set may be split by length,
  ``name_len-0-500.jsonl``.

The files of the two heads are read with the model (``tercet.models.network.heads``).
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet.errors import RecipeError
from tercet.vectors import Terms

OWN_GROUP: Final = "no_in_batch_neg"  # at the end of a name: only the row's own negatives
FIELDS: Final = (
    *("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type"),
    *("batch_size", "train_group_size"),
)
SYMMETRIC: Final = ("symmetric_sts", "symmetric_clustering")  # documents are like queries
_UNCHANGED: Final = ("query", "pos", "neg", "pos_scores", "neg_scores")
ONE_NEGATIVE: Final = "only_1neg"
_HALF_BATCH: Final = (
    'rows with half a batch, by a "type" with symmetric: batches have one size (--batch-size)'
)
_LENGTHS: Final = re.compile(r"_len-\d+-(\d+|inf)$")


# ---- lexical weights -------------------------------------------------------------------------


def lexical_weights(terms: Terms) -> list[dict[str, float]]:
    """Return for each text the weight of each of its tokens, by the token's id as a string."""
    merged = terms.merged()
    ids, weights = merged.ids.tolist(), merged.weights.tolist()
    bounds = merged.offsets.tolist()
    return [
        {str(token): weight for token, weight in zip(ids[a:b], weights[a:b], strict=True)}
        for a, b in pairwise(bounds)
    ]


# ---- training rows ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlagFile:
    """A file of training rows, and what its name says about them."""

    path: Path
    task: str  # the same for files of one set that are split by length
    own_group: bool  # other rows' documents are not negatives


def flag_files(place: Path) -> list[FlagFile]:
    """Return the files at a path: the file itself, or those of a folder by name."""
    if not place.is_dir():
        return [_named(place, "")]
    return [_named(path, place.name) for path in sorted(place.glob("*.jsonl"))]


def _named(path: Path, folder: str) -> FlagFile:
    stem = _LENGTHS.sub("", path.stem)
    return FlagFile(path, stem, folder.endswith(OWN_GROUP) or stem.endswith(OWN_GROUP))


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagRows:
    """How rows are read: what FlagEmbedding takes from flags and not from the rows.

    Raises:
        RecipeError: if the form of queries has something after the text.
    """

    prompt: str = ""  # query_instruction_for_retrieval, for rows without one
    form: str = "{}{}"  # query_instruction_format: of the prompt and the text
    seed: int = 0  # to draw the negative of a row whose type is only_1neg
    notes: Counter[str] = field(default_factory=Counter)  # what was ignored, in words

    def __post_init__(self) -> None:
        if self.form.count("{}") != 2 or not self.form.endswith("{}"):
            raise RecipeError(
                "the form of queries must hold {} twice, for the prompt and the text, with nothing "
                f'after the text; got "{self.form}"'
            )

    def record(self, row: object, number: int, *, own_group: bool) -> object:
        """Return the row with tercet's fields; anything but an object is returned unchanged.

        A row without a prompt gets none, so that the model's is used. Negatives are never repeated
        to fill a group, which FlagEmbedding does unless the type is ``symmetric_class``.
        """
        if not isinstance(row, dict):
            return row
        kind = row.get("type")
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f'"type" must be a text; got {kind!r}')
        found = {name: row[name] for name in _UNCHANGED if name in row}
        prompt = row.get("prompt") or self.prompt
        if isinstance(prompt, str):
            before, between, _ = self.form.split("{}")
            prompt = f"{before}{prompt}{between}" if prompt else None
        found |= {"prompt": prompt, "document_prompt": prompt if kind in SYMMETRIC else None}
        if own_group:
            found["in_batch"] = "none"
        self.notes[_HALF_BATCH] += kind is not None and "symmetric" in kind
        if kind == ONE_NEGATIVE:
            self._keep_one(found, number)
        for name in ("batch_size", "train_group_size"):
            self.notes[f'values of "{name}", a flag of the training here'] += name in row
        return found

    def _keep_one(self, found: dict[str, Any], number: int) -> None:
        negatives = found.get("neg")
        if not isinstance(negatives, list) or len(negatives) < 2:
            return
        kept = int(np.random.default_rng([self.seed, number]).integers(len(negatives)))
        self.notes["negatives of rows with the type only_1neg"] += len(negatives) - 1
        for name in ("neg", "neg_scores"):
            values = found.get(name)
            if isinstance(values, list) and len(values) == len(negatives):
                found[name] = [values[kept]]
