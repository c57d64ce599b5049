"""Small random steps for property tests, and the plain enumeration of all their decisions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from stowplan.core.hardware import Hardware
from stowplan.core.program import Action, BlockProgram, Decision, Decisions, Gap, Op, Phase, StepProgram, Value
from stowplan.planner.activations import Problem
from stowplan.planner.activations.problem import ProgramChoices
from stowplan.planner.activations.rounding import first_rows, grain, nearest_rows

KEEP, SWAP, RECOMPUTE = Action.KEEP, Action.SWAP, Action.RECOMPUTE
PLENTY = 10**9
ACTION_SETS = ((KEEP, SWAP, RECOMPUTE), (KEEP, SWAP), (KEEP, RECOMPUTE), (SWAP, RECOMPUTE), (KEEP,), (SWAP,))
SIZES = st.sampled_from((0, 1, 3, 10, 40, 100, 250))
SECONDS = st.sampled_from((0.0, 0.01, 0.1, 0.3, 1.0))
GRAIN = 16
ROWS = (2 * GRAIN, 3 * GRAIN)


@st.composite
def block_programs(draw: st.DrawFn, most_saved: int = 6, rows: bool = False) -> BlockProgram:
    """A random DAG of 1 to 6 ops: unsaved steps, several outputs, fixed ops, restricted actions, empty values.

    With ``rows`` about half of the saved values may be divided.
    """
    values: list[Value] = []
    ops: list[Op] = []
    num_saved = 0

    def add(producer: int | None) -> int:
        nonlocal num_saved
        saved = num_saved < most_saved and draw(st.booleans())
        num_saved += saved
        actions = draw(st.sampled_from(ACTION_SETS[:3] * 3 + ACTION_SETS)) if saved else ()
        lingers = draw(st.integers(0, 5)) == 0
        num_rows = draw(st.sampled_from((0, 0, *ROWS))) if saved and rows else 0
        splits = draw(st.lists(st.sampled_from(range(GRAIN, num_rows, GRAIN)), unique=True)) if num_rows else []
        values.append(
            Value(
                name=f"v{len(values)}",
                size_bytes=draw(st.sampled_from((0, 1, 3))) * num_rows if num_rows else draw(SIZES),
                producer=producer,
                actions=actions,
                lingers=lingers,
                num_rows=num_rows,
                splits=tuple(sorted(splits)),
            )
        )
        return len(values) - 1

    for _ in range(draw(st.integers(1, 2))):
        add(None)
    for number in range(draw(st.integers(1, 6))):
        inputs = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
        outputs = tuple(add(number) for _ in range(draw(st.sampled_from((1, 1, 1, 2)))))
        ops.append(
            Op(
                name=f"op{number}",
                inputs=tuple(inputs),
                outputs=outputs,
                seconds=draw(SECONDS),
                flops=draw(st.sampled_from((0, 10))),
                workspace_bytes=draw(SIZES),
                replayable=draw(st.integers(0, 6)) > 0,
                causal_attention=draw(st.integers(0, 4)) == 0,
            )
        )
    return BlockProgram(
        name="Block",
        values=tuple(values),
        ops=tuple(ops),
        forward_seconds=draw(SECONDS),
        backward_seconds=draw(SECONDS),
        forward_peak_bytes=draw(SIZES) + sum(v.size_bytes for v in values),
        backward_peak_bytes=draw(SIZES) + draw(st.sampled_from((0, 1))) * sum(v.size_bytes for v in values),
        output_gradient_bytes=draw(SIZES),
        gradient_bytes=draw(SIZES),
        held_bytes=draw(SIZES),
        lingering_bytes=draw(SIZES),
    )


@st.composite
def problems(draw: st.DrawFn, most_blocks: int = 6, most_saved: int = 6, rows: bool = False) -> Problem:
    """A random step with unequal blocks, on a link that is slow or quick, with or without overlapped copies."""
    programs = tuple(draw(st.lists(block_programs(most_saved, rows), min_size=1, max_size=2)))
    blocks = tuple(draw(st.lists(st.integers(0, len(programs) - 1), min_size=1, max_size=most_blocks)))

    def phase() -> Phase:
        return Phase(seconds=draw(SECONDS), peak_bytes=draw(SIZES), left_bytes=draw(SIZES))

    step = StepProgram(
        programs=programs,
        blocks=blocks,
        block_names=tuple(f"layers.{i}" for i in range(len(blocks))),
        parameter_bytes=draw(SIZES),
        buffer_bytes=draw(SIZES),
        optimizer_bytes=draw(SIZES),
        batch_bytes=draw(SIZES),
        held_gradient_bytes=draw(SIZES),
        embedding_forward=phase(),
        head=phase(),
        embedding_backward=phase(),
        optimizer_step=phase(),
        gaps=tuple(
            Gap(block=block, forward=phase(), backward=phase())
            for block in range(1, len(blocks))
            if draw(st.integers(0, 3)) == 0
        ),
    )
    hardware = Hardware(
        name="test",
        device_type="cuda",
        device_bytes=PLENTY,
        matmul_flops_per_second=1.0,
        memory_bytes_per_second=1.0,
        to_host_bytes_per_second=draw(st.sampled_from((50.0, 1000.0, 1e6))),
        to_device_bytes_per_second=draw(st.sampled_from((50.0, 1000.0, 1e6))),
        overlapped_copies=draw(st.booleans()),
        staging_blocks=draw(st.integers(1, 3)),
    )
    return Problem(step=step, hardware=hardware, budget_bytes=PLENTY, host_budget_bytes=PLENTY)


@st.composite
def problems_with_decisions(draw: st.DrawFn, rows: bool = False) -> tuple[Problem, Decisions]:
    problem = draw(problems(rows=rows))

    def decision(choices: ProgramChoices, position: int) -> Decision:
        num_rows = choices.num_rows[position]
        if not num_rows or draw(st.integers(0, 2)) == 0:
            return draw(st.sampled_from(choices.actions[position]))
        recomputed = draw(st.sampled_from(first_rows(choices, position)))
        return nearest_rows(choices, position, recomputed, draw(st.integers(recomputed, num_rows)))

    decisions = tuple(
        tuple(decision(choices, position) for position in range(len(choices.actions)))
        for choices in map(problem.choices_of, problem.order)
    )
    return problem, decisions


def tiny_problems(rows: bool = False) -> st.SearchStrategy[Problem]:
    """Problems whose decisions can all be enumerated: at most 3^6, with rows 10^4."""
    return problems(most_blocks=2, most_saved=2 if rows else 3, rows=rows)


def all_decisions(problem: Problem) -> Iterator[Decisions]:
    """Every decision that is possible, where kept rows begin at multiples of the planner's grain."""
    per_block = []
    for choices in map(problem.choices_of, problem.order):
        per_value = [_decisions_of(choices, position) for position in range(len(choices.actions))]
        per_block.append(itertools.product(*per_value))
    return itertools.product(*per_block)


def _decisions_of(choices: ProgramChoices, position: int) -> list[Decision]:
    num_rows = choices.num_rows[position]
    if not num_rows:
        return list(choices.actions[position])
    edges = {*range(0, num_rows, grain(num_rows)), num_rows}
    rows = [
        (first, edge) for first in first_rows(choices, position) for edge in sorted(edges | {first}) if edge >= first
    ]
    return list(dict.fromkeys(nearest_rows(choices, position, *pair) for pair in rows))
