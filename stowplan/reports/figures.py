"""Figures that reports show beyond those written in the plan: sums over it, nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from stowplan.core.plan import Measurement, MomentBytes, Plan
from stowplan.core.program import Action, StepProgram

__all__ = [
    "CATEGORIES",
    "Comparison",
    "bytes_by_action",
    "bytes_by_category",
    "compare",
    "peak_moment",
    "phase_of",
]

# What memory is used for, from the bottom of the stack to its top; the letter stands for it in charts.
CATEGORIES = (
    ("P", "Parameters, buffers, batch"),
    ("O", "Optimizer state"),
    ("G", "Gradients"),
    ("K", "Kept for the backward pass"),
    ("S", "Swap in flight"),
    ("T", "Block or phase at work"),
)
TOLERANCE = 0.03  # an error beyond this is marked


@dataclass(frozen=True, slots=True)
class Comparison:
    """A predicted figure beside the measured one; ``measured`` is None where nothing was recorded."""

    name: str
    is_seconds: bool
    predicted: float
    measured: float | None

    @property
    def error(self) -> float | None:
        """(measured − predicted) / predicted; None where there is no such ratio."""
        if self.measured is None:
            return None
        if self.predicted:
            return (self.measured - self.predicted) / self.predicted
        return 0.0 if self.measured == 0 else None

    @property
    def is_off(self) -> bool:
        """Is the prediction wrong enough to be marked?"""
        if self.error is None:
            return self.measured is not None
        return abs(self.error) > TOLERANCE


def bytes_by_category(moment: MomentBytes, step: StepProgram) -> tuple[int, ...]:
    """Bytes of a moment in the order of ``CATEGORIES``; they add up to its peak.

    The static bytes are split as the step does. What neither parameters nor optimizer explain are gradients that
    are held all step.
    """
    optimizer = min(step.optimizer_bytes, moment.static_bytes)
    parameters = min(step.parameter_bytes + step.buffer_bytes + step.batch_bytes, moment.static_bytes - optimizer)
    held_gradients = moment.static_bytes - optimizer - parameters
    return (
        parameters,
        optimizer,
        moment.gradient_bytes + held_gradients,
        moment.kept_bytes,
        moment.staged_bytes,
        moment.working_bytes,
    )


def peak_moment(plan: Plan) -> MomentBytes | None:
    """The highest moment of the step; None in a plan without moments."""
    return max(plan.prediction.moments, key=lambda moment: moment.peak_bytes, default=None)


def phase_of(moment: MomentBytes) -> str:
    """What a moment is part of: ``"forward of layers.3"`` is part of the ``"forward"``."""
    return moment.name.partition(" of ")[0]


def bytes_by_action(plan: Plan) -> dict[Action, int]:
    """Bytes of all saved values of all blocks, by what happens to them."""
    totals = dict.fromkeys(Action, 0)
    for block, chosen in enumerate(plan.decisions):
        program = plan.step.program_of(block)
        for index, decision in zip(program.saved, chosen, strict=True):
            for action, size_bytes in program.values[index].bytes_by_action(decision).items():
                totals[action] += size_bytes
    return totals


def compare(plan: Plan, measurement: Measurement) -> tuple[Comparison, ...]:
    """Predicted beside measured: the highest peak, and the median over the steps of all else."""
    predicted = plan.prediction
    highest = max(measurement.peak_bytes, default=None)
    return (
        Comparison("Memory needed", False, predicted.peak_bytes, highest),
        Comparison("Step time", True, predicted.step_seconds, _median(measurement.step_seconds)),
        Comparison("Swapped to the host", False, predicted.swapped_bytes, _median(measurement.swapped_bytes)),
        Comparison("Recomputed", False, predicted.recomputed_bytes, _median(measurement.recomputed_bytes)),
    )


def _median(figures: Sequence[float]) -> float | None:
    return median(figures) if figures else None
