"""The public verbs, as a user meets them: plan, replan, apply, wrap, measure, report."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stowplan
from stowplan.core.hardware import Hardware
from stowplan.core.program import Action
from tests import models

SHAPE = {"batch": 2, "sequence": 128}


@pytest.fixture(scope="module")
def planned() -> stowplan.Plan:
    """A plan with something to do, for the small Llama."""
    model = models.llama(num_blocks=4)
    roomy = stowplan.plan(model, models.batch_for(0, **SHAPE), budget="1GiB", host_budget="1GiB")
    assert roomy.declined
    return stowplan.replan(roomy, budget=(roomy.unplanned.peak_bytes + roomy.least_budget_bytes) // 2)


def steps(model: torch.nn.Module, num_steps: int = 2) -> list[torch.Tensor]:
    return models.train(model, num_steps, **SHAPE)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- plan ----------------------------------------------------------------------------------------------------------
def test_a_plan_survives_its_file_and_is_applied_from_it(planned: stowplan.Plan, tmp_path: Path) -> None:
    planned.save(tmp_path / "plan.json")
    loaded = stowplan.Plan.load(tmp_path / "plan.json")
    assert loaded == planned
    model = models.llama(num_blocks=4)
    with stowplan.apply(loaded, model) as applied:
        assert same(steps(model), steps(models.llama(num_blocks=4)))
    assert applied.counters.swapped_bytes + applied.counters.recomputed_bytes > 0


@pytest.mark.parametrize("argument", ["budget", "host_budget"])
@pytest.mark.parametrize("size", [0.5, "half", -1, "0.5", True, None])
def test_sizes_that_are_no_byte_counts_are_refused(argument: str, size: object) -> None:
    sizes = {"budget": "1GiB", "host_budget": "1GiB", argument: size}
    with pytest.raises(stowplan.InvalidSize, match=argument):
        stowplan.plan(models.llama(), models.batch_for(0), **sizes)  # type: ignore[arg-type]
    with pytest.raises(stowplan.InvalidSize, match=argument):
        stowplan.wrap(models.llama(), **sizes)  # type: ignore[type-var]


def test_a_ratio_is_refused_with_the_reason() -> None:
    with pytest.raises(stowplan.InvalidSize, match="Ratios are refused because"):
        stowplan.plan(models.llama(), models.batch_for(0), budget=0.5)  # type: ignore[arg-type]


def test_an_infeasible_budget_names_the_least_and_that_one_works() -> None:
    model, batch = models.llama(num_blocks=4), models.batch_for(0, **SHAPE)
    with pytest.raises(stowplan.InfeasibleBudget) as caught:
        stowplan.plan(model, batch, budget=1000)
    assert caught.value.budget_bytes == 1000
    assert str(caught.value.least_bytes) in str(caught.value)
    plan = stowplan.plan(model, batch, budget=caught.value.least_bytes)
    assert plan.prediction.peak_bytes <= caught.value.least_bytes


def test_automatic_budgets_are_bytes_of_this_machine() -> None:
    plan = stowplan.plan(models.llama(), models.batch_for(0))
    assert plan.declined
    assert 0 < plan.budget_bytes < 2**50
    assert 0 < plan.host_budget_bytes < 2**50
    assert any("left alone" in assumption for assumption in plan.assumptions)


def test_hardware_of_another_kind_cannot_be_run_on_and_of_the_same_kind_is_used() -> None:
    model, batch = models.llama(), models.batch_for(0)
    with pytest.raises(stowplan.InvalidArgument, match="but the model is on cpu and is to be planned for h100"):
        stowplan.plan(model, batch, hardware="h100-sxm", dry=False)
    with pytest.raises(stowplan.InvalidArgument, match="allowed: a100-sxm"):
        stowplan.plan(model, batch, budget="1GiB", hardware="abacus")
    slow_link = Hardware(
        name="slow link",
        device_type="cpu",
        device_bytes=2**30,
        matmul_flops_per_second=1e12,
        memory_bytes_per_second=1e11,
        to_host_bytes_per_second=1e3,
        to_device_bytes_per_second=1e3,
        origin="made up",
    )
    roomy = stowplan.plan(model, batch, budget="1GiB", hardware=slow_link)
    plan = stowplan.replan(roomy, budget=(roomy.unplanned.peak_bytes + roomy.least_budget_bytes) // 2)
    assert plan.hardware == slow_link
    assert not any(Action.SWAP in actions for actions in plan.decisions)  # at 1 kB/s nobody swaps


def test_batches_of_other_kinds() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    loss = {"loss_fn": lambda output, batch: output.square().mean(), "budget": "1GiB"}
    for batch in (torch.randn(2, 4), (torch.randn(2, 4),), {"input": torch.randn(2, 4)}):
        assert stowplan.plan(model, batch, **loss).step.num_blocks == 2
    with pytest.raises(stowplan.InvalidArgument, match="batch is a set"):
        stowplan.plan(model, {1, 2}, **loss)


def test_blocks_by_name_and_unknown_blocks() -> None:
    model, batch = models.llama(), models.batch_for(0)
    assert stowplan.plan(model, batch, budget="1GiB", blocks="model.layers").step.num_blocks == 3
    with pytest.raises(stowplan.InvalidArgument, match=r"containers of repeated modules: model\.layers"):
        stowplan.plan(model, batch, budget="1GiB", blocks="model.h")


def test_progress_is_told() -> None:
    told: list[str] = []
    stowplan.plan(models.llama(), models.batch_for(0), budget="1GiB", on_progress=told.append)
    assert any("LlamaDecoderLayer" in line for line in told)


# ---- apply ---------------------------------------------------------------------------------------------------------
def test_a_declined_plan_touches_nothing() -> None:
    model = models.llama()
    plan = stowplan.plan(model, models.batch_for(0), budget="1GiB")
    with stowplan.apply(plan, model):
        assert all("forward" not in module.__dict__ for module in model.modules())


def test_hooks_leave_the_module_tree_and_removal_leaves_nothing(planned: stowplan.Plan) -> None:
    model = models.llama(num_blocks=4)
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    attributes = [set(module.__dict__) for module in model.modules()]
    handle = stowplan.apply(planned, model)
    assert stowplan.applied(model) is handle
    steps(model)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    with pytest.raises(stowplan.InvalidArgument, match=r"remove\(\)"):
        stowplan.apply(planned, model)
    handle.remove()
    handle.remove()
    assert stowplan.applied(model) is None
    assert [set(module.__dict__) for module in model.modules()] == attributes


def test_a_plan_for_another_model_is_refused(planned: stowplan.Plan) -> None:
    with pytest.raises(stowplan.PlanMismatch, match=r"GPT2LMHeadModel has no model\.layers\.0"):
        stowplan.apply(planned, models.gpt2())
    with pytest.raises(stowplan.PlanMismatch, match=r"has no model\.layers\.3"):
        stowplan.apply(planned, models.llama(num_blocks=3))
    model = models.llama(num_blocks=4, attention="eager")
    with stowplan.apply(planned, model), pytest.raises(stowplan.PlanMismatch, match="plan anew"):
        steps(model)


def test_a_refused_plan_can_be_followed_by_another(planned: stowplan.Plan) -> None:
    model = models.llama(num_blocks=3)
    with pytest.raises(stowplan.PlanMismatch):
        stowplan.apply(planned, model)
    assert stowplan.applied(model) is None
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_forgotten_handle_and_a_forgotten_model_are_freed(planned: stowplan.Plan) -> None:
    import weakref

    model = models.llama(num_blocks=4)
    gone = weakref.ref(model)
    stowplan.apply(planned, model)
    steps(model)
    del model
    gc.collect()
    assert gone() is None


def test_shorter_and_longer_batches_under_one_plan(planned: stowplan.Plan) -> None:
    def mixed(model: torch.nn.Module) -> list[torch.Tensor]:
        seen = []
        for sequence in (128, 64, 160, 128):
            model.zero_grad()
            model(**models.batch_for(0, batch=2, sequence=sequence)).loss.backward()
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return seen

    model = models.llama(num_blocks=4)
    with stowplan.apply(planned, model), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        seen = mixed(model)
    said = [str(warning.message) for warning in warned]
    assert all("larger batch" in line or "the host slab" in line for line in said)  # 160 tokens may swap more
    assert same(seen, mixed(models.llama(num_blocks=4)))


# ---- wrap ----------------------------------------------------------------------------------------------------------
def test_wrap_plans_at_the_first_batch_and_again_when_batches_grow(planned: stowplan.Plan) -> None:
    model = models.llama(num_blocks=4)
    assert stowplan.wrap(model, budget=planned.budget_bytes) is model
    assert stowplan.applied(model) is None
    assert same(steps(model), steps(models.llama(num_blocks=4)))
    first = stowplan.applied(model)
    assert first is not None
    assert not first.plan.declined
    model(**models.batch_for(0, batch=2, sequence=64)).loss.backward()
    assert stowplan.applied(model) is first
    with pytest.raises(stowplan.InfeasibleBudget):
        model(**models.batch_for(0, batch=4, sequence=256))
    first.remove()
    assert "forward" not in model.__dict__
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_wrap_leaves_evaluation_alone() -> None:
    model = stowplan.wrap(models.llama(), budget="1GiB")
    with torch.no_grad():
        model(**models.batch_for(0))
    assert stowplan.applied(model) is None


def test_wrap_without_a_loss_says_what_it_does_not_count() -> None:
    model = stowplan.wrap(models.llama(), budget="1GiB")
    ids = models.batch_for(0)["input_ids"]
    with pytest.warns(RuntimeWarning, match="outside the model"):
        logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    handle = stowplan.applied(model)
    assert handle is not None
    assert any("outside the model" in assumption for assumption in handle.plan.assumptions)


# ---- measure, report -----------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:a step took:RuntimeWarning")  # gradients are held, which was not planned for
def test_measure_counts_steps_by_the_optimizer(planned: stowplan.Plan) -> None:
    model = models.llama(num_blocks=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stowplan.apply(planned, model), stowplan.measure(model) as measured:
        for _ in range(3):
            for _ in range(2):  # two micro-batches a step
                model(**models.batch_for(0, **SHAPE)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    result = measured.measurement
    assert len(result.step_seconds) == len(result.peak_bytes) == 3
    assert result.swapped_bytes == (2 * planned.prediction.swapped_bytes,) * 3
    assert result.recomputed_bytes == (2 * planned.prediction.recomputed_bytes,) * 3
    text = stowplan.report(planned.with_measurement(result))
    assert "PREDICTED AND MEASURED" in text


def test_measure_without_steps_says_so() -> None:
    measured = stowplan.measure(models.llama())
    with measured:
        pass
    with pytest.raises(stowplan.InvalidArgument, match="ran no step"):
        _ = measured.measurement


def test_measured_peak_counts_gradients_from_before() -> None:
    """Gradients that exist at entry and go at the first zero_grad are counted until then."""
    model = models.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradient_bytes = sum(4 * p.numel() for p in model.parameters())
    batch = models.batch_for(0)

    def peak(set_to_none: bool) -> int:
        model(**batch).loss.backward()
        with stowplan.measure(model) as measured:
            optimizer.zero_grad(set_to_none=set_to_none)
            model(**batch).loss.backward()
            optimizer.step()
        return measured.measurement.peak_bytes[0]

    assert peak(set_to_none=False) > peak(set_to_none=True)
    assert peak(set_to_none=False) - peak(set_to_none=True) < gradient_bytes


def test_a_wrapped_model_is_freed() -> None:
    import weakref

    model = stowplan.wrap(models.llama(), budget="1GiB")
    gone = weakref.ref(model)
    steps(model)
    del model
    gc.collect()
    assert gone() is None


def test_wrapping_twice_or_over_a_plan_is_refused(planned: stowplan.Plan) -> None:
    model = stowplan.wrap(models.llama(num_blocks=4), budget="1GiB")
    with pytest.raises(stowplan.InvalidArgument, match="already"):
        stowplan.wrap(model, budget="1GiB")
    other = models.llama(num_blocks=4)
    stowplan.apply(planned, other)
    with pytest.raises(stowplan.InvalidArgument, match="already"):
        stowplan.wrap(other, budget="1GiB")


def test_a_failed_replan_leaves_the_plan_before_in_force(planned: stowplan.Plan) -> None:
    model, plain = stowplan.wrap(models.llama(num_blocks=4), budget=planned.budget_bytes), models.llama(num_blocks=4)
    assert same(steps(model, 1), steps(plain, 1))
    with pytest.raises(stowplan.InfeasibleBudget):
        model(**models.batch_for(0, batch=4, sequence=256))
    assert same(steps(model), steps(plain))
    handle = stowplan.applied(model)
    assert handle is not None
    assert handle.counters.recomputed_bytes + handle.counters.swapped_bytes > 0


def test_hooks_on_parameters_do_not_run_while_planning() -> None:
    """Optimizers that step in backward hang there; planning must not train."""
    model = models.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p.data.mul_(0.5)))
        parameter.register_hook(calls.append)
    stowplan.plan(model, models.batch_for(0), budget="1GiB")
    assert calls == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(**models.batch_for(0)).loss.backward()
    assert len(calls) == 2 * len(list(model.parameters()))


def test_frozen_lower_layers() -> None:
    """Embedding and first block frozen, the usual fine-tuning: the first block has no backward."""
    model = models.llama(num_blocks=4)
    for parameter in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
        parameter.requires_grad_(False)
    plan = stowplan.plan(model, models.batch_for(0, **SHAPE), budget="1GiB")
    middle = stowplan.replan(plan, budget=(plan.unplanned.peak_bytes + plan.least_budget_bytes) // 2)

    def train(model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        for step in range(4):
            model(**models.batch_for(step, **SHAPE)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = train(model)
    with stowplan.apply(middle, model):
        assert same(train(model), plain)


def test_a_constant_that_nothing_shows_is_caught_by_the_sample() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.sin(self.first(x) * SCALE["scale"]))

    SCALE = {"scale": 1.0}
    model = torch.nn.Sequential(Block(), Block())
    x, loss = torch.randn(8, 16), lambda output, batch: output.square().mean()
    plan = stowplan.plan(model, x, budget="1GiB", loss_fn=loss)
    programs = [plan.step.program_of(block) for block in range(2)]
    recomputed = tuple(
        tuple(Action.RECOMPUTE if Action.RECOMPUTE in p.values[i].actions else Action.KEEP for i in p.saved)
        for p in programs
    )
    assert any(Action.RECOMPUTE in actions for actions in recomputed)
    with stowplan.apply(replace(plan, decisions=recomputed), model):
        for _ in range(3):
            model(x).square().mean().backward()
        SCALE["scale"] = 0.5
        with pytest.raises(stowplan.ReplayMismatch, match="is not what the forward pass had"):
            torch.stack([model(x).square().mean() for _ in range(8)]).sum().backward()
