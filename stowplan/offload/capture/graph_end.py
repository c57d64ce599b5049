"""What stands for the rest of the model behind a block that is measured: it has a gradient for every output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stowplan.offload.arguments import tensors_in
from stowplan.offload.capture.own_arguments import OnGradient, unnoted

__all__ = ["GraphEnd", "Strides", "graph_end", "output_gradient_bytes"]

Strides = Sequence[tuple[int, ...]]
GraphEnd = Callable[[Any, OnGradient], torch.Tensor | None]


class _Detour(torch.autograd.Function):
    """Stands for the rest of the model: takes the block's outputs, lets go of them, and has a gradient for each."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gradients = list(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


def graph_end(output: Any, on_gradient: OnGradient = unnoted, strides: Strides | None = None) -> torch.Tensor | None:
    """A scalar whose backward gives every differentiable output a random gradient, without keeping the output.

    ``on_gradient`` is told each of these. None for a frozen block, which has no backward.
    """
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if not outputs:
        return None
    if strides is None:
        strides = [t.stride() for t in outputs]
    gradients = [_random(t, stride) for t, stride in zip(outputs, strides, strict=True)]
    for gradient in gradients:
        on_gradient(gradient)
    end: torch.Tensor = _Detour.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
    return end


def _random(like: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    if 0 in stride:  # numbers that are there once: nothing is ever added to such a gradient in place
        return torch.randn(_reach(like.shape, stride), dtype=like.dtype, device=like.device).as_strided(
            like.shape, stride
        )
    return torch.empty_strided(like.shape, stride, dtype=like.dtype, device=like.device).normal_()


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of a storage that a tensor of that shape and stride spans."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def output_gradient_bytes(output: Any, strides: Strides | None) -> int:
    """Bytes of the gradients of a call's outputs."""
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if strides is None:
        strides = [t.stride() for t in outputs]
    return sum(t.element_size() * _reach(t.shape, stride) for t, stride in zip(outputs, strides, strict=True))
