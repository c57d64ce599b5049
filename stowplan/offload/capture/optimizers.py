"""What an optimizer's step costs: the bytes of its states, its peak and its time, found without taking a real step.

Bytes: the same optimizer class steps fake tensors of the real shapes; every storage it makes is followed. Seconds: it
steps real stand-ins of at most a few million parameters, scaled by their number.
"""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from stowplan.core.allocations import Events
from stowplan.core.errors import InvalidArgument
from stowplan.offload.allocation_record import AllocationRecord
from stowplan.offload.capture.instruments import Instruments
from stowplan.offload.dry.known import Known
from stowplan.offload.dry.mode import DryLog, DryMode
from stowplan.offload.dry.run import DryRun
from stowplan.offload.memory_log import MemoryLog
from stowplan.offload.parallel import like_distributed, local_part
from stowplan.offload.storages import storage_bytes

__all__ = ["OptimizerCost", "optimizer_cost", "state_bytes", "steady_states"]

_MAX_STAND_IN_ELEMENTS = 4_000_000


class OptimizerCost(NamedTuple):
    """``state_bytes`` in steady state, ``peak_bytes`` above parameters, gradients and states, ``seconds`` of a step.

    ``exact`` is False where the bytes were scaled up from a part of the parameters.
    """

    state_bytes: int
    peak_bytes: int
    seconds: float
    exact: bool = True
    record: AllocationRecord | None = None

    @property
    def events(self) -> Events:
        """Its requests (``core.allocations``); where they are not known, one that has the peak."""
        if self.record is not None:
            return tuple(self.record.events)
        return (self.peak_bytes, ~0) if self.peak_bytes else ()


def optimizer_cost(optimizer: torch.optim.Optimizer | None, instruments: Instruments) -> OptimizerCost:
    """The cost of ``optimizer.step()`` in steady state; nothing of the real optimizer or its parameters changes.

    With dry instruments all of it is dry; otherwise seconds are those of a real step on stand-ins.

    Raises InvalidArgument for something that is no ``torch.optim.Optimizer``.
    """
    if optimizer is None:
        return OptimizerCost(0, 0, 0.0)
    optimizer = _inner(optimizer)
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        return OptimizerCost(state_bytes(optimizer), 0, 0.0)
    try:
        dry = _dry_step(optimizer, instruments)
        if instruments.dry and dry is not None:
            return dry
        sample = _partial_step(optimizer)
    except TypeError as error:
        raise _cannot_step(optimizer, error) from error
    if dry is None:
        return sample
    return dry._replace(seconds=sample.seconds)


