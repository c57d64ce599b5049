"""Named baselines: what others do by rule, within the actions that a step allows.

Where a policy's wish is impossible for a value, the next in its list is taken: keep → swap → recompute, swap → keep →
recompute, recompute → keep → swap. Block inputs are what recomputation starts from: no policy recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable

from stowplan.core.plan import Decisions
from stowplan.core.program import Action, BlockProgram
from stowplan.planner.activations.draft import Draft
from stowplan.planner.activations.problem import Problem

__all__ = ["POLICIES", "Policy"]

Policy = Callable[[Problem], Decisions]

_FALLBACKS = {
    Action.KEEP: (Action.KEEP, Action.SWAP, Action.RECOMPUTE),
    Action.SWAP: (Action.SWAP, Action.KEEP, Action.RECOMPUTE),
    Action.RECOMPUTE: (Action.RECOMPUTE, Action.KEEP, Action.SWAP),
}
_NUM_LAST_KEPT = 2  # MEMO never swaps the last two layers: their backward comes at once


def keep_all(problem: Problem) -> Decisions:
    """Everything stays on the device: what training does without a plan."""
    return _by_rule(problem, lambda block, position: Action.KEEP)


def recompute_all(problem: Problem) -> Decisions:
    """Block inputs are kept and the rest is recomputed: full activation checkpointing."""
    return _by_rule(problem, lambda block, position: Action.RECOMPUTE)


def swap_all(problem: Problem) -> Decisions:
    """Everything goes to the host, but for the last two blocks, which are kept."""
    last = problem.step.num_blocks - _NUM_LAST_KEPT
    return _by_rule(problem, lambda block, position: Action.SWAP if block < last else Action.KEEP)


def selective(problem: Problem) -> Decisions:
    """Results of matrix products and attention are kept and the rest is recomputed (selective checkpointing).

    Korthikanti et al., arXiv 2205.05198, section 5; torch's ``create_selective_checkpoint_contexts`` as commonly used.
    """
    costly = [
        {index for op in program.ops if op.flops > 0 or op.causal_attention for index in op.outputs}
        for program in problem.step.programs
    ]

    def rule(block: int, position: int) -> Action:
        index = problem.step.program_of(block).saved[position]
        return Action.KEEP if index in costly[problem.step.blocks[block]] else Action.RECOMPUTE

    return _by_rule(problem, rule)


def memo(problem: Problem) -> Decisions:
    """MEMO's rule with whole values instead of token rows (arXiv 2407.12117, section 4).

    Block input and attention output are swapped. Of the rest, largest first, as many bytes are swapped as one block's
    forward hides and the host holds; what remains is recomputed. The last two blocks are kept.
    """
    step = problem.step
    num_swapping = max(1, step.num_blocks - _NUM_LAST_KEPT)
    per_program = []
    for program in step.programs:
        room = program.forward_seconds * problem.hardware.to_host_bytes_per_second
        per_program.append(_memo_swaps(program, int(min(room, problem.host_budget_bytes // num_swapping))))

    def rule(block: int, position: int) -> Action:
        if block >= step.num_blocks - _NUM_LAST_KEPT:
            return Action.KEEP
        swapped = step.program_of(block).saved[position] in per_program[step.blocks[block]]
        return Action.SWAP if swapped else Action.RECOMPUTE

    return _by_rule(problem, rule)


def _memo_swaps(program: BlockProgram, room_bytes: int) -> set[int]:
    """Saved values that MEMO swaps when ``room_bytes`` per block are hidden: always its base, then largest first."""
    attention = {index for op in program.ops if op.causal_attention or "attention" in op.name for index in op.outputs}
    swaps = {i for i in program.saved if program.values[i].producer is None or i in attention}
    room_bytes -= sum(program.values[i].size_bytes for i in swaps)
    for index in sorted(set(program.saved) - swaps, key=lambda i: (-program.values[i].size_bytes, i)):
        if program.values[index].size_bytes <= room_bytes:
            swaps.add(index)
            room_bytes -= program.values[index].size_bytes
    return swaps


def greedy(problem: Problem) -> Decisions:
    """Recompute all, then keep by recompute seconds saved per byte for as long as the budgets hold.

    All values that one op makes are kept together: one of them alone would save nothing.
    """
    draft = Draft(problem, recompute_all(problem))
    wishes: list[tuple[float, int, frozenset[int]]] = []
    for block in problem.order:
        program, choices = problem.step.program_of(block), problem.choices_of(block)
        made_by: dict[int | None, list[int]] = {}
        for position, index in enumerate(program.saved):
            if draft.actions[block][position] is Action.RECOMPUTE and Action.KEEP in choices.actions[position]:
                made_by.setdefault(program.values[index].producer, []).append(position)
        for positions in made_by.values():
            seconds = sum(program.ops[op].seconds for op in choices.chains[positions[0]])
            size = sum(program.values[program.saved[position]].size_bytes for position in positions)
            wishes.append((-seconds / max(1, size), block, frozenset(positions)))
    for _, block, kept in sorted(wishes, key=lambda wish: (wish[0], wish[1], min(wish[2]))):
        actions = tuple(Action.KEEP if n in kept else action for n, action in enumerate(draft.actions[block]))
        draft.improve_by({block: actions})
    return draft.decisions


def _by_rule(problem: Problem, wish: Callable[[int, int], Action]) -> Decisions:
    """Ask ``wish(block, position of the saved value)`` everywhere and fall back to what is allowed."""
    decisions = []
    for block in problem.order:
        program, choices = problem.step.program_of(block), problem.choices_of(block)
        actions = []
        for position, index in enumerate(program.saved):
            wanted = wish(block, position)
            if wanted is Action.RECOMPUTE and program.values[index].producer is None:
                wanted = Action.KEEP
            actions.append(next(a for a in _FALLBACKS[wanted] if a in choices.actions[position]))
        decisions.append(tuple(actions))
    return tuple(decisions)


POLICIES: dict[str, Policy] = {
    "keep all": keep_all,
    "recompute all": recompute_all,
    "swap all": swap_all,
    "selective": selective,
    "memo": memo,
    "greedy": greedy,
}
