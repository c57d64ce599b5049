"""The closed form and the event simulation are two accounts of one step: they must agree on every byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from benchmarks.analytic import analytic_llama
from stowplan.core.errors import InvalidArgument, PlanRejected
from stowplan.core.hardware import preset
from stowplan.core.program import Action, BlockProgram, Decisions, Op, Value
from stowplan.planner.activations import Evaluation, Problem, evaluate, policies, simulate, verify
from stowplan.planner.activations.draft import Draft
from stowplan.planner.activations.footprint import measure_block
from stowplan.planner.activations.problem import _choices_of
from tests.planner.random_steps import KEEP, RECOMPUTE, SWAP, problems_with_decisions


@settings(max_examples=800, deadline=None)
@given(problems_with_decisions() | problems_with_decisions(rows=True))
def test_formulas_and_simulation_agree(given_: tuple[Problem, Decisions]) -> None:
    problem, decisions = given_
    formed, seen = evaluate(problem, decisions), simulate(problem, decisions)
    assert tuple(moment.peak_bytes for moment in seen.moments) == formed.peaks_bytes
    assert seen.step_seconds == pytest.approx(formed.step_seconds, rel=1e-9, abs=1e-12)
    assert seen.host_bytes == formed.host_bytes == seen.swapped_bytes
    assert seen.peak_bytes == formed.peak_bytes
    assert seen.stall_seconds == pytest.approx(
        seen.step_seconds - problem.ideal_seconds - seen.recompute_seconds, abs=1e-9
    )
    starts = [moment.seconds for moment in seen.moments]
    assert starts == sorted(starts)


@settings(max_examples=150, deadline=None)
@given(problems_with_decisions(rows=True))
def test_draft_is_the_evaluation(given_: tuple[Problem, Decisions]) -> None:
    problem, decisions = given_
    keep = tuple(tuple(actions[0] for actions in problem.choices_of(block).actions) for block in problem.order)
    draft = Draft(replace(problem, budget_bytes=1), keep)
    for block in problem.order:
        draft.improve_by({block: decisions[block]})
        formed = evaluate(problem, draft.decisions)
        assert draft.seconds == pytest.approx(formed.step_seconds)
        assert draft.excess_bytes == max(0, formed.peak_bytes - 1)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("policy", policies.POLICIES)
def test_policies_of_a_large_model_agree(policy: str, overlapped: bool) -> None:
    hardware = replace(preset("h100-sxm"), overlapped_copies=overlapped)
    step = analytic_llama(num_blocks=24)
    problem = Problem(step=step, hardware=hardware, budget_bytes=60 * 10**9, host_budget_bytes=10**11)
    decisions = policies.POLICIES[policy](problem)
    formed, seen = evaluate(problem, decisions), simulate(problem, decisions)
    assert tuple(moment.peak_bytes for moment in seen.moments) == formed.peaks_bytes
    assert seen.step_seconds == pytest.approx(formed.step_seconds, rel=1e-9)


def _value(name: str, size: int, producer: int | None, *, saved: bool = True) -> Value:
    actions = (KEEP, SWAP, RECOMPUTE) if saved else ()
    return Value(name=name, size_bytes=size, producer=producer, actions=actions)


def _block(values: tuple[Value, ...], ops: tuple[Op, ...], **bytes_: int) -> BlockProgram:
    sizes = {"forward_peak_bytes": 0, "backward_peak_bytes": 0, **bytes_}
    return BlockProgram(name="B", values=values, ops=ops, forward_seconds=1, backward_seconds=2, **sizes)


def test_replay_peak_counts_transients_workspace_and_gradient() -> None:
    x, hidden, out, workspace, gradient = 100, 30, 7, 5, 11
    values = (_value("x", x, None), _value("hidden", hidden, 0, saved=False), _value("out", out, 1))
    ops = (
        Op(name="a", inputs=(0,), outputs=(1,), seconds=2.0),
        Op(name="b", inputs=(1,), outputs=(2,), seconds=3.0, workspace_bytes=workspace),
    )
    program = _block(values, ops, output_gradient_bytes=gradient)
    footprint = measure_block(program, _choices_of(program), (KEEP, RECOMPUTE))
    assert footprint.backward_peak_bytes == gradient + x + hidden + out + workspace
    assert footprint.replay_seconds == 2.0 + 3.0
    assert (footprint.kept_bytes, footprint.swapped_bytes, footprint.recomputed_bytes) == (x, 0, out)


def test_second_copy_of_a_kept_output_dies_at_once() -> None:
    first, second, later = 50, 20, 40
    values = (_value("x", 0, None), _value("first", first, 0), _value("second", second, 0), _value("later", later, 1))
    ops = (
        Op(name="pair", inputs=(0,), outputs=(1, 2), seconds=1.0),
        Op(name="next", inputs=(2,), outputs=(3,), seconds=1.0),
    )
    program = _block(values, ops)
    choices = _choices_of(program)
    one = measure_block(program, choices, (KEEP, KEEP, RECOMPUTE, KEEP))
    assert one.backward_peak_bytes == first + later + (first + second)
    both = measure_block(program, choices, (KEEP, KEEP, RECOMPUTE, RECOMPUTE))
    assert both.backward_peak_bytes == max(first + (first + second), first + second + later)
    assert both.replay_seconds == 2.0


def test_fixed_ops_forbid_recomputation_through_unsaved_values() -> None:
    values = (_value("x", 1, None), _value("drawn", 1, 0, saved=False), _value("out", 1, 1), _value("next", 1, 2))
    ops = (
        Op(name="random", inputs=(0,), outputs=(1,), seconds=1, replayable=False),
        Op(name="scale", inputs=(1,), outputs=(2,), seconds=1),
        Op(name="then", inputs=(2,), outputs=(3,), seconds=1),
    )
    program = _block(values, ops)
    choices = _choices_of(program)
    assert choices.actions == ((KEEP, SWAP), (KEEP, SWAP), (KEEP, SWAP, RECOMPUTE))
    step = replace(analytic_llama(num_blocks=1), programs=(program,))
    problem = Problem(step=step, hardware=preset("h100-sxm"), budget_bytes=10**12, host_budget_bytes=0)
    for account in (evaluate, simulate):
        with pytest.raises(InvalidArgument, match=r"'out'.*'random' may not be replayed"):
            account(problem, ((KEEP, RECOMPUTE, KEEP),))
        with pytest.raises(InvalidArgument, match=r"'x'.*no op of the block makes it"):
            account(problem, ((RECOMPUTE, KEEP, KEEP),))
        with pytest.raises(InvalidArgument, match="2 decisions for 3"):
            account(problem, ((KEEP, KEEP),))
        with pytest.raises(InvalidArgument, match="0 blocks"):
            account(problem, ())


def test_disagreement_rejects_the_plan() -> None:
    step = analytic_llama(num_blocks=4)
    problem = Problem(step=step, hardware=preset("h100-sxm"), budget_bytes=10**12, host_budget_bytes=10**12)
    decisions = policies.POLICIES["memo"](problem)
    right = evaluate(problem, decisions)

    def slow(problem: Problem, decisions: Decisions) -> Evaluation:
        return replace(right, step_seconds=right.step_seconds * 1.006)

    def heavy(problem: Problem, decisions: Decisions) -> Evaluation:
        return replace(right, peaks_bytes=(*right.peaks_bytes[:3], right.peaks_bytes[3] + 1, *right.peaks_bytes[4:]))

    def forgetful(problem: Problem, decisions: Decisions) -> Evaluation:
        return evaluate(problem, ((Action.KEEP,) * len(decisions[0]), *decisions[1:]))

    assert verify(problem, decisions) == simulate(problem, decisions)
    with pytest.raises(PlanRejected, match="s per step"):
        verify(problem, decisions, formula=slow)
    with pytest.raises(PlanRejected, match=f"{right.peaks_bytes[3] + 1} bytes, simulator {right.peaks_bytes[3]} bytes"):
        verify(problem, decisions, formula=heavy)
    with pytest.raises(PlanRejected):
        verify(problem, decisions, formula=forgetful)
    with pytest.raises(PlanRejected, match="peak"):
        verify(replace(problem, budget_bytes=right.peak_bytes - 1), decisions)
