"""What a pipeline's step really takes: peaks of live bytes and the times of all actions, on every device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from stowplan.core.schedule import Action, Schedule
from stowplan.offload.memory_log import MemoryLog, memory_log, synchronize
from stowplan.planner.schedule import Timeline
from stowplan.reports.pipeline import Lane, PipelineReport
from stowplan.runtime.pipeline.reporting import lane_of

__all__ = ["DeviceTrace", "Recorder", "StepTrace"]


@dataclass(frozen=True, slots=True)
class DeviceTrace:
    """One device's step.

    Attributes:
        begins, ends: seconds since the step began, of each action in its order; I and W of a B are one.
        peaks_bytes: the most live bytes while each ran; ``levels_bytes``: those after it.
        peak_bytes: the most live bytes of the step, what was there before included.
        seconds: of the whole step.
    """

    begins: tuple[float, ...]
    ends: tuple[float, ...]
    peaks_bytes: tuple[int, ...]
    levels_bytes: tuple[int, ...]
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A measured step of all devices."""

    schedule: Schedule
    devices: tuple[DeviceTrace, ...]

    @property
    def peaks_bytes(self) -> list[int]:
        """The most live bytes of each device: parameters, gradients and what the step needs."""
        return [device.peak_bytes for device in self.devices]

    @property
    def step_seconds(self) -> float:
        """The step of the device that took longest."""
        return max(device.seconds for device in self.devices)

    def report(self, name: str, predicted: Timeline | None = None) -> PipelineReport:
        """For reading and drawing; with ``predicted`` its peaks stand beside those that were measured."""
        lanes = [self._lane(number) for number in range(len(self.devices))]
        work = [float((lane.ends - lane.begins).sum()) for lane in lanes]
        return PipelineReport(
            name=name,
            num_microbatches=self.schedule.num_microbatches,
            lanes=lanes,
            step_time=self.step_seconds,
            work_time=max(work),
            in_bytes=True,
            predicted_peaks=None if predicted is None else predicted.peaks_bytes,
        )

    def _lane(self, number: int) -> Lane:
        trace = self.devices[number]
        moments = [(0.0, trace.levels_bytes[0] if trace.levels_bytes else 0)]
        for begin, end, peak, level in zip(
            trace.begins, trace.ends, trace.peaks_bytes, trace.levels_bytes, strict=True
        ):
            moments += [(begin, peak), (end, level)]
        times, levels = zip(*moments, strict=True)
        begins, ends = np.array(trace.begins), np.array(trace.ends)
        return lane_of(self.schedule, number, begins, ends, np.array(times), np.array(levels, dtype=np.int64))


class Recorder:
    """Watches one device's step. ``static_bytes``: what is there before."""

    def __init__(self, device: torch.device, static_bytes: int) -> None:
        self._device = device
        self._static_bytes = static_bytes
        self._log: MemoryLog = memory_log(device)
        self._spans: dict[Action, tuple[float, float]] = {}
        self._start = self._end = 0.0

    def check(self) -> None:
        """Raises InvalidArgument if nothing can be watched here: another profiler is active."""
        with memory_log(self._device):
            pass

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the whole step."""
        with self._log:
            self._start = self._now()
            yield
            self._end = self._now()

    @contextmanager
    def watch(self, action: Action) -> Iterator[None]:
        """Around one action; a second time for the same one is its end put off (the W of a B)."""
        self._log.mark(str(action))
        begin = self._spans[action][0] if action in self._spans else self._now() - self._start
        yield
        self._spans[action] = begin, self._now() - self._start
        self._log.mark("between")

    def trace(self, order: Sequence[Action]) -> DeviceTrace:
        """What was seen of the actions in ``order``."""
        peaks: dict[str, int] = {}
        levels: dict[str, int] = {}
        for segment in self._log.segments:
            peaks[segment.name] = max(segment.peak_bytes, peaks.get(segment.name, 0))
            levels[segment.name] = segment.end_bytes
        static = self._static_bytes
        return DeviceTrace(
            begins=tuple(self._spans[action][0] for action in order),
            ends=tuple(self._spans[action][1] for action in order),
            peaks_bytes=tuple(static + peaks[str(action)] for action in order),
            levels_bytes=tuple(static + levels[str(action)] for action in order),
            peak_bytes=static + max(segment.peak_bytes for segment in self._log.segments),
            seconds=self._end - self._start,
        )

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()
