"""What the ops in a block do: writes in place, random numbers, views, kernels that no dispatch mode sees."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stowplan.offload.blocks import Block
from stowplan.offload.copies import PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.recording import record_call
from stowplan.offload.tape.course import allowed_actions
from stowplan.offload.tape.run import Counters
from tests.offload.toys import (
    KEEP,
    NUM_RECORDINGS,
    NUM_STEPS,
    POLICIES,
    RECOMPUTE,
    ROWS,
    SLAB_BYTES,
    WIDTH,
    Body,
    Tensors,
    actions_of,
    all_policies,
    assert_exact,
    assert_same,
    assert_toy_is_exact,
    block_names,
    call_toy,
    choose,
    feed_forward,
    rows,
    stack,
    train_toy,
    views_of_the_input,
    with_custom_function,
    with_dropout,
)


# ---- what ops do ---------------------------------------------------------------------------------------------------
def _chain_in_place(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = block.first(x) + 1
    other = hidden * 2.0
    hidden.add_(1.0)
    hidden.relu_()
    y = torch.sin(hidden + other).clone()
    y.mul_(other.detach())
    y[:, :4].add_(other[:, 4:8])
    rows_ = torch.tensor([0, 2])
    table = torch.zeros(ROWS, WIDTH).index_put((rows_,), y[rows_])
    table.index_put_((rows_,), y[rows_] * 2)
    return block.second(y * table.tanh() + y) + x


def _inplace_relu(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.relu(block.first(x), inplace=True)
    buffer = torch.empty(ROWS, WIDTH)
    buffer.copy_(hidden)
    out = functional.silu(block.second(functional.dropout(buffer, 0.3)), inplace=True)
    return out * out + x


def _many_results(block: Any, x: torch.Tensor) -> torch.Tensor:
    top, where = block.first(x).topk(WIDTH // 2, dim=-1)
    normed = functional.layer_norm(top, (WIDTH // 2,))
    parts = torch.split(normed.softmax(-1) * top, 4, dim=-1)
    return block.second(torch.cat([*parts, *(part.exp() for part in parts)], -1)) + x.gather(1, where).repeat(1, 2)


def _complex_numbers(block: Any, x: torch.Tensor) -> torch.Tensor:
    spectrum = torch.fft.rfft(block.first(x))
    return block.second(torch.fft.irfft(spectrum * spectrum.conj() * 0.1, n=WIDTH)) + x


def _spectrum(block: Any, x: torch.Tensor) -> torch.Tensor:
    spectrum = torch.fft.rfft(block.first(x))
    return block.second(torch.fft.irfft(spectrum * spectrum * 0.1, n=WIDTH)) + x


def _an_outside_tensor(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second((block.first(x) * OUTSIDE).tanh()) + x


OUTSIDE = torch.linspace(-1, 1, WIDTH)


def _random_numbers_of_all_kinds(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = block.first(x) + torch.randn_like(x)
    hidden = hidden * torch.rand(ROWS, WIDTH).normal_() * torch.empty(ROWS, WIDTH).bernoulli_(0.5)
    return block.second(functional.rrelu(hidden, training=True).tanh() * torch.rand_like(hidden)) + x


def _samples(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Random ops whose arguments must be probabilities, before one that can be replayed."""
    hidden = block.first(x)
    mask = torch.bernoulli(hidden.detach().sigmoid())
    columns = torch.multinomial(hidden.detach().softmax(-1), WIDTH, replacement=True)
    return block.second(functional.dropout(hidden.gather(1, columns) * mask, 0.3).tanh()) + x


BODIES = [
    feed_forward,
    with_dropout,
    with_custom_function,
    _chain_in_place,
    _inplace_relu,
    _many_results,
    _spectrum,
    _an_outside_tensor,
    _random_numbers_of_all_kinds,
    _samples,
    views_of_the_input,
]


