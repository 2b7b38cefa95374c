"""The language-model head of a decoder: what turns its states into logits, proved by numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tercet.errors import ModelError
from tercet.losses.tokens import Head
from tercet.models.network.loading import loading
from tercet.models.zoo import zoo


@torch.no_grad()
def load_head(source: str | Path) -> Head:
    """The head of the model at a zoo name, a folder or a hub id, in float32, frozen.

    It is a copy, also where the head shares its weight with the token table. Loads the whole model
    for a moment, to compare its own logits with those of the head on its states.

    Raises:
        ModelError: when the model has no such head, or one that bends logits in an unknown way.
    """
    place = str(zoo.resolve(str(source)))
    with loading(f"{source}: has no language-model head"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])[0]
        raise ModelError(
            f"{source}: the weights of its language-model head are missing ({lost}); masked "
            "next-token prediction needs them: start from the model that still has its head"
        )
    config = model.config.get_text_config()
    linear: Any = model.get_output_embeddings()
    head = Head(
        linear.weight.detach().clone(),
        None if getattr(linear, "bias", None) is None else linear.bias.detach().clone(),
        scale=_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    _prove(model, head, str(source))
    return head


def _scale(config: Any) -> float:
    """Cohere multiplies logits, Granite divides them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )


def _prove(model: nn.Module, head: Head, source: str) -> None:
    """Compare the model's logits with those of the head on the model's own last states."""
    ids = torch.arange(8)[None] % len(head.weight)
    base: Any = model.base_model
    states = base(input_ids=ids).last_hidden_state[0]
    wanted = model.eval()(input_ids=ids).logits[0].float()
    if states.shape[1] != head.weight.shape[1]:
        gap = float("inf")
    else:
        gap = float((head.logits(states.float()) - wanted).norm() / wanted.norm())
    if gap > 1e-4:
        raise ModelError(
            f"{source}: its logits are not its head times its states (they differ by {gap:.0%}), "
            "so masked next-token prediction cannot train it"
        )
