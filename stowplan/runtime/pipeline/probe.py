"""Which stage has which parameters of a model, and the proof that its stages compute what the model does.

The model's own forward runs on a few tokens, without its layers: each gives noise instead. What it uses before the
layers belongs to the first stage, what it uses after them to the last. Then it runs once more for every stage, as that
stage will (``hollow``): stand-ins for what others have, other tokens, and other noise from the layers of stages before
the one that hands over. If a single bit differs in what the stage's layers are called with, or in what the last stage
gives, or a gradient could flow to a stand-in, then something other than the hidden state passes between stages.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_iter

from stowplan.core.errors import UnsupportedModel
from stowplan.runtime.pipeline.hollow import Passage, generators, partial_copy, settings

__all__ = ["Layout", "arguments_of", "examine"]

_BATCH, _SEQUENCE = 2, 6
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, enum.Enum)


@dataclass(frozen=True)
class Layout:
    """How a model is divided.

    Attributes:
        model: its class.
        layers: dotted names of all layers.
        bounds: the first layer of each stage, and at the end the number of layers.
        stages: for every parameter, by each of its names, the stages that have it.
        as_tuple: whether layers give a tuple with the hidden state first, or the hidden state.
    """

    model: str
    layers: tuple[str, ...]
    bounds: tuple[int, ...]
    stages: Mapping[str, frozenset[int]]
    as_tuple: bool

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

    def where(self, stage: int) -> str:
        """Model and stage, for messages."""
        return f"{self.model}, stage {stage} of {self.num_stages}"

    def part(self, model: torch.nn.Module, stage: int, layers: Mapping[str, torch.nn.Module], way: Passage) -> Any:
        """The model as ``stage`` has it, with ``layers`` in the place of those."""
        return partial_copy(model, "", lambda name: stage in self.stages[name], way, layers)


def arguments_of(model: torch.nn.Module, ids: torch.Tensor | None) -> dict[str, Any]:
    """What every stage gives to the model: tokens, and no cache."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    return ({} if ids is None else {"input_ids": ids}) | ({"use_cache": False} if takes_cache else {})


class _Over(BaseException):
    """Leaves a forward: all that was to be seen is seen."""


class _Single(tuple[Any, ...]):
    """What a layer gives, if layers give tuples: the model may take the first item, and look at nothing else."""

    __slots__ = ()

    def __getitem__(self, place: Any) -> Any:
        if place != 0:
            raise LookupError("more than the first item of what a layer gives is used")
        return super().__getitem__(0)

    def __iter__(self) -> Iterator[Any]:
        raise LookupError("more than the first item of what a layer gives is used")


class _Visit:
    """What a layer is called with."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments, self.structure = tree_flatten_with_path((args, kwargs))


class _Run(TorchFunctionMode):
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
        self.visits: list[_Visit] = []
        self.phase = "before"
        self.used: dict[str, set[int]] = {"before": set(), "between": set(), "after": set()}
        self.leaves: list[torch.Tensor] = []
        self.stop: int | None = None
        self.way: Passage | None = None
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

    def visit(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer at ``position`` gives: noise."""
        if any(isinstance(leaf, _Single) for leaf in (*args, *kwargs.values())):
            raise _Over
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
        self.visits.append(_Visit(args, kwargs))
        drawn = [generator.get_state() for generator in generators(hidden.device)]
        if self._drawn and not all(map(torch.equal, drawn, self._drawn)):
            raise UnsupportedModel(
                f"{self.where}: random numbers are drawn between layers, to skip some of them or for what other stages "
                f"would have to repeat: switch that off (layerdrop=0)."
            )
        if position == self.stop:
            raise _Over
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
        noise = torch.randn(hidden.shape, generator=seed).to(hidden.device, hidden.dtype)
        if foreign:
            self.leaves.append(noise.requires_grad_())
        return noise


class _Probe(torch.nn.Module):
    """Stands for a layer in a run."""

    def __init__(self, layer: torch.nn.Module, run: _Run, position: int) -> None:
        super().__init__()
        self.__dict__ |= settings(layer)
        self.run, self.position = run, position

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run.visit(self.position, args, kwargs)


