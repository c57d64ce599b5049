"""What is in a snapshot of one rank: its schema read and checked, tensors as places in a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stowplan.core.errors import InvalidSnapshot
from stowplan.runtime.snapshot.state.leaf import Leaf
from stowplan.runtime.snapshot.state.modules import EXTRA_STATE
from stowplan.runtime.snapshot.state.state_schema import Decoder, load_schema
from stowplan.runtime.snapshot.state.training_state import as_bytes

__all__ = ["OWN_PARTS", "Contents", "Piece", "leaves_of", "replace_leaves"]

OWN_PARTS = ("scheduler", "scaler", "data", "extras", "rng")  # what each rank has for itself


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's snapshot: the schema (as JSON or read) and anything contiguous that has its bytes."""

    schema: dict[str, Any] | bytes | str
    buffer: Any


@dataclass(frozen=True, slots=True)
class Contents:
    """A piece that was read.

    Attributes:
        rank, world_size, step, num_bytes: from the schema.
        model: leaves, and extra states of modules, by name.
        states: the optimizers' states by the names of parameters; a leaf stands for each tensor.
        groups: the options of all parameter groups in order; ``params`` are names.
        decoder: gives the bytes of leaves.
        nodes: the schema's nodes by part.
    """

    rank: int
    world_size: int
    step: int
    num_bytes: int
    model: dict[str, Any]
    states: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    decoder: Decoder
    nodes: dict[str, Any]

    @classmethod
    def of(cls, piece: Piece) -> Contents:
        """Read and check a piece; nothing is copied.

        Raises:
            InvalidSnapshot: the schema is damaged, or the buffer too small for it.
        """
        schema = load_schema(piece.schema)
        data, num_bytes = as_bytes(piece.buffer), schema["bytes"]
        if data.numel() < num_bytes:
            raise InvalidSnapshot(
                f"the snapshot of rank {schema['rank']} has {num_bytes} bytes, and {data.numel()} were given. Give the "
                f"whole buffer, or go on from another snapshot."
            )
        decoder = Decoder(data, num_bytes)
        nodes = dict(_pairs(schema["state"]))
        missing = [part for part in ("model", "optimizer", *OWN_PARTS) if part not in nodes]
        if missing:
            raise InvalidSnapshot(
                f"the schema has no {', '.join(missing)}. It is damaged; go on from another snapshot."
            )
        model = decoder.decode(nodes["model"], "model", _itself)
        optimizer = decoder.decode(nodes["optimizer"], "optimizer", _itself)
        for name, found in model.items() if isinstance(model, dict) else ():
            if not isinstance(found, Leaf) and not str(name).endswith(EXTRA_STATE):
                raise InvalidSnapshot(f"model.{name} is no tensor. The schema is damaged; go on from another snapshot.")
        match model, optimizer:
            case dict(), {"state": dict(states), "groups": list(groups)} if all(
                isinstance(state, dict) for state in states.values()
            ) and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
                numbers = schema["rank"], schema["world_size"], schema["step"], num_bytes
                return cls(*numbers, model, states, groups, decoder, nodes)
        raise InvalidSnapshot(
            "the schema's model or optimizer is not as it should be. It is damaged; go on from another snapshot."
        )

    def own(self, part: str) -> dict[str, Any]:
        """One of ``OWN_PARTS`` with tensors of its own."""
        value = self.decoder.decode(self.nodes[part], part)
        if not isinstance(value, dict):
            raise InvalidSnapshot(f"the schema's {part} is no dict. It is damaged; go on from another snapshot.")
        return value

    def own_leaves(self) -> list[Leaf]:
        """Tensors that a checkpoint of torch has no name for, each once: of ``OWN_PARTS``, options, extra states."""
        shared = {leaf.offset for leaf in self.shared_leaves().values() if leaf.num_bytes}
        named = [leaf for part in ("model", "optimizer") for leaf in self._leaves(self.nodes[part], part)]
        found = [leaf for leaf in named if leaf.offset not in shared]
        found += [leaf for part in OWN_PARTS for leaf in self._leaves(self.nodes[part], part)]
        return list({leaf.offset: leaf for leaf in found if leaf.num_bytes}.values())

    def _leaves(self, node: Any, path: str) -> Iterator[Leaf]:
        """All leaves below a node. Keys of JSON objects are tags, as a value's own dictionaries are lists of pairs."""
        if isinstance(node, list):
            for member in node:
                yield from self._leaves(member, path)
        elif isinstance(node, dict):
            for tag, content in node.items():
                if tag in ("tensor", "array", "generator"):
                    yield self.decoder.leaf(content if tag == "tensor" else content[1], path)
                else:
                    yield from self._leaves(content, path)

    def shared_leaves(self) -> dict[str, Leaf]:
        """Tensors of models and optimizers by the names that they have in a checkpoint of torch."""
        found = {f"model.{name}": leaf for name, leaf in self.model.items() if isinstance(leaf, Leaf)}
        for name, state in self.states.items():
            found |= dict(leaves_of(state, f"optimizer.state.{name}"))
        return found


def leaves_of(tree: Any, path: str) -> Iterator[tuple[str, Leaf]]:
    """All leaves in nested dictionaries, lists and tuples, under names joined by dots."""
    if isinstance(tree, Leaf):
        yield path, tree
    elif isinstance(tree, dict):
        for key, member in tree.items():
            yield from leaves_of(member, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        for index, member in enumerate(tree):
            yield from leaves_of(member, f"{path}.{index}")


def replace_leaves(tree: Any, path: str, new: Callable[[str, Leaf], Any]) -> Any:
    """The same tree with ``new(name, leaf)`` for each leaf."""
    if isinstance(tree, Leaf):
        return new(path, tree)
    if isinstance(tree, dict):
        return type(tree)({key: replace_leaves(member, f"{path}.{key}", new) for key, member in tree.items()})
    if type(tree) in (list, tuple):
        return type(tree)(replace_leaves(member, f"{path}.{index}", new) for index, member in enumerate(tree))
    return tree


def _itself(leaf: Leaf) -> Leaf:
    return leaf


def _pairs(node: dict[str, Any]) -> list[tuple[str, Any]]:
    try:
        return [(str(key), member) for key, member in node["dict"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidSnapshot("the schema's state is no dict. It is damaged; go on from another snapshot.") from error
