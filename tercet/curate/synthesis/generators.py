"""Generators, which answer prompts: the prompt for questions, and a local model of transformers."""

import collections.abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from tercet.curate.synthesis.passages import Passage
from tercet.errors import DataError, ModelError, RecipeError
from tercet.files.artifacts import fingerprint
from tercet.files.limits import read_text
from tercet.files.records import readable
from tercet.models.foreign_code import refuse_code
from tercet.models.network.loading import check_network, loading
from tercet.models.zoo import zoo

_SORTED: Final = 8  # batches whose prompts are sorted by length together
_FILLER: Final = 0  # id of padding tokens, which are masked

# The request of arXiv 2402.03216 (appendix A.2) in our words: one specific and valuable question
# about the core of a passage, without pronouns, and nothing else. Longer prompts, with a list of
# rules or an example, made a model of 135M parameters talk about the prompt.
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

Answers: TypeAlias = "collections.abc.Generator[tuple[int, Answer], None, None]"
"""Numbers of prompts and their answers; closing the generator stops the work."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and the seed of its answer."""

    text: str
    seed: int  # below 2**63


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a prompt: a text, or the reason for a failure."""

    text: str = ""
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class QuestionPrompt:
    """A prompt with the fields ``{passage}``, ``{title}`` and ``{language}``.

    The title becomes `` called "..."``, or nothing for documents without a title.
    """

    prompt: str = PROMPT
    language: str | None = None  # None: that of the passage

    @classmethod
    def of_file(cls, path: Path, language: str | None = None) -> "QuestionPrompt":
        """Read the prompt from a text file.

        Raises:
            DataError: if it cannot be read, or has no ``{passage}``.
        """
        with readable(path):
            prompt = read_text(path)
        if "{passage}" not in prompt:
            raise DataError(path, None, "has no {passage}; write it where the passage belongs")
        return cls(prompt, language)

    @property
    def digest(self) -> str:
        """A fingerprint of the prompt and the language."""
        return fingerprint(f"{self.language or _SAME_LANGUAGE}\n{self.prompt}", size=8)

    def text(self, passage: Passage) -> str:
        """Return the prompt for a passage."""
        title = f' called "{" ".join(passage.title.split())}"' if passage.title.strip() else ""
        filled = self.prompt.replace("{language}", self.language or _SAME_LANGUAGE)
        # The passage is filled in last: it may contain text that looks like a field.
        return filled.replace("{title}", title).replace("{passage}", passage.text)


@runtime_checkable
class Generator(Protocol):
    """Answers prompts."""

    @property
    def about(self) -> Mapping[str, Any]:
        """All that the answers depend on besides the prompt, as JSON values, with ``model``."""
        ...

    def answers(self, prompts: Iterable[Prompt]) -> Answers:
        """Yield the number and the answer of each prompt, in any order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSampling:
    """How the tokens of an answer are sampled.

    Raises:
        RecipeError: for numbers out of range.
    """

    temperature: float | int = 0.7  # 0: always the most probable token
    top_p: float | int = 0.95  # sample from the most probable tokens with this total probability
    max_tokens: int = 64  # of an answer

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise RecipeError(
                "temperature must be at least 0, top-p above 0 and at most 1, and max tokens at "
                f"least 1; got {self.temperature:g}, {self.top_p:g} and {self.max_tokens}"
            )


