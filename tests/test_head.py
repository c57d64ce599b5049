"""A head in chunks, as a user meets it: planned with consent, recognised or not, applied, taken off."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import stowplan
from stowplan.core.head import Head
from stowplan.offload.capture.outline import Outline
from stowplan.offload.head.chunked import FoundHead, NotReplaceable, try_head
from stowplan.offload.head.loss import _Sums
from tests.plans import example_plan

CLASSES, TOKENS = 2048, 128
# Relative, of a loss and of gradients by norm.
NEAR = {False: 1e-5, True: 1e-2}
PEAK = 0.02


def llama(**settings: Any) -> Any:
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "intermediate_size": 88,
            "vocab_size": CLASSES,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_cache": False,
            **settings,
        }
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def frozen_head() -> Any:
    model = llama()
    model.lm_head.requires_grad_(False)
    return model


def phi_with_a_bias() -> Any:
    config = transformers.PhiConfig(
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        vocab_size=CLASSES,
        num_attention_heads=4,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
    )
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config).train()
    assert model.lm_head.bias is not None
    return model


def batch(seed: int = 0, **more: Any) -> dict[str, Any]:
    ids = torch.randint(CLASSES, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :40] = -100  # whole chunks of them
    return {"input_ids": ids, "labels": labels, **more}


def plan(model: nn.Module, given: Any = None, **settings: Any) -> stowplan.Plan:
    settings = {"budget": "1GiB", "host_budget": "1GiB", "time_limit_seconds": 1.0, **settings}
    return stowplan.plan(model, batch() if given is None else given, **settings)


def tight(model: nn.Module, given: Any = None, **settings: Any) -> stowplan.Plan:
    """A plan within a budget that the model's own head has no plan for."""
    own = plan(model, given, **settings, chunked_head=False)
    assert own.head is None
    return plan(model, given, **settings, budget=own.least_budget_bytes * 2 // 3, chunked_head=True)


@pytest.fixture(scope="module")
def planned() -> stowplan.Plan:
    made = tight(llama())
    assert made.head is not None
    assert made.head.chunk_rows
    return made


def gradients(model: nn.Module, given: dict[str, Any], amp: bool = False) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(**given).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def near(one: list[torch.Tensor], other: list[torch.Tensor], amp: bool = False) -> bool:
    """By the norm of all together: some gradients, such as that of a key's bias, are nothing but rounding."""
    distance = torch.cat([(a - b).flatten() for a, b in zip(one, other, strict=True)]).norm()
    return bool(distance <= NEAR[amp] * torch.cat([b.flatten() for b in other[1:]]).norm())


# ---- under a plan ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "amp"),
    [(llama, False), (llama, True), (tied, False), (frozen_head, True), (phi_with_a_bias, True)],
)
def test_training_is_near_and_the_peak_is_as_predicted(make: Callable[[], Any], amp: bool) -> None:
    model, plain = make(), make()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        made = tight(model, optimizer=optimizer)
    assert made.head is not None
    assert made.head.chunk_rows
    with stowplan.apply(made, model):
        assert near(gradients(model, batch(1), amp), gradients(plain, batch(1), amp), amp)
        model.zero_grad()
        with stowplan.measure(model) as measured:
            for step in range(3):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    output = model(**batch(step))
                output.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    peak_bytes = max(measured.measurement.peak_bytes[1:])
    assert made.prediction.peak_bytes == pytest.approx(peak_bytes, rel=PEAK)
    assert made.unplanned.peak_bytes > 1.5 * peak_bytes


