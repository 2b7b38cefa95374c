"""A model as a ``SentenceTransformer`` in memory, with the same weights."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tercet.errors import MissingExtraError, ModelError
from tercet.models.formats.parts import ModelParts
from tercet.models.formats.sentence_transformers import (
    LAYER,
    LAYER_CODE,
    module_folders,
    prompt_ids,
    write_modules,
)
from tercet.models.network.backbone import sharing_copy
from tercet.models.network.dense_layers import DenseLayers, save_dense_layers
from tercet.models.network.latent_attention import AttentionLayer
from tercet.models.network.loading import quiet
from tercet.models.settings import named_prompts


def as_sentence_transformer(parts: ModelParts) -> Any:
    """Return a ``SentenceTransformer`` that shares a model's parameters.

    See :meth:`Embedder.as_sentence_transformer`. Its modules are those of a saved folder.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("as_sentence_transformer", "sentence-transformers") from error
    backbone, settings = parts.backbone, parts.settings
    inexpressible = settings.inexpressible()
    if inexpressible is not None:
        raise ModelError(
            f"sentence-transformers cannot express {inexpressible}; use encode instead"
        )
    if backbone.has_int8:
        raise ModelError(
            "sentence-transformers cannot express 8-bit weights; use encode, or the model before "
            "tercet quantize"
        )
    if backbone.has_lora:
        raise ModelError("the LoRA on this model is not merged; call backbone.merge_lora() first")
    with TemporaryDirectory() as name:
        folder = Path(name)
        backbone.config.save_pretrained(folder)
        parts.tokenizer.save_pretrained(folder)
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        plain = replace(settings, layer=None)
        write_modules(folder, plain, backbone.hidden)
        if parts.dense_layers is not None:
            save_dense_layers(parts.dense_layers, module_folders(folder, plain, "Dense"))
        on_meta = {"device_map": "meta", "dtype": backbone.model.dtype}
        with quiet():
            empty = SentenceTransformer(
                name,
                device="meta",
                model_kwargs=on_meta,
                local_files_only=True,
                trust_remote_code=False,
            )
        prompts = prompt_ids(folder, settings)
    modules = list(empty)
    _give_weights(modules[0], backbone.model)
    if parts.dense_layers is not None:
        _share_dense_layers(modules[2:], parts.dense_layers)
    if parts.layer is not None:
        modules.insert(1, _same_layer(parts.layer, prompts))
    return SentenceTransformer(
        modules=modules,
        prompts=dict(named_prompts(settings)),
        device=str(backbone.device),
        similarity_fn_name="cosine",
    )


def _give_weights(transformer: Any, model: PreTrainedModel) -> None:
    """Insert a copy of the model with the same tensors and the attention of transformers."""
    shared: Any = sharing_copy(model)
    # Release 5 stores the model as auto_model; in later ones that is a property.
    shown = isinstance(getattr(type(transformer), "auto_model", None), property)
    name = "model" if shown else "auto_model"
    attention = getattr(transformer, name).config._attn_implementation
    # Before 5.21, transformers gave Gemma 2 a kernel that leaves out the cap of its scores.
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    shared.set_attn_implementation("eager" if capped and attention == "sdpa" else attention)
    setattr(transformer, name, shared)


def _share_dense_layers(modules: Sequence[nn.Module], layers: DenseLayers) -> None:
    """Give their dense modules, the first ones of these, the parameters of ours."""
    for module, layer in zip(modules, layers, strict=False):
        for name, weight in layer.named_parameters():
            place, _, last = name.rpartition(".")
            module.get_submodule(place).register_parameter(last, weight)


def _same_layer(layer: AttentionLayer, prompts: list[list[int]]) -> nn.Module:
    """Return the layer as a module of sentence-transformers, of the class in a saved folder."""
    made: Any = get_class_from_dynamic_module(LAYER, str(LAYER_CODE.parent))
    with torch.device("meta"):
        module = made({**asdict(layer.layer), "hidden": layer.hidden}, prompts)
    weights = layer.state_dict(keep_vars=True)
    for name, weight in module.named_parameters():
        weight.requires_grad_(weights[name].requires_grad)
    module.load_state_dict(weights, assign=True)
    return module
