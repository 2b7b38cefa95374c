"""The fine-tuning command of FlagEmbedding, as the flags that make ``tercet train bge-m3`` do it.

Read from what a shell script says: every ``--name value ...`` in it, wherever it stands, so that
scripts that gather their arguments in variables can be read too. What has no counterpart is told.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from tercet.errors import RecipeError

Given: TypeAlias = Mapping[str, list[str]]

_POOLINGS: Final = {"cls": "first", "mean": "mean", "last_token": "last"}
_LESSONS: Final = {"kl_div": "kl", "m3_kd_loss": "listwise"}
_YES: Final = ("true", "1", "yes", "y", "t", "on")

# Their defaults, where ours are others, or where a flag's absence says something.
DEFAULTS: Final[Mapping[str, str]] = {
    "train_group_size": "8",
    "query_max_len": "32",
    "passage_max_len": "128",
    "temperature": "0.02",
    "sentence_pooling_method": "cls",
    "normalize_embeddings": "True",
    "unified_finetuning": "False",
    "use_self_distill": "False",
    "self_distill_start_step": "-1",
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "1",
    "nproc_per_node": "1",
    "learning_rate": "5e-5",
    "kd_loss_type": "kl_div",
    "query_instruction_format": "{}{}",
    "passage_instruction_format": "{}{}",
    "seed": "42",
}
RENAMED: Final[Mapping[str, str]] = {
    "model_name_or_path": "base",
    "query_max_len": "query-tokens",
    "passage_max_len": "document-tokens",
    "temperature": "temperature",
    "learning_rate": "learning-rate",
    "shuffle_ratio": "shuffle-segments",
    "max_steps": "steps",
    "seed": "seed",
    "output_dir": "out",
    "save_steps": "save-steps",
}
# What is so here whatever is asked for, and what the other programs' own working needs.
NEEDLESS: Final[Mapping[str, str]] = {
    "pad_to_multiple_of": "nothing is padded here",
    "gradient_checkpointing": "memory is kept low by chunks here",
    "sub_batch_size": "memory is kept low by chunks here",
    "deepspeed": "not used here",
    "negatives_cross_device": "negatives are always shared by all processes here",
    "ddp_find_unused_parameters": "not needed here",
    "dataloader_drop_last": "not needed here",
    "dataloader_num_workers": "not needed here",
    "overwrite_output_dir": "a run goes on where it stopped",
    "cache_path": "data are not copied here",
    "cache_dir": "models have a place of their own",
    "logging_steps": "every step is logged here",
    "same_dataset_within_batch": "say it of the data: tercet convert flagembedding",
    "small_threshold": "a flag of tercet convert flagembedding (--small)",
    "drop_threshold": "a flag of tercet convert flagembedding (--drop)",
    "max_example_num_per_dataset": "a flag of tercet convert flagembedding (--rows)",
}
_USED: Final = frozenset(
    {*DEFAULTS, *RENAMED, "train_data", "colbert_dim", "fix_encoder", "fp16", "bf16", "mrl_dims"}
    | {"query_instruction_for_retrieval", "passage_instruction_for_retrieval", "use_mrl"}
)


@dataclass(frozen=True, slots=True)
class Translated:
    """Flags of ``tercet train bge-m3``, and what each flag without a counterpart asked for."""

    flags: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a line for a shell."""
        return shlex.join(["tercet", "train", "bge-m3", *self.flags])


def translated(script: str) -> Translated:
    """The command that trains as the script does.

    Raises:
        RecipeError: where the script has no flags, or a value that cannot be read.
    """
    given = arguments(script)
    if "model_name_or_path" not in given and "train_data" not in given:
        raise RecipeError(
            "no --model_name_or_path and no --train_data in it; give the command or the script "
            "that starts a fine-tuning of FlagEmbedding"
        )
    flags = [*_renamed(given), *_of_model(given), *_of_losses(given), *_of_data(given)]
    return Translated(tuple(flags), tuple(_notes(given)))


def arguments(script: str) -> dict[str, list[str]]:
    """Every ``--name`` in a script with the words after it, quotes and line ends taken off.

    Of a name that is there twice, the last counts. A quoted word stays whole.
    """
    text = re.sub(r"^\s*#.*$", "", script, flags=re.MULTILINE).replace("\\\n", " ")
    # A variable that gathers arguments: its quotes hold flags, not one value.
    text = re.sub(r'(?<==)"(?=[^"]*--\w)([^"]*)"', r" \1 ", text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"the script cannot be read ({error}); are its quotes closed?") from error
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else []
        elif name is not None and word.strip():
            found[name].append(word)
    return found


