"""The dispatch mode that watches a dry step: live bytes, seconds, and what fake tensors do otherwise than real ones.

It stands above ``FakeTensorMode``, so it sees what a real step would dispatch and none of the temporaries of fake
kernels. Frees need no allocator: Python is told when a storage dies.

Note: gradients that meet
    Where two gradients of one tensor meet, autograd adds them in place if nobody else holds the first. For subclasses
    of Tensor, fake ones included, it never does. So that addition is recognised (it comes from the engine itself, with
    the usual number of references) and done in place. The numbers of references belong to the build of torch; the
    self-test notices when they change.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stowplan.offload.allocation_record import AllocationRecord, Happening, Segment, What
from stowplan.offload.dry.known import Known

__all__ = ["Cost", "Costs", "DryLog", "DryMode"]

aten = torch.ops.aten

# A gradient that only the engine holds: its tensor has at most so many references, its storage so many.
_MAX_TENSOR_USES, _MAX_STORAGE_USES = 4, 2
_SCRATCH = -1  # the key of what a kernel takes for itself


class Cost(NamedTuple):
    """What one op takes beside its outputs' bytes."""

    seconds: float = 0.0
    workspace_bytes: int = 0


class Costs(Protocol):
    """Says what ops take; ``guesses`` lists, in words, what that rests on."""

    guesses: dict[str, None]

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Cost:
        """The cost of a call on fake tensors that gave ``result``."""


class DryMode(TorchDispatchMode):
    """Follows fake tensors. ``live_bytes`` and ``peak_bytes`` count storages made under the mode.

    Args:
        costs: of every op; None where they are not asked for.
        known: the values of small tensors.
        allocated_bytes: what the device's allocator takes for a storage of so many bytes.
    """

    def __init__(
        self,
        costs: Costs | None = None,
        known: Known | None = None,
        allocated_bytes: Callable[[int], int] = lambda num_bytes: num_bytes,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        self.live_bytes = 0
        self.peak_bytes = 0
        self.last = Cost()
        self.known = known if known is not None else Known()
        self._costs = costs
        self._allocated_bytes = allocated_bytes
        self.happenings: list[Happening] | None = None  # of the log that is open
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.known.answers(func):
            self.last = Cost()  # not that of the op before
            return self.known.answer(func, args, kwargs)
        if func is aten.add.Tensor and not kwargs and _joins_gradients(*args):
            func = aten.add_.Tensor
        result = _grouped_product(args, kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        self._count(args, kwargs, result)
        if self._costs is not None:
            self.last = self._costs.of(func, args, kwargs, result)
            self.seconds += self.last.seconds
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + self.last.workspace_bytes)
        if self.last.workspace_bytes:
            self._tell(What.ALLOCATED, _SCRATCH, self.last.workspace_bytes)
            self._tell(What.FREED, _SCRATCH, self.last.workspace_bytes)
        self.known.follow(func, args, kwargs, result)
        return result

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = {_key(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
                key = _key(tensor)
                if key not in given and key not in self._live:
                    storage = tensor.untyped_storage()
                    num_bytes = self._allocated_bytes(storage.nbytes())
                    self._live[key] = (weakref.ref(storage, partial(self._free, key)), num_bytes)
                    self.live_bytes += num_bytes
                    self._tell(What.ALLOCATED, key, num_bytes)

    def _free(self, key: int, storage: object) -> None:
        num_bytes = self._live.pop(key)[1]
        self.live_bytes -= num_bytes
        self._tell(What.FREED, key, num_bytes)

    def _tell(self, what: What, key: int, num_bytes: int) -> None:
        if self.happenings is not None:
            self.happenings.append(Happening(what, key, num_bytes))


class DryLog:
    """A ``MemoryLog`` of what a DryMode counts. Storages tell buffers apart."""

    def __init__(self, mode: DryMode) -> None:
        self.segments: list[Segment] = []
        self.record: AllocationRecord | None = None
        self._mode = mode

    def __enter__(self) -> DryLog:
        self._happenings: list[Happening] = []
        self._mode.happenings = self._happenings
        self._origin = self._mode.live_bytes
        self._begin("start")
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._mode.happenings = None
        self.record = AllocationRecord(self._happenings)

    def mark(self, name: str) -> None:
        self._end()
        self._begin(name)
        self._happenings.append(Happening(What.MARK, name=name))

    def freed(self, num_bytes: int) -> None:
        """Nothing to add: the mode sees every free."""

    def note(self, name: str, tensor: torch.Tensor) -> None:
        self._happenings.append(Happening(What.NOTE, _key(tensor), name=name))

    def _begin(self, name: str) -> None:
        self._name = name
        self._start = self._mode.peak_bytes = self._mode.live_bytes

    def _end(self) -> None:
        at = [self._start, self._mode.peak_bytes, self._mode.live_bytes]
        self.segments.append(Segment(self._name, *(num_bytes - self._origin for num_bytes in at)))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _grouped_product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """``_grouped_mm``, whose shape function knows bf16 only, where kernels take other types as well."""
    like = [
        t
        if t.dtype is torch.bfloat16
        else torch.empty_strided(t.shape, t.stride(), dtype=torch.bfloat16, device=t.device)
        for t in args[:2]
    ]
    made = aten._grouped_mm.default(*like, *args[2:], **kwargs)
    return (
        made
        if made.dtype is args[0].dtype
        else torch.empty_strided(made.shape, made.stride(), dtype=args[0].dtype, device=made.device)
    )


def _joins_gradients(first: Any, second: Any) -> bool:
    """Is this the engine, adding up two gradients of one tensor, and may it do so in place?"""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and first.shape == second.shape):
        return False
    uses = first._use_count()  # type: ignore[attr-defined]
    storage_uses = torch._C._storage_Use_Count(first.untyped_storage()._cdata)
    if uses > _MAX_TENSOR_USES or storage_uses > _MAX_STORAGE_USES:
        return False
    return _called_by_the_engine() and is_non_overlapping_and_dense_or_false(first)


_DISPATCHING = ("_python_dispatch.py", "_compile.py", "eval_frame.py", "_stats.py", "mode.py")


def _called_by_the_engine() -> bool:
    """No Python code stands between autograd's engine and the op."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        if not frame.f_code.co_filename.endswith(_DISPATCHING):
            return False
        frame = frame.f_back
    return True  # a thread of the engine's own
