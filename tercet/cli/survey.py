"""What ``tercet check`` says of a folder of sources."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from tercet.cli.sources import shown_progress
from tercet.data.files.texts import text_key
from tercet.data.survey import Counting, CountTokens, Lengths, SourceReport, Survey, survey
from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results, say
from tercet.types import Role


@dataclass(frozen=True, slots=True)
class Asked:
    """What is wanted beside the counts."""

    batch_size: int
    model: str | None
    limits: tuple[int | None, int | None]  # tokens of a query and of a document
    against: tuple[Path, ...]
    json: Path | None
    plot: Path | None


def check_sources(path: Path, asked: Asked) -> None:
    """Print what each source holds in each language, and end with status 2 at errors."""
    if asked.batch_size < 2:
        raise RecipeError(f"batch_size is {asked.batch_size}; give at least 2")
    if asked.model is None and any(asked.limits):
        raise RecipeError("tokens are counted with a model's tokenizer; name one with --model")
    counting = Counting(
        batch_size=asked.batch_size,
        tokens=None if asked.model is None else _token_counter(asked.model),
        query_tokens=asked.limits[0],
        document_tokens=asked.limits[1],
        against={name: keys for each in asked.against for name, keys in _keys(each).items()},
    )
    with shown_progress(f"read {path.name}") as progress:
        found = survey([path], counting, progress)
    if found.sources:
        _show(found.sources, counting)
    for error in found.errors:
        say(f"tercet: {error}")
    if asked.json is not None:
        _write_json(asked.json, found, asked)
    if asked.plot is not None and found.sources:
        _draw(asked.plot, found.sources)
    if found.errors:
        raise typer.Exit(2)


def _token_counter(model: str) -> CountTokens:
    """Counts with the prompts that the model puts before a text."""
    from tercet.models.formats.parts import settings_of
    from tercet.models.tokens import Tokenizer, load_tokenizer
    from tercet.models.zoo.zoo import resolve

    place = resolve(model)
    tokenizer, settings = Tokenizer(load_tokenizer(place)), settings_of(model, Path(place))

    def count(texts: Sequence[str], role: Role) -> list[int]:
        return tokenizer(texts, 1_000_000, settings.prompt(role)).lengths

    return count


def _keys(path: Path) -> dict[str, set[int]]:
    """The keys of the texts of an evaluation set, or of each in a folder of them, by name."""
    from tercet.curate.convert.decontaminate import evaluation_texts

    sets = [path]
    if path.is_dir() and not (path / "corpus.jsonl").is_file():
        sets = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        if not sets:
            raise RecipeError(f"{path}: holds no evaluation set; name a file or a folder of BEIR")
    return {each.name: {text_key(text) for text in evaluation_texts(each)} for each in sets}


def _show(reports: Sequence[SourceReport], counting: Counting) -> None:
    out = results()
    rows = sum(each.rows for each in reports)
    mixture = columns("source", "lang", "rows", "share", "batches", "duplicate pairs")
    for each in reports:
        twice = f"{each.duplicate_pairs / each.pairs:.1%}"
        counts = [f"{each.rows:,}", f"{each.share:.1%}", f"{each.batches:,}", twice]
        mixture.add_row(each.source, each.lang or "-", *counts)
    batches = sum(each.batches for each in reports)
    mixture.add_row("all", "", f"{rows:,}", "100.0%", f"{batches:,}", "")
    out.print(mixture)
    unit = "words" if counting.tokens is None else "tokens"
    heads = [
        f"{role} {name}" for role in ("query", "document") for name in ("least", "median", "95 %")
    ]
    cut = ["queries cut", "documents cut"] if counting.tokens is not None else []
    lengths = columns("source", "lang", *heads, *cut)
    for each in reports:
        both = (each.queries, each.documents)
        numbers = [n for it in both for n in _shown(it.words if it.tokens is None else it.tokens)]
        shares = ["-" if it.truncated is None else f"{it.truncated:.1%}" for it in both]
        lengths.add_row(each.source, each.lang or "-", *numbers, *shares[: len(cut)])
    out.print(f"{unit} a text", style="bold")
    out.print(lengths)
    if counting.against:
        overlap = columns("source", "lang", *counting.against)
        for each in reports:
            found = [f"{each.overlap.get(name, 0):,}" for name in counting.against]
            overlap.add_row(each.source, each.lang or "-", *found)
        out.print("rows of which a text stands in an evaluation set", style="bold")
        out.print(overlap)


def _shown(lengths: Lengths) -> list[str]:
    return [f"{number:,.0f}" for number in (lengths.least, lengths.median, lengths.p95)]


def _write_json(path: Path, found: Survey, asked: Asked) -> None:
    record = {"batch_size": asked.batch_size, "model": asked.model, **asdict(found)}
    with replacing_file(path) as fresh:
        fresh.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _draw(path: Path, reports: Sequence[SourceReport]) -> None:
    from tercet.evaluate.report.figures import drawing, write_png
    from tercet.evaluate.report.mixture_figure import mixture_bars

    shares: dict[str, dict[str, float]] = {}
    for each in reports:
        shares.setdefault(each.source, {})[each.lang] = each.share
    with drawing():
        write_png(path, mixture_bars(shares))
