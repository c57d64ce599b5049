"""Plans that split values by rows: bit for bit as without a plan, and within the predicted bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import stowplan
from stowplan import session
from stowplan.core.plan import Plan
from stowplan.core.program import Action, Decision, Split
from stowplan.offload.tape import proof
from stowplan.offload.tape.replay import Replay
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.simulate import simulate
from tests import models, zoo
from tests.offload.splits import random_splits
from tests.offload.test_exactness import assert_same
from tests.plans import in_full, with_decisions
from tests.zoo import ZOO

SHAPE = {"batch": 2, "sequence": 32}


class Case(NamedTuple):
    build: Callable[[], torch.nn.Module]
    batch: Callable[[int], dict[str, Any]]
    train: Callable[[torch.nn.Module, bool], list[torch.Tensor]]


def _of_models(build: Callable[[], torch.nn.Module], **shape: int) -> Case:
    return Case(
        build,
        lambda step: models.batch_for(step, **shape),
        lambda model, amp: models.train(model, amp=amp, **shape),
    )


def _of_zoo(name: str) -> Case:
    specimen = ZOO[name]
    return Case(
        lambda: specimen.build(specimen.attentions[0]),
        specimen.batch,
        lambda model, amp: zoo.train(specimen, model, amp),
    )


CASES = {
    "llama": _of_models(models.llama, **SHAPE),
    "llama, one sequence": _of_models(models.llama, batch=1, sequence=48),
    "gpt2": _of_models(models.gpt2, **SHAPE),
    "gpt2, one sequence": _of_models(models.gpt2, batch=1, sequence=48),
    **{name: _of_zoo(name) for name in ("bert", "vit", "neox", "t5")},
}
each_case = pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
each_model = pytest.mark.parametrize("name", CASES)


@cache
def plain_run(name: str, amp: bool) -> list[torch.Tensor]:
    return CASES[name].train(CASES[name].build(), amp)


@cache
def captured(name: str, amp: bool = False) -> Plan:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return session.plan(CASES[name].build(), CASES[name].batch(0), budget="1GiB", host_budget="1GiB")


def check(name: str, amp: bool, plan: Plan, verify: str = "sample") -> None:
    model = CASES[name].build()
    with session.apply(plan, model, verify=verify) as applied:
        seen = CASES[name].train(model, amp)
    assert_same(seen, plain_run(name, amp))
    assert applied.counters.departures == 0


# ---- any split is exact ----------------------------------------------------------------------------------------------
def random_plans(number: int) -> Any:
    return settings(
        max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None
    )


@each_case
@each_model
@random_plans(4)
@given(seed=st.integers(0, 2**31))
def test_random_splits(name: str, amp: bool, seed: int) -> None:
    note(f"seed {seed}")
    check(name, amp, random_splits(captured(name, amp), seed))


@pytest.mark.full
@pytest.mark.timeout(14400)
@each_model
@random_plans(in_full(125))
@given(seed=st.integers(0, 2**31), amp=st.booleans())
def test_many_random_splits(name: str, seed: int, amp: bool) -> None:
    check(name, amp, random_splits(captured(name, amp), seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_that_failed_may_be_tried_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is handed out before all of its rows are there."""
    model, plan = CASES["llama"].build(), random_splits(captured("llama"), seed)
    fails = [False]
    replay = Replay.__call__

    def flaky(self: Replay, *args: Any) -> Any:
        if fails.pop():
            fails.append(False)
            raise RuntimeError("no memory left for this")
        fails.append(False)
        return replay(self, *args)

    monkeypatch.setattr(Replay, "__call__", flaky)

    def gradients(retries: int) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**CASES["llama"].batch(0)).loss
        for _ in range(retries):
            fails[0] = True
            with pytest.raises(RuntimeError, match="no memory left"):
                loss.backward(retain_graph=True)
            model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(0)
    with session.apply(plan, model, verify="off"):
        for retries in (0, 0, 1, 2):
            assert_same(gradients(retries), expected)


