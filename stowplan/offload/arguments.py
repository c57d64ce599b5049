"""The arguments of a block's forward: flattened, named, and condensed to a signature."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from typing import Any

import torch

__all__ = ["Numbers", "flatten", "flatten_named", "map_tree", "signature", "tensors_in"]


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All leaves of the arguments, through tuples, lists, dicts and dataclasses, in order. Other objects are leaves."""
    leaves: list[Any] = []
    _flatten(args, leaves)
    _flatten(kwargs, leaves)
    return leaves


def _flatten(tree: Any, leaves: list[Any]) -> None:
    if isinstance(tree, tuple | list):
        for item in tree:
            _flatten(item, leaves)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _flatten(item, leaves)
    elif _is_dataclass(tree):
        for field in dataclasses.fields(tree):
            _flatten(getattr(tree, field.name, None), leaves)
    else:
        leaves.append(tree)


def _is_dataclass(tree: Any) -> bool:
    return hasattr(type(tree), "__dataclass_fields__")


def map_tree(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """The tree with ``fn(leaf)`` for every leaf, in the order of ``flatten``; what does not change is not copied."""
    if isinstance(tree, tuple | list):
        items = [map_tree(item, fn) for item in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, MutableMapping):
        changed = {key: new for key, item in tree.items() if (new := map_tree(item, fn)) is not item}
        twin = copy.copy(tree) if changed else tree
        for key, item in changed.items():
            twin[key] = item
        return twin
    if _is_dataclass(tree):
        old = {field.name: getattr(tree, field.name, None) for field in dataclasses.fields(tree)}
        changed = {name: new for name, item in old.items() if (new := map_tree(item, fn)) is not item}
        twin = copy.copy(tree) if changed else tree
        for name, item in changed.items():
            object.__setattr__(twin, name, item)  # frozen ones, too: nobody else has the copy
        return twin
    return fn(tree)


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
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from _named_leaves(f"{name}.{key}", item)
    elif _is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from _named_leaves(f"{name}.{field.name}", getattr(tree, field.name, None))
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
            view = (leaf.shape, leaf.stride(), leaf.storage_offset(), alias)
            parts.append((*view, leaf.dtype, leaf.device, leaf.requires_grad))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            parts.append((type(leaf), leaf))
        else:
            parts.append(type(leaf))
    return tuple(parts)


_PLAIN = bool | int | float | str
_MAX_ITEMS = 16  # of a list or tuple of numbers that is read along


class Numbers:
    """The numbers, strings and flags that a module, its children, and the plain objects they hold (configs) have now.

    Scales, probabilities, ``training``: what a block may compute with that is no argument and no tensor. And which of
    its parameters are trained, which decides on what autograd saves.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._find()

    def read(self) -> tuple[Any, ...]:
        """What they are now, with their types."""
        if sum(map(len, self._sources)) != self._num_attributes:
            self._find()
        values = [attributes.get(name) for attributes, name in self._places]
        types = tuple(map(type, values))
        if types != self._types:  # some may have become lists or tensors
            values = [v if v is None or isinstance(v, _PLAIN) else _items(v) for v in values]
        lists = [_items(attributes.get(name)) for attributes, name in self._lists]
        trained = [p is not None and p.requires_grad for parameters in self._parameters for p in parameters.values()]
        return (*values, *lists, *trained, types)

    def _find(self) -> None:
        modules = [child.__dict__ for child in self._module.modules()]
        self._parameters = [child._parameters for child in self._module.modules() if child._parameters]
        held = {id(v): vars(v) for attributes in modules for v in attributes.values() if _is_record(v)}
        self._sources = [*modules, *held.values()]
        self._num_attributes = sum(map(len, self._sources))
        named = [(attributes, name, value) for attributes in self._sources for name, value in attributes.items()]
        self._places = [(a, name) for a, name, value in named if value is None or isinstance(value, _PLAIN)]
        self._lists = [(a, name) for a, name, value in named if isinstance(value, list | tuple) or _items(value)]
        self._types = tuple(type(attributes[name]) for attributes, name in self._places)


def _items(value: Any) -> tuple[Any, ...] | None:
    """A short list, tuple or dict of numbers as a tuple; None for anything else."""
    if type(value) is dict and len(value) <= _MAX_ITEMS and all(isinstance(v, _PLAIN) for v in value.values()):
        return tuple(value.items())
    if isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS and all(isinstance(v, _PLAIN) for v in value):
        return tuple(value)
    return None


def _is_record(value: Any) -> bool:
    """An object that holds attributes, as configs do, and is no tensor, module, class or function."""
    others = (torch.Tensor, torch.nn.Module, Mapping, Set)
    return hasattr(value, "__dict__") and not (callable(value) or isinstance(value, others))


def _autocast_state() -> Iterator[Any]:
    for device_type in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device_type)
        yield enabled and torch.get_autocast_dtype(device_type)
