"""Which stage has which parameters of a model, and the proof that its stages compute what the model does.

The model's own forward runs on a few tokens, without its layers: each gives noise instead. What it uses before the
layers belongs to the first stage, what it uses after them to the last. Then it runs once more for every stage, as that
stage will (``hollow``): stand-ins for what others have, other tokens, and other noise from the layers of stages before
the one that hands over. If a single bit differs in what the stage's layers are called with, or in what the last stage
gives, or a gradient could flow to a stand-in, then something other than the hidden state passes between stages.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from stowplan.core.errors import UnsupportedModel
from stowplan.runtime.pipeline.hollow import Passage, partial_copy
from stowplan.runtime.pipeline.meta import MetaPassage
from stowplan.runtime.pipeline.probe import NUM_TOKENS, LooksFurther, Over, Run, Visit, call

__all__ = ["Layout", "examine", "reaches", "refuse_more"]

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


def examine(model: torch.nn.Module, layers: Sequence[str], bounds: Sequence[int]) -> Layout:
    """Find out which stage has what, and prove that stages cut at ``bounds`` compute what the model does.

    On the meta device (``meta``) the values that the last stage gives are not known, but what their gradients reach is.

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


def _whole(model: torch.nn.Module, layers: Sequence[str], device: torch.device) -> tuple[Run, dict[str, set[str]], Any]:
    """The model's run with all that is its own but the layers, and in which phases each of its modules is called.

    Whether layers give tuples is found out by trying.
    """
    try:
        return _whole_as(model, layers, device, True)
    except Over:
        return _whole_as(model, layers, device, False)
    except UnsupportedModel as error:
        if error.__cause__ is None:
            raise
        try:
            return _whole_as(model, layers, device, False)
        except UnsupportedModel:
            if isinstance(error.__cause__, LooksFurther):
                raise error from error.__cause__
            raise


def _whole_as(
    model: torch.nn.Module, layers: Sequence[str], device: torch.device, as_tuple: bool
) -> tuple[Run, dict[str, set[str]], Any]:
    run = Run(type(model).__name__, layers, as_tuple)
    called: dict[str, set[str]] = {}
    way = MetaPassage(model, _noting_read(called, run)) if device.type == "meta" else Passage(run.where, 0, as_tuple)
    copied = partial_copy(model, "", lambda _: device.type != "meta", way, run.probes(model))
    handles = [
        module.register_forward_pre_hook(_noting_call(called.setdefault(path, set()), run))
        for path, module in copied.named_modules(remove_duplicate=False)
        if not any(layer.startswith(f"{path}." if path else "") for layer in layers)
    ]
    try:
        output = call(copied, model, run, torch.arange(NUM_TOKENS) % 7, device)
    finally:
        for handle in handles:
            handle.remove()
    if len(run.visits) != len(layers):
        raise UnsupportedModel(
            f"{run.where}: the model calls {len(run.visits)} of its {len(layers)} layers; a pipeline needs each once."
        )
    return run, called, output


def _noting_call(phases: set[str], run: Run) -> Callable[..., None]:
    def note(*_: object) -> None:
        phases.add(run.phase)

    return note


def _noting_read(phases: dict[str, set[str]], run: Run) -> Callable[[str], bool]:
    def note(name: str) -> bool:
        phases.setdefault(name.rpartition(".")[0], set()).add(run.phase)
        return run.phase != "after"

    return note


def _stages(
    model: torch.nn.Module, layers: Sequence[str], bounds: Sequence[int], run: Run, called: Mapping[str, set[str]]
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
    model: torch.nn.Module, layout: Layout, stage: int, whole: Run, output: Any, device: torch.device
) -> None:
    where = layout.where(stage)
    first, end = layout.bounds[stage : stage + 2]
    run = Run(where, layout.layers, layout.as_tuple, first)
    run.stop = end - 1 if end < len(layout.layers) else None
    run.way = way = Passage(where, first, layout.as_tuple)
    way.leaves = run.leaves
    copied = layout.part(model, stage, run.probes(model), way)
    way.enter(torch.empty((), device=device))
    ids = torch.ones(NUM_TOKENS, dtype=torch.long)
    given = None
    try:
        given = call(copied, model, run, ids, device)
    except Over:
        assert run.stop is not None
    for position in range(first, end):
        seen, expected = run.visits[position], whole.visits[position]
        if seen.structure != expected.structure:
            refuse_more(where, f"the arguments of {layout.layers[position]}")
        _check_plain(where, layout.layers[position], seen)
        _check_same(where, f"of {layout.layers[position]}", seen.arguments, expected.arguments, run.leaves)
    if run.stop is None:
        _check_same(where, "of the output", _paths(given), _paths(output), run.leaves)


def _paths(tree: Any) -> list[tuple[Any, Any]]:
    return tree_flatten_with_path(dict(tree) if isinstance(tree, Mapping) else tree)[0]


def _check_plain(where: str, layer: str, visit: Visit) -> None:
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
            if not _equal(ours, theirs) or reaches(ours, leaves):
                refuse_more(where, f"{keystr(path)} {whose}")
        elif type(ours) is not type(theirs) or (isinstance(ours, _PLAIN) and ours != theirs):
            refuse_more(where, f"{keystr(path)} {whose}")


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if ours.is_meta or type(ours) not in (torch.Tensor, torch.nn.Parameter):
        return True
    return torch.equal(*(t.detach().contiguous().view(torch.uint8) if t.ndim else t for t in (ours, theirs)))


def reaches(tensor: torch.Tensor, leaves: Sequence[torch.Tensor]) -> bool:
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


def refuse_more(where: str, what: str) -> NoReturn:
    """Raise UnsupportedModel: ``what``, of the stage ``where``, depends on more than stages hand over."""
    raise UnsupportedModel(
        f"{where}: {what} depends on more than the hidden state that the stage before hands over (a skip connection, a "
        f"table that all layers learn, tokens that are read again), which a pipeline of stages cannot carry: train "
        f"this model without a pipeline, or give split() a sequence of modules that take and give one tensor."
    )
