"""Deferred weight gradients have the bits that autograd gives, whatever is called when."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import stowplan
from stowplan.runtime.pipeline.deferred import PendingGradients, WeightGradients
from tests import models
from tests.compositions.loops import assert_moved, assert_same, plan_for, text_batch

SIZES = st.integers(1, 40)


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in module.parameters()]


def assert_equal(seen: Sequence[Any], expected: Sequence[Any]) -> None:
    """Bit for bit, signs of zeros included, and laid out alike."""
    assert len(seen) == len(expected)
    for mine, truth in zip(seen, expected, strict=True):
        assert (mine is None) == (truth is None)
        if truth is not None:
            assert mine.dtype == truth.dtype
            assert mine.stride() == truth.stride()
            assert torch.equal(mine.signbit(), truth.signbit())
            assert torch.equal(mine, truth)


class Products(TorchDispatchMode):
    """Counts the products and sums that run, by the sizes and strides of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "sum"):
            self.seen[name, *((a.shape, a.stride()) for a in args if isinstance(a, torch.Tensor))] += 1
        return func(*args, **(kwargs or {}))


def both(
    stage: nn.Module, batches: Sequence[torch.Tensor], call: Callable[[nn.Module, torch.Tensor], Any], num: int
) -> None:
    """Forward and backward of each batch, plainly and with weights' gradients at the end; ``num`` are deferred."""
    plain = copy.deepcopy(stage)
    deferred = WeightGradients()
    deferred.install(stage)
    assert deferred.num_deferred == num
    seen: list[list[torch.Tensor | None]] = []
    products = [Products(), Products()]
    for module, recorder in zip((stage, plain), products, strict=True):
        pending = []
        results: list[torch.Tensor | None] = []
        with recorder:
            for batch in batches:
                x = batch.detach().requires_grad_(batch.requires_grad)
                y = call(module, x)
                generator = torch.Generator().manual_seed(1)
                y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
                results += [y.detach(), x.grad]
                pending.append(deferred.collect())
            for one in pending:
                one.run()
        seen.append([*results, *gradients(module)])
    assert_equal(*seen)
    # Two ways to compute a product may happen to agree in this machine's bits. How often: a checkpoint that runs a
    # function of ours again cannot stop in the middle of it, as it does in an op.
    assert products[0].seen.keys() == products[1].seen.keys()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "by columns": lambda x: x.mT.contiguous().mT,
    "first two dimensions swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "rows last": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@given(
    rows=st.lists(SIZES, min_size=1, max_size=3),
    sizes=st.tuples(SIZES, SIZES),
    layout=st.sampled_from(list(LAYOUTS)),
    gradient_layout=st.sampled_from(list(LAYOUTS)),
    weight_by_columns=st.booleans(),
    bias=st.sampled_from(["none", "trained", "frozen"]),
    kind=st.sampled_from([nn.Linear, Conv1D]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    autocast=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_bits_of_one_layer(
    rows: list[int],
    sizes: tuple[int, int],
    layout: str,
    gradient_layout: str,
    weight_by_columns: bool,
    bias: str,
    kind: type[nn.Module],
    dtype: torch.dtype,
    autocast: bool,
    first: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer: Any = nn.Linear(*sizes, bias=bias != "none") if kind is nn.Linear else Conv1D(sizes[1], sizes[0])
    if weight_by_columns:
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    if bias == "frozen":
        layer.bias.requires_grad_(False)
    layer.to(dtype)
    x = torch.randn(*rows, sizes[0]).to(dtype)
    if kind is nn.Linear:
        x = LAYOUTS[layout](x)
    x.requires_grad_(not first)

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x if first else x.clone())  # the clone is no leaf, and laid out as x
        return LAYOUTS[gradient_layout](y)

    both(layer, [x, x], call, num=1)


class Shared(nn.Module):
    """Layers that read the same leaf, one of them called three times, and another that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.left, self.right = nn.Linear(24, 24), nn.Linear(24, 24)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> Any:
        x = self.left(x) + self.right(x)
        return self.again(self.first(torch.tanh(self.first(torch.tanh(self.first(x))))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_uses_of_one_weight_are_added_up_first(
    dtype: torch.dtype, cache: bool, autocast: bool, requires_grad: bool
) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 7, 24, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]

    def call(module: nn.Module, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=cache):
            return module(x)

    both(Shared().to(dtype), batches, call, num=4)


class Tied(nn.Module):
    """An embedding and the head that has its weight, and a layer that has the head's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(9, 8), nn.Linear(8, 9), nn.Linear(8, 9)
        self.head.weight, self.hidden.bias = self.embedding.weight, self.head.bias
        self.last = nn.Linear(9, 3)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embedding(ids)
        return self.last(self.head(x) * self.hidden(x))


def test_layers_tied_to_others_have_their_gradients_at_once() -> None:
    batches = [torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    both(Tied(), batches, lambda module, ids: module(ids), num=1)


def mixed() -> nn.Sequential:
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), Conv1D(7, 10), nn.LayerNorm(7), nn.Linear(7, 5))
    stage[0].bias.requires_grad_(False)
    return stage


