"""How the learning rate moves: each schedule gives a factor of the peak for every step."""

from typing import Final, Literal, TypeAlias

ScheduleName: TypeAlias = Literal["constant", "linear", "wsd", "early"]

FLOOR: Final = 0.1  # of the peak: where an early decay ends


def factor(name: ScheduleName, step: int, steps: int, *, warmup: int = 0, decay: int = 0) -> float:
    """The share of the peak learning rate that step ``step`` of ``steps`` takes, counted from 0.

    All rise linearly over ``warmup`` steps and reach the peak at step ``warmup``. Then "constant"
    stays, "linear" falls to zero at the end, and "wsd" (warmup-stable-decay, arXiv 2404.06395)
    stays until the last ``decay`` steps and falls linearly in those. "early" falls in the first
    ``decay`` steps after the warmup instead, and stays at a tenth. Zero is what step ``steps``
    would take, so no step is wasted on it.
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
