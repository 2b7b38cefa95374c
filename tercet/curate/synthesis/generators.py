"""Models that write: what they are asked, what they answer, and a local one of transformers."""

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

from tercet.errors import ModelError, RecipeError
from tercet.models.network.loading import loading
from tercet.models.zoo import zoo

_SORTED: Final = 8  # batches whose prompts are put in order of length together

_FILLER: Final = 0  # a token id that no state is taken from

Answers: TypeAlias = "collections.abc.Generator[tuple[int, Answer], None, None]"
"""Numbers of prompts and what was answered; to close it is to stop."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text for a generator, and what its draws hang on."""

    text: str
    seed: int  # below 2**63


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: a text, or why none did."""

    text: str = ""
    failure: str | None = None


@runtime_checkable
class Generator(Protocol):
    """Answers prompts."""

    @property
    def about(self) -> Mapping[str, Any]:
        """All that its answers hang on, besides the prompt; ``model`` among it. Goes into JSON."""
        ...

    def answers(self, prompts: Iterable[Prompt]) -> Answers:
        """An answer for each prompt, with the prompt's number, as they come."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How the tokens of an answer are drawn.

    Raises:
        RecipeError: for numbers that draw nothing.
    """

    temperature: float | int = 0.7  # 0: the likeliest token always
    top_p: float | int = 0.95  # of the likeliest tokens, so many that they have this share together
    max_tokens: int = 64  # of an answer

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise RecipeError(
                f"temperature {self.temperature:g}, top-p {self.top_p:g} and {self.max_tokens} "
                "tokens draw no answer; use a temperature of 0 or more, a top-p above 0 and up to "
                "1, and at least one token"
            )


class LocalGenerator:
    """A causal model of transformers.

    A prompt goes through the tokenizer's chat template where there is one. Without, the model is
    not taught to stop, so its answer ends with the line. Each prompt brings its own random
    numbers, so an answer does not hang on the others of its batch, but for rounding.

    Inside ``generate`` of transformers, and only there, a batch is filled up on the left.
    """

    def __init__(
        self,
        model: str | Path,
        drawing: Drawing | None = None,
        *,
        batch: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Load the model at a zoo name, a folder or a hub id.

        Raises:
            ModelError: when it is not there, or is no model that writes.
        """
        self.drawing, self.batch = drawing or Drawing(), batch
        self._name, self._dtype = str(model), dtype
        self.model, self.tokenizer = _loaded(self._name, dtype)
        self.model = self.model.to(device).eval()
        end = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.drawing.max_tokens,
            eos_token_id=end if end is not None else self.tokenizer.eos_token_id,
            pad_token_id=_FILLER,
        )

    @property
    def about(self) -> Mapping[str, Any]:
        """The model, its numbers' type, and how tokens are drawn."""
        kind = str(self._dtype).removeprefix("torch.")
        return {"model": self._name, "precision": kind, **asdict(self.drawing)}

    def answers(self, prompts: Iterable[Prompt]) -> Answers:
        """An answer for each prompt; prompts of about the same length are answered together."""
        waiting = iter(enumerate(prompts))
        while some := list(islice(waiting, _SORTED * self.batch)):
            ids = {number: self._ids(prompt.text) for number, prompt in some}
            some.sort(key=lambda pair: len(ids[pair[0]]))
            for start in range(0, len(some), self.batch):
                part = some[start : start + self.batch]
                fitting = [pair for pair in part if len(ids[pair[0]]) <= self._room]
                for number, _ in part[len(fitting) :]:
                    tokens = f"its prompt has {len(ids[number])} tokens"
                    yield number, Answer(failure=f"{tokens}, the model takes {self._room}")
                texts = self._generate(
                    [ids[number] for number, _ in fitting], [prompt.seed for _, prompt in fitting]
                )
                for (number, _), text in zip(fitting, texts, strict=True):
                    yield number, Answer(text)

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return (limit or 1 << 30) - self.drawing.max_tokens

    @property
    def _chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _ids(self, text: str) -> list[int]:
        if not self._chats:
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
            logits_processor=LogitsProcessorList([SeededDraw(self.drawing, seeds)]),
        )
        texts = [self._answer(row) for row in found[:, width:].tolist()]
        if self._chats:
            return texts
        return [(text.strip().splitlines() or [""])[0] for text in texts]

    def _answer(self, ids: list[int]) -> str:
        """The text up to the token that ends it; what follows in a batch is filler."""
        ends = self.model.generation_config.eos_token_id
        known = set(ends if isinstance(ends, list) else [ends])
        length = next((place for place, token in enumerate(ids) if token in known), len(ids))
        return self.tokenizer.decode(ids[:length], skip_special_tokens=True)


class SeededDraw(LogitsProcessor):
    """Logits whose largest is a draw from the softmax, with random numbers of each text's own.

    The largest of ``logits / temperature`` plus noise -log(-log(u)), u uniform, is distributed as
    the softmax of ``logits / temperature`` (the Gumbel-max trick). So a search for the largest
    samples, and no text changes the draws of another one.
    """

    def __init__(self, drawing: Drawing, seeds: Sequence[int]) -> None:
        self.drawing = drawing
        self._randoms = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "texts tokens"], scores: Float[Tensor, "texts vocabulary"]
    ) -> Float[Tensor, "texts vocabulary"]:
        """The logits with noise; those of tokens that are not drawn are -inf."""
        if self.drawing.temperature == 0:
            return scores
        logits = _likeliest(scores.float() / self.drawing.temperature, self.drawing.top_p)
        width = logits.shape[1]
        uniform = torch.stack([torch.rand(width, generator=g) for g in self._randoms])
        # A zero would be minus infinity twice, and so a NaN where the logit is minus infinity.
        uniform = uniform.clamp(min=torch.finfo(torch.float32).tiny)
        return logits - (-uniform.log()).log().to(logits.device)


def _likeliest(
    logits: Float[Tensor, "texts vocabulary"], share: float | int
) -> Float[Tensor, "texts vocabulary"]:
    """The logits of the fewest tokens that have this share together; -inf for the others."""
    if share == 1:
        return logits
    chances, order = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    before = chances.cumsum(dim=1) - chances
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= share)
    return logits.masked_fill(dropped, -torch.inf)


def _loaded(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    place = str(zoo.resolve(name))
    with loading(f"{name}: cannot write texts"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(place)
    model, report = loaded
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])[0]
        raise ModelError(
            f"{name}: the weights of its language-model head are missing ({lost}), so it cannot "
            "write texts; use a causal model that has them, such as smollm2"
        )
    return model, tokenizer
