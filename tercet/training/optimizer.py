"""AdamW over the weights in training, its learning rate, and its state for a checkpoint."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.sharding import is_sharded, kept_by_main, part_of
from tercet.training import checkpoint
from tercet.training.recipe import Stage
from tercet.types import ScheduleName

FLOOR: Final = 0.1  # of the peak learning rate, where the schedule "early" ends


def factor(name: ScheduleName, step: int, steps: int, *, warmup: int = 0, decay: int = 0) -> float:
    """Return the share of the peak learning rate for step ``step`` of ``steps``, counted from 0.

    All rise linearly to the peak at step ``warmup``. Then "constant" stays; "linear" falls to zero,
    which step ``steps`` would reach; "wsd" (warmup-stable-decay, arXiv 2404.06395, sec. 4) falls in
    the last ``decay`` steps; "early" falls in the first ``decay`` steps and stays at ``FLOOR``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    if name == "early":
        return max(1.0 - (1.0 - FLOOR) * (step - warmup) / decay, FLOOR) if decay else FLOOR
    falling = steps - warmup if name == "linear" else decay
    left = steps - step
    return min(1.0, left / falling) if falling else 1.0


def adamw(embedder: Embedder, stage: Stage) -> torch.optim.Optimizer:
    """Make an AdamW for a stage's weights; biases and norms have no weight decay.

    Raises:
        RecipeError: if every weight is frozen.
    """
    weights = list(checkpoint.trainable(embedder).values())
    if not weights:
        raise RecipeError("every weight is frozen; train with LoRA or leave some weights free")
    groups = [
        {"params": [p for p in group if is_sharded(p) == sharded], "weight_decay": decay}
        for group, decay in zip(_groups(weights), (stage.weight_decay, 0.0), strict=True)
        for sharded in (False, True)  # a fused step takes no mixture of both
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.learning_rate, fused=True)


def state_of(optimizer: torch.optim.Optimizer, embedder: Embedder) -> dict[str, Any]:
    """Return the state as if nothing were sharded, in the first process; all have to call this."""
    plain = optimizer.state_dict()
    weights = list(checkpoint.trainable(embedder).values())
    if not any(map(is_sharded, weights)):
        return plain
    order = _numbers_of(optimizer)
    state, described = {}, []
    for group in filter(None, _groups(weights)):
        settings = next(
            saved
            for saved, own in zip(plain["param_groups"], optimizer.param_groups, strict=True)
            if any(p is group[0] for p in own["params"])
        )
        first = len(state)
        for number, weight in enumerate(group, start=first):
            held = plain["state"].get(order[id(weight)], {})
            state[number] = {name: kept_by_main(value) for name, value in held.items()}
        described.append({**settings, "params": list(range(first, len(state)))})
    return {"state": {k: v for k, v in state.items() if v}, "param_groups": described}


def restore(optimizer: torch.optim.Optimizer, embedder: Embedder, saved: Mapping[str, Any]) -> None:
    """Load a state of :func:`state_of`; of sharded weights, only this process's parts of it."""
    weights = list(checkpoint.trainable(embedder).values())
    if not any(map(is_sharded, weights)):
        optimizer.load_state_dict(dict(saved))
        return
    canonical = [weight for group in _groups(weights) for weight in group]
    order, own = _numbers_of(optimizer), optimizer.state_dict()
    own["state"] = {
        order[id(weight)]: {
            name: part_of(value, weight) if value.shape == weight.shape else value
            for name, value in saved["state"][number].items()
        }
        for number, weight in enumerate(canonical)
        if number in saved["state"]
    }
    optimizer.load_state_dict(own)


def _groups(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the weights with decay, and those without."""
    return [[p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]]


def _numbers_of(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Return the number of each weight in a state dict, by its identity."""
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {id(weight): number for number, weight in enumerate(held)}
