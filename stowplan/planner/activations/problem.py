"""The activation problem: one step, one device, two budgets, and what follows from them for each block program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from stowplan.core.errors import InvalidArgument
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Decisions
from stowplan.core.program import Action, BlockProgram, StepProgram

__all__ = ["Problem", "ProgramChoices"]


@dataclass(frozen=True, slots=True)
class ProgramChoices:
    """What may be decided for the saved values of one program, in the order of ``BlockProgram.saved``.

    ``chains[n]`` are the ops that run whenever saved value n is recomputed: its producer, and backwards through
    unsaved inputs. A saved input ends the chain: it is on the device, or is recomputed and brings its own chain. The
    ops that run under any decisions are therefore the union of the chains of the recomputed values. A value whose
    chain has an op that may not be replayed, or which no op makes, has lost RECOMPUTE in ``actions``.
    """

    actions: tuple[tuple[Action, ...], ...]
    chains: tuple[tuple[int, ...], ...]
    obstacles: tuple[str, ...]  # why RECOMPUTE is impossible; empty where it is possible


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
                raise InvalidArgument(f"{where}: {len(chosen)} actions for {len(program.saved)} saved values.")
            for position, action in enumerate(chosen):
                if action not in choices.actions[position]:
                    value = program.values[program.saved[position]]
                    reason = choices.obstacles[position] if action in value.actions else "it is not among its actions"
                    allowed = ", ".join(choices.actions[position])
                    raise InvalidArgument(
                        f"{where}: {action} is impossible for {value.name!r}: {reason}; allowed: {allowed}."
                    )


def _choices_of(program: BlockProgram) -> ProgramChoices:
    """Chains of all saved values, and their actions without the impossible recomputations."""
    actions, chains, obstacles = [], [], []
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
        obstacles.append(obstacle)
    return ProgramChoices(tuple(actions), tuple(chains), tuple(obstacles))


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
