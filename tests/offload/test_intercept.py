"""Standing before a module's forward, unseen."""

from __future__ import annotations

import copy
import io
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn

from stowplan.offload.intercept import Forward, Interception


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(x) * scale


class Watch:
    """A handler that counts, and passes the call on."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[str]]] = []

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append((len(args), list(kwargs)))
        return forward(*args, **kwargs)


def tripled(self: Block, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return 3 * Block.forward(self, x, scale)


def test_every_way_to_call_a_module_comes_by() -> None:
    block, watch, x = Block(), Watch(), torch.ones(2, 4)
    expected = block(x, scale=2.0)
    Interception(block, watch)
    assert torch.equal(block(x, scale=2.0), expected)
    assert torch.equal(block.forward(x, 2.0), expected)
    assert watch.calls == [(1, ["scale"]), (2, [])]


def test_module_hooks_still_run_around_it() -> None:
    block, watch = Block(), Watch()
    block.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    block.register_forward_hook(lambda module, args, output: output + 1)
    expected = block(torch.ones(2, 4))
    Interception(block, watch)
    assert torch.equal(block(torch.ones(2, 4)), expected)
    assert len(watch.calls) == 1


def test_nothing_shows_in_the_tree_or_the_state_dict() -> None:
    block = Block()
    before = list(block.state_dict()), [name for name, _ in block.named_modules()], repr(block)
    Interception(block, Watch())
    assert (list(block.state_dict()), [name for name, _ in block.named_modules()], repr(block)) == before


def test_removing_gives_back_what_was_there() -> None:
    plain, own = Block(), Block()
    own.forward = types.MethodType(tripled, own)  # type: ignore[method-assign]
    kept = own.forward
    for block in (plain, own):
        interception = Interception(block, Watch())
        interception.remove()
        interception.remove()
    assert "forward" not in plain.__dict__
    assert own.__dict__["forward"] is kept


def test_removing_leaves_alone_what_others_put_there_since() -> None:
    block = Block()
    interception = Interception(block, Watch())
    theirs = types.MethodType(tripled, block)
    block.forward = theirs  # type: ignore[method-assign]
    interception.remove()
    assert block.forward is theirs


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_interceptions_are_gone_when_both_are_removed(first_out: int) -> None:
    block = Block()
    watches = [Watch(), Watch()]
    interceptions = [Interception(block, watch) for watch in watches]
    block(torch.ones(2, 4))
    assert [len(watch.calls) for watch in watches] == [1, 1]
    interceptions[first_out].remove()
    block(torch.ones(2, 4))
    assert len(watches[first_out].calls) == 1
    assert len(watches[1 - first_out].calls) == 2
    interceptions[1 - first_out].remove()
    block(torch.ones(2, 4))
    assert [len(watch.calls) for watch in watches][1 - first_out] == 2
    assert "forward" not in block.__dict__


def copied(block: nn.Module, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(block)
    if way == "pickle":
        return pickle.loads(pickle.dumps(block))
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_the_plain_forward_and_its_own_parameters(way: str) -> None:
    block, watch, x = Block(), Watch(), torch.ones(2, 4)
    expected = block(x)
    Interception(block, watch)
    twin = copied(block, way)
    with torch.no_grad():
        block.linear.weight.zero_()
    assert torch.equal(twin(x), expected)
    assert watch.calls == []


def test_a_copy_of_a_block_that_had_a_forward_of_its_own() -> None:
    block, watch, x = Block(), Watch(), torch.ones(2, 4)
    block.forward = types.MethodType(tripled, block)  # type: ignore[method-assign]
    expected = block(x)
    Interception(block, watch)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        block.linear.weight.zero_()
    assert torch.equal(twin(x), expected)
    assert watch.calls == []


def test_a_copy_of_a_model_around_the_block() -> None:
    model, watch, x = nn.Sequential(Block(), Block()), Watch(), torch.ones(2, 4)
    expected = model(x)
    Interception(model[0], watch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].linear.weight.zero_()
    assert torch.equal(twin(x), expected)
    assert twin[0].forward.__self__ is twin[0]
    assert watch.calls == []
