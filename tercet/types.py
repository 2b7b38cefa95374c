"""The central types of the package; most functions map one of these to another.

There is no padding anywhere: the tokens of a batch lie end to end in one row, and ``offsets``
says where each text begins. Axis names, the same in every signature:

- ``texts`` of a batch; ``bounds`` is one more: text ``i`` is ``offsets[i]:offsets[i + 1]``
- ``tokens`` of all those texts together
- ``hidden`` width of the backbone; ``dim`` width of an embedding
- ``queries`` and ``docs``, the rows and columns of a score matrix

Words: a *query* is searched with, a *document* is found. A document is a *positive* of a query
that it answers; a *mined* negative comes with the example, an *in-batch* negative is another
example's document. A *task* is where examples come from; its *prompt* is put before a text.
A *source* is a set of examples that share batches: one file, or one language of a folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

POSITIVE: Final = 1
NEGATIVE: Final = -1
IGNORED: Final = 0

Role: TypeAlias = Literal["query", "document"]

# What users pass to encode. At run time the functions check it, with messages for users.
if TYPE_CHECKING:
    Texts: TypeAlias = Iterable[str]  # a list, tuple, array or series
    Sentences: TypeAlias = Iterable[Iterable[str]]  # lists of words
    RoleName: TypeAlias = str  # a role, a synonym of one, or "default"
else:
    Texts = Sentences = RoleName = object

InBatch: TypeAlias = Literal["all", "positives", "none"]
"""Which documents of other examples are negatives: all, all but mined ones, none."""

Policy: TypeAlias = Literal["all", "positives", "none", "per_row"]
"""Which documents of other examples are negatives: one rule for all, or that of each row."""

Mixing: TypeAlias = Literal["single", "blended"]

Distillation: TypeAlias = Literal["none", "kl", "listwise", "margin-mse"]
"""How the scores of a reranker are learned. Not for the cosines of mining, which teach little."""

Vocabulary: TypeAlias = Literal["all", "seen"]

ReadAs: TypeAlias = Literal["document", "query", "both"]
"""How plain texts are read: as documents, as queries, or every second one as a query."""

ScheduleName: TypeAlias = Literal["constant", "linear", "wsd", "early"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training record: a query, documents that match it, and some that do not.

    Scores, where given, are a teacher's, one for each text of the field they belong to.
    A prompt of None means: use the model's. With ``score`` it is a pair of texts whose similarity
    people judged: the query and its only positive, of which neither answers the other.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    positive_scores: tuple[float, ...] | None = None
    negative_scores: tuple[float, ...] | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    task: str = ""
    in_batch: InBatch | None = None  # negatives that its task allows; None: all
    lang: str = ""  # of its texts, such as "de"; empty: unknown
    score: float | None = None  # similarity of the pair, on the scale of its task; more is closer
