"""torch.compile that comes after planning: noticed at the next step, however long the plan has been followed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stowplan
from tests import models
from tests.compositions.loops import NUM_STEPS, plan_for, steps, text_batch

# torch's own, as its compiler is imported
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
)


@pytest.fixture(autouse=True)
def _no_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def steady() -> Iterator[Any]:
    """A Llama that has followed its plan for some steps."""
    model = models.llama()
    with stowplan.apply(plan_for(seed=4), model) as handle:
        steps(model)
        assert handle.counters.steady_calls > 0
        yield model


def test_a_block_compiled_later(steady: Any) -> None:
    steady.model.layers[1].compile(backend="eager")
    with pytest.raises(stowplan.UnsupportedModel, match=r"^model\.layers\.1 is compiled by torch\.compile"):
        steady(**text_batch(0))


@pytest.mark.parametrize("whole", [True, False])
def test_the_model_compiled_later(steady: Any, whole: bool) -> None:
    if whole:
        compiled = torch.compile(steady, backend="eager")
    else:
        compiled = steady
        steady.compile(backend="eager")
    with pytest.raises(stowplan.UnsupportedModel, match=r"^model\.layers\.0 is called by code that torch\.compile"):
        compiled(**text_batch(0))


def test_the_step_compiled_later(steady: Any) -> None:
    @torch.compile(backend="eager")
    def step(batch: Any) -> torch.Tensor:
        return steady(**batch).loss

    with pytest.raises(stowplan.UnsupportedModel, match=r"^model\.layers\.0 is called by code that torch\.compile"):
        step(text_batch(0))


def test_a_part_of_a_block_compiled_later(steady: Any) -> None:
    steady.model.layers[0].mlp.compile(backend="aot_eager")

    def train() -> None:
        for step in range(NUM_STEPS):
            steady(**text_batch(step)).loss.backward()

    with pytest.raises(stowplan.UnsupportedModel, match=r"^model\.layers\.0 is compiled by torch\.compile"):
        train()


def test_what_is_compiled_outside_the_blocks_is_none_of_our_business() -> None:
    def head_compiled() -> Any:
        model = models.llama()
        model.lm_head.compile(backend="eager")
        return model

    model = head_compiled()
    with stowplan.apply(plan_for(seed=4), model) as handle:
        seen = steps(model)
    assert all(torch.equal(a, b) for a, b in zip(seen, steps(head_compiled()), strict=True))
    assert handle.counters.steady_calls > 0
