"""Forwards of a model without its layers, on a few tokens: what they would be called with, and who reads what when."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten_with_path, tree_iter

from stowplan.core.errors import UnsupportedModel
from stowplan.runtime.pipeline.hollow import Passage, generators, settings
from stowplan.runtime.pipeline.meta import buffers_on_cpu

__all__ = ["NUM_TOKENS", "LooksFurther", "Over", "Run", "Visit", "arguments_of", "call"]

_BATCH, _SEQUENCE = 5, 7
NUM_TOKENS = _BATCH * _SEQUENCE


def arguments_of(model: torch.nn.Module, ids: torch.Tensor | None) -> dict[str, Any]:
    """What every stage gives to the model: tokens, and no cache."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    return ({} if ids is None else {"input_ids": ids}) | ({"use_cache": False} if takes_cache else {})


class Over(BaseException):
    """Leaves a forward: all that was to be seen is seen."""


class LooksFurther(LookupError):
    """The model looks at more of what a layer gives than a stage hands over."""

    def __init__(self) -> None:
        super().__init__("more than the first item of what a layer gives is used")


class _Single(tuple[Any, ...]):
    """What a layer gives, if layers give tuples: the model may take the first item, and look at nothing else."""

    __slots__ = ()

    def __getitem__(self, place: Any) -> Any:
        if place != 0:
            raise LooksFurther
        return super().__getitem__(0)

    def __iter__(self) -> Iterator[Any]:
        raise LooksFurther


class Visit:
    """What a layer is called with."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments, self.structure = tree_flatten_with_path(
            (args, kwargs), is_leaf=lambda tree: tree is not kwargs and _to_be_filled(tree)
        )


def _to_be_filled(tree: object) -> bool:
    """Is it an empty container, through which layers could pass on what they like?"""
    return isinstance(tree, dict | list) and not tree


class Run(TorchFunctionMode):
    """One forward without layers: what those would be called with, and which parameters the rest uses when.

    Attributes:
        visits: of each layer, in order.
        phase: "before" the layers, "between" two, "after".
        used: ids of parameters, by phase.
        leaves: hidden states that no layer from ``first - 1`` on gave.
    """

    def __init__(self, where: str, layers: Sequence[str], as_tuple: bool, first: int = 0) -> None:
        super().__init__()
        self.where, self.layers, self.as_tuple, self.first = where, layers, as_tuple, first
        self.visits: list[Visit] = []
        self.phase = "before"
        self.used: dict[str, set[int]] = {"before": set(), "between": set(), "after": set()}
        self.leaves: list[torch.Tensor] = []
        self.stop: int | None = None
        self.way: Passage | None = None
        self.to_meta = False
        self._drawn: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the parameters that a function makes tensors of."""
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_iter(result)):
            given = tree_iter((args, kwargs))
            self.used[self.phase] |= {id(leaf) for leaf in given if isinstance(leaf, torch.nn.Parameter)}
        return result

    def probes(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """What stands for each layer."""
        return {name: _Probe(model.get_submodule(name), self, n) for n, name in enumerate(self.layers)}

    def visit(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer at ``position`` gives: noise."""
        if any(isinstance(leaf, _Single) for leaf in (*args, *kwargs.values())):
            raise Over
        if position != len(self.visits):
            raise UnsupportedModel(
                f"{self.where}: the model does not call its layers once each and in order ({self.layers[position]} is "
                f"call {len(self.visits)}), so that stages cannot hand over."
            )
        hidden = next((leaf for leaf in tree_iter((args, kwargs)) if _is_hidden(leaf)), None)
        if hidden is None:
            raise UnsupportedModel(
                f"{self.where}: {self.layers[position]} is not called with a hidden state of (batch, sequence, width), "
                f"which is what stages hand over."
            )
        self.visits.append(Visit(args, kwargs))
        drawn = [generator.get_state() for generator in generators(hidden.device)]
        if self._drawn and not all(map(torch.equal, drawn, self._drawn)):
            raise UnsupportedModel(
                f"{self.where}: random numbers are drawn between layers, to skip some of them or for what other stages "
                f"would have to repeat: switch that off (layerdrop=0)."
            )
        if position == self.stop:
            raise Over
        self.phase = "between"
        if position == len(self.layers) - 1:
            self.phase = "after"
            for generator in generators(hidden.device):
                generator.manual_seed(0)
        self._drawn = drawn
        noise = self._noise(position, hidden)
        if self.way is not None and position >= self.first - 1:
            self.way.leave()
        return _Single((noise,)) if self.as_tuple else noise

    def _noise(self, position: int, hidden: torch.Tensor) -> torch.Tensor:
        """The same for the same layer in all runs, unless it is of a stage before the one that hands over."""
        foreign = position < self.first - 1
        seed = torch.Generator().manual_seed(2 * position + foreign)
        to_meta = self.to_meta and position == len(self.layers) - 1
        noise = torch.randn(hidden.shape, generator=seed).to("meta" if to_meta else hidden.device, hidden.dtype)
        if foreign:
            self.leaves.append(noise.requires_grad_())
        return noise


class _Probe(torch.nn.Module):
    """Stands for a layer in a run."""

    def __init__(self, layer: torch.nn.Module, run: Run, position: int) -> None:
        super().__init__()
        self.__dict__ |= settings(layer)
        self.run, self.position = run, position

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run.visit(self.position, args, kwargs)


def _is_hidden(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.shape[:2] == (_BATCH, _SEQUENCE)


def call(copied: torch.nn.Module, model: torch.nn.Module, run: Run, ids: torch.Tensor, device: torch.device) -> Any:
    """The output of ``copied``, the model with ``run`` in the place of its layers.

    Raises:
        UnsupportedModel: its forward fails.
        Over: the run has seen enough.
    """
    for path, module in copied.named_modules():
        if any(layer.startswith(f"{path}." if path else "") for layer in run.layers):
            module.training = True  # a copy, which does in training what eval mode might not show
    for generator in generators(device):
        generator.manual_seed(0)
    if device.type == "meta":
        run.to_meta = True
        buffers_on_cpu(copied, model, "", run.layers)
    arguments = arguments_of(copied, ids.view(_BATCH, _SEQUENCE).to("cpu" if device.type == "meta" else device))
    try:
        with run:
            return copied(**arguments)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ImportError) as error:
        raise UnsupportedModel(
            f"{run.where}: its forward cannot be run with {', '.join(arguments)} and without its layers, as it is in "
            f"a pipeline ({type(error).__name__}: {error}). Give split() a sequence of modules instead."
        ) from error