def test_accumulation_and_the_number_of_items_are_the_trainers(planned: stowplan.Plan) -> None:
    model, plain = llama(), llama()
    with stowplan.apply(planned, model):
        for each in (model, plain):
            for micro in range(2):
                each(**batch(micro), num_items_in_batch=torch.tensor(321)).loss.backward()
    assert near([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_fewer_logits_may_be_asked_for(planned: stowplan.Plan) -> None:
    given = batch(logits_to_keep=17)
    given["labels"] = given["labels"][:, -17:]
    model = llama()
    with stowplan.apply(planned, model):
        found = gradients(model, given)
    assert near(found, gradients(llama(), given))


def test_logits_that_are_read_are_an_error_and_evaluation_has_them(planned: stowplan.Plan) -> None:
    model, given = llama(), batch()
    expected = llama()(**given).logits
    with stowplan.apply(planned, model):
        with pytest.raises(stowplan.NoLogits, match="argmax"):
            model(**given).logits.argmax(-1)
        with torch.no_grad():
            assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model.eval()(**given).logits, expected)
        model.train()
    assert torch.equal(model(**given).logits, expected)


def test_a_loss_outside_the_model_may_use_them(planned: stowplan.Plan) -> None:
    model, ids = llama(), batch()["input_ids"]
    target = ids.roll(-1, 1).view(-1)
    expected = F.cross_entropy(llama()(ids).logits.view(-1, CLASSES), target)
    with stowplan.apply(planned, model):
        found = F.cross_entropy(model(ids).logits.view(-1, CLASSES), target)
    assert torch.allclose(found, expected, rtol=NEAR[False])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_the_plain_head(planned: stowplan.Plan, duplicate: Callable[[Any], Any]) -> None:
    model = llama()
    names = set(model.state_dict())
    with stowplan.apply(planned, model):
        assert set(model.state_dict()) == names
        assert isinstance(duplicate(model)(**batch()).logits, torch.Tensor)
    assert "forward" not in model.lm_head.__dict__


def test_wrap_takes_consent_and_goes_with_remove() -> None:
    model = llama()
    least = plan(model).least_budget_bytes
    stowplan.wrap(model, budget=least * 2 // 3, host_budget="1GiB", chunked_head=True)
    assert near(gradients(model, batch()), gradients(llama(), batch()))
    handle = stowplan.applied(model)
    assert handle is not None
    assert handle.plan.head is not None
    assert handle.plan.head.chunk_rows
    handle.remove()
    assert isinstance(model(**batch()).logits, torch.Tensor)


def test_a_plan_for_another_head_is_a_mismatch(planned: stowplan.Plan) -> None:
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(32, CLASSES))
    with pytest.raises(
        stowplan.PlanMismatch, match="the head of LlamaForCausalLM, lm_head, in chunks, but it is a Sequential"
    ):
        stowplan.apply(planned, model)


def with_a_forward_of_its_own(model: Any) -> Any:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * 2
    return model


def with_a_hook(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [(with_a_hook, "but it has hooks"), (with_a_forward_of_its_own, "but it has a forward of its own")],
)
def test_what_stands_on_the_head_by_now_is_a_mismatch(
    planned: stowplan.Plan, change: Callable[[Any], Any], said: str
) -> None:
    with pytest.raises(stowplan.PlanMismatch, match=said):
        stowplan.apply(planned, change(llama()))


# ---- whether it is planned -------------------------------------------------------------------------------------------
def test_without_consent_nothing_is_replaced_and_the_error_says_what_it_would_bring(planned: stowplan.Plan) -> None:
    with pytest.raises(stowplan.InfeasibleBudget, match="chunked_head=True") as told:
        plan(llama(), budget=planned.budget_bytes)
    assert "lm_head and the loss in chunks of 32 rows" in told.value.advice
    assert "less; not bit for bit the same" in told.value.advice
    assert f"({planned.least_budget_bytes} bytes)" in told.value.advice
    with pytest.raises(stowplan.InfeasibleBudget) as told:
        plan(llama(), budget=planned.budget_bytes, chunked_head=False)
    assert "chunked_head" not in told.value.advice


def test_a_report_says_what_it_brings_or_would(planned: stowplan.Plan) -> None:
    assert "The head (lm_head and its loss) is computed in chunks of 32 rows" in stowplan.report(planned)
    assert any(said.startswith("the head is replaced: lm_head") for said in planned.assumptions)
    own = plan(llama())
    squeezed = plan(llama(), budget=(own.least_budget_bytes + own.unplanned.peak_bytes) // 2)
    assert squeezed.prediction.peak_moment == "head"
    assert squeezed.head is not None
    assert (squeezed.head.chunk_rows, squeezed.head.allowed) == (0, False)
    assert "What would help: chunked_head=True (--chunked-head)" in " ".join(stowplan.report(squeezed).split())
    model = llama()
    with stowplan.apply(squeezed, model):
        assert isinstance(model(**batch()).logits, torch.Tensor)


def test_the_ways_are_weighed_again_for_another_budget(planned: stowplan.Plan) -> None:
    assert planned.head is not None
    again = stowplan.replan(planned, budget=planned.budget_bytes)
    assert (again.head, again.step) == (planned.head, planned.step)
    slow = tuple(
        replace(way, head=replace(way.head, seconds=9.0)) if way.chunk_rows else way for way in planned.head.ways
    )
    head = replace(planned.head, ways=slow)
    roomy = stowplan.replan(replace(planned, head=head, step=slow[1].within(planned.step)), budget="1GiB")
    assert roomy.head is not None
    assert roomy.head.chunk_rows == 0
    assert roomy.declined
    assert roomy.step == planned.head.own.within(planned.step)
    assert roomy.least_budget_bytes == planned.least_budget_bytes
    with pytest.raises(stowplan.InfeasibleBudget) as told:
        stowplan.replan(roomy, budget=1000)
    assert told.value.least_bytes == roomy.least_budget_bytes


def of_the_head(plan: stowplan.Plan) -> list[str]:
    return [said.partition(":")[0] for said in plan.assumptions if "the head" in said]


def test_a_plan_for_another_budget_says_what_it_rests_on(planned: stowplan.Plan) -> None:
    assert planned.head is not None
    proved = "the head's loss and gradients in chunks were proved within tolerance"
    assert of_the_head(planned) == ["the head is replaced", proved]
    slow = tuple(
        replace(way, head=replace(way.head, seconds=9.0)) if way.chunk_rows else way for way in planned.head.ways
    )
    step = slow[1].within(planned.step)
    roomy = stowplan.replan(replace(planned, head=replace(planned.head, ways=slow), step=step), budget="1GiB")
    assert of_the_head(roomy) == ["the head is not replaced", proved]
    assert of_the_head(stowplan.replan(roomy, budget=planned.budget_bytes)) == ["the head is replaced", proved]


def test_a_reason_why_it_stays_stays() -> None:
    ids = torch.randint(256, (2, 16))
    made = plan(hooked().train(), {"input_ids": ids, "labels": ids}, chunked_head=True)
    assert stowplan.replan(made, budget="2GiB").assumptions == made.assumptions


def test_a_budget_that_is_given_leaves_no_memory_alone() -> None:
    made = plan(llama(), budget="auto", chunked_head=False)
    (reserved,) = [said for said in made.assumptions if "left alone" in said]
    again = stowplan.replan(made, budget="1GiB")
    assert again.assumptions == tuple(said for said in made.assumptions if said != reserved)


def test_a_dry_plan_prices_it_too(planned: stowplan.Plan) -> None:
    with stowplan.dry():
        model = llama()
    made = plan(model, budget=planned.budget_bytes, chunked_head=True)
    assert made.head is not None
    assert made.head.chunk_rows == 32
    assert made.prediction.peak_bytes == pytest.approx(planned.prediction.peak_bytes, rel=PEAK)
    assert any("were not compared, as nothing was run" in said for said in made.assumptions)


# ---- what is not recognised ------------------------------------------------------------------------------------------
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def gemma2_soft_capped() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0))


