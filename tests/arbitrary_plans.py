"""Hypothesis strategies for arbitrary plans that are well formed; tests/plans.py has plans that read like real ones."""

from __future__ import annotations

from hypothesis import strategies as st

from stowplan.core.hardware import Hardware
from stowplan.core.plan import Baseline, Measurement, MomentBytes, Plan, Prediction, Solution
from stowplan.core.program import (
    Action,
    BlockProgram,
    Decision,
    Gap,
    Op,
    Phase,
    Split,
    StepProgram,
    Value,
    decision_by_rows,
)

names = st.text(st.characters(codec="utf-8"), max_size=300)
sizes = st.integers(min_value=0, max_value=2**60)
durations = st.floats(min_value=0, max_value=1e9, allow_nan=False)
rates = st.floats(min_value=1e-3, max_value=1e18, allow_nan=False)
phases = st.builds(Phase, seconds=durations, peak_bytes=sizes, left_bytes=sizes)
moments = st.builds(
    MomentBytes,
    name=names,
    seconds=durations,
    static_bytes=sizes,
    gradient_bytes=sizes,
    kept_bytes=sizes,
    staged_bytes=sizes,
    working_bytes=sizes,
)
predictions = st.builds(
    Prediction,
    step_seconds=durations,
    peak_bytes=sizes,
    peak_moment=names,
    host_bytes=sizes,
    swapped_bytes=sizes,
    recomputed_bytes=sizes,
    recompute_seconds=durations,
    stall_seconds=durations,
    moments=st.lists(moments, max_size=8).map(tuple),
)
measurements = st.builds(
    Measurement,
    step_seconds=st.lists(durations, max_size=3).map(tuple),
    peak_bytes=st.lists(sizes, max_size=3).map(tuple),
    swapped_bytes=st.lists(sizes, max_size=3).map(tuple),
    recomputed_bytes=st.lists(sizes, max_size=3).map(tuple),
    source=names,
)
machines = st.builds(
    Hardware,
    name=names,
    device_type=st.sampled_from(("cpu", "cuda")),
    device_bytes=sizes,
    matmul_flops_per_second=rates,
    memory_bytes_per_second=rates,
    to_host_bytes_per_second=rates,
    to_device_bytes_per_second=rates,
    overlapped_copies=st.booleans(),
    staging_blocks=st.integers(1, 4),
    origin=names,
)
solutions = st.builds(Solution, solver=names, seconds=durations, bound_seconds=durations, gap=durations, proof=names)
baselines = st.builds(Baseline, name=names, fits=st.booleans(), prediction=predictions)


@st.composite
def programs(draw: st.DrawFn) -> BlockProgram:
    """A chain of ops with saved and unsaved values; saved names differ."""
    actions = st.lists(st.sampled_from(Action), unique=True, max_size=3).map(tuple)
    value_names = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    num_rows = [draw(st.sampled_from((0, 0, 1, 48))) for _ in value_names]
    values = tuple(
        Value(
            name=name,
            size_bytes=draw(sizes) * max(1, rows),
            producer=i - 1 if i else None,
            actions=draw(actions),
            shape=tuple(draw(st.lists(st.integers(0, 2**20), max_size=3))),
            dtype=draw(names),
            num_rows=rows,
            splits=draw(st.sampled_from(((), (16,), (16, 32)))) if rows > 1 else (),
            lingers=draw(st.booleans()),
        )
        for i, (name, rows) in enumerate(zip(value_names, num_rows, strict=True))
    )
    ops = tuple(
        Op(name=draw(names), inputs=(i,), outputs=(i + 1,), seconds=draw(durations), replayable=draw(st.booleans()))
        for i in range(len(values) - 1)
    )
    return BlockProgram(
        name=draw(names),
        values=values,
        ops=ops,
        forward_seconds=draw(durations),
        backward_seconds=draw(durations),
        forward_peak_bytes=draw(sizes),
        backward_peak_bytes=draw(sizes),
        held_bytes=draw(sizes),
    )


def decisions_of(value: Value) -> st.SearchStrategy[Decision]:
    """Any action or split that ``value`` allows."""
    found: list[Decision] = list(value.actions)
    for recomputed in (0, *value.splits):
        for swapped in range(value.num_rows - recomputed + 1):
            decision = decision_by_rows(value.num_rows, recomputed, swapped)
            shares = value.bytes_by_action(decision) if value.size_bytes else dict.fromkeys(Action, 1)
            if isinstance(decision, Split) and all(a in value.actions for a, size in shares.items() if size):
                found.append(decision)
    return st.sampled_from(found)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that is well formed; its figures need not make sense."""
    kinds = draw(st.lists(programs(), min_size=1, max_size=2))
    blocks = draw(st.lists(st.integers(0, len(kinds) - 1), max_size=130))
    step = StepProgram(
        programs=tuple(kinds),
        blocks=tuple(blocks),
        block_names=tuple(f"{draw(names)}{i}" if i < 3 else f"layers.{i}" for i in range(len(blocks))),
        parameter_bytes=draw(sizes),
        buffer_bytes=draw(sizes),
        optimizer_bytes=draw(sizes),
        batch_bytes=draw(sizes),
        held_gradient_bytes=draw(sizes),
        embedding_forward=draw(phases),
        head=draw(phases),
        embedding_backward=draw(phases),
        optimizer_step=draw(phases),
        gaps=tuple(
            Gap(block=block, forward=draw(phases), backward=draw(phases))
            for block in range(1, len(blocks))
            if draw(st.integers(0, 9)) == 0
        ),
    )
    choices = [
        [
            tuple(draw(decisions_of(program.values[i])) for i in program.saved)
            for _ in range(2)  # two kinds of decisions for each program, so that ranges of blocks arise
        ]
        for program in kinds
    ]
    picks = draw(st.integers(0, 2 ** len(blocks) - 1)) if blocks else 0
    exact = draw(st.booleans())
    return Plan(
        model=draw(names),
        batch=draw(names),
        budget_bytes=draw(sizes),
        host_budget_bytes=draw(sizes),
        hardware=draw(machines),
        step=step,
        decisions=tuple(choices[program][picks >> block & 1] for block, program in enumerate(blocks)),
        prediction=draw(predictions),
        unplanned=draw(predictions),
        solution=draw(solutions),
        least_budget_bytes=draw(sizes),
        baselines=tuple(draw(st.lists(baselines, max_size=2))),
        declined=draw(st.booleans()),
        exact=exact,
        tolerance=None if exact else draw(st.none() | st.floats(1e-9, 0.5)),
        assumptions=tuple(draw(st.lists(names, max_size=3))),
        versions=tuple(draw(st.lists(st.tuples(names, names), max_size=2))),
        measurement=draw(st.none() | measurements),
    )
