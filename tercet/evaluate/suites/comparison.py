"""Compare models and baselines on one set, or on a folder of sets in many languages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.bm25 import WordsOf, by_tokens_of
from tercet.evaluate.measures.by_kind import KindsResult, ProtocolName, measure_kinds, weights_for
from tercet.evaluate.measures.prompts import drop_prompts, known_task, require_prompt
from tercet.evaluate.measures.retention import Retained, measure_coded
from tercet.evaluate.measures.retrieval import conditions, measure_bm25, versions
from tercet.evaluate.report.intervals import Interval, interval, paired_difference
from tercet.evaluate.sets.location import SetLocation
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.averages import (
    Averages,
    averages,
    by_axis,
    cells_of,
    differences,
    language_bias,
)
from tercet.evaluate.suites.by_language import (
    BASELINES,
    SCORES_VERSION,
    SetScores,
    measure_sets,
    measure_words,
)
from tercet.evaluate.suites.suite import MAIN, EvaluationSet, Result
from tercet.files.artifacts import KeptResults
from tercet.files.console import say
from tercet.files.outputs import FolderKind, check_output, holds_only, mark
from tercet.kinds import KINDS, Kind
from tercet.models.embedder import Embedder
from tercet.rank.quantized import Stored

SCORES: Final = "scores.json"  # in the folder of an evaluation
_OURS: Final = ("*.npz", "*.png", SCORES, "report.html")
EVALUATION: Final = FolderKind(
    "an evaluation",
    own=_OURS,
    shared=True,
    is_older=lambda folder: holds_only(folder, _OURS),
)

ModelLoader: TypeAlias = Callable[[str], Embedder]
Figures: TypeAlias = dict[str, dict[str, Interval]]
"""By the name of a system, then by metric."""

_DENSE: Final[tuple[Kind, ...]] = ("dense",)


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """How models are measured; None: the default."""

    task: str | None = None
    prompts: bool = True
    baselines: bool = True
    split: str | None = None
    dims: int | None = None
    precision: Stored | None = None  # of codes that documents are stored in
    kinds: tuple[Kind, ...] | None = None  # of a single set, and the next two
    weights: Mapping[Kind, float] | None = None  # in place of the model's
    protocol: ProtocolName | None = None
    seen: Sequence[str] | None = None  # languages in training; of a folder of sets
    keep: Path | None = None  # a folder for what was measured; of a folder of sets
    seed: int = 0

    @property
    def for_retrieval(self) -> bool:
        """Whether an option is given that applies to retrieval sets only."""
        return (self.kinds, self.weights, self.protocol, self.precision) != (None,) * 4


# ---- one set ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetComparison:
    """The figures of several systems on one set, and their differences to the first one."""

    size: str
    metrics: Sequence[str]
    figures: Figures
    title: str  # of the differences
    differences: Figures
    search: Mapping[str, dict[str, Any]]  # by model: how its vectors were searched
    models: Mapping[str, dict[str, Any]]  # by model: under which conditions it was measured
    examined: EvaluationSet
    measured: Mapping[str, Result]  # by system: what the figures were computed from
    own: Sequence[str]  # systems that are the first model, by each kind of its vectors

    def record(self, data: Path) -> dict[str, Any]:
        """Return all figures and conditions, for a JSON file."""
        return {
            "data": str(data),
            "what": self.size,
            "results": self.figures,
            "differences": {self.title: self.differences},
            "search": self.search,
            "models": self.models,
            "versions": versions("bm25s"),
        }


def compare(
    names: Sequence[str], load: ModelLoader, examined: EvaluationSet, options: ComparisonOptions
) -> SetComparison:
    """Measure models on a set one after the other, and compare each with the first.

    A first model with several kinds of vectors is compared kind by kind with its first one.

    Raises:
        RecipeError: for an option that does not apply to the set or a model, or a model whose
            queries would get no prompt, although it was trained with some.
    """
    if options.for_retrieval and not isinstance(examined.data, RetrievalSet):
        raise RecipeError(
            f"{examined.name}: is not a retrieval set, so --kind, --kind-weight, --protocol and "
            "--store-as do not apply to it; remove them"
        )
    search: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    token_words: dict[str, WordsOf] = {}
    measured: dict[str, Result] = {}
    own: list[str] = []
    for name in names:
        embedder = load(name)
        task = _task(name, embedder, examined, options, first=name == names[0])
        if isinstance(examined.data, RetrievalSet) and (
            options.precision is not None
            or embedder.kinds != _DENSE
            or (options.kinds is not None and not search)
        ):
            found, search[name] = _by_vectors(name, embedder, examined, options, task)
            measured |= found
            if options.precision is None:
                token_words[name] = by_tokens_of(embedder)
        else:
            _say_ignored(name, embedder.kinds, options)
            measured[name] = examined.evaluate(
                embedder, task=task, dims=options.dims, progress=True
            )
        models[name] = conditions(embedder, dims=options.dims, stored=options.precision)
        models[name]["task"] = task
        if name == names[0]:
            own = list(measured)
    if options.baselines:
        measured |= _baselines(examined, token_words)
    return _compared(examined, measured, options.seed, own, search, models)


def _baselines(examined: EvaluationSet, token_words: Mapping[str, WordsOf]) -> dict[str, Result]:
    """Measure by words, and by the tokens of models; without the package for it, say so."""
    measured: dict[str, Result] = {}
    try:
        measured[examined.baseline_name] = examined.baseline()
        for name, words_of in token_words.items():
            assert isinstance(examined.data, RetrievalSet)
            label = f"{examined.baseline_name}, tokens of {name}"
            measured[label] = measure_bm25(examined.data, words_of)
    except MissingExtraError as error:
        say(f"{examined.baseline_name} is left out: {error}")
    return measured


def _compared(
    examined: EvaluationSet,
    measured: Mapping[str, Result],
    seed: int,
    own: Sequence[str],
    search: Mapping[str, dict[str, Any]],
    models: Mapping[str, dict[str, Any]],
) -> SetComparison:
    first, *others = measured
    within_first = len(own) > 1

    def difference(name: str, metric: str) -> Interval:
        pair = (name, first) if within_first else (first, name)
        after, before = (measured[each] for each in pair)
        return after.minus(before, metric, seed=seed)

    return SetComparison(
        examined.size,
        examined.metrics,
        {
            name: {m: each.interval(m, seed=seed) for m in examined.metrics}
            for name, each in measured.items()
        },
        f"minus {first}" if within_first else f"{first} minus",
        {name: {m: difference(name, m) for m in examined.metrics} for name in others},
        search,
        models,
        examined,
        measured,
        own,
    )


def _task(
    name: str,
    embedder: Embedder,
    examined: EvaluationSet,
    options: ComparisonOptions,
    *,
    first: bool,
) -> str | None:
    """Return the task whose prompts a model uses; None for its default ones.

    A task that the user names must be known by the first model, but not by those compared with it.
    """
    settings = embedder.settings
    if not options.prompts:
        drop_prompts(embedder)
        return None
    if options.task is not None:
        has_weights = options.task in settings.weights
        if first and not has_weights:
            settings.prompt("query", options.task)  # raises for an unknown task
        known = known_task(settings, (options.task,))
        if known is None and not has_weights:
            say(f"{name}: has no prompts for the task {options.task!r}; its default ones are used")
    else:
        known = known_task(settings, examined.tasks)
        if known is not None:
            say(f"{name}: using its prompts for the task {known!r}")
    require_prompt(settings, "query", known, what=name)
    return known


def _by_vectors(
    name: str,
    embedder: Embedder,
    examined: EvaluationSet,
    options: ComparisonOptions,
    task: str | None,
) -> tuple[dict[str, Result], dict[str, Any]]:
    """Measure a model in codes, or by every kind of vectors; also return how it was searched."""
    assert isinstance(examined.data, RetrievalSet)
    if options.precision is not None:
        _require_dense(name, embedder.kinds, options)
        coded = measure_coded(
            embedder,
            examined.data,
            options.precision,
            task=task,
            dims=options.dims,
            progress=True,
        )
        return {name: coded.result}, _storage(name, coded)
    tasks = (options.task,) if options.task else examined.tasks
    found = measure_kinds(
        embedder,
        examined.data,
        task=task,
        kinds=options.kinds,
        weights=weights_for(embedder.settings, tasks).changed(options.weights or {}),
        protocol=options.protocol,
        dims=options.dims,
        progress=True,
    )
    record = _search(name, found)
    _say_ignored(name, [kind for kind in KINDS if kind in found.results], options)
    return {f"{name} {kind}": result for kind, result in found.results.items()}, record


def _require_dense(name: str, kinds: Sequence[Kind], options: ComparisonOptions) -> None:
    """Check that only dense vectors are measured, since only these have codes."""
    if options.weights is not None or options.protocol is not None:
        raise RecipeError(
            f"--store-as {options.precision} applies to dense vectors only; remove --kind-weight "
            "and --protocol"
        )
    if (options.kinds or tuple(kinds)) != _DENSE:
        raise RecipeError(
            f"{name}: --store-as {options.precision} applies to dense vectors only, but "
            f"{', '.join(options.kinds or kinds)} are measured; add --kind dense"
        )


def _storage(name: str, found: Retained) -> dict[str, Any]:
    """Print how documents were stored, and return it for the record."""
    how = f"documents in {found.stored}, {found.bytes:,} bytes each, queries in full"
    if found.limit is not None:
        origin = "learned from these documents, not from queries; save one with tercet tune codes"
        how += f"; range {found.limit:.4f}, {origin if found.learned else 'saved with the model'}"
    say(f"{name}: {how}")
    record = {"stored": found.stored, "bytes": found.bytes, "dims": found.dims}
    return record | {"limit": found.limit, "learned_here": found.learned}


def _search(name: str, found: KindsResult) -> dict[str, Any]:
    """Print how a model's kinds were searched and its number of terms; return it for the record."""
    weights = ", ".join(f"{k} {found.weights.of(k):g}" for k in KINDS if k in found.results)
    say(f"{name}: {found.how()}; weights: {weights}")
    for role, counts in found.terms.items():
        say(f"{name}: {role} terms: {counts}")
    return {"protocol": found.protocol, "weights": found.weights, "terms": dict(found.terms)}


