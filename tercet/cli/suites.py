"""What the verb ``eval`` does with a folder of sets, by language: tables, figures and a record."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results, say

if TYPE_CHECKING:
    from tercet.evaluate.measures.retention import Stored
    from tercet.evaluate.report.intervals import Interval
    from tercet.evaluate.suites.averages import Averages
    from tercet.evaluate.suites.kept_scores import KeptScores
    from tercet.evaluate.suites.languages import Place, SetScores

_MAIN: Final = "ndcg@10"


@dataclass(frozen=True, slots=True)
class WantedOfSets:
    """What a user wants of a folder of sets."""

    data: Path
    split: str | None
    task: str | None
    prompts: bool
    baselines: bool
    dims: int | None
    stored: "Stored"
    seed: int
    seen: str | None = None  # languages, with commas between
    keep: Path | None = None  # a folder for what was measured
    figures: Path | None = None
    plot: Path | None = None

    @property
    def languages_seen(self) -> list[str] | None:
        """The languages that training had; None: not told."""
        return None if self.seen is None else [lang.strip() for lang in self.seen.split(",")]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What each system is worth on every set, the first system being the one asked about."""

    scores: dict[str, "list[SetScores]"]
    wanted: WantedOfSets
    models: dict[str, Any] = field(default_factory=dict)  # name -> conditions

    @property
    def first(self) -> "list[SetScores]":
        """Those of the first system."""
        return next(iter(self.scores.values()))

    @property
    def others(self) -> list[str]:
        """All systems but the first."""
        return list(self.scores)[1:]

    def difference(self, one: "SetScores", name: str) -> "Interval":
        """By how much the first system is better than another on a set."""
        from tercet.evaluate.report.intervals import paired_difference

        other = next(each for each in self.scores[name] if each.name == one.name)
        return paired_difference(one.scores[_MAIN], other.scores[_MAIN], seed=self.wanted.seed)

    def averages(self) -> "Iterator[tuple[str, dict[str, Averages], dict[str, Averages]]]":
        """Each group and axis, with each system's averages, and the first one's differences."""
        from tercet.evaluate.suites.averages import averages, by_axis, cells_of, differences

        how = {"seed": self.wanted.seed}
        seen = self.wanted.languages_seen
        split = {name: by_axis(sets) for name, sets in self.scores.items()}
        for (group, axis), own in by_axis(self.first).items():
            parts = {name: found[group, axis] for name, found in split.items()}
            figures = {
                name: averages(cells_of(sets, lambda it: it.scores[_MAIN], **how), seen=seen)
                for name, sets in parts.items()
            }
            minus = {
                name: averages(differences(own, parts[name], _MAIN, **how), seen=seen)
                for name in self.others
            }
            yield f"{group}, {axis}" if group else axis, figures, minus


def sets_in(data: Path) -> "list[Place]":
    """The sets of a folder of sets; none where the data are anything else.

    Raises:
        DataError: for two sets of one name.
    """
    from tercet.evaluate.suites.languages import places_in

    return places_in(data)


def refuse_idle(what: str, given: Mapping[str, Any]) -> None:
    """Check that no flag is given that says nothing of what is measured.

    Raises:
        RecipeError: naming one that is.
    """
    if idle := [f"--{name.replace('_', '-')}" for name, it in given.items() if it is not None]:
        raise RecipeError(f"{idle[0]} says nothing of {what}; leave it out")


def measure_suite(
    names: Sequence[str],
    places: "Sequence[Place]",
    read: Callable[[str], Any],
    wanted: WantedOfSets,
) -> None:
    """Measure models on every set of a folder, show tables, and write what was asked for.

    Raises:
        DataError: at the first set that cannot be read.
        RecipeError: for a model whose queries would get no prompt, though it learned some.
    """
    from tercet.evaluate.measures.conditions import conditions
    from tercet.evaluate.measures.prompts import drop_prompts
    from tercet.evaluate.suites.languages import BASELINES, measure_sets, measure_words

    table = Table({}, wanted)
    for name in names:
        embedder = read(name)
        if not wanted.prompts:
            drop_prompts(embedder)
        if wanted.task is not None and name == names[0]:
            embedder.settings.prompt("query", wanted.task)  # refuses an unknown one
        how = {"dims": wanted.dims, "stored": wanted.stored}
        asked = {"split": wanted.split, "task": wanted.task, **how}
        found = measure_sets(embedder, places, kept=_kept(wanted.keep, embedder, asked), **asked)
        table.scores[name] = sorted(found, key=lambda each: each.name)
        table.models[name] = conditions(embedder, **how)
    if wanted.baselines:
        for name, words in BASELINES.items():
            table.scores[name] = list(measure_words(places, words, split=wanted.split))
    _show(table)
    if wanted.figures is not None:
        _write(wanted.figures, table)
    if wanted.plot is not None:
        _draw(wanted.plot, table)


def _kept(folder: Path | None, embedder: Any, asked: dict[str, Any]) -> "KeptScores | None":
    """Where sets are found that this model was measured on in this way."""
    from tercet.evaluate.measures.conditions import conditions
    from tercet.evaluate.suites.kept_scores import KeptScores

    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return KeptScores(folder, repr((embedder.fingerprint(), conditions(embedder), asked)))


def _show(table: Table) -> None:
    _show_sets(table)
    _show_averages(table)
    mixed = [each.name for each in table.first if each.axis == "mixed"]
    if mixed:
        _show_bias(table, mixed)
    untold = [each.name for each in table.first if each.axis == "not told"]
    if untold:
        say(
            f"{', '.join(untold)}: nothing tells the language, so no average counts it; name the "
            'file by it (de.jsonl, ko-en/), or give records a "lang"'
        )


