"""The commands demo, check and filter."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from tercet.cli.options import (
    DATA,
    OUTPUT,
    TRAINING,
    AddressChoice,
    BatchTokensOption,
    DeviceOption,
    DocumentTokensOption,
    DtypeOption,
    Figures,
    JsonOption,
    NegativeFieldOption,
    PlotOption,
    PositiveFieldOption,
    QueryFieldOption,
    QueryTokensOption,
    RunnerChoice,
    SeedOption,
    TestDataOption,
    WorkersChoice,
    WorkOption,
    chosen_dtype,
    fields_of,
    local_inputs,
    model_option,
    opened,
    out_option,
    require_package,
    runner_of,
    shown_progress,
)
from tercet.data.files.beir import is_judged_folder
from tercet.data.files.examples import USUAL_FIELDS
from tercet.data.files.texts import text_key
from tercet.data.report import (
    CheckOptions,
    CountTokens,
    DataReport,
    SourceReport,
    TextReport,
    check_data,
)
from tercet.errors import RecipeError
from tercet.files.atomic import sole_writer
from tercet.files.console import columns, complain, count_table, results, say, shortened
from tercet.files.outputs import check_files, check_output
from tercet.types import Role

EXAMPLES: Final = Path("examples/data/packages.en.parquet")
_COUNTS: Final = (
    "scored_pairs",
    "with_negatives",
    "distinct_queries",
    "distinct_documents",
    "duplicate_pairs",
)

_RANKS, _RULES = "Ranks", "Rules without a model"  # panels
_SHOWN: Final = 3  # names in a note
_SHOWN_FILES: Final = 20


def demo(
    out: Annotated[Path, out_option("Run folder.")] = Path("runs/demo"),
    packages: Annotated[
        Path, typer.Option(help="File with Debian package descriptions.", rich_help_panel=DATA)
    ] = EXAMPLES,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps.", rich_help_panel=TRAINING)
    ] = 40,
    seed: SeedOption = 0,
) -> None:
    """Fine-tune a small model on real texts, measure the gain, and search, in minutes.

    Example:
        tercet demo --out runs/demo
    """
    from tercet.studies.demo import run_demo

    require_package("bm25s", "the demo", "demo")
    require_package("matplotlib", "the demo", "demo")
    run_demo(out, packages, steps=steps, seed=seed, console=results(), say=say)


def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA",
            help="Files of examples, folders of them or of BEIR, or -.",
            callback=local_inputs,
        ),
    ],
    test_data: TestDataOption = None,
    batch_size: Annotated[
        int,
        typer.Option(min=2, help="Batch size, to count batches an epoch.", rich_help_panel=DATA),
    ] = 256,
    model: Annotated[
        str | None, model_option("Count the tokens of this model's tokenizer, on a sample.")
    ] = None,
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    query_tokens: QueryTokensOption = None,
    document_tokens: DocumentTokensOption = None,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Report what is in training data, by source and language, and what is wrong with it.

    Example:
        tercet check pairs.jsonl --model me5-small --document-tokens 256 --test-data test.jsonl
    """
    if model is None and (query_tokens or document_tokens):
        raise RecipeError("tokens are counted with a model's tokenizer; name one with --model")
    shown = Figures(json)
    check_files([*files, *(test_data or ()), model], json=shown.file, plot=plot)
    if plot is not None:
        require_package("matplotlib", "--plot", "plot")
    options = CheckOptions(
        batch_size=batch_size,
        tokens=None if model is None else _token_counter(model),
        query_tokens=query_tokens,
        document_tokens=document_tokens,
        fields=fields_of(query_field, positive_field, negative_field) or USUAL_FIELDS,
        against={name: keys for each in test_data or () for name, keys in _keys(each).items()},
    )
    with shown_progress(f"read {files[0].name}") as progress:
        report = check_data(files, options, progress)
    if report.total is not None:
        _show(report, report.total, options, shown)
    for warning in report.warnings:
        say(f"tercet: note: {warning}")
    for error in report.errors:
        complain(f"tercet: {error}")
    record = asdict(report)
    del record["samples"]
    shown.write({"batch_size": batch_size, "model": model, **record})
    if plot is not None and report.sources:
        _draw(plot, report.sources)
    if report.errors:
        raise typer.Exit(2)


def _token_counter(model: str) -> CountTokens:
    """Count tokens together with the prompts that the model puts before a text."""
    from tercet.models.formats.parts import settings_of, tokenizer_of
    from tercet.models.tokens import Tokenizer
    from tercet.models.zoo.zoo import resolve

    place = resolve(model)
    tokenizer, settings = Tokenizer(tokenizer_of(place)), settings_of(model, Path(place))

    def count(texts: Sequence[str], role: Role) -> list[int]:
        return tokenizer(texts, 1_000_000, settings.prompt(role)).lengths

    return count