def _say_ignored(name: str, kinds: Sequence[Kind], options: ComparisonOptions) -> None:
    """Print which options have no effect on a model that is measured by one kind of vectors."""
    if len(kinds) > 1:
        return
    given = {
        "--kind": options.kinds is not None and options.kinds != tuple(kinds),
        "--kind-weight": options.weights is not None,
        "--protocol": options.protocol is not None and "sparse" not in kinds,
    }
    if ignored := " and ".join(flag for flag, is_ignored in given.items() if is_ignored):
        have = "have" if " and " in ignored else "has"
        say(f"{name}: measured by {kinds[0]} vectors only: {ignored} {have} no effect")


# ---- a folder of sets ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AxisFigures:
    """Averages of each system on one axis, and of the differences to the first one."""

    figures: Mapping[str, Averages]
    differences: Mapping[str, Averages]


@dataclass(frozen=True, slots=True, eq=False)
class LanguageComparison:
    """The scores of several systems on every set of a folder; the first is compared with others."""

    scores: Mapping[str, Sequence[SetScores]]
    axes: Mapping[str, AxisFigures]  # by group and axis
    models: Mapping[str, dict[str, Any]]  # by model: under which conditions it was measured
    options: ComparisonOptions

    @property
    def first(self) -> Sequence[SetScores]:
        """The scores of the first system."""
        return next(iter(self.scores.values()))

    @property
    def others(self) -> list[str]:
        """The names of all systems but the first."""
        return list(self.scores)[1:]

    def difference(self, one: SetScores, name: str) -> Interval:
        """Return by how much the first system is better than another on a set."""
        other = self._of(name, one)
        return paired_difference(one.scores[MAIN], other.scores[MAIN], seed=self.options.seed)

    def record(self, data: Path) -> dict[str, Any]:
        """Return all figures and conditions, for a JSON file."""
        return {
            "data": str(data),
            "metric": MAIN,
            "seed": self.options.seed,
            "seen": self.options.seen,
            "versions": versions("bm25s"),
            "models": self.models,
            "sets": {each.name: self._set_record(each) for each in self.first},
            "averages": {label: asdict(axis) for label, axis in self.axes.items()},
        }

    def _of(self, name: str, one: SetScores) -> SetScores:
        """Return the scores of another system on the same set."""
        return next(each for each in self.scores[name] if each.name == one.name)

    def _set_record(self, one: SetScores) -> dict[str, Any]:
        seed = self.options.seed
        figures = {
            name: {
                **{m: asdict(interval(it, seed=seed)) for m, it in each.scores.items()},
                "languages": {
                    lang: asdict(cell) for lang, cell in cells_of([each], main_scores, seed=seed)
                },
                **({"bias": _bias_record(each, seed)} if one.axis == "mixed" else {}),
            }
            for name in self.scores
            for each in [self._of(name, one)]
        }
        return {
            "group": one.group,
            "axis": one.axis,
            "languages": one.languages,
            "queries": len(one.langs),
            "documents": one.documents,
            "results": figures,
            "differences": {name: asdict(self.difference(one, name)) for name in self.others},
        }


