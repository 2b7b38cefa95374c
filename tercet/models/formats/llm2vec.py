"""Published models of llm2vec 0.2.3: adapter folders, and the template around a text.

A published model is a base, named but not contained, and one or two folders with adapters of it:
the ``-mntp`` folder, which holds the tokenizer too, and on top of it one trained with SimCSE or on
labelled pairs. What the last ``llm2vec_config.json`` leaves out has the package's defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download

from tercet.errors import ModelError
from tercet.models.choices import PoolingName
from tercet.models.network.loading import read_object
from tercet.models.zoo import zoo

POOLINGS: Final[Mapping[str, PoolingName]] = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "last",
    "last_token": "last",
    "bos_token": "first",
}
DEFAULTS: Final[Mapping[str, Any]] = {
    "pooling_mode": "mean",
    "max_length": 512,
    "doc_max_length": 400,
    "skip_instruction": True,
}
SEPARATOR: Final = "!@#$%^&*()"  # the package puts it before a text, and takes it out again

# What stands around instruction and text, by the exact name of the base.
_INST: Final = ("[INST] ", " [/INST]")
_IM: Final = ("<|im_start|>user\n", "<|im_end|>")
_LLAMA3: Final = "meta-llama/Meta-Llama-3-8B-Instruct"
TEMPLATES: Final[Mapping[str, tuple[str, str]]] = {
    _LLAMA3: ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistralai/Mistral-7B-Instruct-v0.2": _INST,
    "meta-llama/Llama-2-7b-chat-hf": _INST,
    "google/gemma-2-9b-it": ("<bos><start_of_turn>user\n", "<end_of_turn>"),
    "Qwen/Qwen2-1.5B-Instruct": _IM,
    "Qwen/Qwen2-7B-Instruct": _IM,
}
# With pooling_mode "eos_token": what ends a text, by kind of model.
_ENDS: Final[Mapping[str, str]] = {
    "llama": " </s>",
    "mistral": " </s>",
    "gemma": "<eos>",
    "qwen2": "<|endoftext|>",
}
_FILES: Final = ("*.json", "*.model", "*.jinja", "adapter_model.*")


@dataclass(frozen=True, slots=True)
class Llm2Vec:
    """The configuration of a published model."""

    base: str  # name of the model that the first adapter is for; "" if unknown
    tokenizer: Path  # its folder
    pooling: PoolingName
    max_tokens: int  # of instruction, text and template together
    text_tokens: int  # a longer text loses words at its end
    pool_instruction: bool
    before: str  # the template
    after: str  # read and pooled, as part of the text

    def joined(self, instruction: str, text: str) -> str:
        """Return the input with its separator right before the text."""
        head = f"{instruction.strip()} " if instruction else ""
        whole = f"{head}{SEPARATOR}{text}"
        if not (self.before or self.after):
            return whole
        return f"{self.before}{whole.strip()}{self.after}"


def adapter_folder(name: str | Path) -> Path:
    """Return the local folder of an adapter, fetched from the hub if needed.

    Raises:
        ModelError: if there is no such folder and the hub does not provide it.
    """
    place = zoo.resolve(name)
    if isinstance(place, Path):
        folder = place
    else:
        try:
            folder = Path(snapshot_download(place, allow_patterns=list(_FILES)))
        except (OSError, ValueError) as error:  # hub errors are one of the two
            raise ModelError(
                f"{name}: is no local folder, and could not be fetched from the hub "
                f"({type(error).__name__}); give the folder it was downloaded to"
            ) from error
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: has no adapter_config.json, so it is not an adapter; "
            "a whole model is given as the base"
        )
    return folder


def read_llm2vec(folders: Sequence[Path]) -> Llm2Vec:
    """Return what adapter folders say, given in the order in which they are merged.

    Raises:
        ModelError: if a file is damaged, or names a pooling that the package does not have.
    """
    first, last = folders[0], folders[-1]
    config = read_object(first / "config.json", optional=True)
    adapter = read_object(first / "adapter_config.json", optional=True)
    base = adapter.get("base_model_name_or_path") or ""
    named = config.get("_name_or_path") or base
    path = last / "llm2vec_config.json"
    settings = {**DEFAULTS, **read_object(path, optional=True)}
    mode = settings["pooling_mode"]
    if mode not in POOLINGS:
        raise ModelError(f'{path}: pooling_mode must be one of {", ".join(POOLINGS)}; got "{mode}"')
    for key, default in DEFAULTS.items():
        if type(settings[key]) is not type(default):
            raise ModelError(f'{path}: "{key}" must be like {default!r}; got {settings[key]!r}')
    before, after = TEMPLATES.get(named, ("", ""))
    if mode == "eos_token" and named != _LLAMA3:
        plain = named == "meta-llama/Meta-Llama-3-8B"
        after += "<|end_of_text|>" if plain else _ENDS.get(config.get("model_type", ""), "")
    return Llm2Vec(
        base=base or named,
        tokenizer=next((f for f in folders if (f / "tokenizer_config.json").is_file()), first),
        pooling=POOLINGS[mode],
        max_tokens=settings["max_length"],
        text_tokens=settings["doc_max_length"],
        pool_instruction=not settings["skip_instruction"] or mode == "bos_token",
        before=before,
        after=after,
    )
