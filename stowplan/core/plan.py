"""A plan: what every saved value of every block does, what that is predicted to cost, and what was assumed.

``Plan`` is data. It is made by ``stowplan.plan``, carried out by ``stowplan.apply`` and shown by ``stowplan.report``.
The file format is JSON (docs/plan_file.md).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from stowplan.core.errors import InvalidPlanFile
from stowplan.core.hardware import Hardware
from stowplan.core.head import Head, check_head
from stowplan.core.program import Action, StepProgram, Value
from stowplan.core.records import RecordError, from_plain, to_plain

__all__ = ["FORMAT_VERSION", "Baseline", "Measurement", "MomentBytes", "Plan", "Prediction", "Solution"]

FORMAT_VERSION = 1

_ANEW = "Make it anew with stowplan plan --out."
_BLOCKS = re.compile(r"(?P<first>[0-9]{1,9})(-(?P<last>[0-9]{1,9}))?")

# Per block, one action for each saved value, in the order of ``BlockProgram.saved``.
Decisions = tuple[tuple[Action, ...], ...]


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
        budget_bytes: device bytes this process may use; ``host_budget_bytes`` likewise on the host.
        decisions: per block, an action for each saved value in the order of its program's ``saved``.
        prediction: time and bytes of one step under this plan; ``unplanned`` the same with everything kept.
        declined: everything fits without a plan: applying it does nothing and costs nothing.
        assumptions: what the figures rest on, in words.
        measurement: real steps, where there are any.
        head: the model's head, if it is done in chunks of rows, or could be and that was looked at.
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
    assumptions: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    measurement: Measurement | None = None
    head: Head | None = None

    def actions_of(self, block: int) -> dict[str, Action]:
        """Action of each saved value of block number ``block``, by the value's name."""
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
        plain["decisions"] = _decisions_to_plain(self.decisions, self.step)
        document = {"format": "stowplan-plan", "version": FORMAT_VERSION, **plain}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "the text") -> Plan:
        """Inverse of ``to_json``. Raises InvalidPlanFile; ``source`` names the file in the message."""
        try:
            plain = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidPlanFile(f"{source} is not JSON: {error}. {_ANEW}") from None
        if not isinstance(plain, dict) or plain.pop("format", None) != "stowplan-plan":
            raise InvalidPlanFile(f'{source} is not a stowplan plan (no "format": "stowplan-plan").')
        version = plain.pop("version", None)
        if version != FORMAT_VERSION:
            raise InvalidPlanFile(
                f"{source} has plan version {version!r}; this stowplan reads version {FORMAT_VERSION}. {_ANEW}"
            )
        try:
            step = from_plain(StepProgram, plain.get("step"), "$.step")
            _check_step(step)
            plain["decisions"] = _decisions_from_plain(plain.get("decisions"), step)
            plan: Plan = from_plain(Plan, plain)
            if plan.head is not None:
                check_head(plan.head, plan.step)
            return plan
        except RecordError as error:
            raise InvalidPlanFile(f"{source}: {error}. {_ANEW}") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _check_step(step: StepProgram) -> None:
    """Every index must point at something, and a saved value's name at one value. Raises RecordError."""
    if len(step.block_names) != step.num_blocks:
        raise RecordError(f"$.step.block_names: {len(step.block_names)} names of {step.num_blocks} blocks")
    for block, index in enumerate(step.blocks):
        _check_index(index, len(step.programs), f"$.step.blocks[{block}]")
    before = 0
    for number, gap in enumerate(step.gaps):
        if not before < gap.block < step.num_blocks:
            raise RecordError(
                f"$.step.gaps[{number}].block: {gap.block} is not between {before + 1} and {step.num_blocks - 1}"
            )
        before = gap.block
    for number, program in enumerate(step.programs):
        path = f"$.step.programs[{number}]"
        for i, value in enumerate(program.values):
            if value.producer is not None:
                _check_index(value.producer, len(program.ops), f"{path}.values[{i}].producer")
        for i, op in enumerate(program.ops):
            for field, indices in (("inputs", op.inputs), ("outputs", op.outputs)):
                for j, index in enumerate(indices):
                    _check_index(index, len(program.values), f"{path}.ops[{i}].{field}[{j}]")
        names = [program.values[i].name for i in program.saved]
        if len(set(names)) != len(names):
            raise RecordError(f"{path}.values: two saved values have the same name")


