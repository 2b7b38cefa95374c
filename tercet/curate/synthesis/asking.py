"""The prompt that asks for a question about a passage."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tercet.curate.synthesis.passages import Passage
from tercet.errors import DataError
from tercet.files.records import readable

# What arXiv 2402.03216 asks for (appendix A.2), in words of our own: one specific and valuable
# question about the core of a passage, without pronouns, and nothing else. Longer prompts, with a
# list of rules or an example, made a model of 135M parameters talk about the prompt.
PROMPT: Final = """\
Here is a part of a document{title}.

\"\"\"
{passage}
\"\"\"

Write one question in {language} that a person could ask a search engine to find the part above. \
Be specific and name what the question is about. Use no pronouns. Reply with the question only, \
and end it with a question mark.
"""
_SAME_LANGUAGE: Final = "the language of the text"


@dataclass(frozen=True, slots=True)
class Asking:
    """A prompt with places for ``{passage}``, ``{title}`` and ``{language}``.

    In the place of the title stands `` called "..."``, or nothing where a document has none.
    """

    prompt: str = PROMPT
    language: str | None = None  # None: that of the passage

    @classmethod
    def of_file(cls, path: Path, language: str | None = None) -> "Asking":
        """The prompt in a text file.

        Raises:
            DataError: when it cannot be read, or has no place for the passage.
        """
        with readable(path):
            prompt = path.read_text(encoding="utf-8")
        if "{passage}" not in prompt:
            raise DataError(path, None, "has no {passage}; write it where the passage has to stand")
        return cls(prompt, language)

    @property
    def digest(self) -> str:
        """Two prompts of one digest ask the same."""
        about = f"{self.language or _SAME_LANGUAGE}\n{self.prompt}"
        return hashlib.blake2b(about.encode(), digest_size=8).hexdigest()

    def text(self, passage: Passage) -> str:
        """The prompt for a passage."""
        title = f' called "{" ".join(passage.title.split())}"' if passage.title.strip() else ""
        filled = self.prompt.replace("{language}", self.language or _SAME_LANGUAGE)
        # The passage comes last: what looks like a place in it is its own.
        return filled.replace("{title}", title).replace("{passage}", passage.text)
