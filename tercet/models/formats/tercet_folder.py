"""The folder that tercet writes for a model, and how every kind of model folder is loaded."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from tercet.errors import ModelError
from tercet.files.artifacts import read_json, write_json
from tercet.files.atomic import replacing_folder
from tercet.files.outputs import FolderKind, check_output, holds_only, json_object, mark
from tercet.kinds import Kind
from tercet.models.choices import Attention, Window
from tercet.models.formats.lora_adapters import base_of, is_adapter, merge_adapter
from tercet.models.formats.nv_embed import is_nv_embed, load_nv_embed
from tercet.models.formats.parts import (
    ModelParts,
    foreign_settings,
    settings_of,
    tokenizer_of,
    with_dense_layers,
    with_heads,
    with_layer,
)
from tercet.models.formats.sentence_transformers import (
    module_folders,
    other_similarity,
    write_modules,
)
from tercet.models.network.backbone import Backbone, probe
from tercet.models.network.cpu.int8_files import FILE as INT8_FILE
from tercet.models.network.cpu.int8_files import save_int8
from tercet.models.network.dense_layers import save_dense_layers
from tercet.models.network.heads import save_heads
from tercet.models.network.latent_attention import save_layer
from tercet.models.network.loading import read_object
from tercet.models.settings import (
    FILE,
    VERSION,
    Settings,
    changed,
    named_prompts,
    read_settings,
    with_roles,
)
from tercet.models.tokens import Form, Tokenizer
from tercet.models.zoo import zoo

_FILES: Final = (  # that earlier versions, which left no marker, wrote
    FILE,
    "*config*.json",
    "model*.safetensors*",
    INT8_FILE,
    "adapter_model.safetensors",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.bpe*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "modules.json",
    "*_linear.pt",
    "[0-9]_*/*",
    "[0-9][0-9]_*/*",
    "tercet_layer.py",
)

log = logging.getLogger("tercet")


def load_parts(
    source: str | Path,
    changes: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    attention: Attention | None,
    window: Window | None,
    keep_layers: int | None,
) -> ModelParts:
    """Load the parts of a model, with some settings changed; see :meth:`Embedder.load`."""
    changes = with_roles(changes)
    place = zoo.resolve(str(source))
    folder = Path(place)
    if is_nv_embed(folder):
        if keep_layers is not None:
            raise ModelError(
                f"{source}: a published NV-Embed folder is loaded whole; save it with tercet "
                "first to keep some of its layers only"
            )
        return load_nv_embed(folder, dtype, attention=attention, window=window, changes=changes)
    saved = read_settings(folder) if folder.is_dir() else None
    known = foreign_settings(source, folder) if saved is None else saved["settings"]
    base, about = None, {}
    if saved is not None:
        attention, window = attention or saved["attention"], window or saved["window"]
        base, about = saved.get("adapter_of"), saved.get("about", {})
    elif is_adapter(folder):
        base = base_of(folder)
    backbone = Backbone.load(
        base or place, attention=attention, window=window, dtype=dtype, keep_layers=keep_layers
    )
    if base is not None:
        merge_adapter(backbone, folder)
    settings = changed(known, changes)
    if saved is None:
        _warn_of_similarity(source, folder, settings)
    for name in ("query_tokens", "document_tokens"):
        # A recipe's default may exceed the model's limit; a larger number was asked for.
        if changes.get(name, 0) > max(backbone.max_tokens, getattr(Settings, name)):
            log.warning(
                "%s: %s is %d, and the model has room for %d tokens; texts are cut to that",
                source,
                name,
                changes[name],
                backbone.max_tokens,
            )
    settings, layer = with_layer(folder, settings, changes, backbone.hidden, dtype)
    settings, heads = with_heads(folder, known, settings, backbone.hidden)
    dense_layers = with_dense_layers(folder, known, settings, backbone.hidden)
    if base is not None:
        probe(backbone)
    return ModelParts(
        backbone=backbone,
        tokenizer=tokenizer_of(place if base is None else folder),
        settings=settings,
        layer=layer,
        heads=heads,
        dense_layers=dense_layers,
        about=about,
    )


def _warn_of_similarity(source: str | Path, folder: Path, settings: Settings) -> None:
    """Log that a folder of sentence-transformers asks for another order of documents."""
    named = other_similarity(folder, settings)
    if named is not None:
        remedy = "; load it with normalize=True to rank by cosines" * (named == "cosine")
        log.warning(
            "%s: its vectors keep their length, and its similarity is %s, while tercet ranks by "
            "inner products%s",
            source,
            named,
            remedy,
        )


def known_kinds(source: str | Path) -> tuple[Kind, ...]:
    """Return the kinds of vectors that a model makes, read from its folder's settings alone."""
    folder = Path(zoo.resolve(str(source)))
    return Settings.kinds if is_nv_embed(folder) else settings_of(source, folder).kinds


