"""Shapes of a batch: in words in a plan, and whether a later call's are larger."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from stowplan.offload.arguments import flatten_named, tensors_in
from stowplan.offload.intercept import Forward

__all__ = ["Shapes", "describe", "exceeds", "larger_than_planned", "planned_shapes", "shapes_of_call"]

Shapes = dict[str, tuple[int, ...]]


def describe(batch: Any) -> str:
    """Such as ``input_ids 2x128 int64, labels 2x128 int64``; positional arguments are called by their number."""
    arguments = (batch,) if isinstance(batch, torch.Tensor) else batch
    items = arguments.items() if isinstance(arguments, Mapping) else enumerate(arguments)
    return ", ".join(_in_words(str(name), tensor) for name, item in items for tensor in tensors_in(item))


def _in_words(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def planned_shapes(description: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes out of what ``describe`` gave."""
    parts = [part.rsplit(" ", 2) for part in description.split(", ") if part]
    return [(name, tuple(int(size) for size in sizes.split("x") if size)) for name, sizes, _ in parts]


def shapes_of_call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """Shape of each tensor argument, by its name in ``forward``'s signature."""
    leaves = flatten_named(forward, args, kwargs)
    return {name: tuple(leaf.shape) for name, leaf in leaves if isinstance(leaf, torch.Tensor)}


def larger_than_planned(description: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The call's batch in words if it has more of anything than the plan's batch of that name; empty if it has not."""
    order = [name for name in inspect.signature(forward).parameters if name != "self"]

    def named(name: str) -> str:
        return order[int(name)] if name.isdigit() and int(name) < len(order) else name

    planned: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in planned_shapes(description):
        planned.setdefault(named(name), []).append(shape)
    given = {**{named(str(i)): argument for i, argument in enumerate(args)}, **kwargs}
    for name, item in given.items():
        shapes = [tuple(tensor.shape) for tensor in tensors_in(item)]
        if any(exceeds(shape, before) for shape, before in zip(shapes, planned.get(name, ()), strict=False)):
            return describe(given)
    return ""


def exceeds(shape: tuple[int, ...], planned: tuple[int, ...] | None) -> bool:
    """Is any dimension longer than planned, or were other dimensions planned, or none?"""
    return planned is None or len(planned) != len(shape) or any(a > b for a, b in zip(shape, planned, strict=True))