class LocalGenerator:
    """A causal model of transformers.

    Prompts use the tokenizer's chat template if there is one. A model without a template was not
    trained to stop, so its answer ends with the line. Each prompt has its own random numbers, so
    an answer does not depend on the others of its batch, up to rounding.

    Inside ``generate`` of transformers, and only there, batches are padded, on the left.
    """

    def __init__(
        self,
        model: str | Path,
        sampling: TokenSampling | None = None,
        *,
        batch: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Load the model of a zoo name, a folder or a hub id.

        Raises:
            ModelError: if it is missing, or is not a causal language model.
        """
        self.sampling, self.batch = sampling or TokenSampling(), batch
        self._name, self._dtype = str(model), dtype
        self.model, self.tokenizer = _loaded(self._name, dtype)
        self.model = self.model.to(device).eval()
        end = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.sampling.max_tokens,
            eos_token_id=end if end is not None else self.tokenizer.eos_token_id,
            pad_token_id=_FILLER,
        )

    @property
    def about(self) -> Mapping[str, Any]:
        """The model, its precision, and how tokens are sampled."""
        kind = str(self._dtype).removeprefix("torch.")
        return {"model": self._name, "precision": kind, **asdict(self.sampling)}

    def answers(self, prompts: Iterable[Prompt]) -> Answers:
        """Yield an answer for each prompt; prompts of similar length share a batch."""
        waiting = iter(enumerate(prompts))
        while some := list(islice(waiting, _SORTED * self.batch)):
            ids = {number: self._ids(prompt.text) for number, prompt in some}
            some.sort(key=lambda pair: len(ids[pair[0]]))
            for start in range(0, len(some), self.batch):
                part = some[start : start + self.batch]
                fitting = [pair for pair in part if len(ids[pair[0]]) <= self._room]
                for number, _ in part[len(fitting) :]:
                    tokens = f"the prompt has {len(ids[number])} tokens"
                    yield number, Answer(failure=f"{tokens}, and the model takes {self._room}")
                texts = self._generate(
                    [ids[number] for number, _ in fitting], [prompt.seed for _, prompt in fitting]
                )
                for (number, _), text in zip(fitting, texts, strict=True):
                    yield number, Answer(text)

    @property
    def _room(self) -> int:
        """The maximum number of tokens in a prompt."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return (limit or 1 << 30) - self.sampling.max_tokens

    def _ids(self, text: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(text)["input_ids"]
        message = [{"role": "user", "content": text}]
        whole = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(whole, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def _generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[str]:
        if not prompts:
            return []
        width = max(map(len, prompts))
        ids = torch.tensor([[_FILLER] * (width - len(each)) + each for each in prompts])
        read = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
        found = self.model.generate(
            ids.to(self.model.device),
            attention_mask=read.to(self.model.device),
            logits_processor=LogitsProcessorList([SeededDraw(self.sampling, seeds)]),
        )
        texts = [self._answer(row) for row in found[:, width:].tolist()]
        if self.tokenizer.chat_template:
            return texts
        return [(text.strip().splitlines() or [""])[0] for text in texts]

    def _answer(self, ids: list[int]) -> str:
        """Decode an answer up to its end token; after it, a batch is padded."""
        ends = self.model.generation_config.eos_token_id
        known = set(ends if isinstance(ends, list) else [ends])
        length = next((place for place, token in enumerate(ids) if token in known), len(ids))
        return self.tokenizer.decode(ids[:length], skip_special_tokens=True)


class SeededDraw(LogitsProcessor):
    """Adds noise to logits, so that greedy search samples, with separate seeds for each text.

    The argmax of ``logits / temperature`` plus noise -log(-log(u)), u uniform, is distributed as
    the softmax of ``logits / temperature`` (the Gumbel-max trick).
    """

    def __init__(self, sampling: TokenSampling, seeds: Sequence[int]) -> None:
        self.sampling = sampling
        self._randoms = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "texts tokens"], scores: Float[Tensor, "texts vocabulary"]
    ) -> Float[Tensor, "texts vocabulary"]:
        """Return the logits with noise; -inf for tokens outside top-p."""
        if self.sampling.temperature == 0:
            return scores
        logits = _likeliest(scores.float() / self.sampling.temperature, self.sampling.top_p)
        width = logits.shape[1]
        uniform = torch.stack([torch.rand(width, generator=g) for g in self._randoms])
        # Zero would give infinite noise, and NaN where the logit is -inf.
        uniform = uniform.clamp(min=torch.finfo(torch.float32).tiny)
        return logits - (-uniform.log()).log().to(logits.device)


def _likeliest(
    logits: Float[Tensor, "texts vocabulary"], share: float | int
) -> Float[Tensor, "texts vocabulary"]:
    """Return the logits of the fewest tokens with this total probability; -inf for the others."""
    if share == 1:
        return logits
    chances, order = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    before = chances.cumsum(dim=1) - chances
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= share)
    return logits.masked_fill(dropped, -torch.inf)


def _loaded(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    place = str(zoo.resolve(name))
    refuse_code(place, "config.json", "tokenizer_config.json", "generation_config.json")
    with loading(f"{name}: cannot write texts"):
        check_network(Path(place))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    model, report = loaded
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])[0]
        raise ModelError(
            f"{name}: the weights of its language-model head are missing ({lost}); use a causal "
            "model that has them, such as smollm2"
        )
    return model, tokenizer