def known_width(source: str | Path) -> int | None:
    """Return the width of a model's dense vectors, read from its folder's settings alone.

    None if they do not say it, as those of a hub id or an adapter: load the model to know.
    """
    folder = Path(zoo.resolve(str(source)))
    config = read_object(folder / "config.json", optional=True)
    if is_nv_embed(folder) or not config:
        return None
    layers = settings_of(source, folder).dense_layers
    width = layers[-1].width if layers else config.get("hidden_size")
    return width if isinstance(width, int) else None


def _is_older(folder: Path) -> bool:
    """Whether tercet's settings and nothing foreign are in a folder without a marker."""
    of_peft = ("README.md",) if (folder / "adapter_config.json").exists() else ()
    known = {"version", "settings"} <= json_object(folder / FILE).keys()
    return known and holds_only(folder, (*_FILES, *of_peft))


MODEL: Final = FolderKind("a model", is_older=_is_older, error=ModelError)


def save_parts(parts: ModelParts, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a model's folder; LoRA is merged first. See :meth:`Embedder.save`."""
    check_output(folder, kind=MODEL)
    parts.backbone.merge_lora()
    in_8_bits = "8-bit weights" if parts.backbone.has_int8 else None
    inexpressible = in_8_bits or parts.settings.inexpressible()
    with replacing_folder(folder) as fresh:
        _write(parts, fresh, {"about": dict(about)})
        if inexpressible is None:
            write_modules(fresh, parts.settings, parts.backbone.hidden)
        mark(fresh, MODEL)
    if inexpressible is not None:
        log.warning(
            "%s: load it with tercet; sentence-transformers cannot express %s, so no "
            "modules.json was written",
            folder,
            inexpressible,
        )
        return
    miscounted = _miscounted_prompts(parts)
    for name, prompt in miscounted[:1]:
        more = f" and {len(miscounted) - 1} more" if len(miscounted) > 1 else ""
        log.warning(
            "%s: sentence-transformers leaves prompts out of a vector by counting their tokens "
            "alone, and miscounts the %s prompt %r%s, whose end joins the text in one token; "
            "end it with a line break to have its vectors equal",
            folder,
            name,
            prompt,
            more,
        )


def save_adapter(parts: ModelParts, folder: Path, base: str) -> None:
    """Write the low-rank updates without their base. See :meth:`Embedder.save_adapter`."""
    backbone = parts.backbone
    check_output(folder, [base], MODEL, flag="folder")
    if not backbone.has_lora:
        raise ModelError("this model has no LoRA; write it whole with save()")
    turned = backbone.is_decoder and backbone.attention == "bidirectional"
    if turned and not _says_bidirectional(base):
        raise ModelError(
            f'{base}: its config.json must say that it is bidirectional ("is_causal": false), or '
            "other libraries would read this adapter as causal; write the model "
            'whole with save(), or write Embedder.load(base, attention="bidirectional") with '
            "save() first and name that folder as the base"
        )
    for adapter in backbone.model.peft_config.values():
        adapter.base_model_name_or_path = base
    with replacing_folder(folder) as fresh:
        _write(parts, fresh, {"adapter_of": base})
        mark(fresh, MODEL)


def _write(parts: ModelParts, folder: Path, more: Mapping[str, Any]) -> None:
    """Write network, tokenizer, trained layers and settings."""
    backbone, settings = parts.backbone, parts.settings
    if backbone.has_int8:
        backbone.model.config.save_pretrained(folder)
        save_int8(backbone.model, folder)
    else:
        backbone.model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    if parts.layer is not None:
        save_layer(folder, parts.layer)
    if parts.heads is not None:
        save_heads(folder, parts.heads, settings.kinds)
    if parts.dense_layers is not None:
        save_dense_layers(parts.dense_layers, module_folders(folder, settings, "Dense"))
    record = {
        "version": VERSION,
        "attention": backbone.attention,
        "window": backbone.window,
        "settings": asdict(settings),
        **more,
    }
    write_json(folder / FILE, record)


def _miscounted_prompts(parts: ModelParts) -> list[tuple[str, str]]:
    """Return names and texts of prompts that have other tokens alone than before a text."""
    settings = parts.settings
    if settings.pool_prompt or settings.layer is not None:  # a layer's code compares token ids
        return []
    tokenizer = Tokenizer(parts.tokenizer)
    off = []
    for name, prompt in named_prompts(settings):
        alone = tokenizer([prompt], 1 << 30, form=Form(pool_special=False))
        tail_start, tail_end = alone.left_out[0]  # a special token at the end is not counted
        counted = alone.lengths[0] - (tail_end - tail_start)
        (skipped,) = tokenizer(["a"], 1 << 30, prompt, Form(pool_prompt=False)).skipped
        if prompt and counted != skipped:
            off.append((name, prompt))
    return off


def _says_bidirectional(source: str) -> bool:
    """Whether the base's config.json says that it is bidirectional, for any library to see."""
    path = Path(zoo.resolve(source)) / "config.json"
    config = read_json(path) if path.is_file() else {}
    parts = [config, config.get("text_config") or {}]
    return any(
        part.get("is_causal") is False or part.get("use_bidirectional_attention") for part in parts
    )
