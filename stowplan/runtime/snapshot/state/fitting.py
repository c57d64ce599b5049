"""What of a snapshot goes where in a live training: first every difference is found, then everything is done.

Note: all or nothing. ``Fitting`` looks and allocates, and changes nothing. ``apply`` begins with what other people's
code does (``load_state_dict``), which may fail: what it did is undone then. What follows are assignments and copies
between tensors that are known to fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from stowplan.core.errors import SnapshotMismatch, StowplanError
from stowplan.runtime.pipeline.pipeline import Pipeline
from stowplan.runtime.snapshot.state.contents import Contents, replace_leaves
from stowplan.runtime.snapshot.state.leaf import Leaf, Shard
from stowplan.runtime.snapshot.state.modules import models_of, named, parameter_groups
from stowplan.runtime.snapshot.state.training_state import TrainingState, is_stateful

__all__ = ["Fitting"]

_Load = tuple[Callable[[], Any], Callable[[Any], Any], Any, str]  # what is there, how to set it, what to, its name


class Fitting:
    """A snapshot's parts beside those of a live training.

    Args:
        into: the training to be restored.
        sources: what was snapshotted: of this rank alone, or of all ranks for another world size.
        own: whose scheduler, scaler and extras are taken.
        same_world: whether shards have to be as they were, and random generators and data are restored.

    Attributes:
        problems: every difference.
        copies: name, leaf and live tensor of what has to be copied.
    """

    def __init__(self, into: TrainingState, sources: list[Contents], own: Contents, same_world: bool) -> None:
        self.problems: list[str] = []
        self.copies: list[tuple[str, Leaf, torch.Tensor]] = []
        self._loads: list[_Load] = []
        self._assignments: list[Callable[[], object]] = []
        self._into, self._sources, self._same_world = into, sources, same_world
        self._partial = not same_world and any(isinstance(m, Pipeline) for m in named(into.model, "model").values())
        self._models = models_of(into.model)
        self._model(own)
        self._groups()
        self._stateful(own, ("scheduler", "scaler", "data") if same_world else ("scheduler", "scaler"))
        self.extras = self._extras(own)

    def check(self) -> None:
        """Raises SnapshotMismatch with every difference, if there is one."""
        if self.problems:
            raise SnapshotMismatch(self.problems)

    def apply(self, copy_tensors: Callable[[], object]) -> None:
        """Do it all; ``copy_tensors`` carries ``copies`` out."""
        undo: list[Callable[[], Any]] = []
        for get, load, value, name in self._loads:
            before = copy.deepcopy(get())
            undo.append(lambda load=load, before=before: load(before))  # type: ignore[misc]
            try:
                load(value)
            except Exception as error:
                for again in reversed(undo):
                    again()
                if isinstance(error, StowplanError):
                    raise
                raise SnapshotMismatch([f"{name} does not take its state: {type(error).__name__}: {error}"]) from error
        for assign in self._assignments:
            assign()
        with torch.no_grad():
            copy_tensors()

    # ---- models ------------------------------------------------------------------------------------------------------
    def _model(self, own: Contents) -> None:
        wanted: dict[str, Any] = {**self._models.tensors, **self._models.stateful}
        found: dict[str, tuple[Contents, Any]] = {}
        for source in (own, *self._sources):
            for name, member in source.model.items():
                found.setdefault(name, (source, member))
        self._names("model", wanted, found, partial=self._partial)
        for name in wanted.keys() & found.keys():
            source, member = found[name]
            if name in self._models.stateful:
                module = self._models.stateful[name]
                value = replace_leaves(member, name, lambda _, leaf, source=source: source.decoder.fresh(leaf))  # type: ignore[misc]
                self._loads.append((module.get_extra_state, module.set_extra_state, value, f"model.{name}"))
            elif not isinstance(member, Leaf):
                self.problems.append(f"model.{name} is no tensor in the snapshot")
            elif self._fits(f"model.{name}", member, self._models.tensors[name]):
                self.copies.append((f"model.{name}", member, self._models.tensors[name]))

    def _names(self, part: str, wanted: Mapping[str, Any], found: Mapping[str, Any], *, partial: bool = False) -> None:
        self.problems += [f"{part}.{name} is missing in the snapshot" for name in wanted if name not in found]
        if not partial:
            self.problems += [f"{part}.{name} is in the snapshot only" for name in found if name not in wanted]

    def _fits(self, name: str, leaf: Leaf, live: torch.Tensor) -> bool:
        problem = self._difference(leaf, live)
        if problem:
            self.problems.append(f"{name} {problem}")
        return not problem

    def _difference(self, leaf: Leaf, live: torch.Tensor) -> str:
        if leaf.global_shape != tuple(live.shape):
            return f"has shape {leaf.global_shape} in the snapshot and {tuple(live.shape)} here"
        if leaf.dtype != live.dtype:
            return f"is {leaf.dtype} in the snapshot and {live.dtype} here"
        shard = Shard.of(live) if isinstance(live, DTensor) else None
        if self._same_world and leaf.shard != shard:
            return (
                f"is sharded otherwise: {_layout(leaf.shard)} in the snapshot and {_layout(shard)} here (use reshard)"
            )
        return ""

    # ---- optimizers --------------------------------------------------------------------------------------------------
    def _groups(self) -> None:
        options: dict[str, tuple[Contents, dict[str, Any]]] = {}
        states: dict[str, dict[str, Any]] = {}
        for source in self._sources:
            for group in source.groups:
                for name in group["params"]:
                    options.setdefault(name, (source, group))
            for name, state in source.states.items():
                states.setdefault(name, state)
        groups = parameter_groups(named(self._into.optimizer, "optimizer"), self._models)
        wanted = dict.fromkeys(name for _, _, names in groups for name in names)
        self._names("optimizer", wanted, options, partial=self._partial)
        for index, (optimizer, group, names) in enumerate(groups):
            known = [options[name] for name in names if name in options]
            if any(other is not known[0][1] and _without(other) != _without(known[0][1]) for _, other in known):
                self.problems.append(f"group {index} of the optimizer has parameters of several groups of the snapshot")
            elif known:
                self._options(index, group, *known[0])
            for name, parameter in zip(names, group["params"], strict=True):
                self._state(optimizer, parameter, name, states.get(name))

    def _options(self, index: int, group: dict[str, Any], source: Contents, given: dict[str, Any]) -> None:
        new = replace_leaves(_without(given), "", lambda _, leaf: source.decoder.fresh(leaf))
        if missing := group.keys() - new.keys() - {"params"}:
            self.problems.append(f"group {index} of the optimizer has no {', '.join(sorted(missing))} in the snapshot")
        for key, value in new.items():
            live = group.get(key)
            if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor) and live.shape == value.shape:
                new[key] = live
                self._assignments.append(lambda live=live, value=value: live.detach().copy_(value))  # type: ignore[misc]
        self._assignments.append(lambda: group.update(new))

    def _state(self, optimizer: Any, parameter: torch.Tensor, name: str, state: dict[str, Any] | None) -> None:
        if state is None:
            self._assignments.append(lambda: optimizer.state.pop(parameter, None))
            return
        live = _by_name(optimizer.state.get(parameter, {}), f"optimizer.state.{name}")

        def target(path: str, leaf: Leaf) -> torch.Tensor:
            tensor = live.get(path)
            if tensor is None or self._difference(leaf, tensor):
                tensor = _new(leaf, parameter)
            self._fits(path, leaf, tensor)
            self.copies.append((path, leaf, tensor))
            return tensor

        new = replace_leaves(state, f"optimizer.state.{name}", target)
        self._assignments.append(lambda: optimizer.state.update({parameter: new}))

    # ---- the rest ----------------------------------------------------------------------------------------------------
    def restore_data(self, own: Contents) -> None:
        """Restore the position in the data, too: the world size is the same after all."""
        self._stateful(own, ("data",))

    def _stateful(self, own: Contents, parts: Sequence[str]) -> None:
        stateful = self._into.stateful()
        for part in parts:
            things, found = stateful[part], own.own(part)
            self._names(part, things, found)
            for name in things.keys() & found.keys():
                thing = things[name]
                label = f"{part}.{name}" if name else part
                self._loads.append((thing.state_dict, thing.load_state_dict, found[name], label))

    def _extras(self, own: Contents) -> dict[str, Any]:
        found: dict[str, Any] = own.own("extras")
        self._names("extras", self._into.extras, found)
        for name in self._into.extras.keys() & found.keys():
            live, value = self._into.extras[name], found[name]
            if is_stateful(live):
                self._loads.append((live.state_dict, live.load_state_dict, value, f"extras.{name}"))
            elif isinstance(live, torch.Generator) and isinstance(value, torch.Generator):
                state = value.get_state()
                self._assignments.append(lambda live=live, state=state: live.set_state(state))  # type: ignore[misc]
            elif isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
                if (live.shape, live.dtype) != (value.shape, value.dtype):
                    self.problems.append(
                        f"extras.{name} is {value.dtype} of shape {tuple(value.shape)} in the snapshot and "
                        f"{live.dtype} of shape {tuple(live.shape)} here"
                    )
                self._assignments.append(lambda live=live, value=value: live.detach().copy_(value))  # type: ignore[misc]
        return found


def _without(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _layout(shard: Shard | None) -> str:
    if shard is None:
        return "whole"
    return f"{', '.join(shard.placements)} over {shard.mesh} at {shard.coordinate}"


def _by_name(tree: Any, path: str) -> dict[str, torch.Tensor]:
    """All live tensors of an optimizer's state, under names joined by dots."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found: dict[str, torch.Tensor] = {}
    for key, member in members:
        found |= _by_name(member, f"{path}.{key}")
    return found


def _new(leaf: Leaf, parameter: torch.Tensor) -> torch.Tensor:
    """An empty tensor for an optimizer's state, laid out as its parameter if it has that shape."""
    device = parameter.device if leaf.device == parameter.device.type else torch.device("cpu")
    if leaf.global_shape == tuple(parameter.shape) and device == parameter.device:
        return torch.empty_like(parameter, dtype=leaf.dtype, requires_grad=False)
    return torch.empty(leaf.global_shape, dtype=leaf.dtype, device=device)
