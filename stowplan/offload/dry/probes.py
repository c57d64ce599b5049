"""What an op takes on the device at hand: it is run there once per signature, on tensors of one number.

Ops too large to be tried get their seconds by the machine's measured rates, their scratch by the rules below, which
were read off torch's CPU kernels.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from stowplan.core.hardware import Hardware
from stowplan.offload.dry.datasheet import roofline_seconds
from stowplan.offload.dry.mode import Cost
from stowplan.offload.memory_log import memory_log, synchronize
from stowplan.offload.tape.replay import below_autograd
from stowplan.offload.tape.rng import restored

__all__ = ["Probes"]

aten = torch.ops.aten

_MAX_SHARE = 1 / 8  # of the available memory, for the tensors of one probe
_LONG_SECONDS = 0.05  # an op that takes so long is not repeated
_VIEW_SECONDS = 1.5e-6


class Probes:
    """Costs on ``device``, measured. ``guesses`` tells which ops were not tried."""

    def __init__(self, device: torch.device, machine: Hardware) -> None:
        self.device = device
        self.guesses: dict[str, None] = {}
        self._machine = machine
        self._known: dict[Any, Cost] = {}
        self._max_bytes = int(psutil.virtual_memory().available * _MAX_SHARE)

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Cost:
        leaves, spec = tree_flatten((args, kwargs))
        keys = [_key_of(leaf) for leaf in leaves]
        signature = (func, tuple(keys), str(spec))
        found = self._known.get(signature)
        if found is None:
            found = self._known[signature] = self._measured(func, keys, spec, (args, kwargs), result)
        return found

    def _measured(self, func: Any, keys: list[Any], spec: Any, given: Any, result: Any) -> Cost:
        if all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return Cost(_VIEW_SECONDS)
        if _bytes_of((given, result)) > self._max_bytes:
            self.guesses[f"{func} on large tensors was not tried: its seconds and scratch are estimates"] = None
            return self._estimated(func, given, result)
        try:
            with _disable_current_modes(), below_autograd(), restored([self.device]):
                args, kwargs = tree_unflatten([_real(key, self.device) for key in keys], spec)
                return self._run(func, args, kwargs)
        except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            self.guesses[f"{func} could not be tried ({type(error).__name__}): its cost is an estimate"] = None
            return self._estimated(func, given, result)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Cost:
        times = [self._timed(func, args, kwargs)]
        with memory_log(self.device) as log:
            log.mark("op")
            result = func(*args, **kwargs)
            log.mark("end")
            del result
        segment = next(segment for segment in log.segments if segment.name == "op")
        if times[0] < _LONG_SECONDS:
            times = [self._timed(func, args, kwargs) for _ in range(3)]
        return Cost(statistics.median(times), segment.peak_bytes - segment.end_bytes)

    def _timed(self, func: Any, args: Any, kwargs: Any) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        func(*args, **kwargs)
        synchronize(self.device)
        return time.perf_counter() - start

    def _estimated(self, func: Any, given: Any, result: Any) -> Cost:
        args, kwargs = given
        seconds = roofline_seconds(self._machine, func, args, kwargs, result)
        rule = _SCRATCH.get(func) if self.device.type == "cpu" else None
        return Cost(seconds, int(rule(args, result)) if rule is not None else 0)


def _key_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _Tensor(tuple(leaf.shape), leaf.stride(), leaf.dtype)
    return leaf


class _Tensor(tuple[Any, ...]):
    """Shape, strides and dtype: what a tensor is to a kernel."""

    __slots__ = ()

    def __new__(cls, *parts: Any) -> _Tensor:
        return super().__new__(cls, parts)


def _real(key: Any, device: torch.device) -> Any:
    if isinstance(key, torch.device):
        return device
    if not isinstance(key, _Tensor):
        return key
    shape, strides, dtype = key
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    storage = torch.zeros(extent, dtype=dtype, device=device)
    if dtype.is_floating_point or dtype.is_complex:
        storage.fill_(0.5)  # zeros and denormals would be timed wrongly
    return storage.as_strided(shape, strides)


def _bytes_of(tree: Any) -> int:
    sizes = {id(t): t.untyped_storage().nbytes() for t in tree_iter(tree) if isinstance(t, FakeTensor)}
    return sum(sizes.values())


# ---- scratch of torch's CPU kernels ----------------------------------------------------------------------------------
def _block_length(length: int) -> int:
    """Rows of queries that the CPU's flash attention takes at a time."""
    return 256 if length >= 768 else 64 if length >= 192 else 32


def _flash_forward(args: Any, result: Any) -> int:
    query, key = args[0], args[1]
    rows, columns = min(_block_length(query.shape[2]), query.shape[2]), min(512, key.shape[2])
    floats = rows * columns + 2 * rows + rows * query.shape[3]
    halves = rows * columns if query.element_size() == 2 else 0
    return int(torch.get_num_threads() * (4 * floats + 2 * halves))


def _flash_backward(args: Any, result: Any) -> int:
    query, key = args[1], args[2]
    rows, columns = min(_block_length(query.shape[2]), query.shape[2]), min(512, key.shape[2])
    halves = 2 * rows * columns if query.element_size() == 2 else 0
    return int(torch.get_num_threads() * (8 * rows * columns + 2 * halves) + 4 * math.prod(query.shape[:3]))


def _packed_product(args: Any, result: Any) -> int:
    return int(result.numel()) * 4 + 128 if result.element_size() == 2 else 0


def _casts(args: Any, result: Any) -> int:
    operands = [t for t in args[:2] if isinstance(t, torch.Tensor) and t.dim()]
    return sum(t.numel() * result.element_size() for t in operands if t.dtype is not result.dtype)


_SCRATCH: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
    aten._safe_softmax.default: lambda args, result: result.numel() + result.numel() // max(1, result.shape[-1]),
    aten.mm.default: _packed_product,
    aten.addmm.default: _packed_product,
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _casts),
}
