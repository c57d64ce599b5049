"""What one block's decisions cost: bytes between forward and backward, replay seconds, and the backward peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stowplan.core.program import Action, BlockDecisions, BlockProgram, Op, Split
from stowplan.planner.activations.problem import Problem, ProgramChoices

__all__ = ["BlockFootprint", "Footprints", "measure_block"]


@dataclass(frozen=True, slots=True)
class BlockFootprint:
    """Bytes and seconds of one block under one choice of decisions.

    ``kept_bytes`` stay on the device until its backward; ``alive_bytes`` until the forward pass ends (kept plus
    lingering ones); ``swapped_bytes`` wait on the host and take ``staged_bytes`` of the device while they are in
    flight. ``forward_peak_bytes`` is that of its forward with the copies of kept rows, ``backward_peak_bytes`` that of
    its backward with them and the replay.
    """

    kept_bytes: int
    alive_bytes: int
    swapped_bytes: int
    staged_bytes: int
    recomputed_bytes: int
    replay_seconds: float
    forward_peak_bytes: int
    backward_peak_bytes: int


class Footprints:
    """Footprints of the blocks of one problem, computed once per program and choice of decisions."""

    def __init__(self, problem: Problem) -> None:
        self._step = problem.step
        self._choices = problem.choices
        self._known: dict[tuple[int, BlockDecisions], BlockFootprint] = {}

    def of(self, block: int, decisions: BlockDecisions) -> BlockFootprint:
        """Footprint of block number ``block`` under ``decisions``, which must be possible (``Problem.check``)."""
        key = (self._step.blocks[block], decisions)
        found = self._known.get(key)
        if found is None:
            found = measure_block(self._step.programs[key[0]], self._choices[key[0]], decisions)
            self._known[key] = found
        return found


def measure_block(program: BlockProgram, choices: ProgramChoices, decisions: BlockDecisions) -> BlockFootprint:
    """The footprint of ``program`` under ``decisions`` (one for each saved value, in order).

    Note: what a split value costs. Its kept rows are copied out of it at the end of the forward, when all that is saved
    is still alive; then the whole value goes, once its swapped rows are on the host. When they come back, and wherever
    a replay has made its first rows, one buffer of the whole size takes them. All kept rows are counted beside all
    buffers when these are filled, before the replay: an engine may do it in any order. Rows made again are a tensor of
    their own that dies as soon as its op is over, like the second copy of a kept value.
    """
    kept = swapped = staged = recomputed = lingering = 0
    copied = resident = 0  # kept rows of split values; all that is there whole when a replay begins
    runs: dict[int, int] = {}  # by op, how many of ``choices.whole`` parts of its rows it makes
    for position, decision in enumerate(decisions):
        value = program.values[program.saved[position]]
        size = value.size_bytes
        share = 0
        if isinstance(decision, Split):
            row_bytes = size // value.num_rows
            share = decision.recomputed * (choices.whole // value.num_rows)
            copied += (value.num_rows - decision.recomputed - decision.swapped) * row_bytes
            resident += size
            swapped += decision.swapped * row_bytes
            staged += size if decision.swapped else 0
            recomputed += decision.recomputed * row_bytes
        elif decision is Action.KEEP:
            kept += size
            resident += size
        elif decision is Action.SWAP:
            swapped += size
            staged += size
            resident += size
        else:
            recomputed += size
            share = choices.whole
        if share:
            for op in choices.chains[position]:
                runs[op] = max(share, runs.get(op, 0))
        if value.lingers and decision is not Action.KEEP:
            lingering += size
    held = program.held_bytes + sum(program.values[v].size_bytes for v in program.unsaved_inputs(runs))
    kept, resident = kept + copied + held, resident + held
    peak = program.backward_peak_bytes
    if copied:
        peak = max(peak, program.output_gradient_bytes + resident + copied)
    if runs:
        peak = max(
            peak, program.output_gradient_bytes + _replay_peak(program, decisions, runs, choices.whole, resident)
        )
    return BlockFootprint(
        kept_bytes=kept,
        alive_bytes=kept + lingering + program.lingering_bytes,
        swapped_bytes=swapped,
        staged_bytes=staged,
        recomputed_bytes=recomputed,
        replay_seconds=sum(_seconds(program.ops[op], share / choices.whole) for op, share in sorted(runs.items())),
        forward_peak_bytes=max(program.forward_peak_bytes, program.forward_end_bytes + copied),
        backward_peak_bytes=peak,
    )


def _seconds(op: Op, share: float) -> float:
    """Time of ``op`` for the first ``share`` of its rows: causal attention reads no more than that many keys, too."""
    return op.seconds * share * share if op.causal_attention else op.seconds * share


def _replay_peak(
    program: BlockProgram, decisions: BlockDecisions, runs: Mapping[int, int], whole: int, resident: int
) -> int:
    """Highest live bytes while ops run in order with ``resident`` bytes on the device at first.

    Values that are recomputed whole stay; everything else that an op makes dies after its last use among the ops — at
    once where that is a second copy of a kept, swapped or split value, which its readers have on the device already.
    """
    recomputed = {program.saved[n] for n, decision in enumerate(decisions) if decision is Action.RECOMPUTE}
    last_use: dict[int, int] = {}
    for op in sorted(runs):
        last_use.update((value, op) for value in program.ops[op].inputs if not program.values[value].saved)
    made: dict[int, int] = {}
    peak = live = resident
    for op in sorted(runs):
        outputs = program.ops[op].outputs
        made.update((value, -(-program.values[value].size_bytes * runs[op] // whole)) for value in outputs)
        live += sum(made[value] for value in outputs)
        peak = max(peak, live + program.ops[op].workspace_bytes)
        dead = [v for v in outputs if v not in recomputed and last_use.get(v, op) == op]
        dead += [
            v
            for v in dict.fromkeys(program.ops[op].inputs)
            if last_use.get(v) == op and program.values[v].producer is not None
        ]
        live -= sum(made[value] for value in dead)
    return peak