def steady_states(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[torch.Tensor, dict[str, Any]]:
    """The states that each parameter will have, with fake tensors; those of its shape are sharded as it is.

    Nothing of the real optimizer changes. Raises InvalidArgument as ``optimizer_cost`` does.
    """
    optimizer = _inner(optimizer)
    alike: dict[tuple[Any, ...], list[torch.Tensor]] = {}  # those of one group and shape have states that are, too
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                local = local_part(parameter)
                key = number, local.dtype, tuple(local.shape), local.stride()
                alike.setdefault(key, []).append(parameter)
    first = {id(parameters[0]) for parameters in alike.values()}
    states: dict[torch.Tensor, dict[str, Any]] = {}
    with FakeTensorMode(), DryMode():
        twin = _twin(optimizer, partial(_empty, device), lambda p: id(p) in first)
        if twin.param_groups:
            try:
                _take_step(twin)
            except TypeError as error:
                raise _cannot_step(optimizer, error) from error
        stand_ins = [p for group in twin.param_groups for p in group["params"]]
        for stand_in, parameters in zip(stand_ins, alike.values(), strict=True):
            for parameter in parameters if stand_in in twin.state else ():
                states[parameter] = {
                    name: _sharded_as(parameter, _another(value)) for name, value in twin.state[stand_in].items()
                }
    return states


def _another(value: Any) -> Any:
    """A tensor of its own that is like a fake one; anything else as it is."""
    return _empty(value.device, value) if isinstance(value, torch.Tensor) else value


def _cannot_step(optimizer: torch.optim.Optimizer, error: TypeError) -> InvalidArgument:
    """For a ``step()`` that needs a closure, or a constructor of its own."""
    return InvalidArgument(
        f"optimizer={type(optimizer).__name__} cannot be stepped by itself ({error}); leave optimizer= out and lower "
        f"the budget by what its states take."
    )


def _sharded_as(parameter: torch.Tensor, value: Any) -> Any:
    """A state of this process's part of a parameter as one of the parameter."""
    local = local_part(parameter)
    if local is parameter or not isinstance(value, torch.Tensor) or value.shape != local.shape:
        return value
    return like_distributed(value, parameter)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The one that steps, of a wrapper around it. Raises InvalidArgument for something else."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(f"optimizer={type(optimizer).__name__} is not a torch.optim.Optimizer.")
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that exist now, each storage once."""
    return storage_bytes(tree_iter(list(optimizer.state.values())))


def _dry_step(optimizer: torch.optim.Optimizer, instruments: Instruments) -> OptimizerCost | None:
    """The cost of a second step on fake tensors; None if the step looks at data that is not known."""
    with _dry_space(instruments) as (log, seconds, known):
        num_guesses = len(known.guesses)
        twin = _twin(optimizer, partial(_empty, instruments.device))
        _take_step(twin)
        states = state_bytes(twin)
        start = seconds()
        with log:
            _take_step(twin)
        peak_bytes = max(segment.peak_bytes for segment in log.segments)
        cost = OptimizerCost(states, peak_bytes, (seconds() - start) * instruments.scale, record=log.record)
        return cost if len(known.guesses) == num_guesses or instruments.dry else None


def _empty(device: torch.device, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


@contextmanager
def _dry_space(instruments: Instruments) -> Iterator[tuple[MemoryLog, Callable[[], float], Known]]:
    """A memory log, a clock and what is known, where tensors are fake: the dry run's, or one made for the purpose."""
    if isinstance(instruments, DryRun):
        yield instruments.memory_log(), instruments.seconds, instruments.known
        return
    with FakeTensorMode(), DryMode() as mode:
        yield DryLog(mode), lambda: mode.seconds, mode.known


def _partial_step(optimizer: torch.optim.Optimizer) -> OptimizerCost:
    """The cost of a real step on stand-ins of some of the parameters, scaled up by their number."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    chosen: set[int] = set()
    num_chosen = 0
    for parameter in parameters:
        num_elements = local_part(parameter).numel()
        if not chosen or num_chosen + num_elements <= _MAX_STAND_IN_ELEMENTS:
            chosen.add(id(parameter))
            num_chosen += num_elements
    if not num_chosen:
        return OptimizerCost(0, 0, 0.0)
    twin = _twin(optimizer, _small_numbers, lambda p: id(p) in chosen)
    _take_step(twin)
    seconds = sorted(_timed(twin, parameters) for _ in range(3))[1]
    with DryMode() as live:
        _take_step(twin)
    scale = sum(local_part(p).numel() for p in parameters) / num_chosen
    return OptimizerCost(
        round(state_bytes(twin) * scale), round(live.peak_bytes * scale), seconds * scale, exact=scale == 1
    )


def _timed(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    _take_step(optimizer)
    for device in {p.device for p in parameters if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _small_numbers(like: torch.Tensor) -> torch.Tensor:
    """A tensor of one small number: zeros and denormals would be timed wrongly."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).fill_(1e-3)


def _own_copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    """A step that no registered hook sees."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def _twin(
    optimizer: torch.optim.Optimizer,
    make: Callable[[torch.Tensor], torch.Tensor],
    chosen: Callable[[torch.Tensor], bool] = lambda p: True,
) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings over copies of the parameters, each with a gradient."""
    groups = []
    for group in optimizer.param_groups:
        parameters = []
        for p in group["params"]:
            if p.requires_grad and chosen(p):
                stand_in = torch.nn.Parameter(make(local_part(p)))
                stand_in.grad = make(local_part(p))
                parameters.append(stand_in)
        if parameters:
            groups.append({**group, "params": parameters})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = object.__new__(type(optimizer))
        twin.__dict__.update({name: _own_copy(value) for name, value in optimizer.__dict__.items()})
        twin.__dict__.pop("step", None)  # schedulers put one there that is bound to the real optimizer
        torch.optim.Optimizer.__init__(twin, groups, dict(optimizer.defaults))
    return twin
