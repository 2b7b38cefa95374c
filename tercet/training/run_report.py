"""The page about a run, ``report.html``, made from the files that the run has left.

They are ``recipe.json``, ``mixture.json``, the ``log.jsonl`` of each stage, ``messages.jsonl``, and
the record in the saved model, so that a page can be written for any finished run.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Final

from tercet.errors import RecipeError
from tercet.evaluate.report.charts import SERIES, Html, Line, line_chart, with_mean
from tercet.evaluate.report.page import (
    Page,
    Section,
    commands,
    facts,
    flat,
    folded,
    heading,
    messages,
    note,
    side_by_side,
    table,
    write_page,
)
from tercet.files.outputs import json_object
from tercet.files.progress import time_text
from tercet.models.settings import FILE
from tercet.training import log

REPORT: Final = "report.html"
_SHOWN: Final = 12  # sources of a mixture before the reader opens the rest
_NOT_DRAWN: Final = ("_empty",)  # figures of a dev set that are no scores
_WARNED: Final = "warning"


def write_run_report(out: Path) -> Path:
    """Write ``report.html`` of the run in a folder, and return its path.

    Raises:
        RecipeError: if there is no run.
        StorageError: if the disk refuses.
    """
    page = out / REPORT
    write_page(page, run_page(out))
    return page


def try_to_report(out: Path, say: Callable[[str], None]) -> None:
    """Write the page, and say where it is; a page that fails costs no training."""
    try:
        say(f"report: {write_run_report(out)}")
    except Exception as error:  # noqa: BLE001 (the model is saved; nothing here may end the run)
        say(f"tercet: note: {out / REPORT} could not be written: {error}")


def run_page(out: Path) -> Page:
    """Return the page of the run in a folder.

    Raises:
        RecipeError: if there is no run.
    """
    record = json_object(out / "recipe.json")
    if "recipe" not in record:
        raise RecipeError(f"{out}: holds no training (recipe.json); give a run's folder")
    recipe, mixture = record["recipe"], json_object(out / "mixture.json")
    stages, several = recipe["stages"], len(recipe["stages"]) > 1
    names = [f"{number}-{stage['name']}" for number, stage in enumerate(stages, 1)]
    folders = [out / name if several else out for name in names]
    done = _records(out, [stage["name"] for stage in stages])
    sections = [
        Section(
            f"Stage {number}: {stage['name']}" if several else "Training",
            [
                facts(_stage_facts(stage, ended)),
                *stage_charts(log.read(folder / log.LOG), ended.get("dev_scores", ())),
            ],
        )
        for number, (stage, folder, ended) in enumerate(zip(stages, folders, done, strict=True), 1)
    ]
    base = str(recipe["model"]["base"])
    return Page(
        f"Training: {recipe['name']} from {base}",
        [_summary(recipe, record.get("data", {}), done), *_results(stages, done)],
        [
            *sections,
            Section("Data", _data(mixture)),
            Section("Messages", _messages(out)),
            Section("What to do next", [commands(_next(out, base))]),
            Section("Settings", _settings(record)),
        ],
    )


def stage_charts(
    records: Sequence[Mapping[str, Any]], dev_scores: Sequence[Sequence[float | int]] = ()
) -> list[Html]:
    """Return the curves of a stage's log; ``dev_scores`` are steps with the score after them."""
    steps = [record for record in records if "loss" in record]
    if not steps:
        return [note("There is no log of its steps.")]

    def curve(field: str) -> tuple[list[float], list[float]]:
        found = [(record["step"], record[field]) for record in steps if field in record]
        return [float(x) for x, _ in found], [float(y) for _, y in found]

    parts = [line_chart(with_mean("each step", *curve("loss")), name="loss", x="step", y="loss")]
    if measured := _dev_lines(records, dev_scores):
        drawing = line_chart(measured, name="scores on the dev set", x="step", y="dev set")
        parts.append(drawing)
    small = [
        line_chart(
            [Line("learning rate", *curve("learning_rate"))],
            name="learning rate",
            x="step",
            y="learning rate",
            from_zero=True,
            height=130,
        ),
        line_chart(
            with_mean("each step", *curve("tokens_per_second")),
            name="tokens per second",
            x="step",
            y="tokens per second",
            from_zero=True,
            height=130,
        ),
    ]
    if any("ignored" in record for record in steps):
        name = "share of negatives that are ignored"
        drawing = with_mean("each step", *curve("ignored"))
        parts.append(line_chart(drawing, name=name, x="step", y="share", from_zero=True))
    return [*parts, side_by_side(small)]


def _dev_lines(
    records: Sequence[Mapping[str, Any]], dev_scores: Sequence[Sequence[float | int]]
) -> list[Line]:
    """Return the score that the best weights are chosen by, and the other figures beside it."""
    found: dict[str, list[tuple[float, float]]] = {}
    if dev_scores:
        found["dev_score"] = [(float(step), float(score)) for step, score in dev_scores]
    for record in records:
        for name, value in record.items():
            wanted = name.startswith("dev_") and not name.endswith(_NOT_DRAWN)
            if wanted and not (name == "dev_score" and dev_scores):
                found.setdefault(name, []).append((float(record["step"]), float(value)))
    main = found.pop("dev_score", None)
    others = {name: points for name, points in found.items() if points != main}
    every = ({"dev_score": main} if main else {}) | others
    return [
        Line(
            name.removeprefix("dev_"),
            [x for x, _ in points],
            [y for _, y in points],
            ink,
            dots=True,
        )
        for (name, points), ink in zip(every.items(), SERIES, strict=False)
    ]


