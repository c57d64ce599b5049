"""Several stacks, stages, and blocks that are called several times: what is between the blocks, and the peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from stowplan import session
from stowplan.core.plan import Plan
from stowplan.core.program import Action

Make = Callable[[], nn.Module]


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).train()


def pairs() -> dict[str, Any]:
    """192 tokens in, 128 out."""
    ids = torch.randint(64, (2, 192))
    return {"input_ids": ids, "labels": ids[:, :128].contiguous(), "use_cache": False}


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32, 64], depths=[2, 2, 2], num_stages=3, image_size=64)
    torch.manual_seed(0)
    return transformers.ConvNextForImageClassification(config).train()


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(2, (8,))}


def albert() -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=64,
        hidden_size=64,
        embedding_size=32,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    return transformers.AlbertForMaskedLM(config).train()


def tokens() -> dict[str, Any]:
    ids = torch.randint(64, (2, 192))
    return {"input_ids": ids, "labels": ids}


MODELS: dict[str, tuple[Make, Callable[[], dict[str, Any]], str | None]] = {
    "t5": (t5, pairs, None),
    "convnext": (convnext, images, None),
    "albert": (albert, tokens, "albert.encoder.albert_layer_groups"),
}
each_model = pytest.mark.parametrize("name", MODELS)


def planned(name: str, amp: bool = False, budget: str = "1GiB") -> Plan:
    make, batch, blocks = MODELS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return session.plan(model, batch(), budget=budget, optimizer=optimizer, blocks=blocks)


def measured_peak(name: str, amp: bool, plan: Plan) -> int:
    """Highest live bytes of a steady step under the plan: the two before it are recorded, which takes a little more."""
    gc.collect()  # what is freed while the log is open, but came from before it, would count against the peak
    make, batch, _ = MODELS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        held = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            output = model(**held)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with session.apply(plan, model):
        step()
        step()
        with session.measure(model) as measured:
            step()
    return max(measured.measurement.peak_bytes)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@each_model
def test_predicted_peak_is_the_measured_one(name: str, amp: bool) -> None:
    """Without a plan, at a budget half way, and at the least one: never above by more than 1% (0.7% was seen).

    Below by more where blocks share what only their replays need, which counts for each, and where autocast adds up
    the gradients of a shared weight in bf16: both at most 2.5% of these small models.
    """
    plan = planned(name, amp)
    unplanned, least = plan.unplanned.peak_bytes, plan.least_budget_bytes
    assert measured_peak(name, amp, plan) == pytest.approx(unplanned, rel=0.002)
    for budget in ((unplanned + least) // 2, least):
        tight = session.replan(plan, budget=budget)
        above = measured_peak(name, amp, tight) / tight.prediction.peak_bytes - 1
        assert -(0.01 if name == "convnext" else 0.025) < above < 0.01


def test_an_encoder_and_its_decoder() -> None:
    """Both are planned, and the gap between them has what is there: a norm, dropout and the decoder's embedding."""
    step = planned("t5").step
    assert step.block_names == tuple(f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3))
    gap = step.gap_before[3]
    hidden = 2 * 192 * 64 * 4
    assert gap.forward.peak_bytes >= 2 * hidden  # the norm's input and output
    # From the first backward of the decoder on, the encoder's output has a gradient that the others add to.
    assert step.backward_left_bytes[4] - step.backward_left_bytes[5] >= hidden
    # What all blocks of the decoder read is nobody's own.
    names = {value.name for program in step.programs for value in program.values if value.saved}
    assert not any(name.startswith("encoder_hidden_states") for name in names)


def test_gaps_between_stages_only() -> None:
    """Downsampling comes before the first layer of each stage but the first; its parameters' gradients stay."""
    step = planned("convnext").step
    assert [gap.block for gap in step.gaps] == [2, 4]
    model = convnext()
    for gap, stage in zip(step.gaps, (1, 2), strict=True):
        parameters = model.get_submodule(f"convnext.encoder.stages.{stage}.downsampling_layer").parameters()
        made = gap.backward.left_bytes - step.backward_left_bytes[gap.block]
        freed = step.forward_left_bytes[gap.block] - step.forward_left_bytes[gap.block - 1]
        assert made + freed >= sum(4 * p.numel() for p in parameters)


