"""The arguments of a block's forward: flattened, named, and condensed to a signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["Numbers", "flatten", "flatten_named", "signature", "tensors_in"]


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All leaves of the arguments, through tuples, lists and dicts, in order. Other objects are leaves."""
    leaves: list[Any] = []
    _flatten(args, leaves)
    _flatten(kwargs, leaves)
    return leaves


def _flatten(tree: Any, leaves: list[Any]) -> None:
    if isinstance(tree, tuple | list):
        for item in tree:
            _flatten(item, leaves)
    elif isinstance(tree, dict):
        for item in tree.values():
            _flatten(item, leaves)
    else:
        leaves.append(tree)


def flatten_named(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """As ``flatten``, each leaf with its name in ``forward``'s signature (``position_embeddings.0``)."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    positional = dict(zip(names, args, strict=False))
    rest = {f"args.{i}": argument for i, argument in enumerate(args[len(positional) :])}
    return [leaf for name, tree in (positional | rest | kwargs).items() for leaf in _named_leaves(name, tree)]


def _named_leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, tuple | list):
        for i, item in enumerate(tree):
            yield from _named_leaves(f"{name}.{i}", item)
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _named_leaves(f"{name}.{key}", item)
    else:
        yield name, tree


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a tree, attributes of unknown objects not searched."""
    leaves: list[Any] = []
    _flatten(tree, leaves)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def signature(leaves: Sequence[Any], keywords: Iterable[str], numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """What two calls must share for one tape to hold for both, as far as it can be seen from outside the block.

    ``leaves`` are the flattened arguments, ``keywords`` the names of those given by name, in order, and ``numbers``
    what the block itself knows (``Numbers``). Tensors that share a storage must share it again.
    """
    parts: list[Any] = [*keywords, numbers, *_autocast_state()]
    storages: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            storage = leaf.untyped_storage()
            alias = storages.setdefault(storage._cdata, len(storages))
            shape = (leaf.shape, leaf.stride(), leaf.storage_offset(), storage.nbytes(), alias)
            parts.append((*shape, leaf.dtype, leaf.device, leaf.requires_grad))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            parts.append((type(leaf), leaf))
        else:
            parts.append(type(leaf))
    return tuple(parts)


class Numbers:
    """The Python numbers, strings and flags of a module and its children: scales, probabilities, ``training``."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._places = [
            (child.__dict__, name)
            for child in module.modules()
            for name, value in child.__dict__.items()
            if isinstance(value, bool | int | float | str)
        ]

    def read(self) -> tuple[Any, ...]:
        """What they are now."""
        return tuple([attributes.get(name) for attributes, name in self._places])


def _autocast_state() -> Iterator[Any]:
    for device_type in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device_type)
        yield enabled and torch.get_autocast_dtype(device_type)
