"""The norm over stages in several processes is that over the whole model, and so is what is scaled by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stowplan
from stowplan.runtime.pipeline.clipping import clip_grad_norm_
from tests.distributed import Ranks


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(n, 3, generator=generator).to(dtype)) for n in (1, 7, 20, 4)]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


def copies(many: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in many if p.grad is not None]


@given(st.integers(0, 99), st.floats(0, 20), st.sampled_from([None, True, False]))
def test_in_one_process_it_is_torchs_own(seed: int, max_norm: float, foreach: bool | None) -> None:
    mine, truth = parameters(seed), parameters(seed)
    total = clip_grad_norm_(iter([*mine, mine[0]]), max_norm, foreach=foreach)  # one is there twice
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(truth, max_norm, foreach=foreach))
    for one, other in zip(copies(mine), copies(truth), strict=True):
        assert torch.equal(one, other)


def test_no_gradients() -> None:
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
    assert clip_grad_norm_([], 1.0).item() == 0.0


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_max_norm(max_norm: float) -> None:
    with pytest.raises(stowplan.InvalidArgument, match="max_norm="):
        clip_grad_norm_(parameters(), max_norm)


def over_stages(rank: int) -> None:
    """Rank 0 has two of the parameters, rank 1 one and a copy of the first."""
    truth, all_of_them = parameters(), parameters()
    expected = torch.nn.utils.clip_grad_norm_(truth, 0.5)
    mine = all_of_them[:2] if rank == 0 else [all_of_them[0], *all_of_them[2:]]
    tied = [] if rank == 0 else [all_of_them[0]]
    total = clip_grad_norm_(mine, 0.5, groups=[None], counted_elsewhere=tied)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for parameter, true in zip(all_of_them, truth, strict=True):
        if parameter.grad is not None and any(parameter is p for p in mine):
            torch.testing.assert_close(parameter.grad, true.grad, rtol=1e-6, atol=0)


def one_without_parameters(rank: int) -> None:
    mine = parameters() if rank == 0 else []
    expected = torch.nn.utils.get_total_norm(copies(parameters()))
    assert torch.equal(clip_grad_norm_(mine, 1.0, groups=[None]), expected)


def too_large_to_square(rank: int) -> None:
    """Each rank's squared norm is a float32, their sum is none."""
    large = nn.Parameter(torch.zeros(1))
    large.grad = torch.full((1,), 1.5e19)
    assert clip_grad_norm_([large], 1.0, groups=[None]).item() == pytest.approx(math.sqrt(2) * 1.5e19)
    assert large.grad.item() == pytest.approx(math.sqrt(0.5))


def not_finite(rank: int) -> None:
    mine = parameters(rank)
    if rank == 1 and mine[0].grad is not None:
        mine[0].grad[0, 0] = math.inf
    before = copies(mine)
    with pytest.raises(RuntimeError, match="the norm of all gradients is inf"):
        clip_grad_norm_(mine, 1.0, groups=[None], error_if_nonfinite=True)
    assert all(torch.equal(one, other) for one, other in zip(copies(mine), before, strict=True))
    assert clip_grad_norm_(mine, 1.0, groups=[None]).isinf()


@pytest.mark.parametrize("case", [over_stages, one_without_parameters, too_large_to_square, not_finite])
def test_over_stages(ranks: Ranks, case: Any) -> None:
    ranks.run(case)
