"""Parsing a generator's answer: its one question, or the reason for a refusal."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final

from tercet.curate.filtering.scripts import CLEAR, same_scripts, script_shares
from tercet.curate.synthesis.deixis import begins_with_a_pronoun, is_about_a_passage
from tercet.data.files.texts import normal_form

LEAST_UNITS: Final = 3  # words; two characters count as a word in scripts without spaces
MOST_UNITS: Final = 50
COPIED: Final = 0.7  # share of a question's characters in one run that is also in the passage

# Scripts that end a question without a mark, and scripts without spaces between words.
_UNMARKED: Final = {"THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
_UNSPACED: Final = {"CJK", "KANA", *_UNMARKED}

# Characters that resemble others are written as escapes: \uff1a is a full-width colon,
# \uff1f and \u061f are the full-width and the Arabic question mark, \u2018 and \u2019 quotes.
_THOUGHT: Final = re.compile(r"<think>.*?</think>", re.DOTALL)
_LABEL: Final = re.compile(
    r"^[^\n:\uff1a?\uff1f]{0,60}?"
    r"(?:question|query|frage|pregunta|domanda|pergunta|вопрос|질문|質問|問題|问题|\bq)"
    r"(?:\s+is)?\W{0,4}[:\uff1a]\W{0,3}?\s*",
    re.IGNORECASE,
)
_NUMBER: Final = re.compile(r"^(?:\d{1,2}[.)]|[-*•#]+)\s+")
_QUOTES: Final = (
    *(tuple(pair) for pair in ('""', "''", "“”", "„“", "\u2018\u2019", "«»", "「」", "『』", "``")),
    ("**", "**"),
    ("__", "__"),
)
_QUOTED_MARK: Final = re.compile(r"""(["'`“\u2018「])[?\uff1f\u061f]+(["'`”\u2019」])""")

# The end of a question. A "?" before a letter is part of a name; one after a space is an operator,
# unless it is the last (as in French). Also an Armenian and an Ethiopic mark, and Japanese and
# Korean endings, which a full stop may follow.
_END: Final = re.compile(
    r"(?<=[^\s?])\?+(?![\w?])|(?<=\s)\?+(?=\W*$)|[\uff1f\u061f\u055e\u1367]+"
    r"|か(?=。|$)|까(?=\.|$)"
)
_AFTER: Final = re.compile(r"""[\s"'”\u2019»」』)*.。]*""")  # may follow the last mark
# A full stop after a word of at least three letters: "e.g." and "vs." end no sentence.
_SENTENCE: Final = re.compile(r"(?<=\w{3})(?<!\betc)[.!]\s+\S|[。\uff01]\s*\S")


@dataclass(frozen=True, slots=True)
class ParsedQuestion:
    """The question of an answer or, with a refusal, the refused text."""

    question: str
    refusal: str = ""


def parse_question(answer: str, passage: str) -> ParsedQuestion:
    """Return the question of an answer without label, number and quotation marks.

    An answer is refused for the first reason of ``REASONS`` that applies.
    """
    text = _bare(answer)
    for reason, applies in _REFUSALS.items():
        if applies(text, passage):
            return ParsedQuestion(text, reason)
    return ParsedQuestion(" ".join(text.split()))


def question_form(question: str) -> str:
    """Return a normal form for finding duplicates: lower case, single spaces, no final marks."""
    return normal_form(question).rstrip(" ?.!。;\u061f")


def _bare(answer: str) -> str:
    text = _THOUGHT.sub("", answer).strip()
    before = None
    while before != text:  # labels and quotation marks may be nested
        before = text
        for left, right in _QUOTES:
            if len(text) > 2 and text.startswith(left) and text.endswith(right):
                inside = text[len(left) : -len(right)]
                text = text if left in inside or right in inside else inside.strip()
        text = _NUMBER.sub("", _LABEL.sub("", text, count=1), count=1).strip()
    return text


def _ends(text: str) -> list[int]:
    """Return where questions end; quoted question marks do not count."""
    unquoted = _QUOTED_MARK.sub(lambda match: "x" * len(match[0]), text)
    scripts = script_shares(text)
    if scripts.get("GREEK", 0.0) >= CLEAR:  # whose question mark is a semicolon
        unquoted = unquoted.replace(";", "?").replace("\u037e", "?")
    ends = [match.end() for match in _END.finditer(unquoted)]
    return ends if ends or not _UNMARKED & set(scripts) else [len(text)]


def _is_more_than_a_question(text: str, _: str) -> bool:
    end = _ends(text)[-1]
    if "\n" in text or _AFTER.fullmatch(text, end) is None:
        return True
    return _SENTENCE.search(text[:end].rstrip()) is not None


def _units(text: str) -> float | int:
    unspaced = sum(share for name, share in script_shares(text).items() if name in _UNSPACED)
    if unspaced > 0.5:
        return sum(char.isalnum() for char in text) / 2
    return sum(any(char.isalnum() for char in word) for word in text.split())


def _is_copied(text: str, passage: str) -> bool:
    asked, given = question_form(text), normal_form(passage)
    matcher = SequenceMatcher(None, asked, given, autojunk=False)
    return matcher.find_longest_match().size > COPIED * len(asked)


_REFUSALS: Final[dict[str, Callable[[str, str], bool]]] = {
    "empty": lambda text, _: not any(char.isalnum() for char in text),
    "no question": lambda text, _: not _ends(text),
    "several questions": lambda text, _: len(_ends(text)) > 1,
    "more than a question": _is_more_than_a_question,
    "too short": lambda text, _: _units(text) < LEAST_UNITS,
    "too long": lambda text, _: _units(text) > MOST_UNITS,
    "pronoun": lambda text, _: begins_with_a_pronoun(text),
    "speaks of its passage": lambda text, _: is_about_a_passage(text),
    "another script": lambda text, passage: not same_scripts(text, passage),
    "copied": _is_copied,
}
REASONS: Final = tuple(_REFUSALS)
