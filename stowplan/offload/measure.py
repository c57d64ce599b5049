"""What real steps take: highest live bytes, seconds, bytes swapped and recomputed, step by step."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_iter

from stowplan.core.errors import InvalidArgument
from stowplan.core.plan import Measurement
from stowplan.offload import cuda_memory
from stowplan.offload.memory_log import memory_log, synchronize
from stowplan.offload.storages import storage_bytes
from stowplan.offload.tape.run import Counters

__all__ = ["Meter"]


class Meter:
    """A context around training steps of ``model``; ``measurement`` is there after it.

    A step begins with the model's first forward after an optimizer step (or with every forward, while no optimizer
    steps), so accumulated micro-batches are one step. Bytes: on the CPU those of the model, of the optimizers that step
    its parameters, and of all that is allocated inside the context; on CUDA all that the process has allocated.
    ``on_peak`` is told, at the end, the highest peak of the steps in which no block was recorded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        counters: Counters,
        on_peak: Callable[[int], object] = lambda peak_bytes: None,
    ) -> None:
        self.model = model
        self.counters = counters
        self._on_peak = on_peak
        self._recorded: list[int] = []
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise InvalidArgument(f"{type(model).__name__} has no parameters: there is no training step to measure.")
        self._device = parameter.device
        self._own = {id(p) for p in model.parameters()}
        self._log = memory_log(self._device)
        self._measurement: Measurement | None = None
        self._starts: list[float] = []
        self._moved: list[tuple[int, int]] = []
        self._stepped = True

    @property
    def measurement(self) -> Measurement:
        """Raises InvalidArgument while the context is open, or if no step was run in it."""
        if self._measurement is None:
            raise InvalidArgument(
                "there is no measurement yet: it is there after the measure() block, which ran no step."
            )
        return self._measurement

    def __enter__(self) -> Meter:
        gc.collect()  # garbage from before must not be freed under the log, which would count it
        self._base_bytes = self._bytes_at_entry()
        self._log.__enter__()
        self._hooks = [
            self.model.register_forward_pre_hook(self._on_forward),
            register_optimizer_step_post_hook(self._on_optimizer_step),
        ]
        self._watch_gradients()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize(self._device)
        end = time.perf_counter()
        for hook in self._hooks:
            hook.remove()
        for finalizer in self._finalizers:
            finalizer.detach()
        self._log.__exit__(*exception)
        if not self._starts:
            return
        ends = [*self._starts[1:], end]
        moved = [*self._moved, (self.counters.swapped_bytes, self.counters.recomputed_bytes)]
        peaks = [segment.peak_bytes for segment in self._log.segments if segment.name == "step"]
        self._measurement = Measurement(
            step_seconds=tuple(b - a for a, b in zip(self._starts, ends, strict=True)),
            peak_bytes=tuple(self._base_bytes + peak for peak in peaks),
            swapped_bytes=tuple(b[0] - a[0] for a, b in itertools.pairwise(moved)),
            recomputed_bytes=tuple(b[1] - a[1] for a, b in itertools.pairwise(moved)),
            source="torch profiler memory events" if self._device.type == "cpu" else "CUDA caching allocator",
        )
        recorded = [b - a for a, b in itertools.pairwise([*self._recorded, self.counters.recorded_calls])]
        steady = [peak for peak, num in zip(self._measurement.peak_bytes, recorded, strict=True) if not num]
        if steady and exception[0] is None:
            self._on_peak(max(steady))

    def _on_forward(self, module: torch.nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() or not self._stepped:
            return
        self._stepped = not self._has_optimizer
        synchronize(self._device)
        self._starts.append(time.perf_counter())
        self._moved.append((self.counters.swapped_bytes, self.counters.recomputed_bytes))
        self._recorded.append(self.counters.recorded_calls)
        self._log.mark("step")

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped |= _steps(optimizer, self._own)

    def _bytes_at_entry(self) -> int:
        """Bytes of what the log cannot see because it was there before."""
        optimizers = _optimizers_of(self._own)
        self._has_optimizer = bool(optimizers)
        if self._device.type != "cpu":
            return cuda_memory.allocated_bytes(self._device)
        tensors: list[Any] = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [leaf for optimizer in optimizers for leaf in tree_iter(list(optimizer.state.values()))]
        return storage_bytes(tensors)

    def _watch_gradients(self) -> None:
        """Gradients from before may go at the next ``zero_grad``; the log does not see that by itself."""
        self._finalizers = []
        if self._device.type == "cpu":
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    size = parameter.grad.untyped_storage().nbytes()
                    self._finalizers.append(weakref.finalize(parameter.grad, self._log.freed, size))


def _optimizers_of(parameters: set[int]) -> list[torch.optim.Optimizer]:
    """The live optimizers that step any of these parameters (by identity)."""
    return [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), torch.optim.Optimizer) and _steps(candidate, parameters)
    ]


def _steps(optimizer: torch.optim.Optimizer, parameters: set[int]) -> bool:
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])
