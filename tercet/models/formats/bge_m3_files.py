"""What FlagEmbedding's programs write and read beside a model's folder: term weights, rows.

- Lexical weights: a mapping of token id, as a text, to weight for each text. They keep numpy's
  numbers in it, which JSON refuses; here they are plain.
- Training rows: one JSON object a line with ``query``, ``pos``, ``neg``, and maybe ``pos_scores``,
  ``neg_scores``, ``prompt``, ``type``. Names of files and folders say what rows do not: a name
  that ends in ``no_in_batch_neg`` keeps other rows' documents out, and the files of one set may be
  split by length, ``name_len-0-500.jsonl``.

The files of the two heads are read where the model is (``tercet.models.network.heads``).
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

OWN_GROUP: Final = "no_in_batch_neg"  # a name that ends so: no negatives but a row's own
FIELDS: Final = (
    *("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type"),
    *("batch_size", "train_group_size"),
)
SYMMETRIC: Final = ("symmetric_sts", "symmetric_clustering")  # documents are of the queries' kind
_AS_THEY_ARE: Final = ("query", "pos", "neg", "pos_scores", "neg_scores")
ONE_NEGATIVE: Final = "only_1neg"
_HALF_BATCH: Final = (
    'wishes for half a batch, from a "type" with symmetric: batches have one size (--batch-size)'
)
_LENGTHS: Final = re.compile(r"_len-\d+-(\d+|inf)$")


# ---- lexical weights -------------------------------------------------------------------------


def lexical_weights(terms: Terms) -> list[dict[str, float]]:
    """For each text the weight of each of its tokens, by the token's id as a text."""
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
    """One file of rows, and what its name says of them."""

    path: Path
    task: str  # files of one set that are split by length have one name
    own_group: bool  # other rows' documents are no negatives


def flag_files(place: Path) -> list[FlagFile]:
    """The files of rows at a place: the file itself, or those of a folder by name."""
    if not place.is_dir():
        return [_named(place, "")]
    return [_named(path, place.name) for path in sorted(place.glob("*.jsonl"))]


def _named(path: Path, folder: str) -> FlagFile:
    stem = _LENGTHS.sub("", path.stem)
    return FlagFile(path, stem, folder.endswith(OWN_GROUP) or stem.endswith(OWN_GROUP))


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagRows:
    """How rows are read: what the reference says in flags and not in the rows.

    Raises:
        RecipeError: for a form of queries that has something after the text.
    """

    prompt: str = ""  # query_instruction_for_retrieval, for rows that have none
    form: str = "{}{}"  # query_instruction_format: of the prompt and the text
    seed: int = 0  # of the one negative that is drawn, where a row wants one only
    notes: Counter[str] = field(default_factory=Counter)  # what was left out, in words

    def __post_init__(self) -> None:
        if self.form.count("{}") != 2 or not self.form.endswith("{}"):
            raise RecipeError(
                f'the form of queries is "{self.form}"; it should hold {{}} twice, for the prompt '
                "and the text, with nothing after the text"
            )

    def record(self, row: object, number: int, *, own_group: bool) -> object:
        """The same row with the fields that tercet has names for; what is no row stays as it is.

        Prompts are whole, as they stand before a text. A row without one gets no prompt here, so
        that the model's own is used. Negatives are never repeated to fill a group, which is what
        ``symmetric_class`` asks for.
        """
        if not isinstance(row, dict):
            return row
        kind = row.get("type")
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f'"type" must be a text, got {kind!r}')
        found = {name: row[name] for name in _AS_THEY_ARE if name in row}
        prompt = row.get("prompt") or self.prompt
        if isinstance(prompt, str):
            prompt = self._before_text(prompt) if prompt else None
        found |= {"prompt": prompt, "document_prompt": prompt if kind in SYMMETRIC else None}
        if own_group:
            found["in_batch"] = "none"
        self.notes[_HALF_BATCH] += kind is not None and "symmetric" in kind
        if kind == ONE_NEGATIVE:
            self._keep_one(found, number)
        for name in ("batch_size", "train_group_size"):
            self.notes[f'values of "{name}", a flag of the training here'] += name in row
        return found

    def _before_text(self, prompt: str) -> str:
        before, between, _ = self.form.split("{}")
        return f"{before}{prompt}{between}"

    def _keep_one(self, found: dict[str, Any], number: int) -> None:
        negatives = found.get("neg")
        if not isinstance(negatives, list) or len(negatives) < 2:
            return
        kept = int(np.random.default_rng([self.seed, number]).integers(len(negatives)))
        self.notes["negatives of rows that want one only"] += len(negatives) - 1
        for name in ("neg", "neg_scores"):
            values = found.get(name)
            if isinstance(values, list) and len(values) == len(negatives):
                found[name] = [values[kept]]
