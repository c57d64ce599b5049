"""Dry capture: the bytes of a real one, from fake tensors, and nothing of the model touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import stowplan
from stowplan import session
from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.core.hardware import preset
from stowplan.core.plan import Plan
from stowplan.offload.dry import mode, self_test
from stowplan.offload.dry.known import Known
from stowplan.offload.dry.mode import DryLog, DryMode
from stowplan.offload.dry.probes import Probes
from stowplan.offload.dry.run import building
from tests import models
from tests.offload.test_exactness import assert_same

SHAPE = {"batch": 2, "sequence": 256}
BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {"llama": models.llama, "gpt2": models.gpt2}


def build(name: str, foreach: bool = False) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = BUILDERS[name](num_blocks=3, hidden=64)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=foreach)


def planned(name: str, amp: bool = False, foreach: bool = False, **options: Any) -> Plan:
    model, optimizer = build(name, foreach)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return session.plan(model, models.batch_for(0, **SHAPE), budget="1GiB", optimizer=optimizer, **options)


# ---- dry is as real --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_bytes_are_those_of_a_real_capture(name: str, amp: bool) -> None:
    """Every peak and the least budget within 0.1% (what was seen: 0.0003%), and the same values to decide on."""
    real, dry = planned(name, amp, foreach=amp), planned(name, amp, foreach=amp, dry=True)
    assert dry.unplanned.peak_bytes == pytest.approx(real.unplanned.peak_bytes, rel=1e-3)
    assert dry.least_budget_bytes == pytest.approx(real.least_budget_bytes, rel=1e-3)
    assert dry.step.static_bytes == real.step.static_bytes
    for phase in ("embedding_forward", "head", "embedding_backward", "optimizer_step"):
        seen, expected = getattr(dry.step, phase), getattr(real.step, phase)
        assert (seen.peak_bytes, seen.left_bytes) == pytest.approx((expected.peak_bytes, expected.left_bytes), rel=1e-3)
    for seen_program, program in zip(dry.step.programs, real.step.programs, strict=True):
        seen = [(v.name, v.size_bytes, v.actions) for v in seen_program.values]
        assert seen == [(v.name, v.size_bytes, v.actions) for v in program.values]
        assert [op.name for op in seen_program.ops] == [op.name for op in program.ops]
        assert all(op.seconds > 0 for op in seen_program.ops)


def test_a_dry_plan_is_carried_out_bit_for_bit() -> None:
    plan = session.plan(models.llama(), models.batch_for(0), budget="1GiB", dry=True)
    tight = session.replan(plan, budget=plan.least_budget_bytes, host_budget=1)
    model = models.llama()
    with session.apply(tight, model) as applied:
        seen = models.train(model)
    assert applied.counters.recomputed_bytes > 0
    assert_same(seen, models.train(models.llama()))


def test_nothing_of_the_model_changes() -> None:
    model, optimizer = build("gpt2")
    model(**models.batch_for(0)).loss.backward()
    optimizer.step()
    before = {name: (id(p), p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    generator = torch.get_rng_state()
    session.plan(model, models.batch_for(0), budget="1GiB", optimizer=optimizer, dry=True)
    assert torch.equal(generator, torch.get_rng_state())
    for name, p in model.named_parameters():
        identity, value, gradient = before[name]
        assert id(p) == identity
        assert torch.equal(p, value)
        assert p.grad is gradient
    for name, b in model.named_buffers():
        assert id(b) == buffers[name][0]
        assert torch.equal(b, buffers[name][1])


def test_branches_on_masks_go_where_they_would() -> None:
    """A mask without padding is dropped by transformers, one with padding is expanded: both as in a real run."""
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=64
    )
    tokens = models.batch_for(0, **SHAPE)["input_ids"]
    ops = []
    for padded in (0, 9):
        mask = torch.ones_like(tokens)
        mask[:, SHAPE["sequence"] - padded :] = 0
        batch = {"input_ids": tokens, "labels": tokens, "attention_mask": mask}
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config).train()
        real, dry = (session.plan(model, batch, budget="1GiB", dry=dry) for dry in (False, True))
        assert dry.unplanned.peak_bytes == pytest.approx(real.unplanned.peak_bytes, rel=1e-3)
        assert [op.name for op in dry.step.programs[0].ops] == [op.name for op in real.step.programs[0].ops]
        assert not any("only a real run" in said for said in dry.assumptions)
        ops.append((real.step.batch_bytes, real.step.head.left_bytes, real.step.embedding_forward.left_bytes))
    assert ops[0] != ops[1], "the two masks are to be told apart by what they leave"


# ---- models without data ---------------------------------------------------------------------------------------------
def test_a_model_is_built_without_its_data() -> None:
    with stowplan.dry():
        model, optimizer = build("llama")
        batch = models.batch_for(0, **SHAPE)
    plan = session.plan(model, batch, budget="1GiB", optimizer=optimizer)
    real = planned("llama")
    assert plan.unplanned.peak_bytes == pytest.approx(real.unplanned.peak_bytes, rel=1e-3)
    assert plan.batch == real.batch
    assert any("was not run" in said for said in plan.assumptions)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = models.llama(num_blocks=3, hidden=64)
    plan = session.plan(model, models.batch_for(0, **SHAPE), budget="1GiB")
    real = session.plan(models.llama(num_blocks=3, hidden=64), models.batch_for(0, **SHAPE), budget="1GiB")
    assert plan.unplanned.peak_bytes == pytest.approx(real.unplanned.peak_bytes, rel=1e-3)


def test_a_model_without_data_cannot_be_run() -> None:
    with stowplan.dry():
        model = models.llama()
    with pytest.raises(InvalidArgument, match=r"dry=False, but the model has no data .* leave dry= out"):
        session.plan(model, models.batch_for(0), budget="1GiB", dry=False)


PLAN_OF_8B = """
import resource, sys
from pathlib import Path
import transformers, torch, stowplan
config = transformers.LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, use_cache=False)
with stowplan.dry():
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    tokens = torch.zeros(1, int(sys.argv[1]), dtype=torch.long)
try:
    plan = stowplan.plan(model, {"input_ids": tokens, "labels": tokens}, optimizer=optimizer, hardware="h100-sxm")
    print(plan.unplanned.peak_bytes, plan.prediction.peak_bytes, plan.budget_bytes, plan.least_budget_bytes)
