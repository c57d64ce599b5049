"""The activation problem: one step, one device, two budgets, and what follows from them for each block program."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from stowplan.core.errors import InvalidArgument
from stowplan.core.hardware import Hardware
from stowplan.core.program import Action, BlockProgram, Decision, Decisions, Split, StepProgram, Value

__all__ = ["Problem", "ProgramChoices"]


@dataclass(frozen=True, slots=True)
class ProgramChoices:
    """What may be decided for the saved values of one program, in the order of ``BlockProgram.saved``.

    ``chains[n]`` are the ops that run whenever saved value n is recomputed: its producer, and backwards through
    unsaved inputs. A saved input ends the chain: it is on the device, or is recomputed and brings its own chain. The
    ops that run under any decisions are therefore the union of the chains of the recomputed values. A value whose
    chain has an op that may not be replayed, or which no op makes, has lost RECOMPUTE in ``actions``.

    ``num_rows`` is 0 for a value whose rows cannot do different things; ``splits`` are the numbers of first rows that
    may be recomputed alone. ``whole`` is the number of parts of which every value's rows are a multiple: what ops make
    again is counted in them.
    """

    actions: tuple[tuple[Action, ...], ...]
    chains: tuple[tuple[int, ...], ...]
    obstacles: tuple[str, ...]  # why RECOMPUTE is impossible; empty where it is possible
    num_rows: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]
    whole: int

    def obstacle_to(self, position: int, decision: Decision) -> str:
        """Why saved value number ``position`` cannot do ``decision``; empty if it can."""
        actions, num_rows = self.actions[position], self.num_rows[position]
        if not isinstance(decision, Split):
            if decision in actions:
                return ""
            obstacle = self.obstacles[position] if decision is Action.RECOMPUTE else ""
            return obstacle or "it is not among its actions"
        if not num_rows:
            return "its rows may not be divided"
        kept = num_rows - decision.recomputed - decision.swapped
        parts = {Action.RECOMPUTE: decision.recomputed, Action.SWAP: decision.swapped, Action.KEEP: kept}
        if min(parts.values()) < 0 or max(parts.values()) == num_rows:
            return f"its {num_rows} rows must do different things"
        if decision.recomputed and decision.recomputed not in self.splits[position]:
            return f"its first rows may be recomputed alone where they are {list(self.splits[position])}"
        return next((f"it may not {action}" for action, rows in parts.items() if rows and action not in actions), "")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Decide every saved value of ``step`` on ``hardware`` within two budgets, in bytes.

    Raises InvalidArgument for a step without blocks, budgets below zero, rates or staging that are not positive, and
    a saved value that has no possible action.
    """

    step: StepProgram
    hardware: Hardware
    budget_bytes: int
    host_budget_bytes: int

    def __post_init__(self) -> None:
        if not self.step.blocks:
            raise InvalidArgument("step has no blocks; a plan decides on repeated blocks: give at least one.")
        if self.budget_bytes <= 0 or self.host_budget_bytes < 0:
            raise InvalidArgument(
                f"budget_bytes={self.budget_bytes}, host_budget_bytes={self.host_budget_bytes}; the device budget "
                f"must be positive and the host budget at least 0."
            )
        rates = (self.hardware.to_host_bytes_per_second, self.hardware.to_device_bytes_per_second)
        if min(rates) <= 0 or self.hardware.staging_blocks < 1:
            raise InvalidArgument(
                f"hardware {self.hardware.name!r} copies at {rates} bytes/s with {self.hardware.staging_blocks} "
                f"staging blocks; rates must be positive and staging_blocks at least 1."
            )
        swap_only = sum(
            program.values[index].size_bytes
            for program, block in zip(self.programs, self.order, strict=True)
            for index, actions in zip(program.saved, self.choices_of(block).actions, strict=True)
            if actions == (Action.SWAP,)
        )
        if swap_only > self.host_budget_bytes:
            raise InvalidArgument(
                f"host_budget_bytes={self.host_budget_bytes}, but values that can only be swapped need {swap_only}; "
                f"allow at least that."
            )

    @cached_property
    def choices(self) -> tuple[ProgramChoices, ...]:
        """Possible actions and recompute chains of each program of the step."""
        return tuple(_choices_of(program) for program in self.step.programs)

    def choices_of(self, block: int) -> ProgramChoices:
        """Possible actions of block number ``block``."""
        return self.choices[self.step.blocks[block]]

    @cached_property
    def by_rows(self) -> bool:
        """May the rows of any value do different things?"""
        return any(num_rows for choices in self.choices for num_rows in choices.num_rows)

    @cached_property
    def undivided(self) -> Problem:
        """The same problem for whole values."""
        programs = tuple(
            replace(program, values=tuple(replace(value, num_rows=0, splits=()) for value in program.values))
            for program in self.step.programs
        )
        return replace(self, step=replace(self.step, programs=programs))

    @cached_property
    def programs(self) -> tuple[BlockProgram, ...]:
        """The program of each block, in execution order."""
        return tuple(self.step.program_of(block) for block in self.order)

    @cached_property
    def forward_seconds(self) -> tuple[float, ...]:
        return tuple(program.forward_seconds for program in self.programs)

    @cached_property
    def backward_seconds(self) -> tuple[float, ...]:
        return tuple(program.backward_seconds for program in self.programs)

    @cached_property
    def ideal_seconds(self) -> float:
        """Seconds of a step that neither recomputes nor copies."""
        step = self.step
        blocks = sum(program.forward_seconds + program.backward_seconds for program in self.programs)
        phases = [step.embedding_forward, step.head, step.embedding_backward, step.optimizer_step]
        phases += [phase for gap in step.gaps for phase in (gap.forward, gap.backward)]
        return blocks + sum(phase.seconds for phase in phases)

    @property
    def order(self) -> range:
        """Block numbers in execution order."""
        return range(self.step.num_blocks)

    def check(self, decisions: Decisions) -> None:
        """Raise InvalidArgument, naming block and value, unless ``decisions`` are complete, allowed and replayable."""
        if len(decisions) != self.step.num_blocks:
            raise InvalidArgument(f"decisions for {len(decisions)} blocks; the step has {self.step.num_blocks}.")
        for block, chosen in enumerate(decisions):
            program, choices = self.step.program_of(block), self.choices_of(block)
            where = f"block {self.step.block_names[block]!r}"
            if len(chosen) != len(program.saved):
                raise InvalidArgument(f"{where}: {len(chosen)} decisions for {len(program.saved)} saved values.")
            for position, decision in enumerate(chosen):
                reason = choices.obstacle_to(position, decision)
                if reason:
                    value = program.values[program.saved[position]]
                    allowed = ", ".join(choices.actions[position])
                    raise InvalidArgument(
                        f"{where}: {decision} is impossible for {value.name!r}: {reason}; allowed: {allowed}."
                    )


