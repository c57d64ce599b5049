"""Tensors changed in place around the block, between its forward and its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from stowplan.core.errors import ReplayMismatch
from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from tests.offload.toys import (
    KEEP,
    NUM_RECORDINGS,
    NUM_STEPS,
    SLAB_BYTES,
    WIDTH,
    Tensors,
    all_policies,
    assert_exact,
    assert_same,
    call_toy,
    call_with_input_gradient,
    decide,
    feed_forward,
    gradients,
    put_under_plan,
    rows,
    stack,
)


# ---- what is changed in place outside the block --------------------------------------------------------------------
def _sine_of_input(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.sin(x + 1.0))


@all_policies
@pytest.mark.parametrize("call_number", range(NUM_RECORDINGS + 1))
def test_an_input_changed_after_the_block_is_never_a_silent_wrong_gradient(call_number: int, policy: str) -> None:
    def gradient_of(model: Any) -> torch.Tensor:
        torch.manual_seed(1)
        for call in range(NUM_RECORDINGS + 1):
            start = rows().requires_grad_()
            hidden = start * 1.0
            out = model(hidden)
            if call == call_number:
                hidden += out  # no node outside the block needs hidden
                out = hidden
            out.square().mean().backward()
        return start.grad

    expected = gradient_of(stack(_sine_of_input, 1))
    planned = put_under_plan(stack(_sine_of_input, 1), policy, call_with_input_gradient)
    try:
        found = gradient_of(planned.model)
    except ReplayMismatch:
        return  # says what was changed
    assert torch.equal(found, expected)


def test_recomputing_from_a_changed_input_says_so() -> None:
    planned = put_under_plan(stack(_sine_of_input, 1), "recompute", call_with_input_gradient)
    for _ in range(NUM_RECORDINGS + 1):
        hidden = rows().requires_grad_() * 1.0
        out = planned.model(hidden)
        with torch.no_grad():
            hidden.add_(1.0)
        with pytest.raises(
            ReplayMismatch, match="'x' was changed in place between the block's forward and its backward"
        ):
            out.sum().backward()


@all_policies
@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("num_calls", [1, NUM_RECORDINGS + 1])
def test_a_parameter_changed_before_backward(num_calls: int, parameter: str, policy: str) -> None:
    """Autograd saves the weight: an error. It does not save the bias, but what is recomputed comes from it, too."""

    def train(model: Any) -> Tensors:
        torch.manual_seed(1)
        for _ in range(num_calls):
            loss = model(rows()).square().mean()
        with torch.no_grad():
            getattr(model.blocks[1].first, parameter).mul_(0.5)
        loss.backward()
        return gradients(model)

    model = put_under_plan(stack(feed_forward), policy, call_toy).model
    if parameter == "bias" and policy == "swap":
        assert_same(train(model), train(stack(feed_forward)))
        return
    recomputed = "'first.bias' was changed in place between the block's forward and its backward"
    saved = "'first.weight' was changed in place|modified by an inplace operation"
    with pytest.raises(RuntimeError, match=recomputed if parameter == "bias" else saved):
        train(model)


@all_policies
@pytest.mark.parametrize("num_calls", [1, NUM_RECORDINGS + 1])
def test_a_parameter_given_other_data_before_backward(num_calls: int, policy: str) -> None:
    """``parameter.data = …`` bumps no version; backward still is that of the forward pass, as autograd's own is."""

    def train(model: Any) -> Tensors:
        for _ in range(num_calls):
            loss = model(rows()).square().mean()
        model.blocks[1].first.bias.data = torch.zeros(WIDTH)
        loss.backward()
        return gradients(model)

    assert_exact(lambda: stack(feed_forward), train, policy, call_toy)


@pytest.mark.parametrize("num_calls", [1, NUM_RECORDINGS + 1])
def test_a_kept_tensor_changed_in_place_is_autograds_error(num_calls: int) -> None:
    """Hooks switch autograd's own check off, so the engine makes it."""
    model = stack(_keeps_its_output, 1)
    (saved,) = decide(model, ["blocks.0"], "swap", call_toy)
    decisions = {name: KEEP if name == "exp" else action for name, action in saved.items()}
    assert KEEP in decisions.values()
    Engine(model, [Block("blocks.0", model.blocks[0])], [decisions], PlainCopies(HostSlab(SLAB_BYTES)))
    for _ in range(num_calls):
        out = model(rows())
    with torch.no_grad():
        out.add_(1.0)
    with pytest.raises(
        RuntimeError,
        match=r"one of the variables needed for gradient computation has been modified by an inplace operation",
    ):
        out.sum().backward()


def _keeps_its_output(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(functional.gelu(block.first(x))).exp()


@all_policies
def test_an_output_changed_in_place_is_never_a_silent_wrong_gradient(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for _ in range(NUM_STEPS):
            out = model(rows())
            out.mul_(2.0)
            out.sum().backward()
        return gradients(model)

    assert_exact(lambda: stack(_sine_of_input, 1), train, policy, call_toy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(stack(_keeps_its_output, 1))
