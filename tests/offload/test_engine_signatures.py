"""Modes, and calls that look alike or not: gradients off, train and eval, shapes, autocast, how arguments are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stowplan.offload.tape.run import Counters
from tests.offload.toys import (
    NUM_RECORDINGS,
    NUM_STEPS,
    ROWS,
    WIDTH,
    Tensors,
    all_policies,
    assert_exact,
    call_language_model,
    call_toy,
    call_with_input_gradient,
    gradients,
    make_gpt2,
    make_llama,
    rows,
    stack,
    tokens,
    views_of_the_input,
)


# ---- modes and signatures ------------------------------------------------------------------------------------------
@all_policies
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_engine_stands_aside(context: Callable[[], Any], policy: str) -> None:
    def train(model: Any) -> Tensors:
        found = []
        for training in (False, True):
            model.train(training)
            with context():
                found.append(model(**tokens(0)).logits.clone())
        return found

    planned = assert_exact(make_gpt2, train, policy, call_language_model)
    assert planned.engine.counters == Counters()


@all_policies
def test_switching_between_train_and_eval(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for step in range(2 * NUM_STEPS):
            model.train(step % 2 == 0)
            model(**tokens(step), use_cache=False).loss.backward()
        return gradients(model)

    planned = assert_exact(make_gpt2, train, policy, call_language_model)
    counters = planned.engine.counters
    num_recorded = 2 * 3 * NUM_RECORDINGS
    num_steady = 2 * 3 * NUM_STEPS - num_recorded
    assert (counters.recorded_calls, counters.steady_calls, counters.departures) == (num_recorded, num_steady, 0)


@all_policies
def test_shapes_that_change_are_recorded_each_for_itself(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for step in range(3 * NUM_STEPS):
            model(**tokens(step, num_tokens=6 + 2 * (step % 3)), use_cache=False).loss.backward()
        return gradients(model)

    planned = assert_exact(make_llama, train, policy, call_language_model)
    counters = planned.engine.counters
    num_recorded = 3 * 3 * NUM_RECORDINGS
    num_steady = 3 * 3 * NUM_STEPS - num_recorded
    assert (counters.recorded_calls, counters.steady_calls, counters.departures) == (num_recorded, num_steady, 0)


@all_policies
@pytest.mark.parametrize("part", [slice(0, ROWS), slice(2, ROWS + 2)])
def test_an_argument_that_is_a_view_of_ever_other_tensors(part: slice, policy: str) -> None:
    """No signature sees how much of its storage an argument leaves out."""

    def train(model: Any) -> Tensors:
        for step in range(3 * NUM_STEPS):
            whole = rows(part.stop + step % 3 * (step > NUM_RECORDINGS))
            model(whole[part].sin_()).square().mean().backward()
        return gradients(model)

    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.second(x.sin() * block.first(x).tanh()) + x

    planned = assert_exact(lambda: stack(body), train, policy, call_toy)
    assert planned.engine.counters.departures == 0
    assert planned.engine.counters.recorded_calls == 3 * NUM_RECORDINGS


@all_policies
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside: bool, policy: str) -> None:
    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def call(model: Any) -> Any:
        with autocast():
            return call_language_model(model)

    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            with autocast():
                loss = model(**tokens(step), use_cache=False).loss
                if backward_inside:
                    loss.backward()
            if not backward_inside:
                loss.backward()
        return gradients(model)

    assert_exact(make_llama, train, policy, call)


@all_policies
def test_the_cache_of_keys_and_values_that_models_fill_by_default(policy: str) -> None:
    def train(model: Any) -> Tensors:
        for step in range(NUM_STEPS):
            model(**tokens(step)).loss.backward()
        return gradients(model)

    assert_exact(make_llama, train, policy, lambda model: model(**tokens(0)))


@all_policies
def test_hidden_states_asked_for(policy: str) -> None:
    """Models collect them by standing before their blocks' forward, too."""

    def train(model: Any) -> Tensors:
        found: Tensors = []
        for step in range(NUM_STEPS):
            output = model(**tokens(step), use_cache=False, output_hidden_states=step % 2 == 1)
            output.loss.backward()
            found += [t.detach() for t in output.hidden_states or ()]
        return [*found, *gradients(model)]

    assert_exact(make_llama, train, policy, call_language_model)


class Scaling(nn.Module):
    """A block of two tensors of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        left, right = scale.view(ROWS, 2, WIDTH // 2).unbind(1)
        return self.linear(scale.sin() + torch.cat([right.cos(), left.exp()], -1)) * (shift - 0.5).tanh() * shift


class Shifting(nn.Module):
    """A block that does not save what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.linear((scale * 3.0).exp()) * (shift.t() - 0.5).tanh().t()


CALLS_PER_PHASE = NUM_RECORDINGS + 1
NUM_PHASES = 3


class TwoArguments(nn.Module):
    """Calls its blocks as ``arrange`` says, which is told the number of the phase."""

    def __init__(self, arrange: Callable[[int, Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.arrange = arrange
        self.num_calls = 0
        self.blocks = nn.ModuleList([Scaling(), Shifting()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        phase = (self.num_calls - 1) // CALLS_PER_PHASE
        return torch.stack([self.arrange(phase, block, x) for block in self.blocks]).sum(0)


def _keywords_in_turn(phase: int, block: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = x.sigmoid(), x.sin()
    return block(scale=a, shift=b) if phase % 2 == 0 else block(shift=b, scale=a)


def _one_tensor_twice_then_two(phase: int, block: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = x.sigmoid(), x.sin()
    return block(a, a) if phase == 0 else block(a, b)


def _slices_of_one_tensor(phase: int, block: Any, x: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([x, x.sin(), x.cos()])
    parts = whole.split(ROWS)
    return torch.cat([block(part, part.flip(0)) for part in parts]) + whole


def _a_slice_that_moves(phase: int, block: Any, x: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([x.new_zeros(phase, WIDTH), x.sin(), x.new_zeros(NUM_PHASES - phase, WIDTH)])
    part = whole[phase : phase + ROWS]
    return block(part, part.neg())


@all_policies
@pytest.mark.parametrize(
    "arrange",
    [_keywords_in_turn, _one_tensor_twice_then_two, _slices_of_one_tensor, _a_slice_that_moves],
)
def test_arguments_arranged_otherwise_than_in_the_calls_before(
    arrange: Callable[[int, Any, torch.Tensor], torch.Tensor], policy: str
) -> None:
    """Calls that look alike by shapes: keywords in another order, aliases, views at other offsets."""

    def make() -> Any:
        torch.manual_seed(0)
        return TwoArguments(arrange)

    def train(model: Any) -> Tensors:
        found: Tensors = []
        for _ in range(NUM_PHASES * CALLS_PER_PHASE):
            x = rows().requires_grad_()
            model(x).square().mean().backward()
            found.append(x.grad)
        return [*found, *gradients(model)]

    counters = assert_exact(make, train, policy, call_with_input_gradient).engine.counters
    assert counters.steady_calls > 0
    assert counters.departures == 0


@all_policies
def test_micro_batches_cut_from_one_tensor(policy: str) -> None:
    """Slices differ in nothing but the offset into their storage."""

    def train(model: Any) -> Tensors:
        for _ in range(NUM_STEPS):
            whole = rows(3 * ROWS).requires_grad_()
            for part in whole.split(ROWS):
                model(part).square().mean().backward()
        return [whole.grad, *gradients(model)]

    assert_exact(lambda: stack(views_of_the_input), train, policy, call_with_input_gradient)