except stowplan.InfeasibleBudget as error:
    print(error.least_bytes, error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def run_plan_of_8b(length: int) -> tuple[str, int]:
    """What it printed, and the highest resident memory in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN_OF_8B, str(length)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    *said, resident = done.stdout.strip().splitlines()
    return "\n".join(said), int(resident)


@pytest.mark.slow
def test_llama_3_8b_at_8k_tokens_for_an_h100() -> None:
    said, resident = run_plan_of_8b(8192)
    unplanned, predicted, budget, least = map(int, said.split())
    assert least < predicted <= budget < unplanned
    assert resident < 4 * 2**20


@pytest.mark.slow
def test_llama_3_8b_at_128k_tokens_does_not_fit_an_h100() -> None:
    said, resident = run_plan_of_8b(131072)
    least = int(said.split()[0])
    logits = 131072 * 128256 * 4
    assert least > 2 * logits, "fp32 logits and their gradient alone exceed the device"
    assert "the least feasible budget is" in said
    assert resident < 4 * 2**20


# ---- what only a run would know --------------------------------------------------------------------------------------
class Branching(nn.Module):
    """Looks at its activations."""

    def __init__(self, look: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        self.look(x)
        return x.sum()


def test_a_guess_is_told_with_its_place() -> None:
    plan = session.plan(Branching(lambda x: x.sum().item()), torch.randn(4, 8), budget="1GiB", dry=True)
    (said,) = [said for said in plan.assumptions if "only a real run" in said]
    assert said.startswith("test_dry.py:")


def test_a_shape_that_depends_on_unknown_values_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"nonzero.* at test_dry\.py:\d+ .* plan on the device"):
        session.plan(Branching(lambda x: x.nonzero()), torch.randn(4, 8), budget="1GiB", dry=True)


def test_a_shape_that_depends_on_known_values_is_right() -> None:
    with building():
        mask = torch.tensor([True, False, True])
        assert mask.nonzero().shape == (2, 1)
        assert torch.arange(3)[mask].tolist() == [0, 2]


def test_known_values_follow_in_place_ops_and_views() -> None:
    with building():
        x = torch.zeros(4)
        x[1:].add_(2)
        assert x.tolist() == [0, 2, 2, 2]


def test_values_written_over_by_unknown_ones_are_forgotten() -> None:
    known = Known()
    with building(), DryMode(known=known):
        x = torch.zeros(4)
        view = x[:2]
        assert known.twin_of(view) is not None
        view.copy_(torch.rand(2))
        assert known.twin_of(x) is None
        assert known.twin_of(view) is None


def test_known_values_are_copies() -> None:
    """An in-place op on a buffer in a dry step must not reach the model's own."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    session.plan(model, torch.randn(8, 4), loss_fn=lambda y, _: y.sum(), budget="1GiB", dry=True)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# ---- the mode --------------------------------------------------------------------------------------------------------
def test_live_bytes_rise_and_fall_with_storages() -> None:
    with building(), DryMode() as watch, DryLog(watch) as log:
        x = torch.empty(100)
        y = x[10:]
        del x
        log.mark("half")
        assert watch.live_bytes == 400, "a view keeps its storage"
        del y
        torch.empty(50)
    assert [(s.start_bytes, s.peak_bytes, s.end_bytes) for s in log.segments] == [(0, 400, 400), (400, 400, 0)]


def test_an_op_that_is_too_large_is_estimated_and_told() -> None:
    cpu = torch.device("cpu")
    probes = Probes(cpu, preset("h100-sxm"))
    probes._max_bytes = 1000
    with building(), DryMode(probes) as watch:
        small = torch.ones(10)
        small.add(1)
        assert not probes.guesses
        torch.ones(1000)
    (said,) = probes.guesses
    assert "was not tried" in said
    assert watch.seconds > 0


def test_scratch_is_measured() -> None:
    """bf16 plus fp32 casts one operand into scratch."""
    with building(), DryMode(Probes(torch.device("cpu"), preset("h100-sxm"))) as watch:
        a, b = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000)
        a.add(b)
        assert watch.last.workspace_bytes == 4000


# ---- the self-test ---------------------------------------------------------------------------------------------------
def test_the_self_test_passes_here() -> None:
    assert self_test.largest_difference() < self_test.TOLERANCE / 10


def test_the_self_test_notices_what_it_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "_joins_gradients", lambda *_: False)
    self_test.largest_difference.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"self-test differs from a real step by \d+\.\d% .* without dry="):
            plan = planned("llama", dry=True)
    finally:
        self_test.largest_difference.cache_clear()
    assert any("not to be relied on" in said for said in plan.assumptions)