def _choices_of(program: BlockProgram) -> ProgramChoices:
    """Chains of all saved values, and their actions without the impossible recomputations."""
    actions, chains, obstacles, rows, splits = [], [], [], [], []
    for index in program.saved:
        value = program.values[index]
        chain = _chain_of(program, index)
        fixed = [program.ops[op].name for op in chain if not program.ops[op].replayable]
        obstacle = f"op {fixed[0]!r} may not be replayed" if fixed else "" if chain else "no op of the block makes it"
        possible = tuple(a for a in value.actions if not (obstacle and a is Action.RECOMPUTE))
        if not possible:
            raise InvalidArgument(
                f"program {program.name!r}: saved value {value.name!r} may only be recomputed, but {obstacle}; "
                f"allow KEEP or SWAP for it."
            )
        actions.append(possible)
        chains.append(chain)
        obstacles.append(obstacle if Action.RECOMPUTE in value.actions else "")
        _check_rows(program, value)
        first_rows = value.splits if Action.RECOMPUTE in possible and len(possible) > 1 else ()
        rows.append(value.num_rows if first_rows or {Action.KEEP, Action.SWAP} <= set(possible) else 0)
        splits.append(first_rows)
    whole = math.lcm(*(num_rows for num_rows in rows if num_rows))
    return ProgramChoices(tuple(actions), tuple(chains), tuple(obstacles), tuple(rows), tuple(splits), whole)


def _check_rows(program: BlockProgram, value: Value) -> None:
    """Rows are equal stretches of the value, and splits numbers of them in order."""
    rows, splits = value.num_rows, value.splits
    ascending = all(before < after for before, after in pairwise((0, *splits, rows)))
    if (rows or splits) and (rows <= 0 or value.size_bytes % rows or not ascending):
        raise InvalidArgument(
            f"program {program.name!r}: value {value.name!r} of {value.size_bytes} bytes has num_rows={rows} and "
            f"splits={splits}; rows must divide its bytes, and splits ascend between 1 and {rows - 1}."
        )


def _chain_of(program: BlockProgram, index: int) -> tuple[int, ...]:
    """Ops that must run to make value ``index`` from saved values and block inputs, in execution order."""
    found: set[int] = set()
    pending = [program.values[index].producer]
    while pending:
        op = pending.pop()
        if op is None or op in found:
            continue
        found.add(op)
        inputs = (program.values[i] for i in program.ops[op].inputs)
        pending += [value.producer for value in inputs if not value.saved]
    return tuple(sorted(found))
