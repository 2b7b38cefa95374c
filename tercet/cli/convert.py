"""Verbs that convert other data to training rows, and remove the texts of a test from them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from tercet.errors import DataError, RecipeError
from tercet.files.console import columns, count_table, results, say
from tercet.files.outputs import FolderKind, check_files, check_output, mark

SHOWN_LABELS: Final = 20
CLEANED: Final = FolderKind("a folder of cleaned rows", shared=True, is_data=True)

convert = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@convert.callback()
def _about_conversions() -> None:
    """Make training rows of labelled texts and of scored pairs.

    Example: tercet convert classification mails.jsonl --task mails --instruction "Tell the kind of
    a mail" --out rows.jsonl
    """


OutOption = Annotated[Path, typer.Option(help="The rows: a .jsonl or .parquet file.")]
TaskOption = Annotated[str, typer.Option(help="Name of the set, kept in each row.")]
InstructionOption = Annotated[
    str, typer.Option(help="What to do with a text, in words; becomes the prompt.")
]
AgainstOption = Annotated[
    list[Path] | None,
    typer.Option(help="A test file or folder whose texts are left out; may be repeated."),
]
ThresholdOption = Annotated[
    float, typer.Option(help="Overlap from which two texts count as near duplicates.")
]
NegativesOption = Annotated[int, typer.Option(min=1, help="Of each row, at most.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of what is drawn.")]
LabelledArgument = Annotated[
    Path, typer.Argument(help="A .jsonl or .parquet file of labelled texts.")
]
TextFieldsOption = Annotated[
    list[str] | None,
    typer.Option("--text-field", help='Where the text is ("text"); repeated, they are joined.'),
]
LabelFieldOption = Annotated[str, typer.Option(help="Where the label is, or the list of labels.")]
LabelPrefixOption = Annotated[str, typer.Option(help="Only labels that begin so, without it.")]
LabelTextsOption = Annotated[
    Path | None, typer.Option(help='The words of labels: {"0": "sadness", ...}; None: the labels.')
]
ModeOption = Annotated[
    Literal["label", "example"] | None,
    typer.Option(help="What answers a text; None: example for more than two labels, else label."),
]
RowsOption = Annotated[
    int | None, typer.Option(min=1, help="At most, and balanced by label; None: a row a text.")
]
SplitOption = Annotated[str | None, typer.Option(help='Only records with this "split".')]
LonelyOption = Annotated[
    Literal["label", "skip"],
    typer.Option(help="A text whose label has no other gets the words of its label, or no row."),
]


def labelled(
    file: LabelledArgument,
    task: TaskOption,
    instruction: InstructionOption,
    out: OutOption,
    mode: ModeOption = None,
    rows: RowsOption = None,
    negatives: NegativesOption = 7,
    text_field: TextFieldsOption = None,
    label_field: LabelFieldOption = "label",
    label_prefix: LabelPrefixOption = "",
    label_texts: LabelTextsOption = None,
    lonely: LonelyOption = "label",
    split: SplitOption = None,
    against: AgainstOption = None,
    threshold: ThresholdOption = 0.8,
    seed: SeedOption = 0,
) -> None:
    """Write a row for each text of a file, and report the counts."""
    from tercet.curate.convert.classification import convert_labelled
    from tercet.curate.convert.conversion import Conversion
    from tercet.data.files.labelled import read_label_texts, read_labelled_texts

    _check_place(out, file, label_texts, *(against or []))
    words = read_label_texts(label_texts) if label_texts else None
    every = read_labelled_texts(
        file,
        text_field=text_field or "text",
        label_field=label_field,
        label_prefix=label_prefix,
    )
    texts = (text for text in every if split is None or text.split == split)
    if against:
        texts = _withheld(texts, lambda text: [text.text], against, threshold)
    conversion = Conversion(task=task, instruction=instruction, negatives=negatives, seed=seed)
    converted = convert_labelled(
        texts, conversion, mode=mode, rows=rows, lonely=lonely, label_texts=words
    )
    _write(out, converted)


convert.command(
    "classification",
    help="""Make rows of texts with a class each.

    The positive of a text is another text of its class, or the words of its label; the negatives
    are of other classes.

    Example: tercet convert classification mails.jsonl --task mails
    --instruction "Classify the mail by department." --out rows.jsonl
    """,
)(labelled)
convert.command(
    "clustering",
    help="""Make rows of texts with topics, one or several each.

    One of a text's topics is drawn for its row; no text or topic that shares any of them becomes
    a negative. Which fields are read decides between titles and whole documents.

    Example: tercet convert clustering papers.jsonl --task papers --text-field title
    --label-field topics --instruction "Name the topic of the paper." --out rows.jsonl
    """,
)(labelled)


@convert.command()
def similarity(
    file: Annotated[
        Path, typer.Argument(help="A .jsonl or .parquet file with text1, text2 and score.")
    ],
    task: TaskOption,
    instruction: InstructionOption,
    out: OutOption,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest score, mapped to 0 and 5; None: unchanged."),
    ] = None,
    alike: Annotated[float, typer.Option(help="Least score of a pair that becomes rows.")] = 4.0,
    unlike: Annotated[float, typer.Option(help="Highest known score of a negative.")] = 2.5,
    negatives: NegativesOption = 7,
    against: AgainstOption = None,
    threshold: ThresholdOption = 0.8,
) -> None:
    """Make rows of pairs of texts with a score, in both directions.

    Negatives are texts of the file that share words with the query and are not known to be like
    it.

    Example: tercet convert similarity pairs.jsonl --task sts
    --instruction "Retrieve semantically similar text." --out rows.jsonl
    """
    from tercet.curate.convert.conversion import Conversion
    from tercet.curate.convert.scored_pairs import convert_similarity
    from tercet.data.files.similarity import SimilaritySet

    _check_place(out, file, *(against or []))
    data = SimilaritySet.from_file(file)
    if against:
        texts = data.texts
        pairs = zip(data.pairs.tolist(), data.scores.tolist(), strict=True)
        scored = [(texts[first], texts[second], score) for (first, second), score in pairs]
        kept = list(_withheld(scored, lambda pair: pair[:2], against, threshold))
        data = SimilaritySet.of(data.name, kept)
    conversion = Conversion(task=task, instruction=instruction, negatives=negatives)
    _write(out, convert_similarity(data, conversion, alike=alike, unlike=unlike, rescale=scale))


@convert.command()
def flagembedding(
    places: Annotated[
        list[Path], typer.Argument(help="Files of rows, or folders of them; several are one set.")
    ],
    out: OutOption,
    prompt: Annotated[str, typer.Option(help="Before queries of rows without a prompt.")] = "",
    form: Annotated[
        str, typer.Option("--format", help="Of prompt and query; \\n is a line break.")
    ] = "{}{}",
    rows: Annotated[int | None, typer.Option(min=1, help="Of each file, at most.")] = None,
    small: Annotated[
        int, typer.Option(min=0, help="A folder's files with fewer rows become one task.")
    ] = 0,
    drop: Annotated[
        int, typer.Option(min=0, help="That task is left out where it has fewer rows.")
    ] = 0,
    seed: SeedOption = 0,
) -> None:
    """Make rows of FlagEmbedding's, with what its names of files and its flags say in each row.

    Other rows' documents are kept out where the name of a file or folder ends in no_in_batch_neg.

    Example: tercet convert flagembedding data/sts data/nq_no_in_batch_neg --out rows.jsonl
    """
    from tercet.curate.convert.flagembedding import FileLimits, convert_flag_rows, flag_set
    from tercet.data.files.sources import write_examples
    from tercet.files.progress import bar
    from tercet.models.formats.bge_m3_files import FlagRows

    _check_place(out, *places)
    how = FlagRows(prompt=prompt, form=form.replace("\\n", "\n"), seed=seed)
    limits = FileLimits(rows=rows, small=small, drop=drop)
    chosen = flag_set(places, limits)
    tasks: Counter[str] = Counter()

    def examples(advance: Any) -> Iterator[Any]:
        for example in convert_flag_rows(chosen, how, limits, advance):
            tasks[example.task] += 1
            yield example

    with bar("rows", sum(chosen.counts[file.path] for file in chosen.files)) as advance:
        write_examples(out, examples(advance))
    results().print(count_table("task", "rows", tasks))
    for reason, count in (chosen.left_out + how.notes).items():
        say(f"tercet: note: left out: {count:,} {reason}")


@convert.command("arctic")
def from_arctic(
    folder: Annotated[
        Path, typer.Argument(help="With queries.parquet, documents.parquet and labels.parquet.")
    ],
    out: OutOption,
    mined: Annotated[
        Path | None, typer.Option(help="A table with RELEVANCE; below 0 are negatives.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where texts wait on the disk meanwhile.")] = Path(
        "runs/convert"
    ),
) -> None:
    """Make rows of Arctic-Embed's tables of queries, documents and labels.

    Example: tercet convert arctic tables/ --mined tables/mined.parquet --out rows.parquet
    """
    from tercet.curate.convert.arctic import TablesReport, examples_of_tables
    from tercet.data.files.sources import write_examples

    tables = (folder / f"{name}.parquet" for name in ("queries", "documents", "labels"))
    _check_place(out, mined, *tables)
    report = TablesReport()
    write_examples(out, examples_of_tables(folder, report, work=work, mined=mined))
    _show_tables(report)


@convert.command()
def to_arctic(
    files: Annotated[list[Path], typer.Argument(help="Rows: .jsonl or .parquet files.")],
    out: Annotated[Path, typer.Option(help="A folder.")],
) -> None:
    """Write rows as Arctic-Embed's tables of queries, documents, labels and mined documents.

    Example: tercet convert to-arctic rows.parquet --out tables/
    """
    from tercet.curate.convert.arctic import TABLES, write_tables
    from tercet.data.files.sources import iter_examples

    check_output(out, files, TABLES)
    _show_tables(write_tables(out, chain.from_iterable(map(iter_examples, files))))


def decontaminate(
    file: Annotated[
        Path, typer.Argument(help="Training rows: .jsonl, .parquet, or a folder of sources.")
    ],
    against: Annotated[
        list[Path],
        typer.Option(
            help="Examples, scored pairs, labelled or plain texts, or a folder in BEIR's layout; "
            "may be repeated."
        ),
    ],
    out: OutOption,
    threshold: ThresholdOption = 0.8,
) -> None:
    """Take the texts of a test, and what is nearly the same, out of training rows.

    A row goes with its query or its last positive; a negative goes alone. A folder becomes a
    folder of the same files, or one file where --out has an ending.

    Example: tercet decontaminate rows.jsonl --against test.jsonl --out clean.jsonl
    """
    from tercet.curate.convert.decontaminate import EvaluationTexts, Removal
    from tercet.curate.convert.decontaminate import decontaminate as cleaned
    from tercet.data.files.folders import shard_examples
    from tercet.data.files.sources import write_examples
    from tercet.files.progress import bar

    outputs = _cleaned_files(file, out)
    if as_folder := file.is_dir() and not out.suffix:
        check_output(out, [file, *against], CLEANED)
    else:
        _check_place(out, file, *against)
    index, removal = EvaluationTexts.read(against, threshold), Removal()
    with bar("rows", None) as advance:

        def rows(shards: Sequence[Any]) -> Iterator[Any]:
            for row in cleaned(chain.from_iterable(map(shard_examples, shards)), index, removal):
                advance()
                yield row

        for path, shards in outputs:
            clean = rows(shards)
            first = next(clean, None)
            if first is not None:
                if as_folder:
                    mark(out, CLEANED)
                write_examples(path, chain([first], clean))
            elif len(outputs) > 1:
                say(f"tercet: note: {path}: not written: no row is left")
    if not removal.kept:
        raise DataError(file, None, "every row has a text of the test; nothing is left")
    _show_removal(removal)


def _cleaned_files(source: Path, out: Path) -> list[tuple[Path, list[Any]]]:
    """Return each file to write, with the shards whose rows go into it."""
    from tercet.data.files.folders import find_groups

    shards = [shard for group in find_groups(source) for shard in group.shards]
    if not source.is_dir() or out.suffix:
        return [(out, shards)]
    return [(out / shard.path.relative_to(source), [shard]) for shard in shards]


def _check_place(out: Path, *inputs: Path | None) -> None:
    """Raise, before anything is read, if the result would replace an input."""
    from tercet.files.records import known_suffix

    known_suffix(out)
    check_files(inputs, out=out)


def _withheld(
    items: Any, texts_of: Any, against: Sequence[Path], threshold: float
) -> Iterator[Any]:
    """Yield the items without a text of the tests; at the end, show what was removed."""
    from tercet.curate.convert.decontaminate import EvaluationTexts, Removal, withhold

    removal = Removal()
    index = EvaluationTexts.read(against, threshold)
    yield from withhold(items, texts_of, against=index, removal=removal)
    _show_removal(removal)


def _write(out: Path, converted: Any) -> None:
    from tercet.data.files.sources import write_examples

    rows = converted.rows
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in converted.skipped.items())
        raise RecipeError(f"{converted.records:,} records gave no row: {reasons or 'none'}")
    write_examples(out, rows)
    counts = {
        "records": converted.records,
        **{f"no row: {reason}": count for reason, count in converted.skipped.items()},
        "rows": len(rows),
        "negatives per row": f"{sum(len(row.negatives) for row in rows) / len(rows):.2f}",
    }
    if converted.label_instead:
        counts["rows with the label for want of another text"] = converted.label_instead
    results().print(count_table("what", "count", counts))
    if converted.labels:
        most = dict(islice(converted.labels.items(), SHOWN_LABELS))
        results().print(count_table("label", "rows", most))
    if len(converted.labels) > SHOWN_LABELS:
        say(f"tercet: note: {len(converted.labels) - SHOWN_LABELS} smaller labels are not shown")
    if converted.mode:
        say(f"tercet: note: rows of mode {converted.mode}")


def _show_removal(removal: Any) -> None:
    table = columns("found in", "field", "how", "texts")
    for (file, field, how), count in sorted(removal.texts.items()):
        table.add_row(file, field, how, f"{count:,}")
    if removal.texts:
        results().print(table)
    gone = removal.rows - removal.kept
    say(f"tercet: note: {gone:,} of {removal.rows:,} left out for texts of the test")
    if removal.without_negatives:
        say(f"tercet: note: {removal.without_negatives:,} of them had no negative left")
    if gone > removal.rows / 2:
        say("tercet: note: more than half went; is the test made of the same texts?")


def _show_tables(report: Any) -> None:
    table = columns("queries", "rows", "without a label", "negatives")
    counts = (report.queries, report.rows, report.unanswered, report.negatives)
    table.add_row(*(f"{count:,}" for count in counts))
    results().print(table)
