"""The arena in this process: installed once, on the CPU or on one CUDA device; steps, counters, and taking it away."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from stowplan.core.errors import ArenaUnavailable, CompilationFailed, InvalidArgument
from stowplan.offload.arena.boundaries import Boundaries
from stowplan.offload.arena.learning import Learner
from stowplan.offload.arena.library import Arena, library, on_cpu, on_cuda
from stowplan.offload.arena.lifetimes import Packer

__all__ = ["Stats", "cuda_arena", "install", "say", "stats", "step", "uninstall"]

_CPU_ALIGNMENT = 64  # torch's own; kernels count on it
_CPU_LEAST_BYTES = 1024
_CUDA_ALIGNMENT = 512  # torch's own
_CUDA_LEAST_BYTES = 512 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the arena has done since it was installed. Bytes are of requests, unpadded, but for heights and slabs.

    device: ``"cpu"``, ``"cuda:0"``; None: it could not be installed, and torch's own allocator serves.
    steps: training steps that ended. requests: all, of which ``small`` are below what is ever planned.
    hits: served at planned addresses. misses: in a lane (thread and stream) that has a plan, and not served from it,
    of which ``overlaps`` because the planned bytes were still in use. unplanned: blocks that the plan knows and gives
    no address. strangers: from lanes without a plan. resynchronisations: times that the place in the plan was found
    again; plan_changes: that another plan was found to fit within a step.
    plans: kept now; planned_requests: addresses in the last used; height_bytes: of the highest;
    planning_seconds: spent on them.
    peak_bytes: the highest end of an address that was served; slab_bytes: reserved for plans; reserved_bytes: with what
    the fallback holds; planned_bytes, fallback_bytes: alive now; fallback_peak_bytes: the most that was.
    live_peak_bytes: the most that was alive in both. unknown_frees, double_frees: ignored, or passed on.
    out_of_memory: requests that nobody could serve. stream_waits: bytes that went from one stream to another.
    """

    device: str | None = None
    steps: int = 0
    requests: int = 0
    small: int = 0
    hits: int = 0
    misses: int = 0
    unplanned: int = 0
    strangers: int = 0
    overlaps: int = 0
    resynchronisations: int = 0
    plan_changes: int = 0
    unknown_frees: int = 0
    double_frees: int = 0
    out_of_memory: int = 0
    stream_waits: int = 0
    reserved_bytes: int = 0
    slab_bytes: int = 0
    planned_bytes: int = 0
    peak_bytes: int = 0
    fallback_bytes: int = 0
    fallback_peak_bytes: int = 0
    live_peak_bytes: int = 0
    plans: int = 0
    planned_requests: int = 0
    height_bytes: int = 0
    planning_seconds: float = 0.0

    @property
    def slack_bytes(self) -> int:
        """Reserved for plans and never used; none while the slab is given back, or smaller than it was."""
        return max(0, self.slab_bytes - self.peak_bytes)


