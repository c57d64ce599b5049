"""What the stages of a pipeline cost: seconds and bytes of each action, and what is there all the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from stowplan.core.errors import InvalidArgument

__all__ = ["Costs", "StageCosts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """One stage, one microbatch. The defaults are the papers' unit: three ticks, and one activation in memory.

    Attributes:
        forward_seconds: time of F; positive, as are the next two. B takes as long as I and W together.
        input_gradient_seconds: time of I.
        weight_gradient_seconds: time of W.
        forward_bytes: what F leaves for the backward pass, held from its start.
        input_gradient_bytes: what I adds to that (the gradients that W needs), or frees, if negative. W frees the rest.
        transient_bytes: what F, I and W (a number for each) need in addition while they run.
        input_bytes: the tensor that comes from the stage before, and its gradient that goes back.
        static_bytes: parameters, gradients, optimizer state, and all else that is there for the whole step.
    """

    forward_seconds: float = 1.0
    input_gradient_seconds: float = 1.0
    weight_gradient_seconds: float = 1.0
    forward_bytes: int = 1
    input_gradient_bytes: int = 0
    transient_bytes: tuple[int, int, int] = (0, 0, 0)
    input_bytes: int = 0
    static_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise InvalidArgument(f"{name}={seconds!r} is no time: give a positive number of seconds.")
        if min(self.forward_bytes, self.input_bytes, self.static_bytes, *self.transient_bytes) < 0:
            raise InvalidArgument(f"{self!r} has negative bytes: only input_gradient_bytes may be negative.")
        if self.forward_bytes + self.input_gradient_bytes < 0:
            raise InvalidArgument(
                f"input_gradient_bytes={self.input_gradient_bytes} frees more than the forward_bytes="
                f"{self.forward_bytes} that are there: give at least the negative of that."
            )

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Of F, I and W."""
        return self.forward_seconds, self.input_gradient_seconds, self.weight_gradient_seconds

    @property
    def work_seconds(self) -> float:
        """One microbatch, all actions."""
        return sum(self.seconds)

    def with_static(self, num_bytes: int) -> StageCosts:
        """The same stage with so many bytes more that are there all the time."""
        return replace(self, static_bytes=self.static_bytes + num_bytes)


@dataclass(frozen=True, slots=True)
class Costs:
    """All stages of a pipeline, in the order of the model.

    Attributes:
        stages: the costs of each stage.
        communication_seconds: how long a tensor takes from one device to another, while both go on computing.
        receives_ahead: whether the buffers of all microbatches are there for the whole step, as torch's pipelining
            has them. Otherwise a buffer is there from one action before until its tensor is used (see ``messages``).
    """

    stages: tuple[StageCosts, ...]
    communication_seconds: float = 0.0
    receives_ahead: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidArgument("stages=() has no stage: give the costs of one at least.")
        if not (math.isfinite(self.communication_seconds) and self.communication_seconds >= 0):
            raise InvalidArgument(f"communication_seconds={self.communication_seconds!r} is no time: give 0 or more.")

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        seconds: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        forward_bytes: int = 1,
        communication_seconds: float = 0.0,
    ) -> Costs:
        """Stages that are all alike; ``seconds`` are those of F, I and W of one stage."""
        forward, input_gradient, weight_gradient = seconds
        stage = StageCosts(
            forward_seconds=forward,
            input_gradient_seconds=input_gradient,
            weight_gradient_seconds=weight_gradient,
            forward_bytes=forward_bytes,
        )
        return cls((stage,) * num_stages, communication_seconds)

    def merged(self, size: int) -> Costs:
        """The costs of a pipeline whose stages are ``size`` neighbours of this one each, run one after the other."""
        if len(self.stages) % size:
            raise InvalidArgument(f"{len(self.stages)} stages cannot be merged by {size}: give a divisor.")
        groups = [self.stages[first : first + size] for first in range(0, len(self.stages), size)]
        return Costs(tuple(map(_together, groups)), self.communication_seconds, self.receives_ahead)


_SUMMED = {field.name for field in fields(StageCosts)} - {"transient_bytes", "input_bytes"}


def _together(group: Sequence[StageCosts]) -> StageCosts:
    sums = {name: sum(getattr(stage, name) for stage in group) for name in _SUMMED}
    forward, input_gradient, weight_gradient = (max(stage.transient_bytes[i] for stage in group) for i in range(3))
    return StageCosts(
        **sums, transient_bytes=(forward, input_gradient, weight_gradient), input_bytes=group[0].input_bytes
    )