def _is_hidden(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.shape[:2] == (_BATCH, _SEQUENCE)


def examine(model: torch.nn.Module, layers: Sequence[str], bounds: Sequence[int]) -> Layout:
    """Find out which stage has what, and prove that stages cut at ``bounds`` compute what the model does.

    On the meta device values are not known: there, only what gradients could flow along is.

    Raises:
        UnsupportedModel: they do not; names model, stage and argument.
    """
    device = next(model.parameters()).device
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad():
        run, called, output = _whole(model, layers, device)
        layout = Layout(
            type(model).__name__,
            tuple(layers),
            tuple(bounds),
            _stages(model, layers, bounds, run, called),
            run.as_tuple,
        )
        for stage in range(1, layout.num_stages):
            _check_stage(model, layout, stage, run, output, device)
    return layout


def _whole(
    model: torch.nn.Module, layers: Sequence[str], device: torch.device
) -> tuple[_Run, dict[str, set[str]], Any]:
    """The model's run with all that is its own but the layers, and in which phases each of its modules is called."""
    name = type(model).__name__
    for as_tuple in (True, False):
        run = _Run(name, layers, as_tuple)
        way = Passage(name, 0, as_tuple)
        probes = {layer: _Probe(model.get_submodule(layer), run, position) for position, layer in enumerate(layers)}
        copied = partial_copy(model, "", lambda _: True, way, probes)
        called: dict[str, set[str]] = {}
        handles = [
            module.register_forward_pre_hook(_noting(called.setdefault(path, set()), run))
            for path, module in copied.named_modules(remove_duplicate=False)
            if not any(layer.startswith(f"{path}." if path else "") for layer in layers)
        ]
        ids = torch.arange(_BATCH * _SEQUENCE, device=device).view(_BATCH, _SEQUENCE) % 7
        try:
            output = _call(copied, run, ids)
        except _Over:
            continue
        finally:
            for handle in handles:
                handle.remove()
        if len(run.visits) != len(layers):
            raise UnsupportedModel(
                f"{name}: the model calls {len(run.visits)} of its {len(layers)} layers; a pipeline needs each once."
            )
        return run, called, output
    raise UnsupportedModel(f"{name}: its layers give neither a hidden state nor a tuple that begins with one.")


def _noting(phases: set[str], run: _Run) -> Callable[..., None]:
    def note(*_: object) -> None:
        phases.add(run.phase)

    return note


def _call(copied: torch.nn.Module, run: _Run, ids: torch.Tensor) -> Any:
    for path, module in copied.named_modules():
        if any(layer.startswith(f"{path}." if path else "") for layer in run.layers):
            module.training = True  # a copy, which does in training what eval mode might not show
    for generator in generators(ids.device):
        generator.manual_seed(0)
    arguments = arguments_of(copied, ids)
    try:
        with run:
            return copied(**arguments)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ImportError) as error:
        raise UnsupportedModel(
            f"{run.where}: its forward cannot be run with {', '.join(arguments)} and without its layers, as it is in "
            f"a pipeline ({type(error).__name__}: {error}). Give split() a sequence of modules instead."
        ) from error