def test_a_plain_stack_has_no_gaps() -> None:
    assert planned("albert").step.gaps == ()


def test_calls_of_one_block_are_planned_each() -> None:
    plan = planned("albert")
    (name,) = set(plan.step.block_names)
    assert plan.step.num_blocks == 4
    assert plan.step.call_names == (name, *(f"{name} (call {i})" for i in (2, 3, 4)))
    tight = session.replan(plan, budget=(plan.unplanned.peak_bytes + plan.least_budget_bytes) // 2)
    assert len(set(tight.decisions)) > 1
    # Gradients are made once, by the last call, which comes first in backward; the others add to them.
    parameters = sum(4 * p.numel() for p in albert().get_submodule(name).parameters())
    gradients = [plan.step.program_of(call).gradient_bytes for call in range(4)]
    assert gradients[:-1] == [0, 0, 0]
    assert gradients[-1] == pytest.approx(parameters, rel=0.01)


def test_calls_of_one_block_do_what_was_decided_for_each() -> None:
    plan = planned("albert")
    decisions = tuple(
        tuple(
            Action.RECOMPUTE if call == 1 and Action.RECOMPUTE in program.values[i].actions else Action.KEEP
            for i in program.saved
        )
        for call, program in enumerate(map(plan.step.program_of, range(4)))
    )
    expected = sum(
        plan.step.program_of(1).values[i].size_bytes
        for i, action in zip(plan.step.program_of(1).saved, decisions[1], strict=True)
        if action is Action.RECOMPUTE
    )
    model = albert()
    with session.apply(replace(plan, decisions=decisions), model) as applied:
        for _ in range(3):
            before = applied.counters.recomputed_bytes
            model(**tokens()).loss.backward()
            assert applied.counters.recomputed_bytes - before == expected
    assert applied.counters.recorded_calls == 2


class TwiceInAStack(nn.Module):
    """The same module twice in a list, and a block that is called again later."""

    def __init__(self) -> None:
        super().__init__()
        first, second = (nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2))
        self.blocks = nn.ModuleList([first, first, second])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, self.blocks[0]):
            x = torch.sin(block(x))
        return x.square().mean()


def test_the_same_module_twice_in_a_stack() -> None:
    torch.manual_seed(0)
    model, batch = TwiceInAStack(), torch.randn(8, 16)
    plan = session.plan(model, batch, budget="1GiB")
    assert plan.step.block_names == ("blocks.0", "blocks.0", "blocks.2", "blocks.0")
    model(batch).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    tight = session.replan(plan, budget=plan.least_budget_bytes)
    with session.apply(tight, model) as applied:
        for _ in range(4):
            model.zero_grad()
            model(batch).backward()
            assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert applied.counters.steady_calls > 0
    assert "forward" not in model.__dict__


def test_repeated_blocks_under_wrap_leave_no_trace() -> None:
    """Calls are counted in front of the model's forward, where ``wrap`` stands, too: both go, in any order."""
    make, batch, blocks = MODELS["albert"]
    model = make()
    least = planned("albert").least_budget_bytes
    session.wrap(model, budget=2 * least, blocks=blocks)
    for _ in range(3):
        model(**batch()).loss.backward()
    handle = session.applied(model)
    assert handle is not None
    assert handle.counters.recorded_calls > 0
    handle.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_forward_pass_that_ends_early_does_not_shift_the_calls() -> None:
    plan = planned("albert")
    tight = session.replan(plan, budget=plan.least_budget_bytes)
    model, batch = albert(), tokens()
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with session.apply(tight, model) as applied:
        model(**batch)
        with pytest.raises(ValueError, match="enough"):
            _stop_after_two_calls(model, batch)
        recorded = applied.counters.recorded_calls
        for _ in range(3):
            model.zero_grad()
            model(**batch).loss.backward()
            assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert applied.counters.recorded_calls - recorded <= 4


def _stop_after_two_calls(model: nn.Module, batch: dict[str, Any]) -> None:
    calls = []

    def count(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise ValueError("enough")

    handle = model.get_submodule("albert.encoder.albert_layer_groups.0").register_forward_pre_hook(count)
    try:
        model(**batch)
    finally:
        handle.remove()
