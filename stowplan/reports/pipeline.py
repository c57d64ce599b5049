"""A pipeline's step: who computes what when, what it holds, in text. Plain numbers in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stowplan.core.units import format_bytes
from stowplan.reports.lines import clean, wrap

__all__ = ["Floats", "Integers", "Lane", "PipelineReport"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_WIDTH = 100
_NAME_WIDTH = 12
_MOST_COLUMNS = 84  # of the timeline


@dataclass(frozen=True, eq=False, kw_only=True)
class Lane:
    """One device's step.

    ``begins``, ``ends`` (time) and ``kinds`` (F, I, W or B) of its n actions; ``chunks``: 0 for those of its first
    stage, 1 for its second. ``levels[k]``: what it holds from ``times[k]`` on.
    """

    begins: Floats
    ends: Floats
    kinds: str = field(repr=False)
    chunks: Integers
    times: Floats
    levels: Integers

    @property
    def peak(self) -> int:
        return int(self.levels.max())


@dataclass(frozen=True, eq=False, kw_only=True)
class PipelineReport:
    """A schedule of ``name`` for ``num_microbatches``; times in whatever unit they were given.

    Levels are bytes where ``in_bytes``, else activations of which a microbatch leaves ``per_microbatch`` on a device.
    ``limit`` is in the same unit. ``bound_time``: no schedule is known to take, or can take, less; None where nobody
    asked. ``named``: step time of the named schedules within the limit. ``predicted_peaks``: what was thought of each
    device before this was measured.
    """

    name: str
    num_microbatches: int
    lanes: Sequence[Lane]
    step_time: float
    work_time: float
    in_bytes: bool
    per_microbatch: int = 1
    limit: int | None = None
    bound_time: float | None = None
    named: dict[str, float] = field(default_factory=dict)
    predicted_peaks: Sequence[int] | None = None

    @property
    def bubble(self) -> float:
        """The part of the step in which the busiest device idles."""
        return 1 - self.work_time / self.step_time

    @property
    def peak(self) -> int:
        """What the fullest device holds at most."""
        return max(lane.peak for lane in self.lanes)

    def amount(self, level: float) -> str:
        """``level`` with its unit."""
        if self.in_bytes:
            return format_bytes(level)
        return _microbatches(level / self.per_microbatch)

    @property
    def verdict(self) -> str:
        """One sentence."""
        within = "" if self.limit is None else f" within {self.amount(self.limit)}"
        return (
            f"{self.name}: a step of {_microbatches(self.num_microbatches)} on {len(self.lanes)} devices takes "
            f"{_number(self.step_time)}, {self.bubble:.1%} of it bubble; the fullest device holds "
            f"{self.amount(self.peak)}{within}."
        )

    @property
    def figures(self) -> tuple[tuple[str, str], ...]:
        """Names and values for a table."""
        told = [
            ("step", _number(self.step_time)),
            ("bubble", f"{_number(self.step_time - self.work_time)} ({self.bubble:.1%} of the step)"),
            ("peak", self.amount(self.peak)),
        ]
        if self.limit is not None:
            told.append(("limit", self.amount(self.limit)))
        if self.bound_time is not None:
            told.append(
                ("bound", f"{_number(self.bound_time)}: the step is {self.step_time / self.bound_time - 1:.1%} above")
            )
        for name, time in self.named.items():
            told.append((name, f"{_number(time)} ({time / self.step_time:.3f} of this step)"))
        for device, (lane, predicted) in enumerate(zip(self.lanes, self.predicted_peaks or (), strict=False)):
            difference = f"{lane.peak / predicted - 1:+.2%}"
            told.append(
                (f"device {device}", f"{self.amount(lane.peak)}, predicted {self.amount(predicted)}: {difference}")
            )
        return tuple(told)

    def as_dict(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "name": self.name,
            "num_devices": len(self.lanes),
            "num_microbatches": self.num_microbatches,
            "step_time": self.step_time,
            "work_time": self.work_time,
            "bubble": self.bubble,
            "in_bytes": self.in_bytes,
            "per_microbatch": self.per_microbatch,
            "peaks": [lane.peak for lane in self.lanes],
            "limit": self.limit,
            "bound_time": self.bound_time,
            "named": self.named,
            "predicted_peaks": self.predicted_peaks,
        }

    def render(self) -> str:
        """At most 100 columns of ASCII: verdict, a line for each device, figures."""
        lines = wrap(self.verdict, _WIDTH)
        lines += ["", *self._timeline(), ""]
        lines += ["F I W: first stage of a device, f i w: others; B b: I and W at once; .: idle; right: peak", ""]
        lines += [f"{clean(name):{_NAME_WIDTH}} {value}" for name, value in self.figures]
        return "\n".join(lines) + "\n"

    def _timeline(self) -> list[str]:
        shortest = min(float((lane.ends - lane.begins).min()) for lane in self.lanes)
        columns = min(_MOST_COLUMNS, max(1, round(self.step_time / shortest)))
        at = (np.arange(columns) + 0.5) * (self.step_time / columns)
        head = len(str(len(self.lanes) - 1))
        lines = []
        for device, lane in enumerate(self.lanes):
            place = np.searchsorted(lane.begins, at, side="right") - 1
            busy = (place >= 0) & (at < lane.ends[np.maximum(place, 0)])
            letters = [
                (lane.kinds[action] if lane.chunks[action] == 0 else lane.kinds[action].lower()) if is_busy else "."
                for action, is_busy in zip(place.tolist(), busy.tolist(), strict=True)
            ]
            level = format_bytes(lane.peak) if self.in_bytes else f"{lane.peak / self.per_microbatch:g}"
            lines.append(f"{device:>{head}} {''.join(letters)} {level}")
        return lines


def _microbatches(count: float) -> str:
    return f"{count:g} microbatch{'' if count == 1 else 'es'}"


def _number(time: float) -> str:
    return f"{time:,.6g}"