def _keys(path: Path) -> dict[str, set[int]]:
    """Return the keys of the texts of an evaluation set, or of each set in a folder, by name."""
    from tercet.curate.convert.decontaminate import evaluation_texts

    sets = [path]
    if path.is_dir() and not is_judged_folder(path):
        sets = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        if not sets:
            raise RecipeError(f"{path}: holds no evaluation set; name a file or a folder of BEIR")
    return {each.name: {text_key(text) for text in evaluation_texts(each)} for each in sets}


def _show(report: DataReport, total: SourceReport, options: CheckOptions, out: Figures) -> None:
    mixture = columns("source", "lang", "rows", "share", "batches", "duplicate pairs")
    for each in (*report.sources, total):
        duplicates = f"{each.duplicate_pairs / each.pairs:.1%}"
        counts = [f"{each.rows:,}", f"{each.share:.1%}", f"{each.batches:,}", duplicates]
        mixture.add_row(each.source, each.lang or "-", *counts)
    out.print(mixture)
    files = columns("file", "format", "rows", "taken for", "not read")
    for each in report.files[:_SHOWN_FILES]:
        taken = ", ".join(
            field if field == column else f"{field}: {column}"
            for field, column in each.columns.items()
        )
        form = f"{each.format}, {each.encoding}" if each.encoding else each.format
        name = Path(each.path).name
        files.add_row(name, form, f"{each.rows:,}", taken, ", ".join(each.unread) or "-")
    out.print(files)
    if (more := len(report.files) - _SHOWN_FILES) > 0:
        out.print(f"and {more:,} more files")
    counts = {
        "examples": total.rows,
        **{name.replace("_", " "): getattr(total, name) for name in _COUNTS},
        "positives per query": f"{total.positives_per_query:.2f}",
    }
    out.print(count_table("what", "count", counts))
    unit = "words" if options.tokens is None else "tokens"
    lengths = columns(
        "source", "lang", unit, "least", "25 %", "median", "75 %", "95 %", "most", "truncated"
    )
    for each in report.sources:
        for role, texts in (("query", each.queries), ("document", each.documents)):
            lengths.add_row(each.source, each.lang or "-", role, *_shown(texts))
    out.print(lengths)
    if options.against:
        overlap = columns("source", "lang", *options.against)
        for each in report.sources:
            found = [f"{each.overlap.get(name, 0):,}" for name in options.against]
            overlap.add_row(each.source, each.lang or "-", *found)
        out.print("rows with a text of an evaluation set", style="bold")
        out.print(overlap)
    for number, example in enumerate(report.samples, start=1):
        out.print(f"sample {number}", style="bold")
        out.print(f"  query     {shortened(example.query)}")
        out.print(f"  positive  {shortened(example.positives[0])}")
        if example.negatives:
            out.print(f"  negative  {shortened(example.negatives[0])}")


def _shown(texts: TextReport) -> list[str]:
    quantiles = asdict(texts.words if texts.tokens is None else texts.tokens).values()
    truncated = "-" if texts.truncated is None else f"{texts.truncated:.1%}"
    return [*(f"{number:,.0f}" for number in quantiles), truncated]


def _draw(path: Path, reports: Sequence[SourceReport]) -> None:
    from tercet.evaluate.report.figures import drawing, mixture_bars, write_png

    shares: dict[str, dict[str, float]] = {}
    for each in reports:
        shares.setdefault(each.source, {})[each.lang] = each.share
    with drawing():
        write_png(path, mixture_bars(shares))


