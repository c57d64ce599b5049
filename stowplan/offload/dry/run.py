"""A model made fake for a while, and the instruments by which capture measures it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from stowplan.offload.arguments import map_tree
from stowplan.offload.dry.cuda import CudaTarget, pretended_cuda
from stowplan.offload.dry.cuda_costs import allocated_bytes, library_bytes
from stowplan.offload.dry.known import Known
from stowplan.offload.dry.mode import Costs, DryLog, DryMode
from stowplan.offload.dry.patches import uninitialised, unnoticed
from stowplan.offload.storages import storage_bytes
from stowplan.offload.tape.tape import TapeOp

__all__ = ["DryRun", "building", "is_fake"]

# A real block is tried only if its tensors are surely no more than this share of the available memory.
_MAX_SHARE = 1 / 3
_BYTES_PER_PARAMETER_BYTE = 3  # weights, gradients, and room

# Values of small tensors that models were built with.
_KNOWN = Known()


def is_fake(model: torch.nn.Module) -> bool:
    """Was the model built without its data (``building``, or torch's meta device)?"""
    return any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters())


@contextmanager
def building(target: CudaTarget | None = None) -> Iterator[None]:
    """Inside, new tensors take no memory: they have a shape, a dtype and a device, and small ones their values.

    With a ``target`` tensors may be on cuda, wherever there is none.
    """
    with ExitStack() as stack:
        if target is not None:
            stack.enter_context(pretended_cuda(target))
        for context in (unnoticed(), uninitialised(), FakeTensorMode(allow_non_fake_inputs=True)):
            stack.enter_context(context)
        stack.enter_context(DryMode(known=_KNOWN))
        yield


class DryRun:
    """Inside, ``model`` is made of fake tensors on ``device``; afterwards it is as it was.

    ``batch`` is the batch, fake. The run itself is capture's instruments.

    Args:
        costs: what ops take.
        real_device: where one block of each kind may be run for real to calibrate ``costs``; None if nowhere.
        target: the GPU that ``device`` stands for, if that is on cuda.
        allocations: each request of memory is asked for.
    """

    dry = True
    scale = 1.0

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Any,
        device: torch.device,
        costs: Costs,
        real_device: torch.device | None = None,
        target: CudaTarget | None = None,
        *,
        allocations: bool = False,
    ) -> None:
        self.device = device
        self.allocations = allocations
        self.batch = batch
        self.guesses: dict[str, None] = {}
        self._model = model
        self._real_device = real_device
        self._scales: list[float] = []
        self._fakes: dict[int, torch.Tensor] = {}
        self.known = _KNOWN
        self._target = target
        self.resident_bytes = library_bytes(target) if target is not None else 0
        self._mode = DryMode(costs, _KNOWN, *([allocated_bytes] if target is not None else []))
        modes = {p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor)}
        self._fake_mode = modes.pop() if modes else FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> DryRun:
        _KNOWN.guesses.clear()
        with ExitStack() as stack:
            if self._target is not None:
                stack.enter_context(pretended_cuda(self._target))
                stack.enter_context(_autocast_there())
            stack.enter_context(unnoticed())
            stack.enter_context(self._fake_mode)
            stack.enter_context(self._model_made_fake())
            self.batch = self._faked(self.batch)
            stack.enter_context(self._mode)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.guesses |= _KNOWN.guesses
        self._exits.__exit__(*exception)

    # ---- instruments ----------------------------------------------------------------------------------------------
    def memory_log(self) -> DryLog:
        return DryLog(self._mode)

    def seconds(self) -> float:
        return self._mode.seconds

    def observe(self, op: TapeOp) -> None:
        op.seconds, op.workspace_bytes = self._mode.last

    def block_seconds(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], estimate: tuple[float, float]
    ) -> tuple[float, float]:
        """Run the block for real if it fits, and remember by how much the estimate was off."""
        needed = storage_bytes(module.parameters()) * _BYTES_PER_PARAMETER_BYTE + self._mode.peak_bytes
        if self._real_device is None or needed > psutil.virtual_memory().available * _MAX_SHARE:
            return estimate
        try:
            with _disable_current_modes():
                seconds = self._run_for_real(module, args, kwargs)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            name = type(module).__name__
            self.guesses[f"{name} could not be run by itself ({error}): its seconds are sums over its ops"] = None
            return estimate
        self._scales.append(sum(seconds) / max(sum(estimate), 1e-9))
        self.scale = statistics.median(self._scales)
        return seconds

    # ---- a real block ---------------------------------------------------------------------------------------------
    def _run_for_real(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float, float]:
        from stowplan.offload.capture.block_capture import median_seconds
        from stowplan.offload.capture.graph_end import graph_end
        from stowplan.offload.capture.instruments import RealInstruments

        assert self._real_device is not None
        memo: dict[int, Any] = {id(t): self._made_real(t) for t in (*module.parameters(), *module.buffers())}
        twin = copy.deepcopy(module, memo)

        def real(leaf: Any) -> Any:
            return self._made_real(leaf) if isinstance(leaf, torch.Tensor) else leaf

        real_args, real_kwargs = map_tree(args, real), map_tree(kwargs, real)
        instruments = RealInstruments(self._real_device)

        def call() -> Any:
            torch.clear_autocast_cache()
            return twin(*real_args, **real_kwargs)

        return median_seconds(call, graph_end, twin, instruments, held_gradients=False)

    def _made_real(self, fake: torch.Tensor) -> torch.Tensor:
        known = _KNOWN.twin_of(fake)
        if known is None:
            known = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=self._real_device)
            known = known.normal_(std=0.02) if fake.dtype.is_floating_point else known.zero_()
        if isinstance(fake, torch.nn.Parameter):
            return torch.nn.Parameter(known.detach(), fake.requires_grad)
        return known.detach().requires_grad_(fake.requires_grad)

    # ---- a fake model ---------------------------------------------------------------------------------------------
    @contextmanager
    def _model_made_fake(self) -> Iterator[None]:
        """Put fake tensors in the place of the model's parameters, buffers and other tensors."""
        places = [
            (tensors, name, value)
            for module in self._model.modules()
            for tensors in _tensor_dicts(module)
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor)
        ]
        for tensors, name, value in places:
            tensors[name] = self._faked(value)
        try:
            yield
        finally:
            for tensors, name, value in places:
                tensors[name] = value

    def _faked(self, tree: Any) -> Any:
        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) not in self._fakes:
                self._fakes[id(leaf)] = self._fake(leaf)
            return self._fakes[id(leaf)]

        return map_tree(tree, fake)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        known = _KNOWN.twin_of(tensor)
        if known is not None and not known.is_meta and not isinstance(tensor, torch.nn.Parameter):
            _KNOWN.remember(fake, known)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)


@contextmanager
def _autocast_there() -> Iterator[None]:
    """Autocast for cuda where the caller asked for the CPU's, as one does on a machine without a GPU."""
    if not torch.is_autocast_enabled("cpu"):
        yield
        return
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", dtype=dtype):
        yield


def _tensor_dicts(module: torch.nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps its tensors."""
    return module._parameters, module._buffers, module.__dict__
