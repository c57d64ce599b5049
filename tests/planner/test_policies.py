"""Baselines do what their papers say, with the actions that there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from benchmarks.analytic import analytic_llama
from stowplan.core.hardware import preset
from stowplan.core.program import Action, Decisions
from stowplan.planner.activations import Problem, evaluate, policies
from tests.planner.random_steps import problems

NUM_BLOCKS = 5


def _problem(budget_bytes: int = 10**12, host_budget_bytes: int = 10**12) -> Problem:
    step = analytic_llama(num_blocks=NUM_BLOCKS)
    return Problem(
        step=step, hardware=preset("h100-sxm"), budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes
    )


def _named(problem: Problem, decisions: Decisions, block: int) -> dict[str, Action]:
    program = problem.step.program_of(block)
    return {program.values[index].name: action for index, action in zip(program.saved, decisions[block], strict=True)}


@settings(max_examples=60, deadline=None)
@given(problems())
def test_policies_stay_within_the_allowed_actions(problem: Problem) -> None:
    for policy in policies.POLICIES.values():
        problem.check(policy(problem))


def test_recompute_all_keeps_block_inputs() -> None:
    problem = _problem()
    actions = _named(problem, policies.recompute_all(problem), 0)
    assert actions.pop("input") is Action.KEEP
    assert set(actions.values()) == {Action.RECOMPUTE}


def test_swap_all_keeps_the_last_two() -> None:
    decisions = policies.swap_all(_problem())
    assert [set(actions) for actions in decisions] == [{Action.SWAP}] * (NUM_BLOCKS - 2) + [{Action.KEEP}] * 2


def test_selective_keeps_products_and_attention() -> None:
    problem = _problem()
    actions = _named(problem, policies.selective(problem), 0)
    assert {actions[name] for name in ("attention", "logsumexp", "gate", "up", "value", "input")} == {Action.KEEP}
    assert {actions[name] for name in ("normed_1", "query", "residual", "activated", "product")} == {Action.RECOMPUTE}


@pytest.mark.parametrize("host_share", [0.0, 0.4, 2.0])
def test_memo_swaps_what_a_forward_hides_and_the_host_holds(host_share: float) -> None:
    program = analytic_llama(num_blocks=1).programs[0]
    host = int(host_share * (NUM_BLOCKS - 2) * program.saved_bytes)
    problem = _problem(host_budget_bytes=host)
    decisions = policies.memo(problem)
    actions = _named(problem, decisions, 0)
    base = {"input", "attention", "logsumexp"}
    assert {actions[name] for name in base} == {Action.SWAP}
    sizes = {program.values[index].name: program.values[index].size_bytes for index in program.saved}
    swapped = sum(sizes[name] for name, action in actions.items() if action is Action.SWAP)
    room = min(program.forward_seconds * problem.hardware.to_host_bytes_per_second, host / (NUM_BLOCKS - 2))
    assert swapped <= max(room, sum(sizes[name] for name in base))
    assert set(decisions[-1]) == set(decisions[-2]) == {Action.KEEP}


def test_greedy_uses_the_budget_and_no_more() -> None:
    problem = _problem()
    everything = evaluate(problem, policies.keep_all(problem)).peak_bytes
    least = evaluate(problem, policies.recompute_all(problem)).peak_bytes
    seconds = []
    for budget in (least, (least + everything) // 2, everything):
        tight = replace(problem, budget_bytes=budget)
        result = evaluate(tight, policies.greedy(tight))
        assert result.peak_bytes <= budget
        seconds.append(result.step_seconds)
    assert seconds[0] > seconds[1] > seconds[2] == pytest.approx(problem.ideal_seconds)
