"""Words in a question that point to a text which its reader does not see.

Small tables of the most common forms, in the languages of the project's data. Other languages are
simply not checked.
"""

import re
from typing import Final

# A question that begins with these refers to something mentioned before it.
_FIRST: Final = (
    r"(?:this|that|these|those|it|its|they|them|their|he|him|his|she|her)\b",
    # Without forms of "to be": "is it possible" refers to nothing.
    r"(?:\w+\s+){0,2}(?:does|do|did|can|could|will|would|should|has|have|must)\s+(?:it|they|he|she)\b",
    r"(?:dies(?:e[rsmn]?)?|jene[rsmn]?|es|er|sie|ihr|ihre)\b",
    r"(?:wie|was|wann|warum|wo|womit|wozu)\s+\w+\s+(?:es|er|sie)\b",
    r"(?:ce|cet|cette|ces|ceci|cela|il|elle|ils|elles)\b",
    r"¿?\s*(?:este|esta|estos|estas|esto|ese|esa|eso|ello|él|ella|ellos|ellas)\b",
    r"(?:questo|questa|questi|queste|esso|essa|essi|esse)\b",
    r"(?:este|esta|estes|estas|isto|isso|ele|ela|eles|elas)\b",
    r"(?:это|этот|эта|эти|он|она|оно|они)\b",
    r"(?:이것|그것|저것|이|그|저|해당|이러한|그러한)(?:[은는이가을를의]?\s)",
    r"(?:これ|それ|あれ|この|その|あの|彼|彼女|当該)",
    r"(?:这|這|那|它|他|她|此|该|該)",
)

# These refer to something wherever they occur.
_ANYWHERE: Final = (
    r"\b(?:this|these|those)\b",
    r"\bdies(?:e[rsmn]?)?\b",
    r"(?<![-\w])(?:cet|cette|ces)\b",
    r"\b(?:estos|estas)\b",
    r"\b(?:этот|эта|эти|этого|этой|этих|этом|этим)\b",
    r"(?:^|\s)(?:이|그|해당|이러한)\s",
    r"(?:これ|この)",
    r"[这這]",
)

_ABOUT: Final = (
    r"\b(?:the|an?|above|given|following|provided)\s+(?:passage|excerpt)\b",
    r"\b(?:according to|mentioned in|described in|discussed in|stated in|listed in)\s+the\s+"
    r"(?:\w+\s+)?(?:text|article|document|paragraph|section|page|manual)\b",
    r"\b(?:the|this)\s+(?:author|above|(?:given|provided|original)\s+(?:text|sentence))\b",
    r"\b(?:part|text|sentence|section)\s+above\b|\bpart\s+of\s+the\s+(?:text|document)\b",
    r"\b(?:laut|gemäß)\s+(?:dem|des|diesem)\s+(?:\w+\s+)?(?:text|abschnitt|artikel|auszug)",
    r"\bim\s+(?:\w+\s+)?(?:auszug|abschnitt)\b",
    r"\b(?:le|du|ce)\s+(?:passage|extrait)\b",
    r"\b(?:el|del|este)\s+(?:pasaje|extracto|fragmento)\b",
    r"\b(?:отрывк|фрагмент)\w*",
    r"(?:지문|발췌|본문|위의?\s글|이\s글)",
    r"(?:本文|上記|抜粋|以下の文)",
    r"(?:文中|上文|上述|段落|摘录)",
)


def begins_with_a_pronoun(question: str) -> bool:
    """Return whether a question names its subject by a pronoun only."""
    return _FIRST_FORM.match(question) is not None or _ANYWHERE_FORM.search(question) is not None


def is_about_a_passage(question: str) -> bool:
    """Return whether a question mentions the text that it was generated from."""
    return _ABOUT_FORM.search(question) is not None


def _one_of(forms: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{form})" for form in forms), re.IGNORECASE)


_FIRST_FORM: Final = _one_of(_FIRST)
_ANYWHERE_FORM: Final = _one_of(_ANYWHERE)
_ABOUT_FORM: Final = _one_of(_ABOUT)
