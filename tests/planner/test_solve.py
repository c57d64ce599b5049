"""Plans fit, are no slower than any baseline, near the best that enumeration finds, and never under the bound."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from benchmarks.analytic import analytic_llama
from stowplan.core.errors import InfeasibleBudget, InvalidArgument, SolverFailed
from stowplan.core.hardware import preset
from stowplan.core.program import Action, BlockProgram, Op, Phase, StepProgram, Value
from stowplan.planner.activations import ActivationPlan, Problem, evaluate, policies, simulate, solve
from stowplan.planner.activations.groups import group_blocks
from stowplan.planner.activations.programs import relax
from tests.planner.random_steps import PLENTY, all_decisions, problems, tiny_problems

GB = 10**9
GAP = 0.01
SLOW_HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def _solve(problem: Problem, **options: object) -> ActivationPlan:
    return solve(
        problem.step,
        problem.hardware,
        problem.budget_bytes,
        problem.host_budget_bytes,
        **options,  # type: ignore[arg-type]
    )


def _llama(num_blocks: int = 8) -> StepProgram:
    return analytic_llama(num_blocks=num_blocks, static_bytes=8 * GB)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_HEALTH)
@given(tiny_problems(), st.floats(0, 1), st.floats(0, 1))
def test_tiny_plans_against_enumeration(problem: Problem, device: float, host: float) -> None:
    every = [evaluate(problem, decisions) for decisions in all_decisions(problem)]
    host_sizes = sorted({entry.host_bytes for entry in every})
    host_budget = host_sizes[round(host * (len(host_sizes) - 1))]
    inside = [entry for entry in every if entry.host_bytes <= host_budget]
    peaks = sorted({entry.peak_bytes for entry in inside})
    budget = max(1, peaks[round(device * (len(peaks) - 1))])
    problem = replace(problem, budget_bytes=budget, host_budget_bytes=host_budget)
    plan = _solve(problem, gap=GAP)
    best = min(entry.step_seconds for entry in inside if entry.peak_bytes <= budget)
    assert plan.prediction.peak_bytes <= budget
    assert plan.prediction.host_bytes <= host_budget
    assert plan.prediction.step_seconds <= best * (1 + GAP) + 1e-9
    assert plan.solution.bound_seconds <= best + 1e-9
    for groups in (group_blocks(problem, 12), group_blocks(problem, 1)):
        whole = relax(problem, groups, "HiGHS", 10.0, token_rows=False)
        assert whole is not None
        assert whole.bound_seconds <= best + 1e-9
    assert plan.least_budget_bytes == peaks[0]
    if peaks[0] > 1:
        with pytest.raises(InfeasibleBudget) as caught:
            _solve(replace(problem, budget_bytes=peaks[0] - 1))
        assert caught.value.least_bytes == peaks[0]
        assert caught.value.host_budget_bytes == host_budget


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW_HEALTH)
@given(problems(most_blocks=6), st.floats(0, 1))
def test_plans_fit_and_beat_every_baseline_that_fits(problem: Problem, fraction: float) -> None:
    least = _solve(problem).least_budget_bytes
    most = simulate(problem, policies.keep_all(problem)).peak_bytes
    assume(most > least > 0)
    budget = round(least + fraction * (most - 1 - least))
    problem = replace(problem, budget_bytes=budget)
    plan = _solve(problem)
    assert plan.prediction.peak_bytes <= budget
    assert plan.prediction.step_seconds >= plan.solution.bound_seconds
    for baseline in plan.baselines:
        assert baseline.fits == (baseline.prediction.peak_bytes <= budget)
        if baseline.fits:
            assert plan.prediction.step_seconds <= baseline.prediction.step_seconds * (1 + 1e-9)


@settings(max_examples=20, deadline=None, suppress_health_check=SLOW_HEALTH)
@given(problems(most_blocks=8, most_saved=4), st.floats(0, 1))
def test_averaged_bound_is_no_higher_than_the_full_one(problem: Problem, fraction: float) -> None:
    least = _solve(problem).least_budget_bytes
    most = simulate(problem, policies.keep_all(problem)).peak_bytes
    problem = replace(problem, budget_bytes=max(1, round(least + fraction * max(0, most - least))))
    averaged = relax(problem, group_blocks(problem, 4), "HiGHS", 10.0)
    full = relax(problem, group_blocks(problem, 10**6), "HiGHS", 10.0)
    assert averaged is not None
    assert full is not None
    assert averaged.bound_seconds <= full.bound_seconds * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("overlapped", [False, True])
def test_llama_at_its_least_budget(overlapped: bool) -> None:
    hardware = replace(preset("h100-sxm"), overlapped_copies=overlapped)
    plan = solve(_llama(), hardware, 20 * GB, 500 * GB)
    again = solve(_llama(), hardware, plan.least_budget_bytes, 500 * GB)
    assert again.prediction.peak_bytes == plan.least_budget_bytes == again.least_budget_bytes
    with pytest.raises(InfeasibleBudget) as caught:
        solve(_llama(), hardware, plan.least_budget_bytes - 1, 500 * GB)
    assert caught.value.least_bytes == plan.least_budget_bytes


def test_solver_proves_few_blocks_and_search_serves_many() -> None:
    hardware = replace(preset("h100-sxm"), overlapped_copies=True)
    few = solve(_llama(6), hardware, 18 * GB, 500 * GB)
    assert few.solution.proof == "optimal"
    many = solve(_llama(32), hardware, 25 * GB, 500 * GB)
    assert many.solution.proof == "within gap"
    assert 0 <= many.solution.gap <= GAP
    assert many.solution.gap == pytest.approx(many.prediction.step_seconds / many.solution.bound_seconds - 1)


def test_everything_fits_and_the_plan_declines_without_a_solver() -> None:
    code = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from benchmarks.analytic import analytic_llama\n"
        "from stowplan.core.hardware import preset\n"
        "from stowplan.planner.activations import solve\n"
        "hardware = replace(preset('h100-sxm'), overlapped_copies=False)  # nothing staged: the least budget is plain\n"
        "plan = solve(analytic_llama(num_blocks=4), hardware, 10**12, 10**12)\n"
        "assert plan.declined and plan.solution.proof == 'nothing to decide' and plan.solution.gap == 0\n"
        "assert plan.prediction == plan.unplanned\n"
        "assert all(action == 'keep' for block in plan.decisions for action in block)\n"
        "assert not {'pulp', 'highspy', 'torch', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_one_byte_less_than_everything_is_planned() -> None:
    step, hardware = _llama(4), preset("h100-sxm")
    everything = solve(step, hardware, 10**12, 500 * GB).unplanned.peak_bytes
    assert solve(step, hardware, everything, 500 * GB).declined
    plan = solve(step, hardware, everything - 1, 500 * GB)
    assert not plan.declined
    assert plan.prediction.peak_bytes < everything


@pytest.mark.filterwarnings("ignore:PULP_CBC_CMD is deprecated:DeprecationWarning")
def test_cbc_plans_too() -> None:
    plan = solve(_llama(4), preset("h100-sxm"), 16 * GB, 500 * GB, solver="PULP_CBC_CMD")
    other = solve(_llama(4), preset("h100-sxm"), 16 * GB, 500 * GB)
    assert plan.solution.solver == "PULP_CBC_CMD"
    assert plan.solution.bound_seconds == pytest.approx(other.solution.bound_seconds, rel=1e-6)
    assert plan.prediction.step_seconds == pytest.approx(other.prediction.step_seconds, rel=GAP)


def test_unknown_solver_names_the_available_ones() -> None:
    with pytest.raises(SolverFailed, match=r"'CPLEXX'.*PULP_CBC_CMD.*HiGHS"):
        solve(_llama(4), preset("h100-sxm"), 16 * GB, 500 * GB, solver="CPLEXX")


def test_false_infeasibility_of_a_presolve_is_not_believed() -> None:
    """HiGHS 1.15 with presolve calls the relaxation of this block infeasible within four bytes; keeping "b" fits."""
    every = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)
    values = (
        Value(name="x", size_bytes=0, producer=None, actions=every, lingers=True),
        Value(name="a", size_bytes=1, producer=0, actions=every),
        Value(name="b", size_bytes=1, producer=1, actions=every),
    )
    ops = tuple(
        Op(name=str(n), inputs=(0,), outputs=(n + 1,), seconds=seconds) for n, seconds in enumerate((0.0, 0.01))
    )
    block = BlockProgram(
        name="Block",
        values=values,
        ops=ops,
        forward_seconds=0.0,
        backward_seconds=0.0,
        forward_peak_bytes=2,
        backward_peak_bytes=0,
    )
    nothing, head = Phase(seconds=0.0, peak_bytes=0, left_bytes=0), Phase(seconds=0.0, peak_bytes=3, left_bytes=0)
    step = StepProgram(
        programs=(block,),
        blocks=(0,),
        block_names=("layers.0",),
        parameter_bytes=0,
        buffer_bytes=0,
        optimizer_bytes=0,
        batch_bytes=0,
        held_gradient_bytes=0,
        embedding_forward=nothing,
        head=head,
        embedding_backward=nothing,
        optimizer_step=nothing,
    )
    hardware = replace(preset("h100-sxm"), to_host_bytes_per_second=50.0, to_device_bytes_per_second=50.0)
    plan = solve(step, hardware, 4, 0)
    assert plan.decisions == ((Action.KEEP, Action.RECOMPUTE, Action.KEEP),)


def test_host_budget_is_respected_and_has_a_price() -> None:
    hardware = replace(preset("h100-sxm"), overlapped_copies=True)
    seconds = []
    for host_budget in (0, 3 * GB, 500 * GB):
        plan = solve(_llama(8), hardware, 18 * GB, host_budget)
        assert plan.prediction.host_bytes <= host_budget
        seconds.append(plan.prediction.step_seconds)
    assert seconds[2] < seconds[1] < seconds[0]


def test_progress_is_told() -> None:
    said: list[str] = []
    solve(_llama(4), preset("h100-sxm"), 16 * GB, 500 * GB, on_progress=said.append)
    assert any("no plan is faster" in text for text in said)


def test_what_cannot_be_planned_for_is_refused() -> None:
    step, hardware = _llama(2), preset("h100-sxm")
    for arguments in ((step, hardware, 0, 1), (step, hardware, 1, -1), (replace(step, blocks=()), hardware, 1, 1)):
        with pytest.raises(InvalidArgument):
            solve(*arguments)
    with pytest.raises(InvalidArgument, match="must be positive"):
        solve(step, replace(hardware, to_host_bytes_per_second=0.0), 16 * GB, PLENTY)
    block = step.programs[0]
    forced = (replace(block.values[0], actions=(Action.RECOMPUTE,)), *block.values[1:])
    with pytest.raises(InvalidArgument, match="may only be recomputed"):
        solve(replace(step, programs=(replace(block, values=forced),)), hardware, 16 * GB, PLENTY)
    swapped = (replace(block.values[0], actions=(Action.SWAP,)), *block.values[1:])
    with pytest.raises(InvalidArgument, match="can only be swapped"):
        solve(replace(step, programs=(replace(block, values=swapped),)), hardware, 16 * GB, 0)


@pytest.mark.slow
@pytest.mark.parametrize("overlapped", [False, True])
def test_ninety_six_blocks_come_within_the_gap(overlapped: bool) -> None:
    hardware = replace(preset("h100-sxm"), overlapped_copies=overlapped)
    plan = solve(analytic_llama(num_blocks=96), hardware, 60 * GB, 500 * GB)
    assert plan.solution.gap <= GAP