@pytest.mark.parametrize(("name", "seed"), [("llama", 1), ("gpt2", 2)])
def test_every_byte_of_what_was_split_can_be_verified(name: str, seed: int) -> None:
    check(name, False, random_splits(captured(name), seed), verify="all")


@pytest.mark.parametrize(("name", "num_made", "fewest"), [("llama", 16, 12), ("gpt2", 21, 11), ("vit", 16, 9)])
def test_what_can_be_recomputed_by_rows(name: str, num_made: int, fewest: int) -> None:
    """Norms, projections and the whole MLP; not what is around attention, where heads come before tokens in memory."""
    program = captured(name).step.programs[0]
    made = [program.values[i] for i in program.saved if program.values[i].producer is not None]
    by_rows = [value for value in made if value.splits]
    assert len(made) == num_made
    assert len(by_rows) >= fewest
    assert all(rows % 16 == 0 and 0 < rows < value.num_rows for value in by_rows for rows in value.splits)


def test_all_of_llama_but_attention_is_recomputed_by_any_multiple_of_16_rows() -> None:
    program = captured("llama").step.programs[0]
    made = [program.values[i] for i in program.saved if program.values[i].producer is not None]
    assert {value.name for value in made if value.splits != (16, 32, 48)} == {
        "self_attn.add",
        "self_attn.add#2",
        "self_attn._scaled_dot_product_flash_attention_for_cpu",
        "self_attn._scaled_dot_product_flash_attention_for_cpu.1",
    }


def test_attention_is_recomputed_by_rows_within_one_sequence() -> None:
    def splits(name: str) -> set[tuple[int, ...]]:
        program = captured(name).step.programs[0]
        return {program.values[v].splits for op in program.ops if op.causal_attention for v in op.outputs}

    assert splits("llama, one sequence") == {(16, 32)}
    assert splits("llama") == {()}


def test_the_input_is_swapped_by_rows_alone() -> None:
    program = captured("llama").step.programs[0]
    (first,) = (program.values[i] for i in program.saved if program.values[i].producer is None)
    assert (first.num_rows, first.splits) == (64, ())


# ---- bytes -----------------------------------------------------------------------------------------------------------
def counted(plan: Plan) -> dict[Action, int]:
    total = dict.fromkeys(Action, 0)
    for block, chosen in enumerate(plan.decisions):
        program = plan.step.program_of(block)
        for index, decision in zip(program.saved, chosen, strict=True):
            for action, size in program.values[index].bytes_by_action(decision).items():
                total[action] += size
    return total


def positions_bytes(plan: Plan) -> int:
    """Where the generator stood as a block that draws began and ended: held until backward, in no prediction."""
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    drawing = [p for p in programs if any("bernoulli" in op.name for op in p.ops)]
    return 2 * len(drawing) * torch.get_rng_state().nbytes