def main_scores(each: SetScores) -> Any:
    """Return the main metric of each query of a set."""
    return each.scores[MAIN]


def compare_by_language(
    names: Sequence[str],
    load: ModelLoader,
    locations: Sequence[SetLocation],
    options: ComparisonOptions,
) -> LanguageComparison:
    """Measure models on every set of a folder.

    Raises:
        DataError: at the first set that cannot be read.
        RecipeError: for a model whose queries would get no prompt, although it was trained with
            some.
    """
    if options.keep is not None:
        check_output(options.keep, kind=EVALUATION)
    stored = options.precision or "float32"
    scores: dict[str, list[SetScores]] = {}
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        embedder = load(name)
        if not options.prompts:
            drop_prompts(embedder)
        if options.task is not None and name == names[0]:
            embedder.settings.prompt("query", options.task)  # raises for an unknown task
        found = measure_sets(
            embedder,
            locations,
            split=options.split,
            task=options.task,
            dims=options.dims,
            stored=stored,
            kept=_kept_scores(embedder, options),
        )
        scores[name] = sorted(found, key=lambda each: each.name)
        models[name] = conditions(embedder, dims=options.dims, stored=stored)
    if options.baselines:
        try:
            for name, words_of in BASELINES.items():
                scores[name] = list(measure_words(locations, words_of, split=options.split))
        except MissingExtraError as error:
            say(f"{' and '.join(BASELINES)} are left out: {error}")
    return LanguageComparison(scores, _axes(scores, options), models, options)


