"""The rows of the tables of ``benchmarks/judged.py``: what is compared with what."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from benchmarks.judged_cells import (
    KEPT,
    LESSONS,
    MEASURED_IN_8_BITS,
    PARTS,
    RATES,
    RULES,
    STS_METHODS,
)
from benchmarks.judged_sets import ACROSS, SCIFACT, SCIFACT_DEV, STS, WORDS

INT8_TABLE: Final = "8-bit weights"
KEPT_TABLE: Final = "What training on SciFact does to other sets"
DENSE: Final = [f"scifact/minilm-{name}" for name in ("pairs", "mined", "rule", "teacher")]


@dataclass(frozen=True)
class Row:
    """A cell's figure on a set, and what it is compared with."""

    title: str
    cell: str
    of: str  # the set
    against: str = ""  # a cell
    part: str = ""  # of PARTS, for a model with three kinds
    against_part: str = ""


def tables() -> dict[str, list[Row]]:
    """The rows of each table, by its title."""
    return {
        "SciFact, 300 test claims": _scifact_rows(SCIFACT),
        KEPT_TABLE: _kept_rows(),
        "Similarity": list(_similarity_rows()),
        "Words": list(_word_rows()),
        "Across languages": list(_language_rows()),
        INT8_TABLE: list(_int8_rows()),
        "SciFact, the 100 claims of the dev set, which choose": _scifact_rows(SCIFACT_DEV),
    }


def _scifact_rows(of: str) -> list[Row]:
    base, mined = "scifact/minilm", "scifact/minilm-mined"
    rows = [
        Row("BM25", "scifact/bm25", of),
        Row("minilm, untouched", base, of, "scifact/bm25"),
        Row("minilm, pairs", "scifact/minilm-pairs", of, base),
        Row("minilm, + mined negatives", mined, of, "scifact/minilm-pairs"),
        Row("minilm, + mined negatives", mined, of, base),
        Row("minilm, + rule on false negatives", "scifact/minilm-rule", of, mined),
        Row("minilm, + teacher (sum of kinds)", "scifact/minilm-teacher", of, mined),
        Row("minilm, + teacher (sum of kinds)", "scifact/minilm-teacher", of, base),
        Row("me5-small, untouched", "scifact/me5-small", of, "scifact/bm25"),
        Row("me5-small, + mined negatives", "scifact/me5-small-mined", of, "scifact/me5-small"),
    ]
    teacher = "scifact/me5-small"
    rows += [
        Row("student, 3 of 12 layers of me5-small", "scifact/student", of, teacher),
        Row("the student's queries, me5-small's abstracts", "scifact/student-queries", of, teacher),
    ]
    for cell, title in (("m3-untrained", "untrained"), ("m3", "bge-m3")):
        for part in PARTS:
            name = f"minilm, {title}: {part}"
            rows.append(Row(name, f"scifact/{cell}", of, base, part))
    rows.append(Row("minilm, bge-m3: tuned sum", "scifact/m3", of, mined, "tuned sum"))
    rows.append(
        Row("minilm, bge-m3: tuned sum", "scifact/m3", of, "scifact/m3", "tuned sum", "dense")
    )
    ours = "scifact/float32"
    peers = "scifact/sentence-transformers"
    rows.append(Row("sentence-transformers, float32", peers, of, base))
    rows.append(Row("tercet, the same batches, float32", ours, of, peers))
    if of == SCIFACT_DEV:
        compared = [
            *(
                (f"{model}-mined-{rate}", f"scifact/{model}", "")
                for model in KEPT
                for rate in RATES[model]
            ),
            *((f"minilm-rule-{rule}", mined, "") for rule in RULES),
            *((f"minilm-teacher-{lesson}", mined, "") for lesson in LESSONS),
        ]
        for name, against, part in compared:
            rows.append(Row(name, f"scifact/{name}", of, against, part))
    return rows


def _kept_rows() -> list[Row]:
    trained = {
        "minilm": {
            "minilm-pairs": "pairs",
            "minilm-mined": "+ mined negatives",
            "minilm-teacher": "+ teacher",
            "m3": "bge-m3",
        },
        "me5-small": {"me5-small-mined": "+ mined negatives", "student": "student"},
    }
    return [
        Row(f"{model}, {title}", f"scifact/{cell}", of, f"scifact/{model}")
        for model, cells in trained.items()
        for cell, title in cells.items()
        for of in KEPT[model]
    ]


def _similarity_rows() -> Iterable[Row]:
    for lang in STS:
        of, base = f"sts/{lang}", "similarity/me5-small"
        yield Row("overlap of words", "similarity/words", of)
        yield Row("me5-small, untouched", base, of, "similarity/words")
        positives, graded = (f"similarity/{method}-{lang}" for method in STS_METHODS)
        yield Row("me5-small, pairs as positives", positives, of, base)
        yield Row("me5-small, CoSENT", graded, of, base)
        yield Row("me5-small, CoSENT", graded, of, positives)
    yield from _decoder_rows("sts/en")


def _word_rows() -> Iterable[Row]:
    yield Row("usual label of the word", "words/label", WORDS)
    yield from _decoder_rows(WORDS)


def _decoder_rows(of: str) -> Iterable[Row]:
    yield Row("smollm2, causal", "words/causal", of, "words/label")
    yield Row("smollm2, both ways", "words/bidirectional", of, "words/causal")
    yield Row("smollm2, + MNTP", "words/mntp", of, "words/causal")
    yield Row("smollm2, + MNTP + SimCSE", "words/simcse", of, "words/mntp")


def _language_rows() -> Iterable[Row]:
    for of in ACROSS:
        base = "languages/me5-small"
        yield Row("BM25", "languages/bm25", of)
        yield Row("me5-small, untouched", base, of, "languages/bm25")
        yield Row("me5-small, on packages in English and Korean", "languages/packages", of, base)


def _int8_rows() -> Iterable[Row]:
    for model, sets in MEASURED_IN_8_BITS.items():
        for of in sets:
            base = "languages" if of.startswith("debian/") else "scifact"
            yield Row(f"{model}, 8-bit weights", f"int8/{model}", of, f"{base}/{model}")
