"""Facts about a model folder, read without loading its weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tercet.errors import ModelError
from tercet.models.choices import DenseSettings
from tercet.models.formats.sentence_transformers import read_modules
from tercet.models.network.cpu.int8_files import FILE as INT8_FILE
from tercet.models.network.loading import read_object
from tercet.models.settings import FILE, Settings, read_settings
from tercet.models.zoo import zoo
from tercet.models.zoo.loaders import STATED_POOLING


def manifest(source: str) -> dict[str, str]:
    """Return how a model reads texts and how it was made, as lines for people.

    Raises:
        ModelError: if the folder is not a model, or its files are damaged.
    """
    place = Path(zoo.resolve(source))
    if place.is_file():
        raise ModelError(f"{source}: is a file; inspect reads folders and installed models")
    if not place.is_dir():
        raise ModelError(f"{source}: is not here; inspect reads folders and installed models")
    config = read_object(place / "config.json", optional=True)
    config = config or read_object(place / "adapter_config.json", optional=True)
    saved = read_settings(place) if (place / FILE).exists() else None
    return dict(_lines(place, config, saved))


def _lines(
    place: Path, config: dict[str, Any], saved: dict[str, Any] | None
) -> Iterator[tuple[str, str]]:
    yield "folder", str(place)
    if "peft_type" in config:
        yield "adapter of", str(config.get("base_model_name_or_path") or "not said")
    else:
        yield "architecture", ", ".join(config.get("architectures") or ["not said"])
        turned = config.get("is_causal") is False or config.get("use_bidirectional_attention")
        yield "config.json", "reads both ways" if turned else "says no direction"
    if (place / INT8_FILE).exists():
        yield "weights", "8 bits (int8): for encoding only"
    if saved is None:
        yield FILE, "none: tercet did not write this folder"
        try:
            settings = read_modules(place)
        except ModelError as error:
            yield "cannot be loaded", str(error)
            return
        if settings is None:
            if STATED_POOLING in config:
                yield "pooling", f"{config[STATED_POOLING]}, as the GGUF file states"
            return
    else:
        settings = saved["settings"]
        yield "attention", f"{saved['attention']}, windows: {saved['window']}"
    yield from _reading(settings)
    yield from _history((saved or {}).get("about", {}))


def _reading(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield how texts become vectors."""
    yield "pooling", settings.pooling + (", prompts pooled" if settings.pool_prompt else "")
    if settings.layer is not None:
        layer = settings.layer
        size = f"{layer.latents} latents, " if layer.kind == "latent" else ""
        yield "layer before pooling", f"{layer.kind}: {size}{layer.heads} heads"
    if settings.dense_layers:
        yield "dense layers after pooling", ", ".join(map(_dense_layer, settings.dense_layers))
    if settings.ends:
        yield "end-of-text token", "after every text"
    yield "longest text", f"{settings.query_tokens} (query), {settings.document_tokens} (document)"
    for role, prompt in settings.prompts.items():
        yield f"prompt of a {role}", repr(prompt)
    for task, prompts in settings.task_prompts.items():
        for role, prompt in prompts.items():
            yield f"prompt of a {role}, {task}", repr(prompt)


def _dense_layer(layer: DenseSettings) -> str:
    activation = "" if layer.activation == "identity" else f" {layer.activation}"
    return f"to {layer.width}{activation}{', residual' * layer.residual}"


def _history(about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the training stages, in order, and the adapters that were merged."""
    for name in ("recipe", "base", "seed"):
        if name in about:
            yield name, str(about[name])
    for number, stage in enumerate(about.get("stages", ()), start=1):
        kind = "LoRA, merged" if stage["lora"] else "all weights"
        yield (
            f"stage {number}",
            f"{stage['stage']}: {stage['steps']:,} steps of {stage['batch_size']}, "
            f"{stage['tokens']:,} tokens, {stage['seconds'] / 60:.1f} min, {kind}; "
            f"weights {stage['weights'][:12]}",
        )
    if made := about.get("int8"):
        yield (
            "quantized",
            f"{made['by_range']} layers with inputs in a measured range, {made['by_token']} by "
            f"token, {len(made['float'])} left in float; mean cosine {made['mean']:.4f}, smallest "
            f"{made['smallest']:.4f}",
        )
    for number, merged in enumerate(about.get("merged", ()), start=1):
        yield f"adapter {number}", f"{merged['adapter']}; sha256 {merged['sha256'][:12]}"
