"""Which blocks decide together: fewer decisions make a smaller program, at a small loss that search wins back."""

from __future__ import annotations

from stowplan.planner.activations.problem import Problem

__all__ = ["group_blocks"]

_NUM_LAST_APART = 2  # what the last two blocks hold is needed back at once: they differ from all others


def group_blocks(problem: Problem, most: int) -> tuple[tuple[int, ...], ...]:
    """Blocks of one program in one stretch of the depth, the last two blocks apart; about ``most`` groups.

    Every block is its own group where there are no more than ``most`` (or two). With several programs in turn,
    stretches are longer, so that their number times that of programs stays near ``most``.
    """
    count = problem.step.num_blocks
    if count <= max(most, _NUM_LAST_APART):
        return tuple((block,) for block in problem.order)
    early = count - _NUM_LAST_APART
    num_programs = len(set(problem.step.blocks[:early]))
    stretches = max(1, (most - _NUM_LAST_APART) // num_programs)
    groups: dict[tuple[int, int], list[int]] = {}
    for block in range(early):
        groups.setdefault((block * stretches // early, problem.step.blocks[block]), []).append(block)
    return (*(tuple(blocks) for blocks in groups.values()), *((block,) for block in range(early, count)))
