"""Verbs that make training rows of other data, and keep the texts of a test out of them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from tercet.errors import DataError, RecipeError
from tercet.files.console import columns, one_line, results, say

SHOWN_LABELS: Final = 20

convert = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@convert.callback()
def _about_conversions() -> None:
    """Make training rows of labelled texts and of scored pairs.

    Example: tercet convert classification mails.jsonl --task mails --instruction "Tell the kind of
    a mail" --out rows.jsonl
    """


Out = Annotated[Path, typer.Option(help="The rows: a .jsonl or .parquet file.")]
TaskName = Annotated[str, typer.Option(help="Name of the set, kept in each row.")]
Instruction = Annotated[
    str, typer.Option(help="What to do with a text, in words; becomes the prompt.")
]
Against = Annotated[
    list[Path] | None,
    typer.Option(help="A test file or folder whose texts are left out; may be repeated."),
]
Threshold = Annotated[
    float, typer.Option(help="Overlap from which two texts count as near duplicates.")
]
Negatives = Annotated[int, typer.Option(min=1, help="Of each row, at most.")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn.")]
Labelled = Annotated[Path, typer.Argument(help="A .jsonl or .parquet file of labelled texts.")]
TextFields = Annotated[
    list[str] | None,
    typer.Option("--text-field", help='Where the text is ("text"); repeated, they are joined.'),
]
LabelField = Annotated[str, typer.Option(help="Where the label is, or the list of labels.")]
LabelPrefix = Annotated[str, typer.Option(help="Only labels that begin so, without it.")]
LabelTexts = Annotated[
    Path | None, typer.Option(help='The words of labels: {"0": "sadness", ...}; None: the labels.')
]
ModeOption = Annotated[
    Literal["label", "example"] | None,
    typer.Option(help="What answers a text; None: example for more than two labels, else label."),
]
Rows = Annotated[
    int | None, typer.Option(min=1, help="At most, and balanced by label; None: a row a text.")
]
Split = Annotated[str | None, typer.Option(help='Only records with this "split".')]
Lonely = Annotated[
    Literal["label", "skip"],
    typer.Option(help="A text whose label has no other gets the words of its label, or no row."),
]


def labelled(
    file: Labelled,
    task: TaskName,
    instruction: Instruction,
    out: Out,
    mode: ModeOption = None,
    rows: Rows = None,
    negatives: Negatives = 7,
    text_field: TextFields = None,
    label_field: LabelField = "label",
    label_prefix: LabelPrefix = "",
    label_texts: LabelTexts = None,
    lonely: Lonely = "label",
    split: Split = None,
    against: Against = None,
    threshold: Threshold = 0.8,
    seed: Seed = 0,
) -> None:
    """Write a row for each text of a file, and say what became of it."""
    from tercet.curate.convert.classification import convert_labelled
    from tercet.curate.convert.settings import Wanted
    from tercet.data.files.labelled import read_label_texts, read_labelled_texts

    _check_place(out, file, *(against or []))
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
    wanted = Wanted(task=task, instruction=instruction, negatives=negatives, seed=seed)
    converted = convert_labelled(
        texts, wanted, mode=mode, rows=rows, lonely=lonely, label_texts=words
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
    task: TaskName,
    instruction: Instruction,
    out: Out,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest score, mapped to 0 and 5; None: as they are."),
    ] = None,
    alike: Annotated[float, typer.Option(help="Least score of a pair that becomes rows.")] = 4.0,
    unlike: Annotated[float, typer.Option(help="Highest known score of a negative.")] = 2.5,
    negatives: Negatives = 7,
    against: Against = None,
    threshold: Threshold = 0.8,
) -> None:
    """Make rows of pairs of texts with a score, in both directions.

    Negatives are texts of the file that share words with the query and are not known to be like
    it.

    Example: tercet convert similarity pairs.jsonl --task sts
    --instruction "Retrieve semantically similar text." --out rows.jsonl
    """
    from tercet.curate.convert.settings import Wanted
    from tercet.curate.convert.similarity import convert_similarity
    from tercet.data.files.similarity import SimilaritySet

    _check_place(out, file, *(against or []))
    data = SimilaritySet.from_file(file)
    if against:
        texts = data.texts
        pairs = zip(data.pairs.tolist(), data.scores.tolist(), strict=True)
        scored = [(texts[first], texts[second], score) for (first, second), score in pairs]
        kept = list(_withheld(scored, lambda pair: pair[:2], against, threshold))
        data = SimilaritySet.of(data.name, kept)
    wanted = Wanted(task=task, instruction=instruction, negatives=negatives)
    _write(out, convert_similarity(data, wanted, alike=alike, unlike=unlike, rescale=scale))


@convert.command()
def flagembedding(
    places: Annotated[
        list[Path], typer.Argument(help="Files of rows, or folders of them; several are one set.")
    ],
    out: Out,
    prompt: Annotated[
        str, typer.Option(help="Before queries of rows that have none of their own.")
    ] = "",
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
    seed: Seed = 0,
) -> None:
    """Make rows of FlagEmbedding's, with what its names of files and its flags say in each row.

    Other rows' documents are kept out where the name of a file or folder ends in no_in_batch_neg.

    Example: tercet convert flagembedding data/sts data/nq_no_in_batch_neg --out rows.jsonl
    """
    from tercet.curate.convert.flagembedding import Limits, convert_flag_rows, flag_set
    from tercet.data.files.sources import write_examples
    from tercet.files.progress import bar
    from tercet.models.formats.bge_m3_files import FlagRows

    _check_place(out, *places)
    how = FlagRows(prompt=prompt, form=form.replace("\\n", "\n"), seed=seed)
    limits = Limits(rows=rows, small=small, drop=drop)
    chosen = flag_set(places, limits)
    tasks: Counter[str] = Counter()

    def examples(advance: Any) -> Iterator[Any]:
        for example in convert_flag_rows(chosen, how, limits, advance):
            tasks[example.task] += 1
            yield example

    with bar("rows", sum(chosen.counts[file.path] for file in chosen.files)) as advance:
        write_examples(out, examples(advance))
    table = columns("task", "rows")
    for task, count in tasks.items():
        table.add_row(one_line(task), f"{count:,}")
    results().print(table)
    for reason, count in (chosen.left_out + how.notes).items():
        say(f"tercet: note: left out: {count:,} {reason}")


@convert.command("flagembedding-command")
def flagembedding_command(
    script: Annotated[
        Path, typer.Argument(help="A file with the command, such as a shell script of the project.")
    ],
) -> None:
    """Say how tercet does the fine-tuning that a command of FlagEmbedding asks for.

    Nothing is run. What has no counterpart is told.

    Example: tercet convert flagembedding-command m3.sh
    """
    from tercet.curate.convert.flag_command import translated

    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{script}: cannot be read ({error}); give a text file") from error
    found = translated(text)
    results().print(found.command, soft_wrap=True, markup=False, highlight=False)
    for note in found.notes:
        say(f"tercet: note: {note}")


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
    out: Out,
    threshold: Threshold = 0.8,
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
    for path, _ in outputs:
        _check_place(path, file, *against, *(shard.path for _, some in outputs for shard in some))
    index, removal = EvaluationTexts.read(against, threshold), Removal()
    with bar("rows", None) as advance:
        for path, shards in outputs:
            clean = cleaned((row for it in shards for row in shard_examples(it)), index, removal)
            first = next(clean, None)
            if first is not None:
                write_examples(path, _counted(chain([first], clean), advance))
            elif len(outputs) > 1:
                say(f"tercet: note: {path}: no row is left, so it is not written")
    if not removal.kept:
        raise DataError(file, None, "has no row without a text of the test; nothing is left")
    _show_removal(removal)


def _cleaned_files(source: Path, out: Path) -> list[tuple[Path, list[Any]]]:
    """Each file to write, and the shards whose rows go into it."""
    from tercet.data.files.folders import find_groups

    shards = [shard for group in find_groups(source) for shard in group.shards]
    if not source.is_dir() or out.suffix:
        return [(out, shards)]
    return [(out / shard.path.relative_to(source), [shard]) for shard in shards]


def _counted(rows: Iterable[Any], advance: Any) -> Iterator[Any]:
    for row in rows:
        advance()
        yield row


def _check_place(out: Path, *inputs: Path) -> None:
    """Stop before anything is read where the result would take the place of an input."""
    from tercet.files.records import known_suffix

    known_suffix(out)
    if out.resolve() in [each.resolve() for each in inputs]:
        raise RecipeError(f"{out}: is read and cannot be written to as well; give another --out")


def _withheld(
    items: Any, texts_of: Any, against: Sequence[Path], threshold: float
) -> Iterator[Any]:
    """The items without a text of the tests; when all have passed, what was found is shown."""
    from tercet.curate.convert.decontaminate import EvaluationTexts, Removal, withhold

    removal = Removal()
    index = EvaluationTexts.read(against, threshold)
    yield from withhold(items, texts_of, against=index, removal=removal)
    _show_removal(removal)


def _write(out: Path, converted: Any) -> None:
    from tercet.data.files.sources import write_examples

    report = converted.report
    if not report.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items())
        raise RecipeError(f"no row came of {report.records:,} records: {reasons or 'none'}")
    write_examples(out, converted.rows)
    table = columns("what", "count")
    table.add_row("records", f"{report.records:,}")
    for reason, count in report.skipped.items():
        table.add_row(f"no row: {reason}", f"{count:,}")
    table.add_row("rows", f"{report.rows:,}")
    table.add_row("negatives per row", f"{report.negatives_per_row:.2f}")
    if report.label_instead:
        table.add_row("rows with the label for want of another text", f"{report.label_instead:,}")
    results().print(table)
    if report.labels:
        labels = columns("label", "rows")
        for label, count in list(report.labels.items())[:SHOWN_LABELS]:
            labels.add_row(one_line(label), f"{count:,}")
        results().print(labels)
    if len(report.labels) > SHOWN_LABELS:
        say(f"tercet: note: {len(report.labels) - SHOWN_LABELS} smaller labels are not shown")
    if report.mode:
        say(f"tercet: note: rows of mode {report.mode}")


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
