"""What an optimizer's step costs: the bytes of its states, its peak and its time, found without taking a real step.

Bytes: the same optimizer class steps fake tensors of the real shapes; every storage it makes is followed. Seconds: it
steps real stand-ins of at most a few million parameters, scaled by their number.
"""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stowplan.core.errors import InvalidArgument
from stowplan.offload.storages import storage_bytes

__all__ = ["OptimizerCost", "optimizer_cost", "state_bytes"]

_MAX_STAND_IN_ELEMENTS = 4_000_000


class OptimizerCost(NamedTuple):
    """``state_bytes`` in steady state, ``peak_bytes`` above parameters, gradients and states, ``seconds`` of a step.

    ``exact`` is False where the bytes were scaled up from a part of the parameters.
    """

    state_bytes: int
    peak_bytes: int
    seconds: float
    exact: bool = True


def optimizer_cost(optimizer: torch.optim.Optimizer | None) -> OptimizerCost:
    """The cost of ``optimizer.step()`` in steady state; nothing of the real optimizer or its parameters changes.

    Raises InvalidArgument for something that is no ``torch.optim.Optimizer``.
    """
    if optimizer is None:
        return OptimizerCost(0, 0, 0.0)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(f"optimizer={type(optimizer).__name__} is not a torch.optim.Optimizer.")
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner  # a wrapper around the one that steps
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        return OptimizerCost(state_bytes(optimizer), 0, 0.0)
    try:
        partial = _partial_step(optimizer)
        dry = _dry_step(optimizer)
    except TypeError as error:  # step() that needs a closure, a constructor of its own
        raise InvalidArgument(
            f"optimizer={type(optimizer).__name__} cannot be stepped by itself ({error}); leave optimizer= out and "
            f"lower the budget by what its states take."
        ) from error
    if dry is None:
        return partial
    return OptimizerCost(*dry, partial.seconds)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that exist now, each storage once."""
    return storage_bytes(tree_iter(list(optimizer.state.values())))


class _LiveBytes(TorchDispatchMode):
    """Live bytes of the storages made under the mode, counted op by op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result

    def live_bytes(self) -> int:
        for key in [key for key, (reference, _) in self.live.items() if reference.expired()]:
            del self.live[key]
        return sum(size for _, size in self.live.values())


def _dry_step(optimizer: torch.optim.Optimizer) -> tuple[int, int] | None:
    """Bytes of the states after a step, and the peak above them during the next; None if the step looks at data."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        twin = _twin(optimizer, torch.empty_strided)
        try:
            _take_step(twin)
        except DataDependentOutputException:
            return None
        states = state_bytes(twin)
        with _LiveBytes() as live:
            _take_step(twin)
        return states, live.peak_bytes


def _partial_step(optimizer: torch.optim.Optimizer) -> OptimizerCost:
    """The cost of a real step on stand-ins of some of the parameters, scaled up by their number."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    chosen: set[int] = set()
    num_chosen = 0
    for parameter in parameters:
        if not chosen or num_chosen + parameter.numel() <= _MAX_STAND_IN_ELEMENTS:
            chosen.add(id(parameter))
            num_chosen += parameter.numel()
    if not num_chosen:
        return OptimizerCost(0, 0, 0.0)
    twin = _twin(optimizer, _small_numbers, lambda p: id(p) in chosen)
    _take_step(twin)
    seconds = sorted(_timed(twin, parameters) for _ in range(3))[1]
    with _LiveBytes() as live:
        _take_step(twin)
    scale = sum(p.numel() for p in parameters) / num_chosen
    return OptimizerCost(
        round(state_bytes(twin) * scale), round(live.peak_bytes * scale), seconds * scale, exact=scale == 1
    )


def _timed(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    _take_step(optimizer)
    for device in {p.device for p in parameters if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _small_numbers(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensors of one small number: zeros and denormals would be timed wrongly."""
    return torch.empty_strided(*args, **kwargs).fill_(1e-3)


def _own_copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    """A step that no registered hook sees."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def _twin(
    optimizer: torch.optim.Optimizer,
    make: Callable[..., torch.Tensor],
    chosen: Callable[[torch.Tensor], bool] = lambda p: True,
) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings over copies of the parameters, each with a gradient."""
    groups = []
    for group in optimizer.param_groups:
        parameters = []
        for p in group["params"]:
            if p.requires_grad and chosen(p):
                stand_in = torch.nn.Parameter(make(p.shape, p.stride(), dtype=p.dtype, device=p.device))
                stand_in.grad = make(p.shape, p.stride(), dtype=p.dtype, device=p.device)
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
