"""An embedder as a model of sentence-transformers, in memory and with the same weights."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from tercet.errors import MissingExtraError, ModelError
from tercet.models.embedder import Embedder
from tercet.models.formats.sentence_transformers import LAYER, LAYER_CODE, prompt_ids, write_modules
from tercet.models.network.latent_attention import AttentionLayer
from tercet.models.settings import as_st_folder


def as_sentence_transformer(embedder: Embedder) -> Any:
    """A ``SentenceTransformer`` that gives this embedder's vectors, from the same parameters.

    What one of the two learns the other knows. It reads padded batches with transformers' own
    attention, so it is slower. Its modules are those of a saved folder, and its ``save`` writes
    one. It stays on the embedder's device: move the embedder first, then make another.

    Raises:
        MissingExtraError: where sentence-transformers is not installed.
        ModelError: where it has no words for the settings, or LoRA is not merged yet.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("as_sentence_transformer", "sentence-transformers") from error
    unheard_of = embedder.settings.only_ours()
    if unheard_of is not None:
        raise ModelError(f"sentence-transformers cannot express {unheard_of}; use encode instead")
    if embedder.backbone.has_lora:
        raise ModelError("the LoRA on this model is not merged; call backbone.merge_lora() first")
    stock = as_st_folder(embedder.settings, embedder.dim)
    with TemporaryDirectory() as name:
        folder = Path(name)
        embedder.backbone.config.save_pretrained(folder)
        embedder.tokenizer.stock.save_pretrained(folder)
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        write_modules(folder, settings=replace(stock, layer=False))
        on_meta = {"device_map": "meta", "dtype": embedder.backbone.model.dtype}
        with quiet():
            empty = SentenceTransformer(
                name, device="meta", model_kwargs=on_meta, local_files_only=True
            )
        prompts = prompt_ids(folder, stock)
    modules = list(empty)
    _give_weights(modules[0], embedder.backbone.model)
    if embedder.layer is not None:
        modules.insert(1, _same_layer(embedder.layer, prompts))
    model = SentenceTransformer(
        modules=modules,
        prompts=stock.prompts,
        device=str(embedder.device),
        similarity_fn_name="cosine",
    )
    return model.train(embedder.training)


def _give_weights(transformer: Any, model: PreTrainedModel) -> None:
    """Put in a copy of the model that holds its very tensors and has attention of its own."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared: Any = copy.deepcopy(model, same)
    # Release 5 keeps the model as auto_model; later ones only show it under that name.
    shown = isinstance(getattr(type(transformer), "auto_model", None), property)
    name = "model" if shown else "auto_model"
    shared.set_attn_implementation(getattr(transformer, name).config._attn_implementation)
    setattr(transformer, name, shared)


def _same_layer(layer: AttentionLayer, prompts: list[list[int]]) -> nn.Module:
    """The layer as a module of sentence-transformers, of the class that a saved folder names."""
    made: Any = get_class_from_dynamic_module(LAYER, str(LAYER_CODE.parent))
    with torch.device("meta"):
        module = made({**asdict(layer.layer), "hidden": layer.hidden}, prompts)
    weights = layer.state_dict(keep_vars=True)
    for name, weight in module.named_parameters():
        weight.requires_grad_(weights[name].requires_grad)
    module.load_state_dict(weights, assign=True)
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries that load models say nothing but errors: for what is missing on purpose."""
    loggers = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    shown = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