def granite() -> nn.Module:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=8.0))


def cohere() -> nn.Module:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL))


def small_llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def hooked() -> nn.Module:
    model = small_llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    return model


class Biased(nn.Linear):
    """Adds a bias of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def patched() -> nn.Module:
    return with_a_forward_of_its_own(small_llama())


def subclassed() -> nn.Module:
    model = small_llama()
    model.lm_head = Biased(32, 256, bias=False)
    return model


def bias_after_the_head() -> nn.Module:
    model = small_llama()
    loss = model.loss_function
    model.loss_function = lambda logits, **kwargs: loss(logits=logits + torch.ones(256), **kwargs)
    return model


def smoothed() -> nn.Module:
    model = small_llama()
    model.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(
        logits.view(-1, 256), labels.view(-1), label_smoothing=0.1
    )
    return model


def two_losses() -> nn.Module:
    model = small_llama()
    loss = model.loss_function
    model.loss_function = lambda **kwargs: loss(**kwargs) + loss(**kwargs)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (gemma2_soft_capped, "Gemma2ForCausalLM does this with its logits before the loss: truediv"),
        (granite, "GraniteForCausalLM does this with its logits before the loss: truediv"),
        (cohere, "CohereForCausalLM does this with its logits before the loss: mul"),
        (hooked, "lm_head has hooks"),
        (patched, "lm_head has a forward of its own"),
        (subclassed, "lm_head is a Biased, not a torch.nn.Linear"),
        (bias_after_the_head, "does this with its logits before the loss: add"),
        (smoothed, "does this with its logits before the loss: cross_entropy with class weights, label smoothing"),
        (two_losses, "computed 2 cross entropies from 1 calls of lm_head; there must be one of one"),
    ],
)
def test_heads_that_are_no_plain_linear_cross_entropy_stay(make: Callable[[], nn.Module], reason: str) -> None:
    ids = torch.randint(256, (2, 16))
    made = plan(make().train(), {"input_ids": ids, "labels": ids}, chunked_head=True)
    assert made.head is None
    assert [said for said in made.assumptions if said.startswith("the head is not replaced: ") and reason in said]


def test_why_it_stays_is_told_where_nothing_fits() -> None:
    ids = torch.randint(256, (2, 16))
    with pytest.raises(stowplan.InfeasibleBudget, match="The head is not replaced: GraniteForCausalLM"):
        plan(granite().train(), {"input_ids": ids, "labels": ids}, budget=1000, chunked_head=True)


def test_a_head_that_is_off_by_too_much_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stowplan.offload.head.chunked.TOLERANCES", {torch.float32: 1e-12})
    made = plan(llama(), chunked_head=True)
    assert made.head is None
    assert any("off (relative), and 1e-12 is allowed for torch.float32" in said for said in made.assumptions)


def without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    add = _Sums.add

    def add_but_to_bias(sums: _Sums, *args: Any) -> None:
        add(sums, *args)
        assert sums.of_bias is not None
        sums.of_bias.zero_()

    monkeypatch.setattr(_Sums, "add", add_but_to_bias)


def without_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Sums, "_add_to_weight", lambda *args: None)


@pytest.mark.parametrize(
    ("make", "sabotage", "what"), [(tied, without_weight, "weight"), (phi_with_a_bias, without_bias, "bias")]
)
def test_gradients_of_the_layer_are_proved(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    sabotage: Callable[[pytest.MonkeyPatch], None],
    what: str,
) -> None:
    sabotage(monkeypatch)
    made = plan(make(), chunked_head=True)
    assert made.head is None
    assert any(f"in chunks its gradient of {what} is 1.0e+00 off" in said for said in made.assumptions)


def test_a_layer_without_a_gradient_is_not_replaced() -> None:
    model = small_llama()
    loss = model.loss_function
    model.loss_function = lambda logits, **kwargs: loss(logits=logits.detach().requires_grad_(), **kwargs)
    ids = torch.randint(256, (2, 16))
    with pytest.raises(NotReplaceable, match="the loss does not depend on the hidden states of lm_head"):
        try_head(model, FoundHead("lm_head", model.lm_head), lambda use: use(model(ids, labels=ids).loss), dry=False)


# How allocators fail: of a device, and of the host.
FAILURES = [torch.OutOfMemoryError("out"), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 1")]


@pytest.fixture
def squeezed_bytes() -> int:
    """A budget with which nothing is replaced unasked, but the head is looked at."""
    own = plan(llama(), chunked_head=False)
    return (own.least_budget_bytes + own.unplanned.peak_bytes) // 2


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("while_comparing", [True, False])
def test_no_memory_to_compare_is_no_end_of_planning(
    monkeypatch: pytest.MonkeyPatch, squeezed_bytes: int, error: Exception, while_comparing: bool
) -> None:
    measure, seen = Outline.measure, list[int]()

    def fails(*args: Any) -> Any:
        seen.append(1)
        if while_comparing or len(seen) > 1:
            raise error
        return measure(*args)

    if while_comparing:
        monkeypatch.setattr("stowplan.offload.head.chunked._gradients", fails)
    else:
        monkeypatch.setattr(Outline, "measure", fails)
    assert plan(llama(), budget=squeezed_bytes).head is None
    assert seen
    seen.clear()
    made = plan(llama(), budget=squeezed_bytes, chunked_head=True)
    assert made.head is None
    assert any(said.endswith("more memory than there is: plan dry (dry=True)") for said in made.assumptions)


class OwnModel(nn.Module):
    """No transformers: the widest linear layer is the head, the loss is the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def next_token_loss(logits: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, CLASSES), given["ids"][:, 1:].reshape(-1))