def _value(given: Given, name: str) -> str:
    """The first word after a flag, or the default; a flag alone is true."""
    return (given[name] or ["True"])[0] if name in given else DEFAULTS.get(name, "")


def _is_on(given: Given, name: str) -> bool:
    return _value(given, name).lower() in _YES


def _number(given: Given, name: str) -> int:
    try:
        return int(_value(given, name))
    except ValueError as error:
        raise RecipeError(
            f"--{name} is {_value(given, name)!r}, which is no whole number; put the number in"
        ) from error


def _renamed(given: Given) -> list[str]:
    found: list[str] = []
    for theirs, ours in RENAMED.items():
        value = _value(given, theirs)
        if value and not (theirs == "max_steps" and value.startswith("-")):
            found += [f"--{ours}", value]
    return found


def _of_model(given: Given) -> list[str]:
    pooling = _value(given, "sentence_pooling_method")
    if pooling not in _POOLINGS:
        raise RecipeError(f"no such pooling: {pooling}; it is one of {', '.join(_POOLINGS)}")
    found = ["--pooling", _POOLINGS[pooling]]
    if "colbert_dim" in given and _number(given, "colbert_dim") > 0:
        found += ["--multi-dim", _value(given, "colbert_dim")]
    for side, flag in (("query", "--query-prompt"), ("passage", "--document-prompt")):
        text = given.get(f"{side}_instruction_for_retrieval")
        if text:
            form = _value(given, f"{side}_instruction_format").replace("\\n", "\n")
            found += [flag, form.replace("{}", " ".join(text), 1).replace("{}", "", 1)]
    if _is_on(given, "fix_encoder"):
        found += ["--train", "heads"]
    if _is_on(given, "bf16") or _is_on(given, "fp16"):
        found += ["--precision", "bfloat16"]
    return found


def _of_losses(given: Given) -> list[str]:
    if not _is_on(given, "unified_finetuning"):
        dims = given.get("mrl_dims", []) if _is_on(given, "use_mrl") else []
        shorter = [word for dim in dims for word in ("--dims", dim)]
        return ["--stages", "unified", "--kinds", "dense", *shorter]
    found = ["--stages", "unified", "--kinds", "dense,sparse,multi"]
    lesson = _value(given, "kd_loss_type")
    if lesson not in _LESSONS:
        raise RecipeError(f"no such kd_loss_type: {lesson}; it is one of {', '.join(_LESSONS)}")
    if _is_on(given, "knowledge_distillation"):
        found += ["--teacher", _LESSONS[lesson]]
    if not _is_on(given, "use_self_distill"):
        return [*found, "--no-self-distillation"]
    # Theirs begins after the step of this number, and counts from 0.
    return [*found, "--distil-after", str(max(_number(given, "self_distill_start_step") + 1, 0))]


def _of_data(given: Given) -> list[str]:
    per_device, accumulated, devices = (
        _number(given, name)
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "nproc_per_node",
        )
    )
    found = ["--batch-size", str(per_device * accumulated * devices)]
    found += ["--negatives", str(max(_number(given, "train_group_size") - 1, 0))]
    return [*found, *(word for path in given.get("train_data", []) for word in ("--data", path))]


def _notes(given: Given) -> list[str]:
    said: list[tuple[bool, str]] = [
        (
            "num_train_epochs" in given and "max_steps" not in given,
            f"--num_train_epochs {_value(given, 'num_train_epochs')}: give --steps, which is "
            "epochs times rows over the batch size",
        ),
        (
            _value(given, "warmup_ratio") not in ("", "0.1"),
            f"--warmup_ratio {_value(given, 'warmup_ratio')}: the recipe's is 0.1",
        ),
        (
            _number(given, "gradient_accumulation_steps") > 1,
            "--gradient_accumulation_steps: its batches become one, whose documents are all "
            "negatives of each other's queries",
        ),
        (
            not _is_on(given, "normalize_embeddings"),
            "--normalize_embeddings False: vectors are always of unit length here",
        ),
        (_is_on(given, "fp16"), "--fp16: bfloat16 takes its place"),
        ("output_dir" not in given, "--output_dir is not said: give --out, the folder of the run"),
    ]
    notes = [text for applies, text in said if applies]
    notes += [
        f"--train_data {path}: make one file of it with tercet convert flagembedding"
        for path in given.get("train_data", [])
        if not path.endswith(".jsonl")
    ]
    notes += [f"--{name}: {NEEDLESS[name]}" for name in given if name in NEEDLESS]
    told = {*_USED, *NEEDLESS, "num_train_epochs", "warmup_ratio"}
    return [*notes, *(f"--{name}: has no counterpart" for name in given if name not in told)]