def _kept_scores(embedder: Embedder, options: ComparisonOptions) -> KeptResults | None:
    """Return where the scores of this model with these options are kept."""
    if options.keep is None:
        return None
    mark(options.keep, EVALUATION)
    depends_on = (embedder.fingerprint(), conditions(embedder))
    chosen = (options.split, options.task, options.dims, options.precision)
    return KeptResults(options.keep, "set scores", SCORES_VERSION, *depends_on, *chosen)


def _axes(
    scores: Mapping[str, Sequence[SetScores]], options: ComparisonOptions
) -> dict[str, AxisFigures]:
    seed, seen = options.seed, options.seen
    split = {name: by_axis(sets) for name, sets in scores.items()}
    first = next(iter(split.values()))
    found: dict[str, AxisFigures] = {}
    for (group, axis), own in first.items():
        parts = {name: each[group, axis] for name, each in split.items()}
        figures = {
            name: averages(cells_of(sets, main_scores, seed=seed), seen=seen)
            for name, sets in parts.items()
        }
        minus = {
            name: averages(differences(own, parts[name], MAIN, seed=seed), seen=seen)
            for name in list(parts)[1:]
        }
        found[f"{group}, {axis}" if group else axis] = AxisFigures(figures, minus)
    return found


def _bias_record(each: SetScores, seed: int) -> dict[str, Any]:
    """Return the bias by language; figures of no query are None, since JSON has no NaN."""
    record: dict[str, Any] = {}
    for lang in (None, *sorted(set(each.langs))):
        found = language_bias(each, MAIN, lang=lang, seed=seed)
        record[lang or "all"] = found and {
            name: None if isinstance(it, dict) and not it["queries"] else it
            for name, it in asdict(found).items()
        }
    return record
