"""The arguments of a block's forward: flattened, named, and condensed to a signature."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from operator import is_
from typing import Any, NamedTuple

import torch

__all__ = ["Numbers", "flatten", "flatten_named", "map_tree", "signature", "tensors_in"]


_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str})


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All leaves of the arguments, through tuples, lists, dicts and dataclasses, in order. Other objects are leaves."""
    leaves: list[Any] = []
    _flatten(args, leaves)
    _flatten(kwargs, leaves)
    return leaves


def _flatten(tree: Any, leaves: list[Any]) -> None:
    kind = type(tree)
    if kind in _LEAVES:  # most are; the questions below are slow
        leaves.append(tree)
    elif isinstance(tree, tuple | list):
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


def signature(leaves: Sequence[Any], keywords: Iterable[str], state: int = 0) -> tuple[Any, ...]:
    """What two calls must share for one tape to hold for both, as far as it can be seen from outside the block.

    ``leaves`` are the flattened arguments, ``keywords`` the names of those given by name, in order, and ``state`` what
    the block itself knows (``Numbers.state``), if that is to count. Tensors that share a storage must share it again.
    """
    parts: list[Any] = [*keywords, state, *_autocast_state()]
    storages: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if leaf.layout is not torch.strided:
                parts.append(type(leaf))
                continue
            alias = storages.setdefault(leaf.untyped_storage()._cdata, len(storages))
            view = (leaf.shape, leaf.stride(), leaf.storage_offset(), alias)
            parts.append((*view, leaf.dtype, leaf.device, leaf.requires_grad))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            parts.append((type(leaf), leaf))
        else:
            parts.append(type(leaf))
    return tuple(parts)


_PLAIN = bool | int | float | str
_WATCHED = (bool, int, float, str, list, tuple, dict)
_MAX_ITEMS = 16  # of a list or tuple of numbers that is read along
_MAX_STATES = 64  # that are told from new ones
# What every module has, apart from ``training``: parameters, children and hooks have other guards.
_MODULES_OWN = frozenset(torch.nn.Module().__dict__) - {"training"}


class Numbers:
    """The numbers, strings and flags that a module, its children, and the plain objects they hold (configs) have now.

    Scales, probabilities, ``training``: what a block may compute with that is no argument and no tensor. And which of
    its parameters are trained, which decides on what autograd saves.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._states: dict[tuple[Any, ...], int] = {}
        self._num_states = 0
        self._find()

    def state(self) -> int:
        """A number for what they are now: the same while none of them changes, and again when all are as before."""
        if not self._unchanged():
            self._find()
        return self._state

    def _unchanged(self) -> bool:
        """Are they all the objects that were found, and no others there? Most calls need to know no more."""
        for get, names, values in self._seen:
            if not all(map(is_, map(get, names), values)):
                return False
        for many, found in self._many:
            if len(many) != len(found.items) or not all(map(is_, _values(many), found.items)):
                return False
            if found.keys and not all(map(is_, many, found.keys)):
                return False
        if any(_items(many) is not None for many in self._unread):
            return False
        return sum(map(len, self._sources)) == self._num_attributes and self._trained == self._find_trained()

    def _find(self) -> None:
        modules = [child.__dict__ for child in self._module.modules()]
        records = {id(v): v for attributes in modules for v in attributes.values() if _is_record(v)}
        self._sources = [*modules, *map(vars, records.values())]
        self._num_attributes = sum(map(len, self._sources))
        self._seen: list[tuple[Callable[[str], Any], list[str], list[Any]]] = []
        self._many: list[tuple[Any, _Items]] = []
        self._unread: list[Any] = []  # too long, or not of numbers, as yet
        state: list[Any] = []
        for number, attributes in enumerate(self._sources):
            entries = [(name, value) for name, value in attributes.items() if name not in _MODULES_OWN]
            watched = [(n, v) for n, v in entries if v is None or isinstance(v, _WATCHED) or id(v) in records]
            self._seen.append((attributes.get, [name for name, _ in watched], [value for _, value in watched]))
            for name, value in watched:
                if value is None or isinstance(value, _PLAIN):
                    state.append((number, name, type(value), value))
                elif isinstance(value, list | tuple | dict):
                    items = _items(value)
                    state.append((number, name, items and (items, *map(type, items.items))))
                    if items is None:
                        self._unread.append(value)
                    elif not isinstance(value, tuple):
                        self._many.append((value, items))
        self._parameters = [own for child in self._module.modules() if (own := child._parameters)]
        self._trained = self._find_trained()
        key = (*state, *self._trained)
        found = self._states.pop(key, None)
        if found is None:
            found = self._num_states = self._num_states + 1
        self._states[key] = self._state = found
        if len(self._states) > _MAX_STATES:
            del self._states[next(iter(self._states))]

    def _find_trained(self) -> list[bool]:
        return [p is not None and p.requires_grad for own in self._parameters for p in own.values()]


class _Items(NamedTuple):
    """What a short list, tuple or dict of numbers holds; ``keys`` of dicts alone."""

    items: tuple[Any, ...]
    keys: tuple[Any, ...]


def _items(many: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> _Items | None:
    """Those of a short list, tuple or dict of numbers; None for any other."""
    if len(many) > _MAX_ITEMS or not all(v is None or isinstance(v, _PLAIN) for v in _values(many)):
        return None
    return _Items(tuple(_values(many)), tuple(many) if isinstance(many, dict) else ())


def _values(many: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
    return many.values() if isinstance(many, dict) else many


def _is_record(value: Any) -> bool:
    """An object that holds attributes, as configs do, and is no tensor, module, class or function."""
    others = (torch.Tensor, torch.nn.Module, Mapping, Set)
    return hasattr(value, "__dict__") and not (callable(value) or isinstance(value, others))


def _autocast_state() -> Iterator[Any]:
    for device_type in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device_type)
        yield enabled and torch.get_autocast_dtype(device_type)