def test_weights_long_after_inputs_with_other_microbatches_between() -> None:
    """F0 F1 F2 I0 I1 W1 F3 I2 W0 I3 W3 W2."""
    order = ["F0", "F1", "F2", "I0", "I1", "W1", "F3", "I2", "W0", "I3", "W3", "W2"]
    batches = [torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    stage, deferred = mixed(), WeightGradients()
    deferred.install(stage)
    outputs: dict[str, torch.Tensor] = {}
    pending: dict[str, PendingGradients] = {}
    for action, number in order:
        if action == "F":
            outputs[number] = stage(batches[int(number)])
        elif action == "I":
            outputs[number].square().sum().backward()
            pending[number] = deferred.collect()
        else:
            pending[number].run()
    # LayerNorm's gradients come with I, the layers' with W: each kind in its own order.
    for parts, microbatches in (((3,), "0123"), ((0, 2, 4), "1032")):
        plain = mixed()
        for number in microbatches:
            plain(batches[int(number)]).square().sum().backward()
        for part in parts:
            assert_equal(gradients(stage[part]), gradients(plain[part]))


def test_what_is_held_goes_bit_by_bit_and_counts_once() -> None:
    stage = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    branches = [nn.Linear(16, 4), nn.Linear(16, 4)]
    deferred = WeightGradients()
    deferred.install(nn.ModuleList([stage, *branches]))

    def pending() -> tuple[PendingGradients, torch.Tensor]:
        inner = stage[0](torch.randn(32, 8))
        hidden = stage[1](inner)
        (branches[0](hidden) + branches[1](hidden)).backward(torch.randn(32, 4))
        return deferred.collect(), inner

    one, _ = pending()
    column = 32 * 4  # bytes
    first, second, both_branches = column * (8 + 8), column * (8 + 16), column * (16 + 4)
    assert one.num_bytes == first + second + both_branches
    one.run()
    assert one.num_bytes == 0
    expected = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
    one.run()
    assert_equal(gradients(stage), expected)
    assert deferred.collect().num_bytes == 0
    one, inner = pending()
    inner.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        one.run()
    assert one.num_bytes == first


def test_without_gradients_the_layers_are_their_own() -> None:
    stage, deferred = mixed(), WeightGradients()
    deferred.install(stage)
    x = torch.randn(2, 6, requires_grad=True)
    with torch.no_grad():
        assert stage(x).grad_fn is None
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    assert not stage(torch.randn(2, 6)).requires_grad
    stage(x).sum().backward()
    assert x.grad is not None
    assert deferred.collect().num_bytes == 0
    assert not any(p.grad is not None for p in stage.parameters())


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.weight.register_hook(lambda gradient: 3 * gradient)
    return layer


def told(layer: nn.Linear) -> nn.Linear:
    def halve(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad /= 2

    layer.bias.register_post_accumulate_grad_hook(halve)
    return layer


def replaced(layer: nn.Linear) -> nn.Linear:
    own = layer.forward
    layer.forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    return layer


class OfAnotherClass(torch.Tensor):
    pass


def subclassed(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OfAnotherClass))
    return layer


LEFT_ALONE: dict[str, Callable[[], nn.Linear]] = {
    "subclass": lambda: Doubled(4, 3),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "hook": lambda: hooked(nn.Linear(4, 3)),
    "hook after": lambda: told(nn.Linear(4, 3)),
    "another forward": lambda: replaced(nn.Linear(4, 3)),
    "tensor subclass": lambda: subclassed(nn.Linear(4, 3)),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_is_left_alone_has_its_gradients_at_once(kind: str) -> None:
    torch.manual_seed(0)
    plain = LEFT_ALONE[kind]()
    torch.manual_seed(0)
    layer, deferred = LEFT_ALONE[kind](), WeightGradients()
    deferred.install(nn.Sequential(layer))
    x = torch.randn(5, 4)
    for module in (plain, layer):
        module(x).square().sum().backward()
    for mine, truth in zip(gradients(layer), gradients(plain), strict=True):
        assert mine is not None
        assert torch.equal(mine, truth)  # type: ignore[arg-type]
    assert deferred.collect().num_bytes == 0


def test_a_vector_and_no_input_by_name() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    both(layer, [torch.randn(4), torch.randn(4)], lambda module, x: module(x) + module(input=x), num=1)


def test_a_failed_backward_is_cleared() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            raise ArithmeticError

    stage, deferred = nn.Linear(4, 4), WeightGradients()
    deferred.install(stage)
    y = stage(Fails.apply(torch.randn(2, 4, requires_grad=True)))
    with pytest.raises(ArithmeticError):
        y.sum().backward()
    deferred.clear()
    pending = deferred.collect()
    assert pending.num_bytes == 0
    pending.run()
    assert stage.weight.grad is None


def test_at_once_nothing_is_put_off() -> None:
    stage, deferred = nn.Linear(4, 3), WeightGradients()
    x = torch.randn(2, 4)
    stage(x).square().sum().backward()
    expected = [parameter.grad for parameter in stage.parameters()]
    stage.zero_grad()
    deferred.install(stage)
    with deferred.at_once():
        stage(x).square().sum().backward()
    assert deferred.collect().num_bytes == 0
    assert all(torch.equal(p.grad, g) for p, g in zip(stage.parameters(), expected, strict=True))  # type: ignore[arg-type]
    stage(x).square().sum().backward()
    assert deferred.collect().num_bytes > 0


def test_changes_in_place_are_noticed() -> None:
    stage, deferred = nn.Linear(4, 4), WeightGradients()
    deferred.install(stage)
    x, gradient = torch.randn(2, 4), torch.randn(2, 4)
    for changed in (x, gradient):
        stage(x).backward(gradient)
        pending = deferred.collect()
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            pending.run()
    assert stage.weight.grad is None


def test_second_derivatives_are_refused() -> None:
    stage, deferred = nn.Linear(4, 4), WeightGradients()
    deferred.install(stage)
    x = torch.randn(2, 4, requires_grad=True)
    (first,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_removing_copying_and_installing_twice() -> None:
    stage, deferred = mixed(), WeightGradients()
    deferred.install(stage)
    with pytest.raises(stowplan.InvalidArgument, match="installed already"):
        deferred.install(stage)
    for twin in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        twin(torch.randn(2, 6)).sum().backward()
        assert twin[0].weight.grad is not None
    stage(torch.randn(2, 6)).sum().backward()
    deferred.remove()
    deferred.remove()
    assert deferred.collect().num_bytes == deferred.num_deferred == 0
    assert all("forward" not in module.__dict__ for module in stage.modules())
    assert not stage._forward_pre_hooks
    stage(torch.randn(2, 6)).sum().backward()
    assert stage[0].weight.grad is not None
    deferred.install(stage)


def checkpointed(module: nn.Module, x: torch.Tensor) -> Any:
    return checkpoint(module, x, use_reentrant=False)


def packed(module: nn.Module, x: torch.Tensor) -> Any:
    def pack(tensor: torch.Tensor) -> bytes:
        return pickle.dumps(tensor.detach().clone())

    with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
        return module(x)


@pytest.mark.parametrize("call", [checkpointed, packed])
@pytest.mark.parametrize("autocast", [True, False])
def test_saved_tensors_go_through_hooks(call: Callable[..., Any], autocast: bool) -> None:
    batches = [torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def under_autocast(module: nn.Module, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call(module, x)

    both(mixed(), batches, under_autocast, num=3)


def test_nothing_waits_for_the_garbage_collector() -> None:
    def alive() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    stage, deferred = mixed(), WeightGradients()
    deferred.install(stage)
    stage(torch.randn(3, 6)).sum().backward()
    deferred.collect().run()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            stage(torch.randn(3, 6)).sum().backward()
            deferred.collect().run()
        stage(torch.randn(3, 6))  # never goes backward
        assert alive() == before
    finally:
        gc.enable()


BUILDS = {"llama": models.llama, "gpt2": models.gpt2}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_under_a_plan(name: str, dtype: torch.dtype | None, seed: int) -> None:
    """Two microbatches a step, the first one's weights after the second's inputs."""

    def train(stage: nn.Module, finish: Callable[[], PendingGradients]) -> list[torch.Tensor]:
        optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
        torch.manual_seed(7)
        seen: list[torch.Tensor] = []
        for step in range(4):
            losses, pending = [], []
            for microbatch in range(2):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    losses.append(stage(**text_batch(2 * step + microbatch)).loss)
            for loss in losses:
                loss.backward()
                pending.append(finish())
            for one in pending:
                one.run()
            seen += [loss.detach().clone() for loss in losses]
            seen += [p.grad.clone() for p in stage.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return [*seen, *(p.detach().clone() for p in stage.parameters()), torch.rand(1)]

    expected = train(BUILDS[name](), lambda: PendingGradients([]))
    for applied_first in (True, False):
        stage, deferred = BUILDS[name](), WeightGradients()
        with contextlib.ExitStack() as stack:
            if not applied_first:
                deferred.install(stage)
            handle = stack.enter_context(stowplan.apply(plan_for(BUILDS[name], seed, dtype), stage))
            if applied_first:
                deferred.install(stage)
            assert_same(train(stage, deferred.collect), expected)
        assert_moved(handle)


def test_wrappers_are_refused(ranks: Any) -> None:
    ranks.run(wrapped)


def wrapped(rank: int) -> None:
    with pytest.raises(stowplan.UnsupportedModel, match="the stage is wrapped by DistributedDataParallel"):
        WeightGradients().install(DistributedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(stowplan.UnsupportedModel, match="0 is wrapped by DistributedDataParallel"):
        WeightGradients().install(nn.Sequential(DistributedDataParallel(nn.Linear(2, 2))))