def filter_pairs(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of examples, or folders of them.", callback=local_inputs),
    ],
    *,
    model: Annotated[str, model_option("Model that ranks: zoo name, folder or hub id.")] = (
        "me5-small"
    ),
    out: Annotated[Path, out_option("Folder for the kept pairs, the verdicts and a report.")],
    json: JsonOption = None,
    plot: PlotOption = None,
    preset: Annotated[
        Literal["arctic", "e5", "nomic"],
        typer.Option(
            help="arctic: top 20 of 3 million; e5 and nomic: top 2 of 1 million.",
            rich_help_panel=_RANKS,
        ),
    ] = "arctic",
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            help="Worst rank that is kept. Default: the preset's.",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    top_share: Annotated[
        float | None,
        typer.Option(
            help="Instead of --k: share of a shard that is kept, such as 0.002.",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    shard: Annotated[
        int | None,
        typer.Option(
            help="Pairs that are ranked together. Default: the preset's.", rich_help_panel=_RANKS
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Rule to leave out: same, short, long, letters, script or duplicate. Repeat for "
            "more.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    min_characters: Annotated[
        tuple[int, int],
        typer.Option(
            metavar="QUERY DOCUMENT",
            help="Minimum number of characters of a query and of a document.",
            rich_help_panel=_RULES,
        ),
    ] = (2, 2),
    max_characters: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="QUERY DOCUMENT",
            help="Maximum number of characters of both, such as 500 20000. Default: no limit.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    letters: Annotated[
        float, typer.Option(help="Minimum share of letters in a text.", rich_help_panel=_RULES)
    ] = 0.3,
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    query_tokens: QueryTokensOption = None,
    document_tokens: DocumentTokensOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
    work: WorkOption = Path("runs/filter"),
    keep_vectors: Annotated[
        bool,
        typer.Option("--keep-vectors", help="Keep vectors in --work too.", rich_help_panel=OUTPUT),
    ] = False,
    runner: RunnerChoice = "auto",
    workers: WorkersChoice = None,
    address: AddressChoice = None,
) -> None:
    """Leave out pairs whose document is far from the best ones for its query.

    The pairs of each source and language are cut into shards, and a small model ranks each document
    among all documents of its shard. Before that, rules drop pairs that no model is needed for.
    OUT/pairs holds what is kept, with ranks and scores, OUT/verdicts a line for each pair. The same
    command continues a killed run; with another --k and --out, nothing is encoded again.

    Example:
        tercet filter news.parquet faq.jsonl --model me5-small --out filtered
    """
    from tercet.curate.filtering.judge import PRESETS, FilterFolders, Judge
    from tercet.curate.filtering.pair_filter import (
        FILTERED,
        filter_sources,
        finished,
        settings_of,
        write_report,
    )
    from tercet.curate.filtering.pair_rules import PairRules

    where = runner_of(runner, workers, address, device)
    most = max_characters or (None, None)
    if plot is not None:
        require_package("matplotlib", "--plot", "plot")
    rules = PairRules(
        without=tuple(without or ()),
        query_characters=(min_characters[0], most[0]),
        document_characters=(min_characters[1], most[1]),
        letters=letters,
    )
    usual = PRESETS[preset]
    filtering = replace(
        usual,
        k=usual.k if k is None else k,
        shard=usual.shard if shard is None else shard,
        top_share=top_share,
        seed=seed,
        rules=rules,
    )
    judge = Judge(
        model=model,
        precision=chosen_dtype(dtype, device),
        device=device,
        batch_tokens=batch_tokens,
        query_tokens=query_tokens,
        document_tokens=document_tokens,
    )
    shown = Figures(json)
    check_files([*files, model], json=shown.file, plot=plot)
    check_output(out, [*files, model], FILTERED)
    with sole_writer(out):
        fields = fields_of(query_field, positive_field, negative_field)
        settings = settings_of(files, judge, filtering, fields)
        reports = finished(out, settings)
        if reports is None:
            sources = [source for file in files for source in opened(file, fields=fields)]
            folders = FilterFolders(out=out, work=work, keep_vectors=keep_vectors)
            reports = filter_sources(sources, judge, filtering, folders, runner=where)
            write_report(out, reports)
        else:
            say(f"{out}: has finished already; this is its report")
        _show_filtered(reports, shown)
        _advise(reports, filtering.shard)
        if plot is not None:
            _draw_filtered(reports, plot)


def _show_filtered(reports: Sequence[Mapping[str, Any]], out: Figures) -> None:
    """Print two tables with a line for each source and language."""
    rules = list(reports[0]["dropped"])
    levels = list(reports[0]["levels"])
    counts = columns("source", "lang", "pairs", *rules, "kept", "dropped")
    ranked = columns("source", "lang", "ranked", "shards", "of", "k", "score", *levels)
    for report in reports:
        label = report["source"], report["lang"] or "-"
        dropped = f"{1 - report['kept'] / max(report['pairs'], 1):.1%}"
        numbers = (report["pairs"], *report["dropped"].values(), report["kept"])
        counts.add_row(*label, *(f"{n:,}" for n in numbers), dropped)
        about = (report["ranked"], report["shards"], report["shard"], report["k"])
        kept = (f"{n:,}" for n in report["levels"].values())
        ranked.add_row(*label, *(f"{n:,}" for n in about), f"{report['score']:.3f}", *kept)
    out.print("pairs, and which rule dropped them", style="bold")
    out.print(counts)
    out.print("pairs that were ranked, their mean score, and how many each k keeps", style="bold")
    out.print(ranked)
    out.write(list(reports))


def _advise(reports: Sequence[Mapping[str, Any]], shard: int) -> None:
    small = [report for report in reports if 0 < report["ranked"] and report["shard"] * 2 < shard]
    if small:
        names = ", ".join(f"{_name_of(report)} {report['shard']:,}" for report in small[:_SHOWN])
        more = f" and {len(small) - _SHOWN} more" if len(small) > _SHOWN else ""
        say(
            f"shards are smaller than {shard:,}: {names}{more}; the same rank among fewer pairs is "
            "a weaker test: see --top-share"
        )
    for report in reports:
        if report["pairs"] and not report["ranked"]:
            say(f"{_name_of(report)}: the rules left no pair")


def _name_of(report: Mapping[str, Any]) -> str:
    return f"{report['source']} {report['lang']}".strip()


def _draw_filtered(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    from tercet.evaluate.report.figures import CurvePoint, curves, drawing, write_png
    from tercet.evaluate.report.intervals import Interval

    lines = {}
    for report in reports:
        if count := report["ranked"]:
            lines[_name_of(report)] = [
                CurvePoint(float(k), Interval(n / count, n / count, n / count, queries=count))
                for k, n in report["levels"].items()
            ]
    with drawing():
        write_png(path, curves(lines, x="worst rank that is kept", y="share of pairs"))