def _show_sets(table: Table) -> None:
    from tercet.evaluate.report.intervals import interval

    head = ("set", "axis", "languages", "queries", "nDCG@10", "Recall@100")
    shown = columns(*head, *(f"minus {name}" for name in table.others))
    for each in table.first:
        figure = interval(each.scores[_MAIN], seed=table.wanted.seed)
        recall = f"{each.scores['recall@100'].mean():.3f}"
        row = (each.name, each.axis, each.languages, f"{len(each.langs):,}", str(figure), recall)
        shown.add_row(*row, *(_signed(table.difference(each, name)) for name in table.others))
    results().print(shown)


def _show_averages(table: Table) -> None:
    """Averages of every system, and by how much the first one is better."""
    shown = columns("nDCG@10 over", *table.scores)
    gains = columns(f"{next(iter(table.scores))} minus", *table.others)
    for label, figures, minus in table.averages():
        for rows, part, as_text in ((shown, figures, str), (gains, minus, _signed)):
            cells = [_cells(each, as_text) for each in part.values()]
            for row in cells[0] if cells else ():
                rows.add_row(f"{label}: {row}", *(each[row] for each in cells))
    for rows in (shown, gains):
        if rows.row_count:
            results().print(rows)


def _cells(found: "Averages", as_text: "Callable[[Interval], str]") -> dict[str, str]:
    return {row: f"{as_text(figure)} {lang}".rstrip() for row, figure, lang in found.rows()}


def _show_bias(table: Table, mixed: Sequence[str]) -> None:
    """Whether documents in the query's own language crowd out those that answer it."""
    head = ("mixed set", "queries in", "nDCG@10", "answer in own language", "in another")
    bias = ("first 10 in own language", "corpus", "more than its share")
    shown = columns("system", *head, *bias)
    for name, sets in table.scores.items():
        for each in (one for one in sets if one.name in mixed):
            shown.add_row(name, *_bias_row(each, None, table.wanted.seed))
            if name == next(iter(table.scores)):
                for lang in sorted(set(each.langs)):
                    shown.add_row(name, *_bias_row(each, lang, table.wanted.seed))
    results().print(shown)


def _bias_row(each: "SetScores", lang: str | None, seed: int) -> list[str]:
    from tercet.evaluate.suites.averages import language_bias

    row = [each.name, lang or "all"]
    found = language_bias(each, _MAIN, lang=lang, seed=seed)
    if found is None:
        return [*row, "nothing was found"]
    figures = [str(it) if it.queries else "" for it in (found.figure, found.own, found.other)]
    return [*row, *figures, f"{found.same:.3f}", f"{found.chance:.3f}", _signed(found.bias)]


def _signed(value: "Interval") -> str:
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def record_of(table: Table) -> dict[str, Any]:
    """All that was measured and how, for a file."""
    from tercet.evaluate.measures.conditions import versions

    wanted = table.wanted
    axes = {
        label: {"figures": figures, "differences": minus}
        for label, figures, minus in table.averages()
    }
    return {
        "data": str(wanted.data),
        "metric": _MAIN,
        "seed": wanted.seed,
        "seen": wanted.languages_seen,
        "versions": versions("bm25s"),
        "models": table.models,
        "sets": {each.name: _set_record(table, each) for each in table.first},
        "averages": {
            label: {kind: {n: asdict(a) for n, a in part.items()} for kind, part in axis.items()}
            for label, axis in axes.items()
        },
    }


def _set_record(table: Table, one: "SetScores") -> dict[str, Any]:
    from tercet.evaluate.report.intervals import interval
    from tercet.evaluate.suites.averages import cells_of

    seed = table.wanted.seed
    systems = {
        name: next(each for each in sets if each.name == one.name)
        for name, sets in table.scores.items()
    }
    figures = {
        name: {
            **{m: asdict(interval(it, seed=seed)) for m, it in each.scores.items()},
            "languages": {
                lang: asdict(cell)
                for lang, cell in cells_of([each], lambda it: it.scores[_MAIN], seed=seed)
            },
            **({"bias": _bias_record(each, seed)} if one.axis == "mixed" else {}),
        }
        for name, each in systems.items()
    }
    return {
        "group": one.group,
        "axis": one.axis,
        "languages": one.languages,
        "queries": len(one.langs),
        "documents": one.documents,
        "results": figures,
        "differences": {name: asdict(table.difference(one, name)) for name in table.others},
    }


def _bias_record(each: "SetScores", seed: int) -> dict[str, Any]:
    from tercet.evaluate.suites.averages import language_bias

    found = {
        lang or "all": language_bias(each, _MAIN, lang=lang, seed=seed)
        for lang in (None, *sorted(set(each.langs)))
    }
    return {lang: None if it is None else _without_empty(asdict(it)) for lang, it in found.items()}


def _without_empty(bias: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: the figure of no query is null."""
    return {n: None if isinstance(it, dict) and not it["queries"] else it for n, it in bias.items()}


def _write(path: Path, table: Table) -> None:
    with replacing_file(path) as fresh:
        text = json.dumps(record_of(table), indent=2, ensure_ascii=False)
        fresh.write_text(text + "\n", encoding="utf-8")


def _draw(path: Path, table: Table) -> None:
    from tercet.evaluate.report.figures import dots, drawing, write_png

    panels = {
        label: {lang: {n: each.languages[lang] for n, each in figures.items()} for lang in one}
        for label, figures, _ in table.averages()
        for one in [next(iter(figures.values())).languages]
    }
    if not panels:
        raise RecipeError(f"--plot {path}: no set tells its language, so there is nothing to draw")
    with drawing():
        write_png(path, dots(panels, y="nDCG@10"))
