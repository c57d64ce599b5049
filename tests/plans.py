"""Example plans that read like real ones; tests/arbitrary_plans.py has arbitrary ones."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from stowplan.core.hardware import Hardware
from stowplan.core.plan import Baseline, Measurement, MomentBytes, Plan, Prediction, Solution
from stowplan.core.program import (
    Action,
    BlockProgram,
    Decisions,
    Op,
    Phase,
    Split,
    StepProgram,
    Value,
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


def in_full(number: int) -> int:
    """How many random plans a test of the full suite takes: ``number``, times STOWPLAN_TEST_FACTOR if that is set."""
    return number * int(os.environ.get("STOWPLAN_TEST_FACTOR", "1"))


def random_decisions(plan: Plan, seed: int) -> Plan:
    """The plan with an action drawn for every value of every block, among those that are allowed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(actions: tuple[Action, ...]) -> Action:
        return actions[int(torch.randint(len(actions), (1,), generator=generator))]

    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    decisions = tuple(tuple(choose(p.values[i].actions) for i in p.saved) for p in programs)
    return with_decisions(plan, decisions)


def with_decisions(plan: Plan, decisions: Decisions) -> Plan:
    """The plan with other decisions and a host slab that surely holds what they swap."""
    saved_bytes = sum(plan.step.program_of(block).saved_bytes for block in range(plan.step.num_blocks))
    return replace(plan, decisions=decisions, prediction=replace(plan.prediction, host_bytes=saved_bytes))
