"""Example plans: two fixed ones that read like real ones, and hypothesis strategies for arbitrary ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from stowplan.core.hardware import Hardware
from stowplan.core.plan import Baseline, Measurement, MomentBytes, Plan, Prediction, Solution
from stowplan.core.program import (
    Action,
    BlockProgram,
    Decision,
    Decisions,
    Gap,
    Op,
    Phase,
    Split,
    StepProgram,
    Value,
    decision_by_rows,
)
from stowplan.core.units import GIB, MIB

ANYTHING = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)
MOVABLE = (Action.KEEP, Action.SWAP)

HARDWARE = Hardware(
    name="desk",
    device_type="cpu",
    device_bytes=16 * GIB,
    matmul_flops_per_second=0.2e12,
    memory_bytes_per_second=20e9,
    to_host_bytes_per_second=5e9,
    to_device_bytes_per_second=5e9,
)

LAYER = BlockProgram(
    name="DecoderLayer",
    values=(
        Value(name="x_in", size_bytes=32 * MIB, producer=None, actions=MOVABLE, shape=(2, 2048, 2048), dtype="float32"),
        Value(name="norm1", size_bytes=32 * MIB, producer=0, actions=ANYTHING),
        Value(name="q", size_bytes=32 * MIB, producer=1, actions=ANYTHING),
        Value(name="scores", size_bytes=8 * MIB, producer=2),
        Value(name="up", size_bytes=112 * MIB, producer=3, actions=ANYTHING),
    ),
    ops=(
        Op(name="rms_norm", inputs=(0,), outputs=(1,), seconds=0.002),
        Op(name="mm", inputs=(1,), outputs=(2,), seconds=0.05, flops=10**10),
        Op(name="attention", inputs=(2,), outputs=(3,), seconds=0.04, flops=10**9, causal_attention=True),
        Op(name="mm", inputs=(3,), outputs=(4,), seconds=0.08, flops=3 * 10**10),
    ),
    forward_seconds=0.2,
    backward_seconds=0.4,
    forward_peak_bytes=240 * MIB,
    backward_peak_bytes=320 * MIB,
    output_gradient_bytes=32 * MIB,
    gradient_bytes=48 * MIB,
)


def step_of(program: BlockProgram, num_blocks: int) -> StepProgram:
    """A step of equal blocks with plausible surroundings."""
    phase = Phase(seconds=0.1, peak_bytes=64 * MIB, left_bytes=16 * MIB)
    return StepProgram(
        programs=(program,),
        blocks=(0,) * num_blocks,
        block_names=tuple(f"model.layers.{i}" for i in range(num_blocks)),
        parameter_bytes=num_blocks * 48 * MIB,
        buffer_bytes=1 * MIB,
        optimizer_bytes=num_blocks * 96 * MIB,
        batch_bytes=1 * MIB,
        held_gradient_bytes=0,
        embedding_forward=phase,
        head=Phase(seconds=0.3, peak_bytes=256 * MIB, left_bytes=32 * MIB),
        embedding_backward=phase,
        optimizer_step=phase,
    )


def walk(step: StepProgram, decisions: Decisions) -> Prediction:
    """A toy simulation, so that examples look right; the planner has the real one."""
    now, kept, gradients, swapped, recomputed, again = 0.0, 0, 0, 0, 0, 0.0
    moments: list[MomentBytes] = []

    def note(name: str, working_bytes: int, seconds: float, staged_bytes: int = 0) -> None:
        nonlocal now
        moments.append(
            MomentBytes(
                name=name,
                seconds=now,
                static_bytes=step.static_bytes,
                gradient_bytes=gradients,
                kept_bytes=kept,
                staged_bytes=staged_bytes,
                working_bytes=working_bytes,
            )
        )
        now += seconds

    def bytes_of(block: int, wanted: Action) -> int:
        program = step.program_of(block)
        pairs = zip(program.saved, decisions[block], strict=True)
        return sum(program.values[i].bytes_by_action(decision)[wanted] for i, decision in pairs)

    note("embedding forward", step.embedding_forward.peak_bytes, step.embedding_forward.seconds)
    for block, name in enumerate(step.block_names):
        program = step.program_of(block)
        note(f"forward of {name}", program.forward_peak_bytes, program.forward_seconds, bytes_of(block, Action.SWAP))
        kept += bytes_of(block, Action.KEEP)
        swapped += bytes_of(block, Action.SWAP)
    note("head", step.head.peak_bytes, step.head.seconds)
    for block in reversed(range(step.num_blocks)):
        program = step.program_of(block)
        kept -= bytes_of(block, Action.KEEP)
        recomputed += bytes_of(block, Action.RECOMPUTE)
        replay = 0.1 if bytes_of(block, Action.RECOMPUTE) else 0.0
        again += replay
        note(f"backward of {step.block_names[block]}", program.backward_peak_bytes, program.backward_seconds + replay)
        gradients += program.gradient_bytes
    note("embedding backward", step.embedding_backward.peak_bytes, step.embedding_backward.seconds)
    note("optimizer step", step.optimizer_step.peak_bytes, step.optimizer_step.seconds)
    highest = max(moments, key=lambda moment: moment.peak_bytes)
    copying = 2 * swapped / HARDWARE.to_host_bytes_per_second
    return Prediction(
        step_seconds=now + copying,
        peak_bytes=highest.peak_bytes,
        peak_moment=highest.name,
        host_bytes=swapped,
        swapped_bytes=swapped,
        recomputed_bytes=recomputed,
        recompute_seconds=again,
        stall_seconds=copying,
        moments=tuple(moments),
    )


def example_plan(num_blocks: int = 12) -> Plan:
    """A plan that swaps, recomputes and keeps, and fits."""
    step = step_of(LAYER, num_blocks)
    early = (Action.SWAP, Action.RECOMPUTE, Action.RECOMPUTE, Action.SWAP)
    middle = (Action.SWAP, Action.RECOMPUTE, Action.KEEP, Action.RECOMPUTE)
    late = (Action.KEEP,) * 4
    third = num_blocks // 3
    decisions = (early,) * third + (middle,) * third + (late,) * (num_blocks - 2 * third)
    prediction, unplanned = walk(step, decisions), walk(step, (late,) * num_blocks)
    everything_again = walk(step, ((Action.KEEP, *(Action.RECOMPUTE,) * 3),) * num_blocks)
    budget_bytes = prediction.peak_bytes + 96 * MIB
    return Plan(
        model="ExampleForCausalLM",
        batch="input_ids (2, 2048) int64",
        budget_bytes=budget_bytes,
        host_budget_bytes=12 * GIB,
        hardware=HARDWARE,
        step=step,
        decisions=decisions,
        prediction=prediction,
        unplanned=unplanned,
        solution=Solution(
            solver="HiGHS",
            seconds=0.42,
            bound_seconds=prediction.step_seconds * 0.97,
            gap=1 / 0.97 - 1,
            proof="time limit",
        ),
        least_budget_bytes=prediction.peak_bytes // 2,
        baselines=(Baseline(name="recompute everything", fits=True, prediction=everything_again),),
        assumptions=("A step does the same as the captured one.", "Copies of pinned memory at the measured rates."),
        versions=(("stowplan", "0.1.0"), ("torch", "2.13.0"), ("python", "3.11.7")),
    )


def split_plan() -> Plan:
    """The example plan where rows of two values do different things."""
    plan = example_plan()
    values = tuple(
        replace(value, num_rows=256, splits=(64, 128)) if value.name in ("norm1", "up") else value
        for value in LAYER.values
    )
    thirds = (
        (Action.SWAP, Split(recomputed=64, swapped=128), Action.RECOMPUTE, Split(recomputed=128, swapped=128)),
        (Action.SWAP, Split(recomputed=64, swapped=128), Action.KEEP, Split(recomputed=64, swapped=192)),
        (Action.KEEP, Split(recomputed=0, swapped=32), Action.KEEP, Action.KEEP),
    )
    third = plan.step.num_blocks // 3
    decisions = tuple(thirds[min(2, block // third)] for block in range(plan.step.num_blocks))
    step = replace(plan.step, programs=(replace(LAYER, values=values),))
    prediction = walk(step, decisions)
    return replace(
        plan, step=step, decisions=decisions, prediction=prediction, budget_bytes=prediction.peak_bytes + 96 * MIB
    )


def measured_plan() -> Plan:
    """The example plan beside three real steps, one figure of which is off."""
    plan = example_plan()
    predicted = plan.prediction
    return plan.with_measurement(
        Measurement(
            step_seconds=tuple(predicted.step_seconds * factor for factor in (1.4, 1.06, 1.05)),
            peak_bytes=tuple(int(predicted.peak_bytes * factor) for factor in (0.99, 1.004, 1.004)),
            swapped_bytes=(predicted.swapped_bytes,) * 3,
            recomputed_bytes=(predicted.recomputed_bytes,) * 3,
            source="3 steps on desk",
        )
    )


def declined_plan() -> Plan:
    """A plan where everything fits without one."""
    plan = example_plan()
    return replace(
        plan,
        budget_bytes=plan.unplanned.peak_bytes + GIB,
        decisions=((Action.KEEP,) * 4,) * plan.step.num_blocks,
        prediction=plan.unplanned,
        solution=Solution(
            solver="none", seconds=0.0, bound_seconds=plan.unplanned.step_seconds, gap=0.0, proof="nothing to decide"
        ),
        baselines=(),
        declined=True,
    )


# ---- arbitrary plans -------------------------------------------------------------------------------------------------

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
    device_type=names,
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
        exact=draw(st.booleans()),
        tolerance=draw(st.none() | st.floats(1e-9, 0.5)),
        assumptions=tuple(draw(st.lists(names, max_size=3))),
        versions=tuple(draw(st.lists(st.tuples(names, names), max_size=2))),
        measurement=draw(st.none() | measurements),
    )
