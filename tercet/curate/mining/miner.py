"""Hard negatives for files of examples: near documents that do not answer the query.

Exact search finds the nearest documents of each query, by a teacher's vectors or BM25, and a rule
(``tercet.curate.mining.rules``) selects which of them may be negatives. Memory does not grow with
queries times documents: blocks of queries meet one shard of documents at a time.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool

from tercet.curate.mining.document_pools import StoredVectors
from tercet.curate.mining.finders import COSINES, By, ByVectors, CountedShelf, EncodedShelf, Finder
from tercet.curate.mining.ranks import JudgedExamples, RankedExamples, Ranker, prompt_for
from tercet.curate.mining.relevant import Collection, blocks, read_collection
from tercet.curate.mining.rules import ABSENT, REASONS, MiningRule
from tercet.data.files.sources import Source, refuse_scored, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.bm25 import by_tokens_of, by_words
from tercet.files.forms import rows_name
from tercet.files.outputs import FolderKind, check_output, mark
from tercet.files.progress import Bars, bar
from tercet.files.records import known_suffix
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.embedder import Embedder
from tercet.types import Example

WORK: Final = Path("runs/mining")
MINED: Final = FolderKind("a folder of mined rows", shared=True, is_data=True)

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mining:
    """Settings of mining.

    Raises:
        RecipeError: for numbers that contradict each other.
    """

    rule: MiningRule = field(default_factory=MiningRule)
    negatives: int = 7  # per row
    depth: int = 100  # candidates per query, positives included
    keep: bool = False  # keep a row's own negatives, before mined ones, unless they are positives
    at_least: int = 0  # leave out rows with fewer negatives than this
    prompts: Literal["row", "teacher"] = "row"  # prefer a row's prompts, or ignore them
    by: By = "dense"  # the scores that rank documents
    # The rule compares with at most this many of a row's best positives among the candidates; rows
    # without one are left out. None: with all positives, also those that are not candidates.
    max_positives: int | None = None
    # Of the hybrid sum. None: those tuned for the teacher; by kind: these in place of some.
    weights: Weights | Mapping[Kind, float] | None = None

    def __post_init__(self) -> None:
        self._check_by()
        if self.negatives < 1:
            raise RecipeError(f"negatives must be at least 1; got {self.negatives}")
        if self.depth < self.negatives + self.rule.shift:
            raise RecipeError(
                f"depth must be at least negatives + shift = {self.negatives + self.rule.shift}; "
                f"got {self.depth}"
            )
        if self.rule.sample_from is not None and self.rule.sample_from < self.negatives:
            raise RecipeError(
                f"sample_from must be at least the {self.negatives} negatives; got "
                f"{self.rule.sample_from}"
            )
        if self.max_positives is not None and self.max_positives < 1:
            raise RecipeError(f"max_positives must be at least 1; got {self.max_positives}")
        if not 0 <= self.at_least <= self.negatives:
            raise RecipeError(
                f"at_least must be between 0 and the {self.negatives} negatives; got "
                f"{self.at_least}"
            )

    def _check_by(self) -> None:
        if self.weights is not None and self.by != "hybrid":
            raise RecipeError(f"weights are for mining by hybrid; got by {self.by}; leave them out")
        if self.by not in COSINES and self.rule.kind in ("margin", "absolute"):
            if self.rule.value is None:
                raise RecipeError(
                    f"the default value of the rule {self.rule.kind} is for cosines, and scores by "
                    f"{self.by} are not cosines; give a value, or use the rule percent"
                )


@dataclass(slots=True, kw_only=True)
class MiningReport:
    """Counts of what mining did with one source."""

    source: str
    rule: MiningRule  # as used: a quantile is replaced by its score
    rows: int = 0
    had_negatives: int = 0  # rows with negatives before mining
    refused: int = 0  # their negatives that keep drops: positives, duplicates and blank texts
    candidates: int = 0  # of all rows
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    negatives: int = 0  # in the written rows
    short: int = 0  # rows with fewer negatives than asked for
    empty: int = 0  # rows without negatives
    left_out: int = 0  # rows with fewer than at_least, or unanswered with max_positives
    unanswered: int = 0  # rows without a positive among the candidates
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
        """The mean score of the positives."""
        return self.positive_total / max(self.positives, 1)

    @property
    def negative_score(self) -> float:
        """The mean score of the written negatives."""
        return self.negative_total / max(self.negatives, 1)

    @property
    def ratio(self) -> float:
        """The mean score of negatives over that of positives; NaN without both."""
        both = self.positive_score and self.negatives
        return self.negative_score / self.positive_score if both else math.nan

    def judge(
        self, ranked: RankedExamples, mining: Mining
    ) -> tuple[JudgedExamples, Bool[np.ndarray, "queries"]]:
        """Apply the rule to some rows and count them; return also which rows are written."""
        found = ranked.judged(self.rule, mining.negatives, mining.max_positives)
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
        return found, written


def mine(
    teacher: Embedder | None,
    sources: Sequence[Source],
    out: Path,
    *,
    mining: Mining,
    documents: Iterable[str] = (),
    work: Path = WORK,
) -> list[MiningReport]:
    """Write the examples of the sources with mined negatives and the teacher's scores.

    A document that answers a query in any row, or is the query itself, never becomes its negative;
    texts that differ only in case or spaces are the same document. Scores are written only if they
    are cosines (by dense or token vectors).

    Args:
        teacher: the model that ranks; BM25 needs none, or takes the teacher's tokens as words.
        sources: examples whose queries get negatives and whose documents are candidates.
        out: a file for all sources or, without a suffix, a folder with a file for each.
        mining: the rule, the kind of vectors, and how many negatives.
        documents: more candidates.
        work: folder where vectors stay for the next mining; it may be deleted.

    Raises:
        RecipeError: if ``out`` would replace a source, or the teacher lacks the needed vectors.
        DataError: if a source has changed since it was opened.
        ModelError: if the teacher's vectors contain NaN or infinity.
        StorageError: if the disk refuses; an earlier output is still there then.

    Examples:
        ``mine(Embedder.load("minilm"), [open_source("pairs.jsonl")], Path("mined.jsonl"),
        mining=Mining(negatives=7))``
    """
    outputs = outputs_of(out, sources)
    reports: list[MiningReport] = []
    with closing(Miner(teacher, sources, mining, documents, work)) as miner:
        for path, group in outputs:
            if path != out:
                mark(out, MINED)
            write_examples(path, miner.examples(group, reports))
    return reports


def sweep(
    teacher: Embedder | None,
    sources: Sequence[Source],
    values: Sequence[float],
    *,
    mining: Mining,
    documents: Iterable[str] = (),
    work: Path = WORK,
) -> list[MiningReport]:
    """Return a report on mining with each value of the rule, for each source.

    The search runs once, and nothing is written but vectors.
    """
    rules = [replace(mining.rule, value=value) for value in values]
    with closing(Miner(teacher, sources, mining, documents, work)) as miner:
        return [report for source in sources for report in miner.tried(source, rules)]


class Miner:
    """Mines some sources; ``prepare`` reads and encodes the documents.

    With several processes, all must call ``prepare``, and each encodes its share.
    """

    def __init__(
        self,
        teacher: Embedder | None,
        sources: Sequence[Source],
        mining: Mining,
        documents: Iterable[str],
        work: Path,
        *,
        bars: Bars = bar,
    ) -> None:
        refuse_scored(sources, "mining")
        self.teacher, self.finder = teacher, finder_of(mining, teacher, work)
        self._work = work
        self.sources, self.mining, self.documents, self._bars = sources, mining, documents, bars
        self._collection: Collection | None = None
        self._ranker: Ranker | None = None

    def close(self) -> None:
        """Free the disk space of the texts."""
        self.finder.close()
        if self._collection is not None:
            self._collection.close()

    def examples(self, sources: Sequence[Source], reports: list[MiningReport]) -> Iterator[Example]:
        """Yield the examples of these sources with negatives; append a report for each source."""
        self.prepare()  # before the next progress bar starts
        for source in sources:
            report = self.report(source)
            reports.append(report)
            with self._bars(f"mine {source.name}", len(source)) as advance:
                for block in blocks(source):
                    yield from self.mined(block, report)
                    advance(len(block))

    def report(self, source: Source) -> MiningReport:
        """Return an empty report on a source, with the rule as used there."""
        return MiningReport(source=source.name, rule=self._settled(self.mining.rule, source))

    def mined(self, block: Sequence[Example], report: MiningReport) -> list[Example]:
        """Return some examples with negatives, in order, and count them in the report."""
        found: dict[int, Example] = {}
        for ranked in self.prepare().ranked(block):
            judged, written = report.judge(ranked, self.mining)
            for row in np.flatnonzero(written).tolist():
                found[ranked.places[row]] = self._with_negatives(judged, row)
        return [found[place] for place in sorted(found)]

    def tried(self, source: Source, rules: Sequence[MiningRule]) -> list[MiningReport]:
        """Return a report on mining a source with each rule."""
        ranker = self.prepare()
        settled = [self._settled(rule, source) for rule in rules]
        reports = [MiningReport(source=source.name, rule=rule) for rule in settled]
        with self._bars(f"mine {source.name}", len(source)) as advance:
            for block in blocks(source):
                for ranked in ranker.ranked(block):
                    for report in reports:
                        report.judge(ranked, self.mining)
                advance(len(block))
        return reports

    def read(self) -> Collection:
        """Read the documents at the first call; return them."""
        if self._collection is not None:
            return self._collection
        settings, first = self.finder.settings, self.mining.prompts
        found = self._collection = read_collection(
            self.sources,
            self.documents,
            lambda example: prompt_for(settings, example, "document", first),
            self._work,
            bars=self._bars,
        )
        knows_prompts = settings is None or settings.prompts or settings.task_prompts
        if found.prompted_rows and first == "row" and not knows_prompts:
            log.warning(
                "%s rows have prompts, and the teacher was saved without any, so it may not "
                "understand them; --prompts teacher ignores them",
                f"{found.prompted_rows:,}",
            )
        return found

    def prepare(self) -> Ranker:
        """Read and encode the documents at the first call; return their ranker."""
        if self._ranker is None:
            collection, mining = self.read(), self.mining
            with self._bars("documents", sum(map(len, collection.pools.values()))) as advance:
                for pool in collection.pools.values():
                    self.finder.fill(pool, advance)
            self._ranker = Ranker(
                self.finder, collection, mining.depth, mining.keep, mining.prompts
            )
        return self._ranker

    def _with_negatives(self, judged: JudgedExamples, row: int) -> Example:
        negatives = judged.negatives(row)
        scored = self.mining.by in COSINES
        return replace(
            judged.ranked.examples[row],
            negatives=tuple(text for text, _ in negatives),
            positive_scores=tuple(judged.ranked.positives[row]) if scored else None,
            negative_scores=(tuple(s for _, s in negatives) or None) if scored else None,
        )

    def _settled(self, rule: MiningRule, source: Source) -> MiningRule:
        """Return the rule; a quantile as the absolute score that it has in this source."""
        if rule.kind != "quantile":
            return rule
        ranker = self.prepare()
        lowest = [score for block in blocks(source) for score in ranker.lowest_positives(block)]
        value = float(np.quantile(lowest, rule.used_value))
        return replace(rule, kind="absolute", value=value)


def finder_of(mining: Mining, teacher: Embedder | None, work: Path) -> Finder:
    """Return what finds the nearest documents by the chosen scores.

    Raises:
        RecipeError: if a teacher is needed and missing, or lacks the needed vectors.
    """
    if mining.by == "bm25":
        split = by_words if teacher is None else by_tokens_of(teacher)
        return ByVectors(CountedShelf(work, split), Weights(0.0, 1.0, 0.0), ("sparse",))
    if teacher is None:
        raise RecipeError(f"mining by {mining.by} needs a teacher; give one, or mine by bm25")
    if mining.by == "dense":
        return StoredVectors(teacher, work)
    weights = _weights(mining, mining.by, teacher)
    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if weights.of(kind))
    return ByVectors(EncodedShelf(teacher, work, kinds), weights, kinds)


def _weights(
    mining: Mining, by: Literal["sparse", "multi", "hybrid"], teacher: Embedder
) -> Weights:
    """Return the weight of each kind."""
    made: tuple[Kind, ...] = teacher.kinds
    tuned = teacher.settings.weights.get("", Weights()).only(made)
    given = mining.weights or {}
    summed = given if isinstance(given, Weights) else tuned.changed(given)
    weights = summed if by == "hybrid" else Weights(1.0, 1.0, 1.0).only((by,))
    needed = {kind for kind in KINDS if weights.of(kind)}
    if by == "hybrid" and mining.weights is None:
        needed |= {"dense", "sparse"}
    if missing := [kind for kind in KINDS if kind in needed and kind not in made]:
        raise RecipeError(
            f"mining by {by} needs {' and '.join(missing)} vectors, and the teacher makes "
            f"{' and '.join(made)} vectors; give another teacher, or mine by another kind"
        )
    if by == "hybrid" and not needed & {"dense", "sparse"}:
        raise RecipeError(
            "mining by hybrid finds candidates by dense and sparse vectors, so one of them must "
            "have a weight above 0; or mine by multi"
        )
    return weights


def outputs_of(out: Path, sources: Sequence[Source]) -> list[tuple[Path, list[Source]]]:
    """Return each file to write, with the sources that go into it.

    Raises:
        RecipeError: if a file would replace a source, two files have the same name, or the folder
            holds other things.
    """
    check_output(out, [source.path for source in sources], None if out.suffix else MINED)
    if out.suffix:
        known_suffix(out)
        outputs = [(out, list(sources))]
    else:
        outputs = [(out / rows_name(path), group) for path, group in _by_path(sources)]
    paths = [path.resolve() for path, _ in outputs]
    if len(set(paths)) < len(paths):
        raise RecipeError(
            f"{out}: two input files have the same name; rename one, or give one output file for "
            "all of them, such as mined.jsonl"
        )
    return outputs


def _by_path(sources: Sequence[Source]) -> list[tuple[Path, list[Source]]]:
    """Group the languages of each file or folder; the same path given twice stays apart."""
    found: list[tuple[Path, list[Source]]] = []
    for source in sources:
        names = {each.name for each in found[-1][1]} if found else set[str]()
        if found and found[-1][0] == source.path and source.name not in names:
            found[-1][1].append(source)
        else:
            found.append((source.path, [source]))
    return found