@each_model
def test_peak_and_bytes_are_no_more_than_predicted(name: str) -> None:
    case = CASES[name]
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters())
    roomy = session.plan(model, case.batch(0), budget="1GiB", host_budget="1GiB", optimizer=optimizer)
    for seed in range(3):
        plan = random_splits(roomy, seed)
        problem = Problem(step=plan.step, hardware=plan.hardware, budget_bytes=2**30, host_budget_bytes=2**30)
        predicted = simulate(problem, plan.decisions)
        with session.apply(plan, model), session.measure(model) as measured:
            for step in range(4):
                model(**case.batch(step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        found = measured.measurement
        expected = counted(plan)
        assert found.peak_bytes[-1] <= predicted.peak_bytes + positions_bytes(plan)
        assert found.swapped_bytes[-1] == expected[Action.SWAP] == predicted.swapped_bytes
        assert found.recomputed_bytes[-1] == expected[Action.RECOMPUTE] == predicted.recomputed_bytes


# ---- every order of forwards and backwards ---------------------------------------------------------------------------
def gradients(model: torch.nn.Module, drive: Callable[[torch.nn.Module], None]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    drive(model)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    loss: torch.Tensor = model(**models.batch_for(step, **SHAPE)).loss
    return loss


def accumulated(model: torch.nn.Module) -> None:
    for step in range(2):
        _loss(model, step).backward()


def first_in_first_out(model: torch.nn.Module) -> None:
    losses = [_loss(model, step) for step in range(3)]
    for loss in losses:
        loss.backward()


def last_in_first_out(model: torch.nn.Module) -> None:
    losses = [_loss(model, step) for step in range(3)]
    for loss in reversed(losses):
        loss.backward()


def twice(model: torch.nn.Module) -> None:
    loss = _loss(model, 0)
    loss.backward(retain_graph=True)
    loss.backward()


def in_parts(model: torch.nn.Module) -> None:
    """The graph of the last blocks is used before that of the first ones, and some of it is dropped."""
    hidden = model(**models.batch_for(0, **SHAPE), output_hidden_states=True).hidden_states
    torch.autograd.grad(hidden[2].sum(), hidden[1], retain_graph=True)
    hidden[1].sum().backward()


def dropped(model: torch.nn.Module) -> None:
    _loss(model, 0)
    _loss(model, 1).backward()


def of_another_size(model: torch.nn.Module) -> None:
    """Splits of 64 rows say nothing of 96, or of 20."""
    for batch, sequence in ((3, 32), (2, 10), (2, 32)):
        model(**models.batch_for(0, batch, sequence)).loss.backward()


@pytest.mark.parametrize(
    "drive", [accumulated, first_in_first_out, last_in_first_out, twice, in_parts, dropped, of_another_size]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*host slab:RuntimeWarning", "ignore:.*larger batch:RuntimeWarning")
def test_every_order(name: str, drive: Callable[[torch.nn.Module], None]) -> None:
    expected = gradients(CASES[name].build(), drive)
    for seed in range(2):
        model = CASES[name].build()
        with session.apply(random_splits(captured(name), seed), model):
            for _ in range(3):
                assert_same(gradients(model, drive), expected)


@pytest.mark.parametrize("seed", range(3))
def test_copies_beside_compute(seed: int) -> None:
    plan = random_splits(captured("llama"), seed)
    hardware = replace(plan.hardware, overlapped_copies=True, staging_blocks=2)
    check("llama", False, replace(plan, hardware=hardware))


# ---- what the engine makes of a plan ---------------------------------------------------------------------------------
def split_all(plan: Plan, recomputed: int, swapped: int) -> Plan:
    """Every value that can be is split so, the others are kept."""

    def choose(value: Any) -> Decision:
        return Split(recomputed=recomputed, swapped=swapped) if recomputed in value.splits else Action.KEEP

    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    return with_decisions(plan, tuple(tuple(choose(p.values[i]) for i in p.saved) for p in programs))


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where first rows do not come out as in the whole."""
    captured("llama")
    monkeypatch.setattr(proof, "_agrees", lambda *compared: False)


@pytest.mark.usefixtures("another_machine")
def test_rows_that_differ_on_this_machine_are_swapped_with_their_value() -> None:
    plan = split_all(captured("llama"), 16, 0)
    model = models.llama()
    said = r"model\.layers\.\d: the first rows of .* and 7 more do not come out .* KiB more on the host than planned"
    with session.apply(plan, model) as applied, pytest.warns(RuntimeWarning, match=said) as warned:
        seen = CASES["llama"].train(model, False)
    assert len(warned) == plan.step.num_blocks
    assert_same(seen, plain_run("llama", False))
    programs = [plan.step.program_of(block) for block in range(plan.step.num_blocks)]
    sizes = [p.values[i].size_bytes for p, d in zip(programs, plan.decisions, strict=True)
             for i, decision in zip(p.saved, d, strict=True) if isinstance(decision, Split)]  # fmt: skip
    assert applied.counters.swapped_bytes == 3 * sum(sizes)
    assert applied.counters.recomputed_bytes == 0


def test_what_is_kept_of_a_value_is_no_more_than_its_rows() -> None:
    """Between forward and backward: kept rows on the device, swapped ones on the host, recomputed ones nowhere."""
    plan = split_all(captured("llama"), 16, 32)
    expected = counted(plan)
    model = models.llama()
    with session.apply(plan, model) as applied:
        model(**models.batch_for(0, **SHAPE)).loss.backward()
    assert applied.counters.swapped_bytes == expected[Action.SWAP] > 0
    assert applied.counters.recomputed_bytes == expected[Action.RECOMPUTE] == expected[Action.SWAP] // 2


# ---- plans that need not be exact ------------------------------------------------------------------------------------
@torch.library.custom_op("stowplan_tests::rounded", mutates_args=(), tags=(torch.Tag.pointwise,))
def rounded(x: torch.Tensor) -> torch.Tensor:
    """Its last bits depend on the number of rows, as a kernel's may that chooses its blocks by shape."""
    return x * (1 + 1e-6 * x.numel() / (x.numel() + 100))


@rounded.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    (saved,) = ctx.saved_tensors
    return gradient * (1 + 0 * saved)


rounded.register_autograd(_backward, setup_context=_setup)


class RoundedBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rounded(self.linear(x)).sin()  # type: ignore[no-any-return]


class RoundedModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(RoundedBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def plan_rounded(**how: Any) -> Plan:
    stowplan.allow_replay(rounded)
    return session.plan(RoundedModel(), torch.ones(1, 64, 16), budget="1GiB", host_budget="1GiB", **how)


def splits_of_rounded(plan: Plan) -> tuple[int, ...]:
    program = plan.step.programs[0]
    (found,) = (program.values[i].splits for i in program.saved if "rounded" in program.values[i].name)
    return found


def test_rows_that_are_rounded_otherwise_are_split_only_where_that_is_allowed() -> None:
    exact, loose = plan_rounded(), plan_rounded(exact=False)
    assert splits_of_rounded(exact) == ()
    assert splits_of_rounded(loose) == (16, 32, 48)
    assert splits_of_rounded(plan_rounded(exact=False, tolerance=1e-9)) == ()
    assert not any("not bitwise" in said for said in exact.assumptions)
    assert any("not bitwise" in said and "1e-05" in said for said in loose.assumptions)
    assert (loose.exact, loose.tolerance) == (False, None)
    assert Plan.from_json(loose.to_json()) == loose


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_such_a_plan_trains_within_rounding(verify: str) -> None:
    def losses(model: torch.nn.Module) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(4):
            loss = model(torch.randn(1, 64, 16, generator=generator))
            loss.backward()
            found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return found

    plan = split_all(plan_rounded(exact=False), 16, 16)
    assert any(isinstance(decision, Split) for chosen in plan.decisions for decision in chosen)
    model = RoundedModel()
    with session.apply(plan, model, verify=verify) as applied:
        found = losses(model)
    torch.testing.assert_close(found, losses(RoundedModel()), rtol=1e-4, atol=1e-6)
    assert applied.counters.recomputed_bytes > 0
    assert applied.counters.departures == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tolerance": 1e-3}, "goes with exact=False"),
        ({"exact": False, "tolerance": 0.0}, "not between 0 and 1"),
        ({"exact": False, "tolerance": 1.5}, "not between 0 and 1"),
        ({"exact": False, "tolerance": float("nan")}, "not between 0 and 1"),
    ],
)
def test_tolerances_that_cannot_be(how: dict[str, Any], said: str) -> None:
    with pytest.raises(stowplan.InvalidArgument, match=said):
        session.plan(models.llama(), models.batch_for(0), **how)
    with pytest.raises(stowplan.InvalidArgument, match=said):
        stowplan.wrap(models.llama(), **how)
