"""Embedders in folders: what is written there, and how it becomes an embedder again."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tercet.errors import ModelError
from tercet.files.atomic import replacing_folder
from tercet.kinds import Kind
from tercet.models.embedder import Embedder
from tercet.models.formats.lora_adapters import merge_adapter
from tercet.models.formats.nv_embed_files import is_nv_embed
from tercet.models.formats.sentence_transformers import write_modules
from tercet.models.network.backbone import Backbone, probe
from tercet.models.network.heads import save_heads
from tercet.models.network.latent_attention import save_layer
from tercet.models.settings import (
    FILE,
    VERSION,
    Settings,
    as_st_folder,
    changed,
    known_settings,
    named_prompts,
    read_settings,
    with_heads,
    with_layer,
)
from tercet.models.tokens import Form, load_tokenizer
from tercet.models.zoo import zoo

log = logging.getLogger("tercet")


def load(source: str | Path, how: Mapping[str, Any], changes: Mapping[str, Any]) -> Embedder:
    """What :meth:`Embedder.load` promises; ``how`` are the arguments of ``Backbone.load``."""
    place = zoo.resolve(str(source))
    folder = Path(place)
    if is_nv_embed(folder):
        return _load_nv_embed(source, folder, how, changes)
    saved = read_settings(folder) if folder.is_dir() else None
    if saved is not None:
        how = {**how, **{name: how[name] or saved[name] for name in ("attention", "window")}}
    known = known_settings(source, folder) if saved is None else saved["settings"]
    adapted = saved is not None and "adapter_of" in saved
    backbone = Backbone.load(saved["adapter_of"] if saved and adapted else place, **how)
    if adapted:
        merge_adapter(backbone, folder)
    settings = changed(known, changes)
    for name in ("query_tokens", "document_tokens"):
        # The usual number is a recipe's own; who asks for more wants to know.
        if changes.get(name, 0) > max(backbone.max_tokens, getattr(Settings, name)):
            log.warning(
                "%s: %s is %d, and the model has room for %d tokens; texts are cut to that",
                source,
                name,
                changes[name],
                backbone.max_tokens,
            )
    settings, layer = with_layer(folder, settings, changes, backbone.hidden, how["dtype"])
    settings, heads = with_heads(folder, known, settings, backbone.hidden)
    tokenizer = load_tokenizer(folder if adapted else place)
    embedder = Embedder(backbone, tokenizer, settings, layer, heads)
    embedder.about = saved.get("about", {}) if saved is not None else {}
    embedder.eval()
    if adapted:
        probe(backbone)
    return embedder


def known_kinds(source: str | Path) -> tuple[Kind, ...]:
    """The kinds of vectors that a model makes, told by its folder's settings alone."""
    folder = Path(zoo.resolve(str(source)))
    if is_nv_embed(folder):
        return Settings.kinds
    saved = read_settings(folder) if folder.is_dir() else None
    return (known_settings(source, folder) if saved is None else saved["settings"]).kinds


def _load_nv_embed(
    source: str | Path, folder: Path, how: Mapping[str, Any], changes: Mapping[str, Any]
) -> Embedder:
    from tercet.models.formats.nv_embed import load_nv_embed  # heavy, and seldom needed

    if how["keep_layers"] is not None:
        raise ModelError(
            f"{source}: a published NV-Embed folder is loaded whole; save it with tercet "
            "first to keep some of its layers only"
        )
    attention, window = how["attention"], how["window"]
    return load_nv_embed(folder, how["dtype"], attention=attention, window=window, changes=changes)


def save(embedder: Embedder, folder: Path, about: Mapping[str, Any]) -> None:
    """What :meth:`Embedder.save` promises."""
    holds = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if holds and not holds & {FILE, "config.json", "adapter_config.json"}:
        raise ModelError(
            f"{folder}: is not a model and would be overwritten; choose another folder"
        )
    embedder.backbone.merge_lora()
    unheard_of = embedder.settings.only_ours()
    with replacing_folder(folder) as fresh:
        _write(embedder, fresh, {"about": dict(about)})
        if unheard_of is None:
            write_modules(fresh, settings=as_st_folder(embedder.settings, embedder.dim))
    if unheard_of is not None:
        log.warning(
            "%s: load it with tercet; sentence-transformers cannot express %s, so no "
            "modules.json was written",
            folder,
            unheard_of,
        )
        return
    miscounted = _miscounted_prompts(embedder)
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


def save_adapter(embedder: Embedder, folder: Path, base: str) -> None:
    """What :meth:`Embedder.save_adapter` promises."""
    backbone = embedder.backbone
    if not backbone.has_lora:
        raise ModelError("there is no LoRA on this model; save() writes it whole")
    turned = backbone.is_decoder and backbone.attention == "bidirectional"
    if turned and not _says_bidirectional(base):
        raise ModelError(
            f'{base}: does not say that it reads both ways ("is_causal": false in its '
            "config.json), so other libraries would read this adapter one way; write the model "
            'whole with save(), or write Embedder.load(base, attention="bidirectional") with '
            "save() first and name that folder as the base"
        )
    for adapter in backbone.model.peft_config.values():
        adapter.base_model_name_or_path = base
    with replacing_folder(folder) as fresh:
        _write(embedder, fresh, {"adapter_of": base})


def _write(embedder: Embedder, folder: Path, more: Mapping[str, Any]) -> None:
    """The network, its tokenizer, what else is trained, and the settings."""
    embedder.backbone.model.save_pretrained(folder)
    embedder.tokenizer.stock.save_pretrained(folder)
    if embedder.layer is not None:
        save_layer(folder, embedder.layer)
    save_heads(folder, embedder.heads, embedder.kinds)
    record = {
        "version": VERSION,
        "attention": embedder.backbone.attention,
        "window": embedder.backbone.window,
        "settings": asdict(embedder.settings),
        **more,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _miscounted_prompts(embedder: Embedder) -> list[tuple[str, str]]:
    """Prompts, with their names, that have other tokens alone than before a text.

    The code of a layer, which is saved with it, looks at the ids and does not miscount.
    """
    settings, tokenizer = embedder.settings, embedder.tokenizer
    if settings.pool_prompt or settings.layer is not None:
        return []
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
    """Whether a base's own config says that it reads both ways, for any library to see."""
    path = Path(zoo.resolve(source)) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = [config, config.get("text_config") or {}]
    return any(
        part.get("is_causal") is False or part.get("use_bidirectional_attention") for part in parts
    )