def test_models_and_losses_of_ones_own_are_recognised() -> None:
    given = {"ids": torch.randint(CLASSES, (2, TOKENS))}
    torch.manual_seed(0)
    model = OwnModel()
    made = tight(model, given, loss_fn=next_token_loss)
    assert made.head is not None
    assert (made.head.module, made.head.chunk_rows) == ("out", 32)
    expected = next_token_loss(model(**given), given)
    with stowplan.apply(made, model):
        assert torch.allclose(next_token_loss(model(**given), given), expected, rtol=NEAR[False])


# ---- the plan file ---------------------------------------------------------------------------------------------------
def test_a_plan_file_has_the_head(planned: stowplan.Plan) -> None:
    assert stowplan.Plan.from_json(planned.to_json()) == planned
    assert stowplan.Plan.from_json(example_plan().to_json()).head is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: head.update(chunk_rows=7), r"\$.head.chunk_rows: 7 is none of the ways"),
        (lambda head: head.update(allowed=False), r"\$.head.chunk_rows: 32 is none of the ways that are allowed"),
        (lambda head: head.update(ways=head["ways"][1:]), r"\$.head.ways: chunk_rows are \[32\]; expected: 0 first"),
        (lambda head: head.update(chunk_rows=0), r"the phases of \$.step are not those of the chosen way"),
        (lambda head: head.update(rows=1), r"\$.head: unknown key 'rows'"),
        (
            lambda head: head["ways"][0].update(
                gaps=[{"block": 3, "forward": head["ways"][0]["head"], "backward": head["ways"][0]["head"]}]
            ),
            r"\$.head.ways\[0\].gaps: 3 is not a later block of 3",
        ),
    ],
)
def test_a_damaged_head_is_named(planned: stowplan.Plan, change: Callable[[Any], None], said: str) -> None:
    plain = json.loads(planned.to_json())
    change(plain["head"])
    with pytest.raises(stowplan.InvalidPlanFile, match=said):
        stowplan.Plan.from_json(json.dumps(plain))


def test_the_lowest_way_stands_for_chunks_where_none_is_chosen(planned: stowplan.Plan) -> None:
    assert isinstance(planned.head, Head)
    lower = replace(planned.head.chunked, chunk_rows=1, head=replace(planned.head.chunked.head, peak_bytes=1))
    head = replace(planned.head, ways=(*planned.head.ways, lower))
    assert head.chunked.chunk_rows == 32
    assert replace(head, chunk_rows=0).chunked == lower
