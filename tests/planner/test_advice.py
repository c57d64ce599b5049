"""What an infeasible budget is told: where the peak is, and what would make it fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stowplan.core.errors import InfeasibleBudget
from stowplan.core.program import Phase, StepProgram
from stowplan.core.units import GIB, MIB
from stowplan.planner.activations import solve
from tests.plans import HARDWARE, LAYER, step_of


def advice_for(step: StepProgram, budget_bytes: int) -> str:
    with pytest.raises(InfeasibleBudget) as caught:
        solve(step, HARDWARE, budget_bytes, 64 * GIB)
    assert caught.value.advice in str(caught.value)
    return caught.value.advice


def test_states_that_do_not_fit_by_themselves() -> None:
    step = step_of(LAYER, 4)
    advice = advice_for(step, step.static_bytes - 1)
    assert "alone take" in advice
    assert "shard" in advice


def test_a_head_that_does_not_fit() -> None:
    step = replace(step_of(LAYER, 4), head=Phase(seconds=0.3, peak_bytes=8 * GIB, left_bytes=MIB))
    advice = advice_for(step, step.static_bytes + 2 * GIB)
    assert "peak is in the head" in advice
    assert "8.00 GiB at work" in advice
    assert "chunks of tokens" in advice
    assert "25% of the batch's tokens" in advice


def test_an_optimizer_step_that_does_not_fit() -> None:
    step = replace(step_of(LAYER, 4), optimizer_step=Phase(seconds=0.3, peak_bytes=8 * GIB, left_bytes=MIB))
    assert "fused=True" in advice_for(step, step.static_bytes + 4 * GIB)


def test_a_block_that_does_not_fit() -> None:
    step = step_of(LAYER, 4)
    assert "smaller blocks" in advice_for(step, step.static_bytes + 300 * MIB)
