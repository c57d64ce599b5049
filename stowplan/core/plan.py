"""A plan: what every saved value of every block does, what that is predicted to cost, and what was assumed.

``Plan`` is data. It is made by ``stowplan.plan``, carried out by ``stowplan.apply`` and shown by ``stowplan.report``.
The file format is JSON (docs/plan_file.md).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from stowplan.core.decisions import check_indices, decisions_from_plain, decisions_to_plain
from stowplan.core.errors import InvalidPlanFile
from stowplan.core.hardware import Hardware
from stowplan.core.head import Head, check_head
from stowplan.core.program import Decision, Decisions, StepProgram
from stowplan.core.records import RecordError, from_plain, to_plain

__all__ = [
    "FORMAT_VERSION",
    "Baseline",
    "Measurement",
    "MomentBytes",
    "Plan",
    "Prediction",
    "SnapshotBytes",
    "Solution",
    "tolerance_fault",
    "with_fragmentation",
]

FORMAT_VERSION = 1
_MOST_DIGITS = 30  # of a whole number in a file: far beyond bytes, far below the largest float

_ANEW = "Make it anew with stowplan plan --out."


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentBytes:
    """The highest live bytes during one moment of the step (a block's forward, the head, …), by what they are.

    ``static_bytes`` parameters, buffers, batch, optimizer states and gradients held all step; ``gradient_bytes`` those
    made by then; ``kept_bytes`` saved values of other blocks; ``working_bytes`` the block or phase at work itself;
    ``staged_bytes`` swapped values of other blocks in flight. They add up to ``peak_bytes``.
    """

    name: str
    seconds: float  # when it starts, from the start of the step
    static_bytes: int
    gradient_bytes: int
    kept_bytes: int
    staged_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.static_bytes + self.gradient_bytes + self.kept_bytes + self.staged_bytes + self.working_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the simulator says of one set of decisions. Bytes of one step, seconds of one step."""

    step_seconds: float
    peak_bytes: int
    peak_moment: str
    host_bytes: int  # host slab needed for swapped values
    swapped_bytes: int  # copied to the host per step (and back)
    recomputed_bytes: int  # saved values made again per step
    recompute_seconds: float
    stall_seconds: float  # compute waiting for copies, or copying itself where copies do not overlap
    moments: tuple[MomentBytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A named policy through the same simulator, for comparison. ``fits`` both budgets or not."""

    name: str
    fits: bool
    prediction: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """How the decisions were found. ``bound_seconds`` is the LP with token rows: no plan can be faster.

    ``gap`` is (step seconds − bound) / bound.
    """

    solver: str
    seconds: float
    bound_seconds: float
    gap: float
    proof: str  # "optimal", "within gap", "time limit" or "nothing to decide"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotBytes:
    """What snapshots take of the host for one rank: ``total_bytes``, two of ``data_bytes`` and parity, and tables."""

    data_bytes: int
    parity_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What real steps did: per step, seconds and highest live bytes on the device; swapped and recomputed bytes."""

    step_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    swapped_bytes: tuple[int, ...] = ()
    recomputed_bytes: tuple[int, ...] = ()
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do with every saved value, and why.

    Attributes:
        model: name of the model's class; ``blocks`` are named in ``step.block_names``.
        budget_bytes: device bytes this process may use; ``host_budget_bytes`` likewise on the host, for swapped values
            and for ``snapshots``.
        decisions: per block, an action or a split by rows for each saved value in the order of its program's ``saved``.
        prediction: time and bytes of one step under this plan; ``unplanned`` the same with everything kept.
        exact: losses and gradients are those of the plain run, bit for bit. If not, rows that are recomputed alone may
            differ by ``tolerance``, relative to a value's largest number (None: by what is usual for its dtype).
        declined: everything fits without a plan: applying it does nothing and costs nothing.
        assumptions: what the figures rest on, in words.
        measurement: real steps, where there are any.
        head: the model's head, if it is done in chunks of rows, or could be and that was looked at.
        arena_bytes: the highest address of the step, static bytes below it; None: no addresses were planned.
        fragmentation: without planned addresses, what the allocator is allowed to lose between buffers, as a share of
            the peak's bytes that do not live all step.
        snapshots: what they take of the host budget; None: none are taken.
    """

    model: str
    batch: str
    budget_bytes: int
    host_budget_bytes: int
    hardware: Hardware
    step: StepProgram
    decisions: Decisions
    prediction: Prediction
    unplanned: Prediction
    solution: Solution
    least_budget_bytes: int
    baselines: tuple[Baseline, ...] = ()
    declined: bool = False
    exact: bool = True
    tolerance: float | None = None
    assumptions: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    measurement: Measurement | None = None
    head: Head | None = None
    arena_bytes: int | None = None
    fragmentation: float = 0.0
    snapshots: SnapshotBytes | None = None

    @property
    def snapshot_bytes(self) -> int:
        """What snapshots take of the host budget."""
        return self.snapshots.total_bytes if self.snapshots else 0

    @property
    def swap_budget_bytes(self) -> int:
        """What is left of the host budget for swapped values."""
        return self.host_budget_bytes - self.snapshot_bytes

    @property
    def needed_bytes(self) -> int:
        """What the step takes of the device: up to its highest address, or with the allowance for fragmentation."""
        return self.arena_bytes if self.arena_bytes is not None else self.needed_by(self.prediction)

    def needed_by(self, prediction: Prediction) -> int:
        """What a step would take that has no planned addresses: live bytes and the allowance for fragmentation."""
        return with_fragmentation(prediction.peak_bytes, self.step.static_bytes, self.fragmentation)

    def actions_of(self, block: int) -> dict[str, Decision]:
        """What each saved value of block number ``block`` does, by the value's name."""
        program = self.step.program_of(block)
        return {program.values[i].name: action for i, action in zip(program.saved, self.decisions[block], strict=True)}

    def with_measurement(self, measurement: Measurement) -> Plan:
        """The same plan with real figures beside the predicted ones."""
        return replace(self, measurement=measurement)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON (versioned, readable, no pickle), replacing ``path`` at once or not at all."""
        target = Path(path)
        draft = target.with_name(target.name + ".tmp")
        draft.write_text(self.to_json(), encoding="utf-8")
        draft.replace(target)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan file. Raises InvalidPlanFile saying where it is wrong, FileNotFoundError if it is not there."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidPlanFile(f"{path} is not text: {error}. {_ANEW}") from None
        return Plan.from_json(text, str(path))

    def to_json(self) -> str:
        """The plan as JSON text; decisions are written as block ranges by value name."""
        plain = to_plain(self)
        plain["decisions"] = decisions_to_plain(self.decisions, self.step)
        document = {"format": "stowplan-plan", "version": FORMAT_VERSION, **plain}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "the text") -> Plan:
        """Inverse of ``to_json``. Raises InvalidPlanFile; ``source`` names the file in the message."""
        try:
            plain = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded)
        except (ValueError, RecursionError) as error:
            raise InvalidPlanFile(f"{source} is not JSON: {error}. {_ANEW}") from None
        if not isinstance(plain, dict) or plain.pop("format", None) != "stowplan-plan":
            raise InvalidPlanFile(f'{source} is not a stowplan plan (no "format": "stowplan-plan").')
        version = plain.pop("version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise InvalidPlanFile(
                f"{source} has plan version {version!r}; this stowplan reads version {FORMAT_VERSION}. {_ANEW}"
            )
        try:
            step = from_plain(StepProgram, plain.get("step"), "$.step")
            check_indices(step)
            plain["decisions"] = decisions_from_plain(plain.get("decisions"), step)
            plan: Plan = from_plain(Plan, plain)
            _check_ranges(plan)
            if plan.head is not None:
                check_head(plan.head, plan.step)
            return plan
        except RecordError as error:
            raise InvalidPlanFile(f"{source}: {error}. {_ANEW}") from None


def with_fragmentation(peak_bytes: int, static_bytes: int, fragmentation: float) -> int:
    """A peak of live bytes with what fragmentation may add to those above ``static_bytes``."""
    return peak_bytes + math.ceil(max(0, peak_bytes - static_bytes) * fragmentation)


def tolerance_fault(exact: bool, tolerance: float | None) -> str:
    """What is wrong with a plan's ``tolerance``; empty if nothing is."""
    if tolerance is None:
        return ""
    if exact:
        return f"{tolerance!r} goes with exact=False; an exact plan needs none"
    return "" if 0 < tolerance < 1 else f"{tolerance!r} is not between 0 and 1; 1e-5 suits float32"


def _check_ranges(plan: Plan) -> None:
    """Raises RecordError for a number that no plan can have."""
    fault = tolerance_fault(plan.exact, plan.tolerance)
    if fault:
        raise RecordError(f"$.tolerance: {fault}")
    hardware = plan.hardware
    if hardware.device_type not in ("cpu", "cuda"):
        raise RecordError(f"$.hardware.device_type: {hardware.device_type!r} is neither 'cpu' nor 'cuda'")
    if hardware.staging_blocks < 1:
        raise RecordError(f"$.hardware.staging_blocks: {hardware.staging_blocks} is less than 1")
    for name in ("to_host_bytes_per_second", "to_device_bytes_per_second"):
        if getattr(hardware, name) <= 0:
            raise RecordError(f"$.hardware.{name}: {getattr(hardware, name)} is not more than 0")
    for name, number in (
        ("budget_bytes", plan.budget_bytes),
        ("host_budget_bytes", plan.host_budget_bytes),
        ("prediction.host_bytes", plan.prediction.host_bytes),
        ("least_budget_bytes", plan.least_budget_bytes),
        ("arena_bytes", plan.arena_bytes or 0),
        ("snapshots.total_bytes", plan.snapshot_bytes),
        ("fragmentation", plan.fragmentation),
    ):
        if number < 0:
            raise RecordError(f"$.{name}: {number} is less than 0")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large a number")
    return number


def _bounded(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"{digits[:_MOST_DIGITS]}... is too large a number")
    return int(digits)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
