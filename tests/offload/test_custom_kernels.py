"""Kernels that are not torch's own: kept or swapped, and replayed where they are known to be pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stowplan
from stowplan.core.errors import InvalidArgument
from stowplan.core.program import Action
from stowplan.offload.tape import rules
from tests.offload.toys import KEEP, RECOMPUTE, SWAP, WIDTH, assert_toy_is_exact, stack

num_runs = [0]


@torch.library.custom_op("stowplan_tests::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    num_runs[0] += 1
    return x * torch.sigmoid(x)


@swish.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _swish_backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    x, result = ctx.saved_tensors
    sigmoid = torch.sigmoid(x)
    return gradient * (sigmoid + result * (1 - sigmoid))


def _swish_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


swish.register_autograd(_swish_backward, setup_context=_swish_context)


@torch.library.custom_op("stowplan_tests::add_one_", mutates_args=("x",))
def add_one_(x: torch.Tensor) -> None:
    x.add_(1)


@pytest.fixture(autouse=True)
def rules_as_they_were() -> Iterator[None]:
    """What one test allows is not allowed in the next."""
    before = set(rules._allowed)
    yield
    rules._allowed.clear()
    rules._allowed.update(before)
    rules.rules_of.cache_clear()


def with_swish(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(swish(block.first(x)).sin()) + x


def allowed_for_swish() -> set[tuple[Action, ...]]:
    model, batch = stack(with_swish), torch.randn(4, WIDTH)
    plan = stowplan.plan(model, batch, budget="1GiB", loss_fn=lambda output, batch: output.sum())
    return {
        program.values[i].actions
        for program in plan.step.programs
        for i in program.saved
        if program.values[i].name == "swish"
    }


def test_a_custom_kernel_is_kept_or_swapped() -> None:
    assert allowed_for_swish() == {(KEEP, SWAP)}
    for policy in ("swap", "recompute", "mixed"):
        assert_toy_is_exact(with_swish, policy)


@pytest.mark.parametrize(
    "op",
    [swish, torch.ops.stowplan_tests.swish, torch.ops.stowplan_tests.swish.default, "stowplan_tests::swish"],
    ids=["custom op", "packet", "overload", "name"],
)
def test_a_pure_one_is_replayed(op: Any) -> None:
    stowplan.allow_replay(op)
    assert allowed_for_swish() == {(KEEP, SWAP, RECOMPUTE)}


def test_it_is_run_again() -> None:
    stowplan.allow_replay(swish)
    planned = assert_toy_is_exact(with_swish, "recompute")
    before = num_runs[0]
    planned.model(torch.randn(4, WIDTH)).sum().backward()
    assert num_runs[0] - before == 2 * 3  # once forward and once again, in each of three blocks


def test_one_that_is_not_pure_after_all_is_found_out() -> None:
    """The proof refutes what was declared wrongly."""

    @torch.library.custom_op("stowplan_tests::counts", mutates_args=())
    def counts(x: torch.Tensor) -> torch.Tensor:
        num_runs[0] += 1
        return x * num_runs[0]

    def setup(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    counts.register_autograd(lambda ctx, gradient: gradient * ctx.saved_tensors[0], setup_context=setup)
    stowplan.allow_replay(counts)
    model = stack(lambda block, x: counts(block.first(x)))
    plan = stowplan.plan(model, torch.randn(4, WIDTH), budget="1GiB", loss_fn=lambda output, batch: output.sum())
    assert any("do not give the same bits again" in said for said in plan.assumptions)
    values = [v for program in plan.step.programs for v in program.values if v.name == "counts"]
    assert all(RECOMPUTE not in value.actions for value in values)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (3, r"allow_replay\(3\): allowed are an op"),
        ("swish", "qualified name such as"),
        ("stowplan_tests::missing", "no such op is registered; import the library"),
        (add_one_, "it writes to its arguments"),
        ("aten::mm", "ops of aten have rules of their own"),
        (torch.ops.aten.bernoulli, "ops of aten have rules of their own"),
    ],
)
def test_what_cannot_be_allowed(op: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        stowplan.allow_replay(op)


def test_dropout_inside_a_custom_kernel() -> None:
    """A kernel that takes ``dropout_p`` is replayed where that is zero, and not otherwise."""

    @torch.library.custom_op("stowplan_tests::attend", mutates_args=())
    def attend(x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return torch.dropout(x.exp(), dropout_p, True)

    func = torch.ops.stowplan_tests.attend.default
    x = torch.ones(2)
    assert not rules.draws_random_numbers(func, (x, 0.0), {})
    assert rules.draws_random_numbers(func, (x, 0.5), {})
    assert rules.draws_random_numbers(func, (x,), {"dropout_p": 0.1})


def test_flash_attention_is_known_to_be_pure() -> None:
    assert "flash_attn::_flash_attn_forward" in rules.PURE
