"""The arguments of a block's call on their own: cut off from the graph around it, and found again in its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from stowplan.offload.arguments import map_tree

__all__ = ["OnGradient", "Passed", "input_bytes", "own_arguments", "unnoted", "without_arguments"]


OnGradient = Callable[[torch.Tensor], None]


def unnoted(gradient: torch.Tensor) -> None:
    """Nobody wants to know of the gradient."""


class Passed:
    """In a block's output, the place of an argument that the block hands on as it is."""

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position  # among the flattened arguments


class _Entry(torch.autograd.Function):
    """Where a block's graph begins: an argument that is no leaf, as autocast would take a leaf for a weight."""

    @staticmethod
    def forward(ctx: Any, argument: torch.Tensor, on_gradient: OnGradient) -> torch.Tensor:
        ctx.on_gradient = on_gradient
        return argument.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Nobody asks for the argument's gradient."""
        ctx.on_gradient(grad)
        return None, None


def own_arguments(tree: Any, on_gradient: OnGradient = unnoted) -> Any:
    """The same arguments cut off from the graph around the block; unknown objects (caches) are copied.

    ``on_gradient`` is told the gradients of the arguments as backward reaches them.
    """
    twins: dict[int, torch.Tensor] = {}  # an argument that is given twice is one tensor again

    def own(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in twins:
                twins[id(leaf)] = leaf.detach()
                if leaf.requires_grad:
                    twins[id(leaf)] = _Entry.apply(  # type: ignore[no-untyped-call]
                        leaf.detach().requires_grad_(), on_gradient
                    )
            return twins[id(leaf)]
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        return copy.deepcopy(leaf)

    return map_tree(tree, own)


def without_arguments(output: Any, leaves: list[Any]) -> Any:
    """The output with ``Passed`` in the places of tensors that are arguments of the call."""
    positions = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    return map_tree(output, lambda leaf: Passed(positions[id(leaf)]) if id(leaf) in positions else leaf)


def input_bytes(leaves: list[Any]) -> dict[int, int]:
    """Bytes of each storage among the arguments, by the position of its first tensor."""
    storages: dict[int, tuple[int, int]] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages.setdefault(storage._cdata, (position, storage.nbytes()))
    return dict(storages.values())
