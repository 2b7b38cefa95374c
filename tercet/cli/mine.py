"""The commands mine and score: hard negatives and a teacher's scores for training pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from tercet.cli.options import (
    DATA,
    MODEL,
    AddressChoice,
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    Figures,
    JsonOption,
    KindWeightOption,
    NegativeFieldOption,
    PositiveFieldOption,
    QueryFieldOption,
    RunnerChoice,
    SeedOption,
    TextFieldOption,
    WorkersChoice,
    WorkOption,
    changed_weights,
    chosen_dtype,
    fields_of,
    load,
    local_inputs,
    model_option,
    opened,
    out_option,
    runner_of,
)
from tercet.data.files.beir import is_judged_folder
from tercet.data.files.documents import Fields, read_documents
from tercet.errors import ModelError, RecipeError
from tercet.files.console import columns, count_table, say
from tercet.files.outputs import check_files, check_output
from tercet.kinds import Kind

if TYPE_CHECKING:
    from tercet.curate.jobs.score_job import EmbedderTeacher, ScoredBy
    from tercet.curate.mining.miner import MiningReport
    from tercet.models.formats.cross_encoder import CrossEncoder

_RANKING, _RULE, _CHOICE = "Candidates", "Rule", "Negatives"  # panels
_MANY: Final = 0.5  # of the candidates dropped as too close: worth a note


def mine(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of examples, folders of them or of BEIR.", callback=local_inputs
        ),
    ],
    model: Annotated[
        str | None,
        model_option("Model that scores: zoo name, folder or hub id. --by bm25 needs none."),
    ] = None,
    out: Annotated[
        Path | None, out_option("A file for all rows, or a folder with a file for each input.")
    ] = None,
    json: JsonOption = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of more documents. Repeat for more.",
            callback=local_inputs,
            rich_help_panel=DATA,
        ),
    ] = None,
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    text_field: TextFieldOption = "text",
    by: Annotated[
        Literal["dense", "sparse", "multi", "hybrid", "bm25"],
        typer.Option(
            help="Scores that rank documents; hybrid: a weighted sum of several.",
            rich_help_panel=_RANKING,
        ),
    ] = "dense",
    kind_weight: KindWeightOption = None,
    depth: Annotated[
        int, typer.Option(min=1, help="Candidates of each query.", rich_help_panel=_RANKING)
    ] = 100,
    prompts_of: Annotated[
        Literal["row", "model"],
        typer.Option(
            help="Whose prompts are used. row: those of a row, if it has some.",
            rich_help_panel=_RANKING,
        ),
    ] = "row",
    rule: Annotated[
        Literal["naive", "percent", "margin", "absolute", "quantile", "relative"],
        typer.Option(
            help="How near the score of a negative may come to that of the positive.",
            rich_help_panel=_RULE,
        ),
    ] = "percent",
    value: Annotated[
        float | None,
        typer.Option(
            help="Value of the rule. Default: 0.95; margin 0.05, absolute 0.7.",
            rich_help_panel=_RULE,
        ),
    ] = None,
    sweep: Annotated[
        list[float] | None,
        typer.Option(
            help="Try this value of the rule and write nothing. Repeat for more.",
            rich_help_panel=_RULE,
        ),
    ] = None,
    max_positives: Annotated[
        int | None,
        typer.Option(
            help="Compare with at most this many of the best positives among the candidates, and "
            "leave out rows without one. Default: with all positives.",
            rich_help_panel=_RULE,
        ),
    ] = None,
    negatives: Annotated[
        int, typer.Option(help="Negatives of each row.", rich_help_panel=_CHOICE)
    ] = 7,
    shift: Annotated[
        int,
        typer.Option(help="Leave out this many of the nearest documents.", rich_help_panel=_CHOICE),
    ] = 0,
    sample_from: Annotated[
        int | None,
        typer.Option(
            help="Draw negatives from this many of the best. Default: take the best.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="Temperature of that draw.", rich_help_panel=_CHOICE),
    ] = 1.0,
    keep_negatives: Annotated[
        bool,
        typer.Option(
            "--keep-negatives",
            help="Keep the negatives that rows have already.",
            rich_help_panel=_CHOICE,
        ),
    ] = False,
    at_least: Annotated[
        int, typer.Option(help="Leave out rows with fewer negatives.", rich_help_panel=_CHOICE)
    ] = 0,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
    work: WorkOption = Path("runs/mining"),
    runner: RunnerChoice = "auto",
    workers: WorkersChoice = None,
    address: AddressChoice = None,
) -> None:
    """Find hard negatives: documents near to a query that do not answer it.

    Documents are those of all files, of --corpus, and the corpora of folders of BEIR. Of those
    nearest to a query, the ones that are known to answer it are left out, and so are those that
    the rule rejects; the others become its negatives, with the model's scores where these are
    cosines (by dense or multi). By bm25 no model is needed; with a model, its tokens are the words.
    The same command continues a killed run.

    Examples:
        tercet mine pairs.jsonl --model minilm --out mined.jsonl
        tercet mine pairs.jsonl --model minilm --sweep 0.9 --sweep 0.95
    """
    from tercet.curate.mining.finders import COSINES
    from tercet.curate.mining.mine_together import SharedMining, mine_together
    from tercet.curate.mining.miner import MINED, Mining
    from tercet.curate.mining.miner import mine as run_mining
    from tercet.curate.mining.miner import sweep as try_values
    from tercet.curate.mining.rules import MiningRule

    where = runner_of(runner, workers, address, device, alone=out is None or model is None)
    values, shown = sweep or [], Figures(json)
    if (out is None) == (not values):
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
        keep=keep_negatives,
        at_least=at_least,
        max_positives=max_positives,
        prompts="teacher" if prompts_of == "model" else "row",
        by=by,
        weights=changed_weights(kind_weight),
    )
    if model is None and by != "bm25":
        raise RecipeError(f"--by {by} needs --model; without a model, use --by bm25")
    if out is None and where.several:
        raise RecipeError("--sweep runs in one process; leave out --workers and --runner")
    given = [*files, *(corpus or ()), model]
    check_files(given, json=shown.file)
    if out is not None:
        check_output(out, given, None if out.suffix else MINED)
    fields = fields_of(query_field, positive_field, negative_field)
    sources = [source for file in files for source in opened(file, fields=fields)]
    documents = [*(corpus or ()), *(file for file in files if is_judged_folder(file))]
    more = {"documents": _DocumentTexts(documents, text_field), "work": work}
    loaded = None
    if model is not None:
        dtype = chosen_dtype(dtype, device)
        loaded = partial(load, model, dtype, device=device, batch_tokens=batch_tokens)
    if out is None:
        _show(try_values(loaded and loaded(), sources, values, mining=mining, **more), shown)
        return
    if where.several:
        shared = SharedMining(load=loaded, sources=sources, mining=mining, **more)
        reports = mine_together(shared, out, where)
    else:
        reports = run_mining(loaded and loaded(), sources, out, mining=mining, **more)
    _show(reports, shown)
    _advise(reports, mining.negatives, keep=keep_negatives)
    if by != "bm25":
        say(f"vectors stay in {work} for the next mining; it may be deleted")
    if by not in COSINES:
        say(f"rows were written without scores: scores by {by} are not cosines")


@dataclass(frozen=True, slots=True)
class _DocumentTexts:
    """The texts of documents in files; each iteration reads the files."""

    files: Sequence[Path]
    text_field: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            for document in read_documents(file, Fields(text=self.text_field)):
                yield document.text


def _show(reports: Sequence["MiningReport"], shown: Figures) -> None:
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
    for title, table in (
        ("candidates seen, and why they were dropped", dropped),
        ("rows, and negatives a row", made),
        ("positives not among the candidates, and mean scores", scores),
    ):
        shown.print(title, style="bold")
        shown.print(table)
    shown.write(list(map(asdict, reports)))


def _advise(reports: Sequence["MiningReport"], negatives: int, *, keep: bool) -> None:
    for report in reports:
        near = report.dropped["too close"] / max(report.candidates, 1)
        if report.had_negatives:
            done = "kept" if keep else "replaced; --keep-negatives keeps them"
            say(f"{report.source}: {report.had_negatives:,} rows had negatives: {done}")
        if report.refused:
            say(f"{report.source}: {report.refused:,} of them are positives, duplicates or blank")
        if report.short and near > _MANY:
            say(
                f"{report.source}: {near:.0%} of the candidates score too close to the positive, "
                f"and {report.short:,} rows have fewer than {negatives} negatives; raise --depth, "
                "or try other values with --sweep"
            )


def score(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files of examples, folders of them or of BEIR.", callback=local_inputs
        ),
    ],
    model: Annotated[
        str, model_option("Teacher: folder or hub id of a cross-encoder, or any embedder.")
    ],
    out: Annotated[Path, out_option("The rows with scores: a .jsonl or .parquet file.")],
    json: JsonOption = None,
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    architecture: Annotated[
        Literal["auto", "cross-encoder", "embedder"],
        typer.Option(help="What the model is. auto: what config.json says.", rich_help_panel=MODEL),
    ] = "auto",
    score_by: Annotated[
        Literal["dense", "sparse", "multi", "hybrid"] | None,
        typer.Option(
            help="Scores of an embedder; hybrid: a weighted sum of its kinds. Default: hybrid, or "
            "dense where there is no other kind.",
            rich_help_panel=_RANKING,
        ),
    ] = None,
    kind_weight: KindWeightOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
    work: WorkOption = Path("runs/scores"),
    runner: RunnerChoice = "auto",
    workers: WorkersChoice = None,
    address: AddressChoice = None,
) -> None:
    """Add a teacher's score of each positive and negative to training rows.

    A cross-encoder of transformers (one label) reads query and document together; its scores are
    logits, by default in float32. An embedder scores by its vectors, with its own prompts. Scores
    that rows have already are replaced. The same command continues a killed run.

    Example:
        tercet score mined.jsonl --model minilm --out scored-rows.jsonl
    """
    from tercet.curate.jobs.score_job import EmbedderTeacher, ScoreJob, score_rows
    from tercet.models.formats.cross_encoder import is_cross_encoder, names_classifier

    where = runner_of(runner, workers, address, device)
    shown = Figures(json)
    check_files([*files, model], json=shown.file)
    check_output(out, [*files, model])
    crosses = architecture == "cross-encoder" or (
        architecture == "auto" and is_cross_encoder(model)
    )
    if crosses and (score_by is not None or kind_weight):
        raise RecipeError(
            "--score-by and --kind-weight are of embedders; a cross-encoder has one score"
        )
    usual = "float32" if crosses else None  # logits of 8 to 16 have steps of 1/16 in bfloat16
    kind = chosen_dtype(dtype or usual, device)
    machine = {"device": device, "batch_tokens": batch_tokens}
    if crosses:
        loaded = partial(_cross_encoder, model, kind, **machine)
    else:
        loaded = partial(
            _embedder_teacher, model, kind, score_by, changed_weights(kind_weight), **machine
        )
    fields = fields_of(query_field, positive_field, negative_field)
    sources = [source for file in files for source in opened(file, fields=fields)]
    teacher = loaded()
    if architecture == "auto" and isinstance(teacher, EmbedderTeacher):
        if names_classifier(teacher.embedder.backbone.model.config.architectures):
            raise ModelError(
                f"{model}: its config names a classifier, such as a reranker, whose vectors were "
                "not trained; give --architecture cross-encoder, or embedder if they were"
            )
    job = ScoreJob(load=loaded, fingerprint=teacher.fingerprint(), sources=sources)
    report = score_rows(job, out, work, runner=where)
    counts: dict[str, int | str] = {
        "rows": report.rows,
        "documents": report.documents,
        "mean score of positives": f"{report.positive:.4g}",
    }
    if report.negatives:
        counts["mean score of negatives"] = f"{report.negative:.4g}"
        counts["rows with a positive first"] = f"{report.first / report.with_negatives:.1%}"
    shown.print(count_table("what", "count", counts))
    shown.write(
        {**asdict(report), "positive_score": report.positive, "negative_score": report.negative}
    )
    if report.replaced:
        say(f"{report.replaced:,} rows had scores before: replaced")
    if not report.negatives:
        say("no row has negatives, so there is nothing to compare with; mine some: tercet mine")


def _cross_encoder(
    model: str, dtype: str, *, device: str | None, batch_tokens: int | None
) -> "CrossEncoder":
    import torch

    from tercet.models.devices import find_device
    from tercet.models.formats.cross_encoder import CrossEncoder

    place = find_device(device)
    kind = getattr(torch, dtype)
    return CrossEncoder.load(model, dtype=kind, device=place, batch_tokens=batch_tokens)


def _embedder_teacher(
    model: str,
    dtype: str,
    by: "ScoredBy | None",
    weights: "Mapping[Kind, float] | None",
    *,
    device: str | None,
    batch_tokens: int | None,
) -> "EmbedderTeacher":
    from tercet.curate.jobs.score_job import EmbedderTeacher

    embedder = load(model, dtype, device=device, batch_tokens=batch_tokens)
    return EmbedderTeacher(embedder, by, weights)