@all_policies
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.strip("_"))
def test_toy_blocks(body: Body, policy: str) -> None:
    planned = assert_toy_is_exact(body, policy)
    counters = planned.engine.counters
    num_planned = len(planned.engine.blocks)
    assert num_planned == 3 or policy == "recompute"
    num_recorded = NUM_RECORDINGS * num_planned
    num_steady = NUM_STEPS * num_planned - num_recorded
    assert (counters.recorded_calls, counters.steady_calls, counters.departures) == (num_recorded, num_steady, 0)


def test_recomputed_dropout_moves_the_generator_as_before() -> None:
    def train(model: Any) -> Tensors:
        found = []
        for _ in range(NUM_STEPS):
            loss = model(rows()).square().mean()
            found.append(torch.rand(1))
            loss.backward()
            found.append(torch.rand(1))
        return found

    planned = assert_exact(lambda: stack(with_dropout), train, "recompute", call_toy)
    assert planned.engine.counters.recomputed_bytes > 0


@all_policies
def test_a_value_saved_before_its_last_write_is_kept(policy: str) -> None:
    class SavesThenWrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.linear(x)
            out = hidden.sin() + x
            with torch.no_grad():
                hidden.mul_(2.0)
            return out

    model = SavesThenWrites()
    with torch.random.fork_rng(devices=[]):
        recording = record_call(model, model.forward, (rows(),), {}, PlainCopies(HostSlab(1)), Counters())
    tape = recording.recorder.finish()
    allowed = {tape.values[value].name: actions for value, actions in allowed_actions(tape).items()}
    assert allowed["linear.addmm"] == (KEEP,)
    assert choose(tape, policy)["linear.addmm"] is KEEP


class NumpySine(torch.autograd.Function):
    """A kernel that no dispatch mode sees fills the result."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        result = torch.empty(x.shape)
        np.sin(x.detach().numpy(), out=result.numpy())
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x, result = ctx.saved_tensors
        return gradient * x.cos() * (1 + 0 * result)


def _filled_by_numpy(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = block.first(x)
    return block.second(NumpySine.apply(hidden) * torch.sigmoid(hidden)) + x


@all_policies
def test_what_a_hidden_kernel_filled_is_never_recomputed(policy: str) -> None:
    planned = assert_toy_is_exact(_filled_by_numpy, policy)
    (action,) = actions_of(planned, "empty")
    assert action is not RECOMPUTE


class DoublesBehindTheBack(torch.autograd.Function):
    """Changes a tensor that an op made, through numpy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.detach().numpy()[:] *= 2
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * 2


def _changed_by_numpy(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.tanh(DoublesBehindTheBack.apply(block.first(x) + 0.0))) + x


@all_policies
def test_a_hidden_write_is_found_by_the_proof(policy: str) -> None:
    assert_toy_is_exact(_changed_by_numpy, policy)


def _batch_norm(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.relu(block.norm(block.first(x)))) + x


@all_policies
def test_batch_norm_counts_every_batch_once(policy: str) -> None:
    planned = assert_toy_is_exact(_batch_norm, policy)  # running statistics are among the buffers compared
    assert [int(block.norm.num_batches_tracked) for block in planned.model.blocks] == [NUM_STEPS] * 3
    assert planned.engine.counters.departures == 0


def _sparse(block: Any, x: torch.Tensor) -> torch.Tensor:
    picked = torch.eye(ROWS).to_sparse()
    return block.second(torch.sparse.mm(picked, block.first(x)).tanh()) + x


@all_policies
@pytest.mark.parametrize(("body", "planned_value"), [(_sparse, "tanh"), (_complex_numbers, "mul")])
def test_a_sparse_tensor_or_a_conjugate_view_inside_is_exact(body: Body, planned_value: str, policy: str) -> None:
    plain_model = stack(body)
    torch.manual_seed(1)
    expected = train_toy(plain_model)
    model = stack(body)
    blocks = [Block(name, model.get_submodule(name)) for name in block_names(model)]
    Engine(model, blocks, [{planned_value: POLICIES[policy][0]}] * 3, PlainCopies(HostSlab(SLAB_BYTES)))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # whether such a block is kept is not the matter here
        assert_same(train_toy(model), expected)
