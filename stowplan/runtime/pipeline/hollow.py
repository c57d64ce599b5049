"""A model in part: copies of its modules that share the parameters of one stage and have none of the others.

Note: a stage runs the model's own forward
    Masks, position ids and rotary tables are the model's business, so every stage lets the model make them: it calls
    the whole model, with stand-ins where another stage has the parameters. What comes before the layers runs on zeros
    that take no memory (``_Hollow``). The layers of earlier stages hand on what the stage received (``AbsentLayer``):
    the one right before the stage's own for good, so that all that the model does from there on is real. Forward is
    left behind the stage's last layer, by an exception that carries nothing. The stack keeps its length, so layers
    keep their numbers and names. ``layout`` proves before that the stage's own layers can see none of this.
"""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stowplan.core.errors import UnsupportedModel

__all__ = ["AbsentLayer", "Passage", "generators", "partial_copy", "settings", "shallow_copy"]

_REGISTRIES = frozenset(name for name, value in torch.nn.Module().__dict__.items() if isinstance(value, dict | set))


def generators(device: torch.device) -> list[torch.Generator]:
    """The random generators that a model on ``device`` draws from by default."""
    found: list[torch.Generator] = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    return found


class Passage:
    """Where the forward of one stage stands; shared by what stands in for other stages' parts.

    Attributes:
        where: model and stage, for messages.
        before: whether the parts before the stage's own are running; they may be stood in for, nothing else may.
        leaves: in a check, what stood in for parameters and layers so far, requiring gradients; None otherwise.
    """

    def __init__(self, where: str, num_before: int, as_tuple: bool) -> None:
        self.where = where
        self.before = False
        self.leaves: list[torch.Tensor] | None = None
        self._num_before = num_before
        self._as_tuple = as_tuple
        self._hidden: torch.Tensor | None = None
        self._drawn: list[tuple[torch.Generator, torch.Tensor]] = []

    @property
    def waits(self) -> bool:
        """Whether what the stage received has not reached its own layers yet."""
        return self._hidden is not None

    def enter(self, hidden: torch.Tensor | None) -> None:
        """Begin a forward pass with ``hidden``, of the stage before; None on the first stage."""
        self._hidden, self.before = hidden, hidden is not None
        if hidden is not None:
            self._drawn = [(generator, generator.get_state()) for generator in generators(hidden.device)]

    def leave(self) -> None:
        """End it; nothing of it is kept."""
        self._hidden, self.before, self._drawn = None, False, []

    def hand_on(self, position: int) -> Any:
        """What the absent layer at ``position`` gives: what the stage received, in the layers' own form.

        Random numbers that were drawn until the stage's own layers begin belong to the first stage: they are drawn as
        if they had not been.
        """
        hidden = self._hidden
        if hidden is None or position >= self._num_before:
            raise UnsupportedModel(
                f"{self.where}: the model left out a layer or called one twice, which a pipeline cannot follow: switch "
                f"off what skips layers (layerdrop, early exit)."
            )
        if position < self._num_before - 1:
            hidden = hidden.detach()
            if self.leaves is not None:
                self.leaves.append(hidden.requires_grad_())
        else:
            for generator, state in self._drawn:
                generator.set_state(state)
            self.leave()
        return (hidden,) if self._as_tuple else hidden

    def stand_in(self, name: str, zero: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Zeros of ``shape`` in one element's memory, for a parameter that another stage has."""
        if not self.before:
            raise UnsupportedModel(
                f"{self.where}: {name} is read, which the model did not do when it was split, and another stage has "
                f"it. Call the model as it is trained: with input_ids, attention_mask, position_ids and labels."
            )
        if self.leaves is not None and zero.is_floating_point():
            zero = torch.zeros((), dtype=zero.dtype, device="cpu" if zero.is_meta else zero.device, requires_grad=True)
            self.leaves.append(zero)
        return zero.expand(shape)


class AbsentLayer(torch.nn.Module):
    """Stands for a layer of another stage, and has its settings, by which models choose a layer's arguments."""

    def __init__(self, layer: torch.nn.Module, passage: Passage, position: int) -> None:
        super().__init__()
        self.__dict__ |= settings(layer)
        self.passage, self.position = passage, position

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stage received, whatever the arguments are."""
        return self.passage.hand_on(self.position)


def settings(layer: torch.nn.Module) -> dict[str, Any]:
    """The layer's plain attributes and those of its class: its kind of attention, its number."""
    classes = [kind for kind in reversed(type(layer).__mro__) if kind is not torch.nn.Module]
    attributes = {name: value for owner in (*classes, layer) for name, value in vars(owner).items()}
    plain = (bool, int, float, str, enum.Enum)
    return {name: value for name, value in attributes.items() if isinstance(value, plain) and not name.startswith("_")}


class _Hollow:
    """Mixed into a module's class: parameters of ``_absent`` are zeros in the memory of one element."""

    _absent: dict[str, tuple[str, torch.Size]]
    _passage: Passage
    _buffers: dict[str, torch.Tensor]

    def __getattr__(self, name: str) -> Any:
        absent = self.__dict__.get("_absent", {})
        if name not in absent:
            return super().__getattr__(name)  # type: ignore[misc]
        full_name, shape = absent[name]
        return self._passage.stand_in(full_name, self._buffers[_zero_name(name)], shape)


def _zero_name(parameter: str) -> str:
    return f"absent_{parameter}"


@functools.cache
def _hollow_class(kind: Any) -> type[torch.nn.Module]:
    """A subclass under the same name, as code and messages go by names."""
    return type(kind.__name__, (_Hollow, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def shallow_copy(module: torch.nn.Module, kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A module of ``kind`` with the same submodules, parameters, buffers, hooks and settings, in its own registries."""
    copied = object.__new__(kind)
    for key, value in module.__dict__.items():
        copied.__dict__[key] = copy.copy(value) if key in _REGISTRIES else value
    return copied


def partial_copy(
    module: torch.nn.Module,
    name: str,
    has: Callable[[str], bool],
    passage: Passage,
    replaced: Mapping[str, torch.nn.Module],
) -> torch.nn.Module:
    """``module`` with those parameters that the stage ``has``, by their full names, and with modules ``replaced``.

    What the stage has as a whole, or what has no parameters, is the same module, not a copy.

    Raises:
        UnsupportedModel: a module to be copied holds modules in plain attributes, or its forward was replaced.
    """
    if name in replaced:
        return replaced[name]
    prefix = f"{name}." if name else ""
    if not any(inner.startswith(prefix) for inner in replaced) and all(
        has(prefix + parameter) for parameter, _ in module.named_parameters(remove_duplicate=False)
    ):
        return module
    _refuse_hidden_references(module, name or type(module).__name__)
    absent = {
        own: parameter
        for own, parameter in module._parameters.items()
        if parameter is not None and not has(prefix + own)
    }
    kind: Any = type(module)
    copied = shallow_copy(module, _hollow_class(kind) if absent else kind)
    for own, parameter in absent.items():
        del copied._parameters[own]
        copied._buffers[_zero_name(own)] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        copied._non_persistent_buffers_set.add(_zero_name(own))
    if absent:
        copied.__dict__["_absent"] = {own: (prefix + own, parameter.shape) for own, parameter in absent.items()}
        copied.__dict__["_passage"] = passage
    for child, inner in module._modules.items():
        if inner is not None:
            copied._modules[child] = partial_copy(inner, prefix + child, has, passage, replaced)
    return copied


def _refuse_hidden_references(module: torch.nn.Module, name: str) -> None:
    if "forward" in module.__dict__:
        raise UnsupportedModel(
            f"{name}: its forward was replaced on the instance (device_map= and some wrappers do that), and still "
            f"calls the whole model: split the model as it was made, and wrap its stages."
        )
    for key, value in module.__dict__.items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if key not in _REGISTRIES and any(isinstance(part, torch.nn.Module) for part in parts):
            raise UnsupportedModel(
                f"{name}.{key} holds modules outside torch's registry of submodules, so that a stage would keep and "
                f"run the whole model: register them (torch.nn.ModuleList)."
            )
