"""What stands for a block in an outline: outputs of the right shapes, joined to the block's inputs in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.offload.arguments import map_tree, tensors_in
from stowplan.offload.capture.own_arguments import Passed

__all__ = ["stand_in"]

OnBackward = Callable[[Sequence[torch.Tensor]], object]


class _StandIn(torch.autograd.Function):
    """Makes a block's outputs out of nothing, and its inputs' gradients out of its outputs' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        on_backward: OnBackward,
        outputs: list[torch.Tensor],
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.on_backward = on_backward
        ctx.shapes = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in inputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.on_backward(gradients)
        by_shape = {(g.shape, g.dtype, g.device): g for g in gradients}
        _, *shapes = ctx.shapes  # the anchor needs none
        return None, None, None, *(None if shape is None else _gradient(shape, by_shape) for shape in shapes)


def _gradient(shape: tuple[Any, ...], by_shape: dict[Any, torch.Tensor]) -> torch.Tensor:
    """An incoming gradient, each handed on once, or a new one."""
    size, dtype, device = shape
    return by_shape.pop(shape) if shape in by_shape else torch.zeros(size, dtype=dtype, device=device)


def stand_in(template: Any, leaves: list[Any], anchor: torch.Tensor, on_backward: OnBackward) -> Any:
    """Outputs like ``template`` (tensors on the meta device), joined to the inputs among ``leaves`` in the graph."""
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    shapes = [tensor for tensor in tensors_in(template) if tensor.requires_grad]
    made = [_filled(shape, anchor.device) for shape in shapes]
    outputs = iter(_StandIn.apply(on_backward, made, anchor, *inputs))  # type: ignore[no-untyped-call]

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Passed):
            return leaves[leaf.position]
        if isinstance(leaf, torch.Tensor):
            return next(outputs) if leaf.requires_grad else _filled(leaf, anchor.device)
        return leaf

    return map_tree(template, fill)


def _filled(shape: torch.Tensor, device: torch.device) -> torch.Tensor:
    tensor = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    if isinstance(tensor, FakeTensor):
        return tensor  # what a block gives is not known in a dry capture
    return tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