def _check_index(index: int, length: int, path: str) -> None:
    if not 0 <= index < length:
        raise RecordError(f"{path}: {index} is not between 0 and {length - 1}")


def _decisions_to_plain(decisions: Decisions, step: StepProgram) -> list[dict[str, object]]:
    """Equal decisions of consecutive blocks as one entry: ``{"blocks": "0-5", "keep": [...], …}``."""
    entries: list[dict[str, object]] = []
    first = 0
    for block in range(1, step.num_blocks + 1):
        if (
            block < step.num_blocks
            and step.blocks[block] == step.blocks[first]
            and decisions[block] == decisions[first]
        ):
            continue
        program = step.program_of(first)
        names = [program.values[i].name for i in program.saved]
        assert len(set(names)) == len(names), "decisions are written by name: names of saved values must differ"
        entry: dict[str, object] = {"blocks": f"{first}-{block - 1}" if block - 1 > first else str(first)}
        for action in Action:
            entry[action.value] = [n for n, a in zip(names, decisions[first], strict=True) if a is action]
        entries.append(entry)
        first = block
    return entries


def _decisions_from_plain(plain: object, step: StepProgram) -> list[list[str]]:
    """Expand block ranges into the plain form of ``Decisions``; checks that every value has exactly one action."""
    if not isinstance(plain, list):
        raise RecordError("$.decisions: a list of block ranges is expected")
    expanded: list[list[str]] = []
    for position, entry in enumerate(plain):
        path = f"$.decisions[{position}]"
        if not isinstance(entry, dict):
            raise RecordError(f'{path}: an object with "blocks": "FIRST-LAST" is expected')
        chosen = _actions_by_name(entry, path)
        for block in _next_blocks(entry.get("blocks"), len(expanded), step.num_blocks, f"{path}.blocks"):
            program = step.program_of(block)
            expanded.append(_actions_in_order([program.values[i] for i in program.saved], chosen, path))
    if len(expanded) != step.num_blocks:
        raise RecordError(f"$.decisions: {len(expanded)} blocks of {step.num_blocks}")
    return expanded


def _next_blocks(text: object, first: int, num_blocks: int, path: str) -> range:
    """The blocks that ``"FIRST-LAST"`` or ``"FIRST"`` names; they must go on from block ``first``."""
    match = _BLOCKS.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match["first"]) != first or int(match["last"] or first) < first:
        raise RecordError(f"{path}: {text!r} is not the next range of blocks, which begins with {first}")
    last = int(match["last"] or first)
    if last >= num_blocks:
        raise RecordError(f"{path}: block {last} of {num_blocks}")
    return range(first, last + 1)


def _actions_by_name(entry: dict[str, object], path: str) -> dict[str, str]:
    """The action that an entry gives each value's name."""
    chosen: dict[str, str] = {}
    for key, names in entry.items():
        if key == "blocks":
            continue
        if key not in tuple(Action):
            raise RecordError(f"{path}: unknown key {key!r}")
        if not isinstance(names, list):
            raise RecordError(f"{path}.{key}: a list of names is expected")
        for name in names:
            if not isinstance(name, str) or name in chosen:
                raise RecordError(f"{path}.{key}: {name!r} is no name, or has an action already")
            chosen[name] = key
    return chosen


def _actions_in_order(values: list[Value], chosen: dict[str, str], path: str) -> list[str]:
    for value in values:
        if value.name not in chosen:
            raise RecordError(f"{path}: no action for {value.name!r}")
        if chosen[value.name] not in value.actions:
            raise RecordError(f"{path}: {chosen[value.name]!r} is not allowed for {value.name!r}")
    if len(chosen) != len(values):
        (other, *_) = sorted(set(chosen) - {value.name for value in values})
        raise RecordError(f"{path}: {other!r} is no saved value of these blocks")
    return [chosen[value.name] for value in values]
