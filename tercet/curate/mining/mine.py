"""Hard negatives for files of examples: the nearest documents that are no answers.

A teacher embeds queries and documents, exact search finds the nearest documents of each query, and
a rule (``tercet.curate.mining.rules``) says which of them may be negatives. Near is what the dense
vectors say, or sparse ones, token vectors, their weighted sum, or BM25. Memory does not grow with
queries times documents: a block of queries at a time meets a shard of documents at a time.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool

from tercet.curate.mining.counts import CountedShelf
from tercet.curate.mining.documents import StoredVectors
from tercet.curate.mining.finders import ByVectors, EncodedShelf
from tercet.curate.mining.nearness import COSINES, By, Finder
from tercet.curate.mining.ranks import JudgedExamples, Ranker, prompt_for
from tercet.curate.mining.relevant import Collection, blocks, read_collection
from tercet.curate.mining.rules import ABSENT, REASONS, MiningRule
from tercet.data.files.sources import Source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.bm25 import by_tokens_of, by_words
from tercet.files.progress import Bars, bar
from tercet.files.records import known_suffix
from tercet.models.embedder import Embedder
from tercet.types import Example
from tercet.vectors import KINDS, Kind, Weights

WORK: Final = Path("runs/mining")

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mining:
    """What is looked for, and what becomes of a row.

    Raises:
        RecipeError: for numbers that cannot go together.
    """

    rule: MiningRule = field(default_factory=MiningRule)
    negatives: int = 7  # of a row
    depth: int = 100  # candidates looked at for each query, its positives among them
    keep: bool = False  # a row's own negatives stay, before mined ones, unless they are positives
    at_least: int = 0  # a row that ends with fewer negatives is left out
    prompts: Literal["row", "teacher"] = "row"  # a row's own go before the teacher's, or are unread
    by: By = "dense"  # what says how near a document is
    # The rule compares with so many of a row's best positives among the candidates, and a row that
    # has none there is left out. None: with all of its positives, wherever they are.
    max_positives: int | None = None
    weights: Weights | None = None  # of a hybrid sum; None: those tuned for the teacher

    def __post_init__(self) -> None:
        self._check_by()
        if self.negatives < 1:
            raise RecipeError(f"negatives is {self.negatives}; ask for 1 or more")
        if self.depth < self.negatives + self.rule.shift:
            raise RecipeError(
                f"a depth of {self.depth} cannot give {self.negatives} negatives after a shift of "
                f"{self.rule.shift}; raise depth"
            )
        if self.rule.sample_from is not None and self.rule.sample_from < self.negatives:
            raise RecipeError(
                f"{self.negatives} negatives cannot be drawn from {self.rule.sample_from} "
                "candidates; raise sample_from"
            )
        if self.max_positives is not None and self.max_positives < 1:
            raise RecipeError(f"max_positives is {self.max_positives}; ask for 1 or more")
        if not 0 <= self.at_least <= self.negatives:
            raise RecipeError(
                f"at_least is {self.at_least}; it should be between 0 and the {self.negatives} "
                "negatives asked for"
            )

    def _check_by(self) -> None:
        if self.weights is not None and self.by != "hybrid":
            raise RecipeError(
                f"weights are of a hybrid sum, and mining is by {self.by}; leave them out"
            )
        if self.by not in COSINES and self.rule.kind in ("margin", "absolute"):
            if self.rule.value is None:
                raise RecipeError(
                    f"the usual value of the rule {self.rule.kind} is meant for cosines, and "
                    f"scores by {self.by} are none; give a value, or take the rule percent"
                )


@dataclass(slots=True, kw_only=True)
class MiningReport:
    """What mining did with one source."""

    source: str
    rule: MiningRule  # as used: a quantile has become a score
    rows: int = 0
    had_negatives: int = 0  # rows that brought some
    refused: int = 0  # of these, with keep: positives, repeats and blanks
    candidates: int = 0  # looked at, over all rows
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    negatives: int = 0  # in the rows that were written
    short: int = 0  # rows with fewer than asked for
    empty: int = 0  # and those of them without any
    left_out: int = 0  # rows with fewer than at_least, or unanswered with max_positives
    unanswered: int = 0  # rows with no positive among the candidates
    positives: int = 0
    unfound: int = 0  # positives that are not among the candidates of their query
    positive_total: float = 0.0  # sum of scores
    negative_total: float = 0.0

    @property
    def written(self) -> int:
        """Rows in the output."""
        return self.rows - self.left_out

    @property
    def positive_score(self) -> float:
        """Mean score of the positives."""
        return self.positive_total / max(self.positives, 1)

    @property
    def negative_score(self) -> float:
        """Mean score of the negatives that were written."""
        return self.negative_total / max(self.negatives, 1)

    @property
    def ratio(self) -> float:
        """Mean score of the negatives over that of the positives; not a number without both."""
        both = self.positive_score and self.negatives
        return self.negative_score / self.positive_score if both else math.nan

    def count(self, found: JudgedExamples, mining: Mining) -> Bool[np.ndarray, "queries"]:
        """Count some rows; which of them are to be written."""
        ranked = found.ranked
        self.rows += len(ranked.examples)
        self.had_negatives += sum(bool(example.negatives) for example in ranked.examples)
        self.refused += ranked.refused
        self.candidates += int((found.verdicts != ABSENT).sum())
        counts = np.bincount(found.verdicts.ravel(), minlength=len(REASONS) + 1)
        for reason, count in zip(REASONS, counts[1:ABSENT].tolist(), strict=True):
            self.dropped[reason] += count
        self.positives += sum(map(len, ranked.positives))
        self.unfound += ranked.unfound
        self.positive_total += sum(map(sum, ranked.positives))
        sizes = found.chosen.sum(axis=1) + np.array([len(own) for own in ranked.own])
        self.short += int((sizes < mining.negatives).sum())
        self.empty += int((sizes == 0).sum())
        unanswered = np.array([not any(row) for row in ranked.found], np.bool_)
        self.unanswered += int(unanswered.sum())
        written = (sizes >= mining.at_least) & ~np.isnan(found.references)
        self.left_out += int((~written).sum())
        self.negatives += int(sizes[written].sum())
        self.negative_total += float(ranked.scores[found.chosen & written[:, None]].sum())
        self.negative_total += sum(
            score for row in np.flatnonzero(written).tolist() for _, score in ranked.own[row]
        )
        return written


def mine(
    teacher: Embedder | None,
    sources: Sequence[Source],
    out: Path,
    *,
    mining: Mining,
    corpus: Iterable[str] = (),
    work: Path = WORK,
) -> list[MiningReport]:
    """Write the examples of the sources with mined negatives and the teacher's scores.

    Scores are written where they are cosines (by dense or token vectors); others are on a scale of
    their own, and rows come without. BM25 needs no teacher; it takes a teacher's tokens as words.

    Mined are the documents of all sources, and those of ``corpus``. Never a negative of a query is
    a document that answers it in any row, or the query itself; texts that differ in case or spaces
    only are one document. ``out`` is a file for all sources, or, without an ending, a folder with
    a file for each. Vectors stay in ``work``, where the next mining finds them; the folder may be
    deleted.

    Raises:
        RecipeError: when ``out`` would take the place of a source, or the teacher does not make
            the vectors that are mined by.
        DataError: when a source has changed since it was opened.
        ModelError: when the teacher gives vectors that are no numbers.
        StorageError: when the disk refuses; a file that was there before is still there.
    """
    outputs = outputs_of(out, sources)
    reports: list[MiningReport] = []
    with closing(Miner(teacher, sources, mining, corpus, work)) as miner:
        for path, group in outputs:
            write_examples(path, miner.examples(group, reports))
    return reports


def sweep(
    teacher: Embedder | None,
    sources: Sequence[Source],
    values: Sequence[float],
    *,
    mining: Mining,
    corpus: Iterable[str] = (),
    work: Path = WORK,
) -> list[MiningReport]:
    """What mining would do with each value of its rule: a report for each source and value.

    Nothing is written but vectors, and the search runs once.
    """
    rules = [replace(mining.rule, value=value) for value in values]
    with closing(Miner(teacher, sources, mining, corpus, work)) as miner:
        return [report for source in sources for report in miner.tried(source, rules)]


class Miner:
    """Mines some sources. Documents are read and encoded when they are first asked for.

    In several processes all have to ask for them, and each encodes its share.
    """

    def __init__(
        self,
        teacher: Embedder | None,
        sources: Sequence[Source],
        mining: Mining,
        corpus: Iterable[str],
        work: Path,
        *,
        bars: Bars = bar,
    ) -> None:
        self.teacher, self.finder = teacher, finder_of(mining, teacher, work)
        self._work = work
        self.sources, self.mining, self.corpus, self._bars = sources, mining, corpus, bars
        self._collection: Collection | None = None
        self._foreign = False  # whether the rows bring prompts to a teacher that has none

    def close(self) -> None:
        """Give the disk space of the texts back."""
        self.finder.close()
        if self._collection is not None:
            self._collection.close()

    def examples(self, sources: Sequence[Source], reports: list[MiningReport]) -> Iterator[Example]:
        """The examples of these sources with their negatives; a report for each is appended."""
        _ = self.ranker  # a bar of its own, and there may be one at a time
        for source in sources:
            report = self.report(source)
            reports.append(report)
            with self._bars(f"mine {source.name}", len(source)) as advance:
                for block in blocks(source):
                    yield from self.mined(block, report)
                    advance(len(block))

    def report(self, source: Source) -> MiningReport:
        """An empty report on a source, with the rule that holds there."""
        return MiningReport(source=source.name, rule=self._settled(self.mining.rule, source))

    def mined(self, block: Sequence[Example], report: MiningReport) -> list[Example]:
        """Some examples with their negatives, in order, counted in the report."""
        found: dict[int, Example] = {}
        for ranked in self.ranker.ranked(block):
            judged = ranked.judged(report.rule, self.mining.negatives, self.mining.max_positives)
            for row in np.flatnonzero(report.count(judged, self.mining)).tolist():
                found[ranked.places[row]] = self._with_negatives(judged, row)
        return [found[place] for place in sorted(found)]

    def tried(self, source: Source, rules: Sequence[MiningRule]) -> list[MiningReport]:
        """What each rule would do with a source."""
        ranker = self.ranker  # a bar of its own, and there may be one at a time
        settled = [self._settled(rule, source) for rule in rules]
        reports = [MiningReport(source=source.name, rule=rule) for rule in settled]
        with self._bars(f"mine {source.name}", len(source)) as advance:
            for block in blocks(source):
                for ranked in ranker.ranked(block):
                    for report in reports:
                        judged = ranked.judged(
                            report.rule, self.mining.negatives, self.mining.max_positives
                        )
                        report.count(judged, self.mining)
                advance(len(block))
        return reports

    @property
    def collection(self) -> Collection:
        """The documents, read when they are first asked for."""
        if self._collection is None:
            self._collection = self._read()
        return self._collection

    def _read(self) -> Collection:
        collection = read_collection(
            self.sources, self.corpus, self._prompt, self._work, bars=self._bars
        )
        if self._foreign:
            log.warning(
                "rows bring prompts, and the teacher has none of its own, so it may not know what "
                "they mean; with prompts from the teacher they are not read"
            )
        return collection

    @cached_property
    def ranker(self) -> Ranker:
        """The documents, read and encoded."""
        collection = self.collection
        with self._bars("documents", sum(map(len, collection.pools.values()))) as advance:
            for pool in collection.pools.values():
                self.finder.fill(pool, advance)
        mining = self.mining
        return Ranker(self.finder, collection, mining.depth, mining.keep, mining.prompts)

    def _with_negatives(self, judged: JudgedExamples, row: int) -> Example:
        negatives = judged.negatives(row)
        found = replace(
            judged.ranked.examples[row],
            negatives=tuple(text for text, _ in negatives),
            positive_scores=tuple(judged.ranked.positives[row]),
            negative_scores=tuple(score for _, score in negatives) or None,
        )
        if self.mining.by in COSINES:
            return found
        return replace(found, positive_scores=None, negative_scores=None)

    def _prompt(self, example: Example) -> str:
        settings, first = self.finder.settings, self.mining.prompts
        if settings and not settings.prompts and not settings.task_prompts and first == "row":
            self._foreign |= bool(example.query_prompt or example.document_prompt)
        return prompt_for(settings, example, "document", first)

    def _settled(self, rule: MiningRule, source: Source) -> MiningRule:
        """The rule itself; a quantile as the score that it is in this source."""
        if rule.kind != "quantile":
            return rule
        lowest = [
            score for block in blocks(source) for score in self.ranker.lowest_positives(block)
        ]
        value = float(np.quantile(lowest, rule.used_value))
        return replace(rule, kind="absolute", value=value)


def finder_of(mining: Mining, teacher: Embedder | None, work: Path) -> Finder:
    """What finds documents in the way that is mined by.

    Raises:
        RecipeError: without a teacher where one is needed, or for one that does not make the
            vectors that count.
    """
    if mining.by == "bm25":
        split = by_words if teacher is None else by_tokens_of(teacher)
        return ByVectors(CountedShelf(work, split), Weights(0.0, 1.0, 0.0), ("sparse",))
    if teacher is None:
        raise RecipeError(f"mining by {mining.by} needs a teacher; name one, or mine by bm25")
    if mining.by == "dense":
        return StoredVectors(teacher, work)
    weights = _weights(mining, mining.by, teacher)
    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if weights.of(kind))
    return ByVectors(EncodedShelf(teacher, work, kinds), weights, kinds)


def _weights(
    mining: Mining, by: Literal["sparse", "multi", "hybrid"], teacher: Embedder
) -> Weights:
    """How much each kind counts."""
    made: tuple[Kind, ...] = teacher.kinds
    tuned = teacher.settings.weights.get("", Weights()).only(made)
    weights = (mining.weights or tuned) if by == "hybrid" else Weights(1.0, 1.0, 1.0).only((by,))
    needed = {kind for kind in KINDS if weights.of(kind)}
    if by == "hybrid" and mining.weights is None:
        needed |= {"dense", "sparse"}
    if missing := [kind for kind in KINDS if kind in needed and kind not in made]:
        raise RecipeError(
            f"mining by {by} needs {' and '.join(missing)} vectors, and the teacher makes "
            f"{' and '.join(made)} ones; choose another teacher, or another way"
        )
    if by == "hybrid" and not needed & {"dense", "sparse"}:
        raise RecipeError(
            "candidates of a hybrid sum are found by dense and sparse vectors, and neither has a "
            "weight; give one of them some, or mine by multi"
        )
    return weights


def outputs_of(out: Path, sources: Sequence[Source]) -> list[tuple[Path, list[Source]]]:
    """Each file to write, and the sources that go into it."""
    if out.suffix:
        known_suffix(out)
        outputs = [(out, list(sources))]
    else:
        outputs = [(_named_as(path, out), group) for path, group in _by_path(sources)]
    paths = [path.resolve() for path, _ in outputs]
    if len(set(paths)) < len(paths):
        raise RecipeError(
            f"{out}: two of the files have the same name; rename one, or give an output file "
            "with an ending for all of them"
        )
    for source in sources:
        if source.path.resolve() in paths:
            raise RecipeError(f"{source.path}: would be replaced by the output; choose another")
    return outputs


def _by_path(sources: Sequence[Source]) -> list[tuple[Path, list[Source]]]:
    """The languages of a file or a folder together; what was given twice stays apart."""
    found: list[tuple[Path, list[Source]]] = []
    for source in sources:
        names = {each.name for each in found[-1][1]} if found else set[str]()
        if found and found[-1][0] == source.path and source.name not in names:
            found[-1][1].append(source)
        else:
            found.append((source.path, [source]))
    return found


def _named_as(source: Path, folder: Path) -> Path:
    """The file of a source in a folder; one for all the shards of a source."""
    return folder / (f"{source.name}.jsonl" if source.is_dir() else source.name)