class _Installed:
    """The arena of a device, its plans, and the hook that tells it of steps."""

    def __init__(self, device: str, arena: Arena, learner: Learner, uninstall: Callable[[], None] | None) -> None:
        self.device = device
        self.arena = arena
        self.learner = learner
        self.uninstall = uninstall
        self._boundaries: Boundaries | None = Boundaries()
        self._at_work = threading.Lock()
        self._process = os.getpid()
        # A compiled optimizer's step is not to be traced through what happens here.
        self._hook = register_optimizer_step_post_hook(torch.compiler.disable(self._stepped))

    def remove(self) -> None:
        self._hook.remove()
        self.arena.forget()

    def step(self) -> None:
        self._boundaries = None  # who marks steps marks all of them
        self._end_step()

    def _stepped(self, optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        if self._boundaries is not None and self._boundaries.stepped(id(optimizer)):
            self._end_step()

    def _end_step(self) -> None:
        # A forked child has the memory and not the steps; of two threads that step at once the second ends nothing.
        if self._process != os.getpid() or not self._at_work.acquire(blocking=False):
            return
        try:
            self.learner.step()
        finally:
            self._at_work.release()


class _Process:
    """There is one allocator in a process."""

    installed: _Installed | None = None
    unavailable = False  # asked for, and torch's own allocator serves


def install(
    device: str | None, pack: Packer, *, slab_bytes: int, most_plans: int, strict: bool, notify: Callable[[str], None]
) -> None:
    """See ``stowplan.arena.install``."""
    if _Process.installed is not None:
        raise ArenaUnavailable(f"the arena is installed already, for {_Process.installed.device}: install it once.")
    if type(most_plans) is not int or most_plans < 1:
        raise InvalidArgument(f"most_plans={most_plans!r}: give a positive number of plans.")
    chosen = _device(device)
    try:
        arena, alignment, uninstall_ = _cpu(notify) if chosen.type == "cpu" else _cuda(chosen, notify)
    except CompilationFailed as error:
        if strict:
            raise
        _Process.unavailable = True
        warnings.warn(f"the arena is not installed, torch's own allocator serves: {error}", stacklevel=3)
        return
    if slab_bytes and not arena.reserve(slab_bytes):
        if uninstall_ is not None:
            uninstall_()
        raise ArenaUnavailable(f"slab={slab_bytes} bytes: so much memory cannot be had on {chosen}; give less.")
    _Process.installed = _Installed(str(chosen), arena, Learner(arena, pack, alignment, most_plans), uninstall_)


def _device(given: str | None) -> torch.device:
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device={given!r} is no device: give 'cpu', 'cuda' or 'cuda:N'.") from error
    if device.type not in {"cpu", "cuda"}:
        raise InvalidArgument(f"device={given!r}: the arena serves 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ArenaUnavailable(f"device={given!r}: torch sees no CUDA device here.")
        count = torch.cuda.device_count()
        if str(device) == "cuda":
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
        if device.index >= count:
            raise ArenaUnavailable(f"device={given!r}: torch sees {count} CUDA devices here, the first is 'cuda:0'.")
        return device
    return torch.device("cpu")


def _cpu(notify: Callable[[str], None]) -> tuple[Arena, int, Callable[[], None]]:
    functions = library("torch_cpu", notify)
    arena = on_cpu(functions, _CPU_ALIGNMENT, _CPU_LEAST_BYTES)
    return arena, _CPU_ALIGNMENT, functions.arena_cpu_uninstall


def _cuda(device: torch.device, notify: Callable[[str], None]) -> tuple[Arena, int, None]:
    if torch.cuda.is_initialized():
        raise ArenaUnavailable(
            "CUDA is in use already (torch.cuda.is_initialized()), and torch takes another allocator before that only: "
            "call stowplan.arena.install() as the script's first line, before anything is on a GPU."
        )
    functions = library("torch_cuda", notify)
    major = str(torch.version.cuda).partition(".")[0]
    arena = on_cuda(
        functions, (f"libcudart.so.{major}", "libcudart.so"), _CUDA_ALIGNMENT, _CUDA_LEAST_BYTES, device.index
    )
    allocator = torch.cuda.memory.CUDAPluggableAllocator(functions._name, "arena_cuda_allocate", "arena_cuda_free")
    inner = allocator.allocator()
    inner.set_record_stream_fn(_address(functions.arena_cuda_record_stream))
    inner.set_reset_fn(_address(functions.arena_cuda_empty_cache))
    torch.cuda.memory.change_current_allocator(allocator)
    return arena, _CUDA_ALIGNMENT, None


def _address(function: Any) -> int:
    import ctypes

    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def say(message: str) -> None:
    """To the user's terminal: the first line of a script has no logging yet."""
    print(f"stowplan: {message}", file=sys.stderr)  # noqa: T201


def uninstall() -> None:
    """See ``stowplan.arena.uninstall``."""
    if _Process.installed is not None:
        if _Process.installed.uninstall is None:
            raise ArenaUnavailable(
                "torch keeps its CUDA allocator for the life of the process: the arena stays. To compare with torch's "
                "own, run another process without it."
            )
        _Process.installed.uninstall()
        _Process.installed.remove()
    _Process.installed, _Process.unavailable = None, False


def cuda_arena(device: torch.device) -> Arena | None:
    """The arena of CUDA device ``device``, if the arena serves CUDA: torch's counters stop there."""
    installed = _Process.installed
    if installed is None or not installed.device.startswith("cuda"):
        return None
    return installed.arena.beside(torch.cuda.current_device() if str(device) == "cuda" else device.index)


def step() -> None:
    """See ``stowplan.arena.step``."""
    if _Process.installed is not None:
        _Process.installed.step()
    elif not _Process.unavailable:
        raise ArenaUnavailable("the arena is not installed: call stowplan.arena.install() first.")


def stats() -> Stats:
    """See ``stowplan.arena.stats``."""
    if _Process.installed is None:
        if _Process.unavailable:
            return Stats()
        raise ArenaUnavailable("the arena is not installed: call stowplan.arena.install() first.")
    counted = _Process.installed.arena.stats()
    learner = _Process.installed.learner
    plans = list(learner.plans.values())
    return Stats(
        device=_Process.installed.device,
        **{name: getattr(counted, name) for name, *_ in counted._fields_},
        plans=len(plans),
        planned_requests=plans[-1].num_requests if plans else 0,
        height_bytes=max((plan.height_bytes for plan in plans), default=0),
        planning_seconds=learner.planning_seconds,
    )
