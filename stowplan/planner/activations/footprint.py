"""What one block's decisions cost: bytes between forward and backward, replay seconds, and the backward peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stowplan.core.program import Action, BlockProgram
from stowplan.planner.activations.problem import Problem, ProgramChoices

__all__ = ["BlockFootprint", "Footprints", "measure_block"]


@dataclass(frozen=True, slots=True)
class BlockFootprint:
    """Bytes and seconds of one block under one choice of actions.

    ``kept_bytes`` stay on the device until its backward; ``alive_bytes`` until the forward pass ends (kept plus
    lingering ones); ``swapped_bytes`` wait on the host; ``backward_peak_bytes`` is that of its backward with replay.
    """

    kept_bytes: int
    alive_bytes: int
    swapped_bytes: int
    recomputed_bytes: int
    replay_seconds: float
    backward_peak_bytes: int


class Footprints:
    """Footprints of the blocks of one problem, computed once per program and choice of actions."""

    def __init__(self, problem: Problem) -> None:
        self._step = problem.step
        self._choices = problem.choices
        self._known: dict[tuple[int, tuple[Action, ...]], BlockFootprint] = {}

    def of(self, block: int, actions: tuple[Action, ...]) -> BlockFootprint:
        """Footprint of block number ``block`` under ``actions``, which must be possible (``Problem.check``)."""
        key = (self._step.blocks[block], actions)
        found = self._known.get(key)
        if found is None:
            found = measure_block(self._step.programs[key[0]], self._choices[key[0]], actions)
            self._known[key] = found
        return found


def measure_block(program: BlockProgram, choices: ProgramChoices, actions: tuple[Action, ...]) -> BlockFootprint:
    """The footprint of ``program`` under ``actions`` (one for each saved value, in order)."""
    kept = alive = swapped = recomputed = 0
    running: set[int] = set()
    for position, action in enumerate(actions):
        value = program.values[program.saved[position]]
        if action is Action.KEEP:
            kept += value.size_bytes
        elif action is Action.SWAP:
            swapped += value.size_bytes
        else:
            recomputed += value.size_bytes
            running.update(choices.chains[position])
        if value.lingers and action is not Action.KEEP:
            alive += value.size_bytes
    ops = sorted(running)
    kept += program.held_bytes + sum(program.values[v].size_bytes for v in program.unsaved_inputs(ops))
    peak = program.backward_peak_bytes
    if ops:
        resident = kept + swapped
        peak = max(peak, program.output_gradient_bytes + _replay_peak(program, actions, ops, resident))
    return BlockFootprint(
        kept_bytes=kept,
        alive_bytes=kept + alive + program.lingering_bytes,
        swapped_bytes=swapped,
        recomputed_bytes=recomputed,
        replay_seconds=sum(program.ops[op].seconds for op in ops),
        backward_peak_bytes=peak,
    )


def _replay_peak(program: BlockProgram, actions: tuple[Action, ...], ops: Iterable[int], resident: int) -> int:
    """Highest live bytes while ``ops`` run in order with ``resident`` bytes on the device at first.

    Recomputed saved values stay; everything else that an op makes dies after its last use among ``ops`` — at once
    where that is a second copy of a kept or swapped value, which its readers have on the device already.
    """
    recomputed = {program.saved[n] for n, action in enumerate(actions) if action is Action.RECOMPUTE}
    last_use: dict[int, int] = {}
    for op in ops:
        last_use.update((value, op) for value in program.ops[op].inputs if not program.values[value].saved)
    peak = live = resident
    for op in ops:
        outputs = program.ops[op].outputs
        live += sum(program.values[value].size_bytes for value in outputs)
        peak = max(peak, live + program.ops[op].workspace_bytes)
        dead = [v for v in outputs if v not in recomputed and last_use.get(v, op) == op]
        dead += [
            v
            for v in dict.fromkeys(program.ops[op].inputs)
            if last_use.get(v) == op and program.values[v].producer is not None
        ]
        live -= sum(program.values[value].size_bytes for value in dead)
    return peak
