"""Decisions in closed form: the peak of every moment as a sum, the step's seconds as a recursion over blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stowplan.core.program import Decisions
from stowplan.planner.activations.footprint import BlockFootprint, Footprints
from stowplan.planner.activations.problem import Problem

__all__ = ["Evaluation", "evaluate", "peaks_of_moments", "seconds_of_step"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Seconds of one step, and the device peak in bytes of each of its moments, in order of execution."""

    step_seconds: float
    peaks_bytes: tuple[int, ...]
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks_bytes)


def evaluate(problem: Problem, decisions: Decisions) -> Evaluation:
    """Time and bytes of ``decisions`` by formula. Raises InvalidArgument for decisions that are not possible."""
    problem.check(decisions)
    footprints = Footprints(problem)
    blocks = [footprints.of(block, chosen) for block, chosen in enumerate(decisions)]
    return Evaluation(
        step_seconds=seconds_of_step(problem, blocks),
        peaks_bytes=tuple(peaks_of_moments(problem, blocks)),
        host_bytes=sum(block.swapped_bytes for block in blocks),
    )


def peaks_of_moments(problem: Problem, blocks: Sequence[BlockFootprint]) -> list[int]:
    """Device peaks in bytes: embedding, forwards in order, head, backwards in reverse, embedding, optimizer step.

    Where the step has a gap before a block, it comes before that block's forward, and after its backward.
    """
    step, gaps = problem.step, problem.step.gap_before
    static = step.static_bytes
    window = problem.hardware.staging_blocks if problem.hardware.overlapped_copies else 0
    staged = [block.staged_bytes for block in blocks]
    programs = problem.programs
    peaks = [static + step.embedding_forward.peak_bytes]
    earlier = static
    in_flight = _in_flight(staged, window)
    left = step.forward_left_bytes
    for i, block in enumerate(blocks):
        if i in gaps:
            peaks.append(earlier + _last(staged, window, i) + gaps[i].forward.peak_bytes)
        peaks.append(earlier + left[i] + in_flight[i] + block.forward_peak_bytes)
        earlier += block.alive_bytes
    peaks.append(earlier + _last(staged, window, len(blocks)) + step.head.peak_bytes)
    kept = sum(block.kept_bytes for block in blocks)
    gradients = 0
    left = step.backward_left_bytes
    for i in reversed(problem.order):
        kept -= blocks[i].kept_bytes
        others = static + left[i] + gradients + kept + in_flight[i]
        peaks.append(others + blocks[i].backward_peak_bytes)
        gradients += programs[i].gradient_bytes
        if i in gaps:
            peaks.append(static + gradients + kept + _last(staged, window, i) + gaps[i].backward.peak_bytes)
    peaks.append(static + gradients + step.embedding_backward.peak_bytes)
    peaks.append(static + gradients + step.optimizer_step.peak_bytes)
    return peaks


def _in_flight(staged: Sequence[int], window: int) -> Sequence[int]:
    """For each block the staged bytes of the ``window`` − 1 blocks before it (``window`` 0 or 1: none)."""
    if window <= 1:
        return [0] * len(staged)
    if window == 2:  # the usual number of staging blocks, on the path of every trial of the search
        return [0, *staged[:-1]]
    return [sum(staged[max(0, i - window + 1) : i]) for i in range(len(staged))]


def _last(staged: Sequence[int], window: int, stop: int) -> int:
    """Staged bytes of the last ``window`` blocks before block ``stop``."""
    return sum(staged[max(0, stop - window) : stop]) if window else 0


def seconds_of_step(problem: Problem, blocks: Sequence[BlockFootprint]) -> float:
    """Seconds of one step; copies stop compute, or run beside it through the hardware's staging blocks."""
    hardware = problem.hardware
    if not hardware.overlapped_copies:
        replay = sum(block.replay_seconds for block in blocks)
        swapped = sum(block.swapped_bytes for block in blocks)
        copies = swapped / hardware.to_host_bytes_per_second + swapped / hardware.to_device_bytes_per_second
        return problem.ideal_seconds + replay + copies
    return _overlapped_seconds(problem, blocks)


def _overlapped_seconds(problem: Problem, blocks: Sequence[BlockFootprint]) -> float:
    """Ends of forwards f, copies out d, copies in h and backwards e, each the latest of what it waits for.

    A block that swaps nothing has no copies: nothing waits for them. Staging holds ``window`` blocks: the forward of
    block i waits until block i − window is on the host, and block i comes back when i + window has been used up
    (the last ones as soon as the forward pass is over). MEMO, arXiv 2407.12117, section 4.2.
    """
    step, hardware, gaps = problem.step, problem.hardware, problem.step.gap_before
    window, count = hardware.staging_blocks, len(blocks)
    forward_seconds, backward_seconds = problem.forward_seconds, problem.backward_seconds
    rate_out, rate_in = hardware.to_host_bytes_per_second, hardware.to_device_bytes_per_second
    swapped = [block.swapped_bytes for block in blocks]
    out: list[float] = []  # end of the copy out of each block; that of the one before where there is none
    now, queue = step.embedding_forward.seconds, 0.0
    for i, size in enumerate(swapped):
        if i in gaps:
            now += gaps[i].forward.seconds
        if i >= window and swapped[i - window] and out[i - window] > now:
            now = out[i - window]
        now += forward_seconds[i]
        if size:
            queue = (queue if queue > now else now) + size / rate_out
        out.append(queue)
    forward_end = now
    ends = [forward_end] * (count + window)  # of each backward; from index count on: when the last may come back
    now, queue = forward_end + step.head.seconds, 0.0
    for i in range(count - 1, -1, -1):
        if swapped[i]:
            queue = max(queue, ends[i + window], out[i]) + swapped[i] / rate_in
            now = queue if queue > now else now
        now += backward_seconds[i] + blocks[i].replay_seconds
        ends[i] = now
        if i in gaps:
            now += gaps[i].backward.seconds
    return now + step.embedding_backward.seconds + step.optimizer_step.seconds
