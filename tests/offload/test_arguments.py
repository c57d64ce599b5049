"""What a block computes with that is no argument: numbers in configs, which tell calls apart."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stowplan.offload.arguments import Numbers
from tests.offload.toys import (
    NUM_RECORDINGS,
    Tensors,
    all_policies,
    assert_exact,
    call_toy,
    gradients,
    rows,
    stack,
)


def _scaled_by_config(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(torch.sin(block.first(x) * block.config.scale * block.config.scales[1])) + x


def _with_config() -> Any:
    model = stack(_scaled_by_config)
    config = SimpleNamespace(scale=1.0, scales=[1.0, 1.0])  # one for all blocks, as models have it
    for block in model.blocks:
        block.config = config
    return model


@all_policies
@pytest.mark.parametrize("where", ["number", "list"])
def test_a_number_in_a_config_that_changes_between_steps_is_recorded_anew(where: str, policy: str) -> None:
    scales = [1.0, 0.5]

    def train(model: Any) -> Tensors:
        found: Tensors = []
        for scale in scales:
            config = model.blocks[0].config
            if where == "number":
                config.scale = scale
            else:
                config.scales[1] = scale
            for _ in range(NUM_RECORDINGS + 1):
                model(rows()).square().mean().backward()
                found += gradients(model)
        return found

    planned = assert_exact(_with_config, train, policy, call_toy)
    counters = planned.engine.counters
    assert counters.departures == 0
    assert counters.recorded_calls == 3 * len(scales) * NUM_RECORDINGS
    assert counters.steady_calls == 3 * len(scales)


def test_what_is_read_along() -> None:
    model = _with_config()
    block, config = model.blocks[0], model.blocks[0].config
    numbers = Numbers(block)

    def differs(change: Any) -> bool:
        before, state = numbers.state(), copy.deepcopy(vars(config))
        change()
        after = numbers.state()
        vars(config).clear()
        vars(config).update(state)
        return before != after

    assert not differs(lambda: None)
    assert differs(lambda: setattr(config, "scale", 2.0))
    assert differs(lambda: setattr(config, "scale", 1))  # equal, and yet of another type
    assert differs(lambda: config.scales.append(1.0))
    assert differs(lambda: setattr(config, "scale", [1.0]))
    assert differs(lambda: setattr(config, "new", 0.5))
    assert differs(lambda: (delattr(config, "scale"), setattr(config, "other", 1.0)))
    config.long = [0.5] * 17
    assert differs(config.long.pop)  # short enough to be read from now on
    config.mixed = [torch.zeros(1), 2.0]
    assert differs(lambda: config.mixed.__setitem__(0, 3.0))
    config.pair = {"a": 1, "b": 2}
    assert differs(lambda: setattr(config, "pair", {"b": 1, "a": 2}))
    block.scaling = {"default": 1.0}  # as adapters have it
    assert differs(lambda: block.scaling.update(default=2.0))
    assert differs(block.eval)
    block.train()
    assert differs(lambda: block.first.weight.requires_grad_(False))
