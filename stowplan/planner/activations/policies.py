"""Named baselines: what others do by rule, within the actions that a step allows.

Where a policy's wish is impossible for a value, the next in its list is taken: keep → swap → recompute, swap → keep →
recompute, recompute → keep → swap. Block inputs are what recomputation starts from: no policy recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable

from stowplan.core.program import Action, BlockProgram, Decision, Decisions, Split, decision_by_rows
from stowplan.planner.activations.draft import Draft
from stowplan.planner.activations.problem import Problem, ProgramChoices

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
    """MEMO's rule (arXiv 2407.12117, section 4).

    Block input and attention output are swapped. Of the rows of the rest a fraction α is swapped: the largest that one
    block's forward hides and the host holds. The first 1 − α of the rows are recomputed. The last two blocks are kept.
    A value whose rows may not be divided is swapped whole, the largest first, as long as the same bytes allow it.
    """
    step = problem.step
    num_swapping = max(1, step.num_blocks - _NUM_LAST_KEPT)
    per_program = []
    for program, choices in zip(step.programs, problem.choices, strict=True):
        room = program.forward_seconds * problem.hardware.to_host_bytes_per_second
        room_bytes = int(min(room, problem.host_budget_bytes // num_swapping))
        per_program.append(_memo_decisions(program, choices, room_bytes))

    def rule(block: int, position: int) -> Decision:
        if block >= step.num_blocks - _NUM_LAST_KEPT:
            return Action.KEEP
        return per_program[step.blocks[block]].get(position, Action.RECOMPUTE)

    return _by_rule(problem, rule)


def _memo_decisions(program: BlockProgram, choices: ProgramChoices, room_bytes: int) -> dict[int, Decision]:
    """What MEMO swaps, all or part of it, by position among the saved values, where ``room_bytes`` are hidden."""
    attention = {index for op in program.ops if op.causal_attention or "attention" in op.name for index in op.outputs}
    sizes = [program.values[index].size_bytes for index in program.saved]
    decisions: dict[int, Decision] = {
        n: Action.SWAP
        for n, index in enumerate(program.saved)
        if program.values[index].producer is None or index in attention
    }
    others = [n for n in range(len(sizes)) if n not in decisions]
    room_bytes = max(0, room_bytes - sum(sizes[n] for n in decisions))
    all_bytes = sum(sizes[n] for n in others)
    whole = []
    for n in others:
        num_rows = choices.num_rows[n]
        if not choices.splits[n] or Action.SWAP not in choices.actions[n]:
            whole.append(n)
            continue
        recomputed = next(
            rows for rows in (0, *choices.splits[n], num_rows) if (num_rows - rows) * all_bytes <= room_bytes * num_rows
        )
        decisions[n] = decision_by_rows(num_rows, recomputed, num_rows - recomputed)
    room_bytes -= sum(
        program.values[program.saved[n]].bytes_by_action(decisions[n])[Action.SWAP] for n in others if n in decisions
    )
    for n in sorted(whole, key=lambda n: -sizes[n]):
        if sizes[n] <= room_bytes:
            decisions[n] = Action.SWAP
            room_bytes -= sizes[n]
    return decisions


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
            if draft.chosen[block][position] is Action.RECOMPUTE and Action.KEEP in choices.actions[position]:
                made_by.setdefault(program.values[index].producer, []).append(position)
        for positions in made_by.values():
            seconds = sum(program.ops[op].seconds for op in choices.chains[positions[0]])
            size = sum(program.values[program.saved[position]].size_bytes for position in positions)
            wishes.append((-seconds / max(1, size), block, frozenset(positions)))
    for _, block, kept in sorted(wishes, key=lambda wish: (wish[0], wish[1], min(wish[2]))):
        chosen = tuple(Action.KEEP if n in kept else other for n, other in enumerate(draft.chosen[block]))
        draft.improve_by({block: chosen})
    return draft.decisions


def _by_rule(problem: Problem, wish: Callable[[int, int], Decision]) -> Decisions:
    """Ask ``wish(block, position of the saved value)`` everywhere; where an action is not allowed, fall back."""
    decisions = []
    for block in problem.order:
        program, choices = problem.step.program_of(block), problem.choices_of(block)
        chosen: list[Decision] = []
        for position, index in enumerate(program.saved):
            wanted = wish(block, position)
            if isinstance(wanted, Split):
                chosen.append(wanted)
                continue
            if wanted is Action.RECOMPUTE and program.values[index].producer is None:
                wanted = Action.KEEP
            chosen.append(next(a for a in _FALLBACKS[wanted] if a in choices.actions[position]))
        decisions.append(tuple(chosen))
    return tuple(decisions)


POLICIES: dict[str, Policy] = {
    "keep all": keep_all,
    "recompute all": recompute_all,
    "swap all": swap_all,
    "selective": selective,
    "memo": memo,
    "greedy": greedy,
}
