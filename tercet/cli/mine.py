"""The verb that mines hard negatives."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from tercet.cli.options import (
    AddressOption,
    Precision,
    RunnerOption,
    WorkersOption,
    load,
    opened,
    weights_of,
)
from tercet.data.files.documents import Fields, read_documents
from tercet.errors import RecipeError
from tercet.files.console import columns, results, say
from tercet.files.outputs import check_output

if TYPE_CHECKING:
    from tercet.curate.mining.miner import MiningReport

_MANY: Final = 0.5  # of the candidates dropped as too close: worth a note


def mine(
    files: Annotated[list[Path], typer.Argument(help="Examples: .jsonl, .parquet or folders.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="What scores: zoo name, folder or hub id; bm25 needs none."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A file for all, or a folder with a file for each.")
    ] = None,
    by: Annotated[
        Literal["dense", "sparse", "multi", "hybrid", "bm25"],
        typer.Option(help="Scores that rank documents; hybrid: a weighted sum of several."),
    ] = "dense",
    weights: Annotated[
        str | None,
        typer.Option(help="Of dense, sparse, multi for hybrid; None: those tuned for the teacher."),
    ] = None,
    rule: Annotated[
        Literal["naive", "percent", "margin", "absolute", "quantile", "relative"],
        typer.Option(help="How near a negative may come to the positive's score."),
    ] = "percent",
    value: Annotated[
        float | None, typer.Option(help="Of the rule; None: 0.95, margin 0.05, absolute 0.7.")
    ] = None,
    negatives: Annotated[int, typer.Option(help="Of each row.")] = 7,
    depth: Annotated[int, typer.Option(help="Candidates looked at for each query.")] = 100,
    shift: Annotated[int, typer.Option(help="Leave out this many of the nearest.")] = 0,
    sample_from: Annotated[
        int | None, typer.Option(help="Draw from this many of the best; None: take the best.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of that draw.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Rows keep their negatives.")] = False,
    at_least: Annotated[int, typer.Option(help="Leave out rows with fewer negatives.")] = 0,
    max_positives: Annotated[
        int | None,
        typer.Option(
            help="The rule compares with this many of the best positives among the candidates; "
            "rows without one are left out. None: with all, wherever they are."
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="More documents; may be repeated.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Where their text is in a record.")] = "text",
    prompts: Annotated[
        Literal["row", "teacher"], typer.Option(help="Whose prompts; row: where a row has some.")
    ] = "row",
    sweep: Annotated[
        str | None, typer.Option(help="Try these values of the rule, and write nothing.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where vectors stay for the next time.")] = Path(
        "runs/mining"
    ),
    precision: Precision = "float32",
    runner: RunnerOption = "auto",
    workers: WorkersOption = 1,
    address: AddressOption = None,
) -> None:
    """Find hard negatives: documents near to a query that do not answer it.

    Documents are those of all files and of --corpus. What the rule leaves of a query's nearest
    ones, without those known to answer it, becomes its negatives, with the teacher's scores where
    these are cosines (by dense or multi). By bm25 no model is needed; with a teacher, its tokens
    are the words. The same command continues a killed run.

    Example: tercet mine pairs.jsonl --teacher minilm --out mined.jsonl
    """
    from tercet.curate.jobs.runners import Runner
    from tercet.curate.mining.finders import COSINES
    from tercet.curate.mining.mine_together import SharedMining, mine_together
    from tercet.curate.mining.miner import MINED, Mining
    from tercet.curate.mining.miner import mine as run_mining
    from tercet.curate.mining.miner import sweep as try_values
    from tercet.curate.mining.rules import MiningRule

    where = Runner(engine=runner, workers=workers, address=address)
    values = _numbers(sweep)
    if (out is None) == (sweep is None):
        raise RecipeError("give either --out, to write mined rows, or --sweep, to only count")
    mining = Mining(
        rule=MiningRule(
            kind=rule,
            value=values[0] if values else value,
            shift=shift,
            sample_from=sample_from,
            temperature=temperature,
            seed=seed,
        ),
        negatives=negatives,
        depth=depth,
        keep=keep,
        at_least=at_least,
        max_positives=max_positives,
        prompts=prompts,
        by=by,
        weights=weights_of(weights),
    )
    if teacher is None and by != "bm25":
        raise RecipeError(f"--by {by} needs a --teacher; without one, use --by bm25")
    if out is None and where.several:
        raise RecipeError("--sweep runs in one process; leave out --workers and --runner")
    if out is not None:
        given = [*files, *(corpus or ()), teacher]
        check_output(out, given, None if out.suffix else MINED)
    sources = [source for file in files for source in opened(file)]
    more = {"documents": _DocumentTexts(corpus or [], text_field), "work": work}
    loaded = None if teacher is None else partial(load, teacher, precision)
    if out is None:
        _show(try_values(loaded and loaded(), sources, values, mining=mining, **more))
        return
    if where.several:
        shared = SharedMining(load=loaded, sources=sources, mining=mining, **more)
        reports = mine_together(shared, out, where)
    else:
        reports = run_mining(loaded and loaded(), sources, out, mining=mining, **more)
    _show(reports)
    _advise(reports, mining.negatives, keep=keep)
    if by != "bm25":
        say(f"vectors stay in {work} for the next mining; it may be deleted")
    if by not in COSINES:
        say(f"rows were written without scores: scores by {by} are not cosines")


def _numbers(text: str | None) -> list[float]:
    """Parse the values of a sweep."""
    found: list[float] = []
    with suppress(ValueError):
        found = [float(part) for part in (text or "").split(",") if part.strip()]
    if text is not None and not found:
        raise RecipeError(f"--sweep must be numbers, as in 0.9,0.95,0.98; got {text!r}")
    return found


@dataclass(frozen=True, slots=True)
class _DocumentTexts:
    """The texts of documents in files; each iteration reads the files."""

    files: Sequence[Path]
    text_field: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            for document in read_documents(file, Fields(text=self.text_field)):
                yield document.text


def _show(reports: Sequence["MiningReport"]) -> None:
    """Print three tables with a line per report; one with all columns would be too wide."""
    names = list(reports[0].dropped)
    dropped = columns("source", "rule", "value", "seen", *names)
    made = columns("source", "value", "rows", "written", "a row", "short", "empty")
    scores = columns(
        "source", "value", "positives", "unfound", "unanswered", "positive", "negative", "ratio"
    )
    for report in reports:
        value = "-" if report.rule.kind == "naive" else f"{report.rule.used_value:.4g}"
        label = (report.source, value)
        counts = [report.candidates, *(report.dropped[name] for name in names)]
        dropped.add_row(report.source, report.rule.kind, value, *(f"{n:,}" for n in counts))
        each = f"{report.negatives / max(report.written, 1):.2f}"
        rows, rest = (report.rows, report.written), (report.short, report.empty)
        made.add_row(*label, *(f"{n:,}" for n in rows), each, *(f"{n:,}" for n in rest))
        means = (report.positive_score, report.negative_score, report.ratio)
        places = (report.positives, report.unfound, report.unanswered)
        scores.add_row(*label, *(f"{n:,}" for n in places), *(f"{mean:.3f}" for mean in means))
    out = results()
    for title, table in (
        ("candidates seen, and why they were dropped", dropped),
        ("rows, and negatives a row", made),
        ("positives not among the candidates, and mean scores", scores),
    ):
        out.print(title, style="bold")
        out.print(table)


def _advise(reports: Sequence["MiningReport"], negatives: int, *, keep: bool) -> None:
    for report in reports:
        near = report.dropped["too close"] / max(report.candidates, 1)
        if report.had_negatives:
            done = "kept" if keep else "replaced; --keep keeps them"
            say(f"{report.source}: {report.had_negatives:,} rows had negatives: {done}")
        if report.refused:
            say(f"{report.source}: {report.refused:,} of them are positives, duplicates or blank")
        if report.short and near > _MANY:
            say(
                f"{report.source}: {near:.0%} of the candidates score too close to the positive, "
                f"and {report.short:,} rows have fewer than {negatives} negatives; raise --depth, "
                "or try other values with --sweep"
            )