def _stages(
    model: torch.nn.Module, layers: Sequence[str], bounds: Sequence[int], run: _Run, called: Mapping[str, set[str]]
) -> dict[str, frozenset[int]]:
    """The stages of every parameter, by all its names. What no phase uses is the first stage's."""
    last = len(bounds) - 2
    of_layer = {f"{layer}.": stage for stage in range(last + 1) for layer in layers[bounds[stage] : bounds[stage + 1]]}
    found: dict[str, frozenset[int]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for identity, aliases in names.items():
        owned = {name: called.get(name.rpartition(".")[0], set()) for name in aliases}
        outside = {phase for phase, ids in run.used.items() if identity in ids} - set().union(*owned.values())
        for name, phases in owned.items():
            layer = next((stage for prefix, stage in of_layer.items() if name.startswith(prefix)), None)
            if layer is not None:
                found[name] = frozenset({layer})
                continue
            if "between" in phases | outside:
                raise UnsupportedModel(
                    f"{run.where}: {name} is used between layers, outside of them, which would put it on many stages: "
                    f"a pipeline needs all parameters in the layers, before them or after them."
                )
            ends = {"before": 0, "after": last}
            found[name] = frozenset(ends[phase] for phase in phases | outside) or frozenset({0})
    return found


def _check_stage(
    model: torch.nn.Module, layout: Layout, stage: int, whole: _Run, output: Any, device: torch.device
) -> None:
    where = layout.where(stage)
    first, end = layout.bounds[stage : stage + 2]
    run = _Run(where, layout.layers, layout.as_tuple, first)
    run.stop = end - 1 if end < len(layout.layers) else None
    run.way = way = Passage(where, first, layout.as_tuple)
    way.leaves = run.leaves
    probes = {layer: _Probe(model.get_submodule(layer), run, n) for n, layer in enumerate(layout.layers)}
    copied = layout.part(model, stage, probes, way)
    way.enter(torch.empty((), device=device))
    ids = torch.ones(_BATCH, _SEQUENCE, dtype=torch.long, device=device)
    given = None
    try:
        given = _call(copied, run, ids)
    except _Over:
        assert run.stop is not None
    for position in range(first, end):
        seen, expected = run.visits[position], whole.visits[position]
        if seen.structure != expected.structure:
            _refuse(where, f"the arguments of {layout.layers[position]}")
        _check_plain(where, layout.layers[position], seen)
        _check_same(where, f"of {layout.layers[position]}", seen.arguments, expected.arguments, run.leaves)
    if run.stop is None:
        _check_same(where, "of the output", _paths(given), _paths(output), run.leaves)


def _paths(tree: Any) -> list[tuple[Any, Any]]:
    return tree_flatten_with_path(dict(tree) if isinstance(tree, Mapping) else tree)[0]


def _check_plain(where: str, layer: str, visit: _Visit) -> None:
    """Refuse objects, which layers may use to hand on more than the hidden state."""
    for path, leaf in visit.arguments:
        if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            raise UnsupportedModel(
                f"{where}: {layer} is called with {keystr(path)}, a {type(leaf).__name__}, in which layers may hand on "
                f"more than the hidden state; stages hand over the hidden state alone."
            )


def _check_same(
    where: str,
    whose: str,
    seen: Iterable[tuple[Any, Any]],
    expected: Iterable[tuple[Any, Any]],
    leaves: Sequence[torch.Tensor],
) -> None:
    for (path, ours), (_, theirs) in zip(seen, expected, strict=True):
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            if not _equal(ours, theirs) or _reaches(ours, leaves):
                _refuse(where, f"{keystr(path)} {whose}")
        elif type(ours) is not type(theirs) or (isinstance(ours, _PLAIN) and ours != theirs):
            _refuse(where, f"{keystr(path)} {whose}")


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if ours.is_meta or type(ours) not in (torch.Tensor, torch.nn.Parameter):
        return True
    return torch.equal(*(t.detach().contiguous().view(torch.uint8) if t.ndim else t for t in (ours, theirs)))


def _reaches(tensor: torch.Tensor, leaves: Sequence[torch.Tensor]) -> bool:
    """Does a gradient of the tensor flow to one of the leaves?"""
    wanted = {id(leaf) for leaf in leaves}
    return id(tensor) in wanted or any(id(variable) in wanted for variable in _variables(tensor))


def _variables(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    pending, met = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        pending += [following for following, _ in node.next_functions]


def _refuse(where: str, what: str) -> NoReturn:
    raise UnsupportedModel(
        f"{where}: {what} depends on more than the hidden state that the stage before hands over (a skip connection, a "
        f"table that all layers learn, tokens that are read again), which a pipeline of stages cannot carry: train "
        f"this model without a pipeline, or give split() a sequence of modules that take and give one tensor."
    )
