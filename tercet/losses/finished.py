"""A loss whose gradients were computed together with it, block by block, and are only scaled."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def finished(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor | None]) -> Tensor:
    """``loss`` as a function of ``inputs``, one gradient for each; None where none is wanted.

    There are no second derivatives.
    """
    return _Finished.apply(loss, len(inputs), *inputs, *gradients)


class _Finished(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *given: Tensor | None) -> Tensor:
        inputs, gradients = given[:count], given[count:]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs if x is not None]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        # The product before the rounding: a float16 gradient may exist only once it is scaled up.
        wanted = [
            None if gradient is None else (by_loss * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, *wanted, *(None for _ in wanted))