def _records(out: Path, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return what the saved model says about each stage of this run, the last of its stages."""
    stages = json_object(out / "model" / FILE).get("about", {}).get("stages", [])
    own = stages[-len(names) :]
    if [each.get("stage") for each in own] != list(names):
        return [{} for _ in names]
    return own


def _summary(
    recipe: Mapping[str, Any], data: Mapping[str, Any], done: Sequence[Mapping[str, Any]]
) -> str:
    rows = sum(each.get("examples", 0) for each in data.values())
    sources = f"{len(data)} sources" if len(data) != 1 else "one source"
    seconds = sum(each.get("seconds", 0.0) for each in done)
    time = f" It took {time_text(seconds)} without loading and mining." if seconds else ""
    count = len(recipe["stages"])
    stages = "one stage" if count == 1 else f"{count} stages"
    return (
        f"The model {recipe['model']['base']} was trained by the recipe {recipe['name']} in "
        f"{stages} on {rows:,} rows of {sources}, with the seed {recipe['seed']}.{time}"
    )


def _results(stages: Sequence[Mapping[str, Any]], done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each stage that was measured on a dev set."""
    found = []
    for stage, ended in zip(stages, done, strict=True):
        if scores := ended.get("dev_scores"):
            step, best = max(scores, key=lambda each: each[1])
            taken = "its weights were taken" if stage["keep"] == "best" else "the last were taken"
            where = f", stage {stage['name']}" if len(stages) > 1 else ""
            found.append(
                f"Dev set{where}: {scores[0][1]:.4f} before training, {best:.4f} at best, after "
                f"step {step:,} of {ended['steps']:,}; {taken}."
            )
    return found


def _stage_facts(stage: Mapping[str, Any], ended: Mapping[str, Any]) -> dict[str, str]:
    objective = ended.get("objective") or ", ".join(
        f"{name} {value}" for name, value in flat(stage["objective"])
    )
    shown = {"objective": objective}
    if ended:
        shown["steps"] = f"{ended['steps']:,} steps of up to {ended['batch_size']:,} rows"
        shown["tokens"] = f"{ended['tokens']:,} in {time_text(ended['seconds'])}"
        if ended["seconds"]:
            shown["speed"] = f"{ended['tokens'] / ended['seconds']:,.0f} tokens per second"
    else:
        shown["batch size"] = str(stage["batch_size"])
    if "candidates" in ended:
        shown["candidates"] = f"about {ended['candidates']:,.0f} documents for each query"
    shown["learning rate"] = f"{stage['learning_rate']:g} at its peak, {stage['schedule']}"
    return {name: str(value) for name, value in shown.items()}


def _data(mixture: Mapping[str, Any]) -> list[Html]:
    parts: list[Html] = []
    for name, each in mixture.items():
        rows = [
            [
                source["source"],
                source["lang"] or "-",
                f"{source['rows']:,}",
                f"{source['examples']:,.0f}",
                f"{source['share']:.1%}",
            ]
            for source in sorted(each["sources"], key=lambda source: -source["share"])
        ]
        header = ("source", "language", "rows", "in an epoch", "share")
        if len(mixture) > 1:
            parts.append(heading(f"Stage {name}"))
        parts.append(table(header, rows[:_SHOWN]))
        if rest := rows[_SHOWN:]:
            parts.append(folded(f"{len(rest)} smaller ones", [table(header, rest)]))
    return parts


def _messages(out: Path) -> list[Html]:
    said = dict.fromkeys((each["kind"], each["text"]) for each in log.read_messages(out))
    warned = [each for each in said if each[0] == _WARNED]
    rest = [each for each in said if each[0] != _WARNED]
    parts = [messages(warned)] if warned else [note("There were no warnings.")] if rest else []
    return [*parts, folded("everything that was said", [messages(rest)])] if rest else parts


def _next(out: Path, base: str) -> list[str]:
    model = quote(str(out / "model"))
    index = quote(str(out / "index"))
    return [
        f"tercet eval test.jsonl --model {model} --compare-with {quote(base)} "
        f"--out {quote(str(out / 'evaluation'))}",
        f"tercet index docs.jsonl --model {model} --out {index}",
        f'tercet search {index} "your question"',
    ]


def _settings(record: Mapping[str, Any]) -> list[Html]:
    recipe, run = record["recipe"], record.get("run", {})
    shown = {
        "seed": str(recipe["seed"]),
        "device": str(run.get("device") or "found by tercet"),
        "dtype": str(run.get("dtype", run.get("precision", ""))),
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items()),
        "paper": str(recipe.get("paper") or ""),
    }
    stages = {stage["name"]: dict(flat(stage)) for stage in recipe["stages"]}
    return [
        facts({name: value for name, value in shown.items() if value}),
        folded("settings of the model", [facts(dict(flat(recipe["model"])))]),
        *(folded(f"settings of the stage {name}", [facts(all_)]) for name, all_ in stages.items()),
        folded("settings of the run", [facts(dict(flat(run)))]),
    ]
