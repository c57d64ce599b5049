"""Stages of models: one after the other they are the model, bit for bit, and what cannot be is refused."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.pipeline.stages import Stage, divide, microbatches, split, tie
from tests.runtime.pipeline.pieces import MODELS, NUM_LAYERS, batch_of, build, staged_step, whole_step


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num_stages", "layers"), [(2, None), (3, (1, 4, 1)), (NUM_LAYERS, None)], ids=str)
def test_stages_are_the_model(name: str, num_stages: int, layers: tuple[int, ...] | None) -> None:
    model = build(name)
    stages = split(model, num_stages, layers=layers)
    whole = whole_step(model, batch_of(padded=True))
    assert len(whole.gradients) > 3 * NUM_LAYERS
    assert whole.differs(staged_step(stages, batch_of(padded=True))) == []


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt, narrow embedding", "gptj"])
def test_under_autocast_and_eager_attention(name: str) -> None:
    model = build(name, attn_implementation="eager")
    stages = split(model, 4)
    whole = whole_step(model, batch_of(padded=True), amp=True)
    assert whole.differs(staged_step(stages, batch_of(padded=True), amp=True)) == []
    assert whole.differs(whole_step(model, batch_of(padded=True))) != []


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_stages_in_the_middle_need_no_batch(name: str) -> None:
    model = build(name)
    whole = whole_step(model, batch_of(), count=1)
    assert whole.differs(staged_step(split(model, 3), batch_of(), count=1, middle=False)) == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_of_the_layers(name: str, reentrant: bool) -> None:
    model = build(name)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    stages = split(model, 3)
    assert whole_step(model, batch_of()).differs(staged_step(stages, batch_of())) == []


@pytest.mark.parametrize("name", MODELS)
def test_names_of_parameters_are_the_models(name: str) -> None:
    model = build(name)
    stages = split(model, 4)
    names = [own for stage in stages.values() for own, _ in stage.named_parameters()]
    assert sorted(names) == sorted(own for own, _ in model.named_parameters())
    for stage in stages.values():
        for own, parameter in stage.named_parameters():
            assert parameter is model.get_parameter(own)
    assert {own for stage in stages.values() for own in stage.state_dict()} == set(model.state_dict())


def test_a_stage_without_gradients_gives_the_output_itself() -> None:
    model = build("llama").eval()
    stages = split(model, 2)
    batch = batch_of()
    with torch.no_grad():
        hidden = stages[0](None, batch)
        assert torch.equal(stages[1](hidden, batch), model(**batch).loss)
        output: Any = stages[1](hidden)
        assert torch.equal(output.logits, model(**batch).logits)
        assert not torch.is_tensor(output)
    with pytest.raises(InvalidArgument, match="no scalar loss"):
        stages[1](hidden)


def test_a_loss_of_the_users() -> None:
    model = build("llama", attention_dropout=0.0)

    def loss_fn(output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return output.logits[:, 0].float().square().mean() * inputs["weight"]

    stages = split(model, 2, loss_fn=loss_fn)
    batch = {"input_ids": batch_of()["input_ids"]}
    hidden = stages[0](None, batch)
    expected = loss_fn(model(**batch), {"weight": 3})
    assert torch.equal(stages[1](hidden, {"weight": 3, **batch}), expected)
    with pytest.raises(InvalidArgument, match="what loss_fn gives"):
        split(model, 2, loss_fn=lambda output, _: output.logits)[1](hidden, batch)


@pytest.mark.parametrize("hidden", [None, torch.zeros(1, 2, 32)])
def test_hidden_is_for_all_but_the_first_stage(hidden: torch.Tensor | None) -> None:
    stages = split(build("llama"), 2)
    with pytest.raises(InvalidArgument, match="the first stage takes None"):
        stages[int(hidden is None)](hidden, batch_of())


def test_batches_are_mappings() -> None:
    with pytest.raises(InvalidArgument, match="give a dict of the model's arguments"):
        split(build("llama"), 2)[0](None, batch_of()["input_ids"])


def test_splitting_changes_nothing() -> None:
    model = build("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module), dict(module._forward_hooks)) for name, module in model.named_modules()]
    torch.manual_seed(3)
    split(model, 3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modules == [(name, type(module), dict(module._forward_hooks)) for name, module in model.named_modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_follow() -> None:
    model = build("gpt2", resid_pdrop=0.5)
    stage = split(model, 2)[0]
    assert stage.training
    assert not torch.equal(stage(None, batch_of()), stage(None, batch_of()))
    stage.eval()
    assert torch.equal(stage(None, batch_of()), stage(None, batch_of()))


@pytest.fixture
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_stages_layers_are_freed(device: str) -> None:
    model = build("gpt2").to(device)
    layers = [weakref.ref(layer) for layer in model.transformer.h]  # type: ignore[union-attr, arg-type]
    embedding = weakref.ref(model.transformer.wpe.weight)  # type: ignore[union-attr]
    parameters = [weakref.ref(layer().mlp.c_fc.weight) for layer in layers]  # type: ignore[union-attr, operator]
    stages = split(model, 3, keep=[1])
    del model
    gc.collect()
    assert [layer() is not None for layer in layers] == [False, False, True, True, False, False]
    assert [parameter() is not None for parameter in parameters] == [False, False, True, True, False, False]
    assert embedding() is None
    assert list(stages) == [1]


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gptj"])
def test_nothing_outlives_a_call(name: str) -> None:
    stages = split(build(name), 3)
    for stage in stages.values():
        seen: list[weakref.ref[Any]] = []

        def watch(_: nn.Module, __: Any, output: Any, seen: list[Any] = seen) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            seen.append(weakref.ref(tensor))

        for module in stage.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
                module.register_forward_hook(watch)
        received = None if stage.is_first else torch.randn(2, 12, 32, requires_grad=True)
        held = None if received is None else weakref.ref(received)
        batch = batch_of(2)
        given = stage(received, batch)
        del received
        if held is not None:
            assert held() is not None  # autograd has it
        del given
        assert seen
        assert [reference() for reference in seen] == [None] * len(seen)
        assert held is None or held() is None


@pytest.mark.parametrize("name", MODELS)
def test_stages_on_the_meta_device_have_the_same_parts(name: str) -> None:
    stages, meta = split(build(name), 3), split(build(name).to("meta"), 3)
    for index, stage in stages.items():
        assert list(stage.state_dict()) == list(meta[index].state_dict())
        assert {parameter.device.type for parameter in meta[index].parameters()} == {"meta"}


def test_a_meta_stage_is_moved_without_memory_for_the_others() -> None:
    model = build("llama").to("meta")
    stage = split(model, 3, keep=[1])[1].to_empty(device="cpu")
    assert {tensor.device.type for tensor in (*stage.parameters(), *stage.buffers())} == {"cpu"}
    assert "model.embed_tokens.weight" not in stage.state_dict()
    named = dict(stage.named_buffers())
    assert named["model.embed_tokens.absent_weight"].shape == ()
    stage.to(torch.bfloat16)
    assert stage(torch.randn(2, 12, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_tied_embedding_and_head(name: str) -> None:
    model = build(name, tie_word_embeddings=True)
    embedding = next(own for own, parameter in model.named_parameters() if parameter.shape == (64, 32))
    stages = split(model, 3)
    assert all(stage.tied == {embedding: {0: embedding, 2: "lm_head.weight"}} for stage in stages.values())
    assert split(model, 3, keep=[1])[1].tied == stages[0].tied
    assert stages[0].get_parameter(embedding) is stages[2].get_parameter("lm_head.weight")
    whole = whole_step(model, batch_of(), count=1)
    assert whole.differs(staged_step(stages, batch_of(), count=1)) == []
    # Over several microbatches the sum has another order: head, embedding, head, embedding.
    whole, staged = whole_step(model, batch_of()), staged_step(stages, batch_of())
    assert whole.differs(staged, but=[embedding, "lm_head.weight"]) == []
    torch.testing.assert_close(staged.gradients[embedding], whole.gradients[embedding], rtol=1e-5, atol=1e-7)


def test_tied_again_after_meta() -> None:
    model = build("gpt2", tie_word_embeddings=True).to("meta")
    model.tie_weights()  # type: ignore[operator]
    stages = split(model, 3, keep=[0, 2])
    for stage in stages.values():
        stage.to_empty(device="cpu")
    tie(stages)
    embedding = stages[0].get_parameter("transformer.wte.weight")
    assert embedding.device.type == "cpu"
    assert stages[2].get_parameter("lm_head.weight") is embedding


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [
        (8, 4, [2, 2, 2, 2]),
        (9, 4, [2, 3, 2, 2]),
        (10, 4, [2, 3, 3, 2]),
        (11, 4, [3, 3, 3, 2]),
        (3, 1, [3]),
        (5, 2, [3, 2]),
    ],
)
def test_even_division(num_layers: int, num_stages: int, expected: list[int]) -> None:
    bounds = divide(num_layers, num_stages)
    assert [end - first for first, end in itertools.pairwise(bounds)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": NUM_LAYERS + 1}, f"there are {NUM_LAYERS} layers; give 1 to {NUM_LAYERS}"),
        ({"num_stages": 0}, "give 1 to"),
        ({"num_stages": 2, "layers": (3, 4)}, r"layers=\[3, 4\], 7 in 2 stages; give 2 numbers.*add up to 6"),
        ({"num_stages": 2, "layers": (6, 0)}, "each 1 or more"),
        ({"num_stages": 2, "layers": (2, 2, 2)}, "give 2 numbers"),
        ({"num_stages": 2, "keep": [2]}, r"keep=\[2\]; give stages from 0 to 1"),
        ({"num_stages": 2, "keep": []}, "one at least"),
    ],
)
def test_divisions_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        split(build("llama"), **options)


def test_one_stage_is_the_whole_model() -> None:
    model = build("gpt2")
    stage = split(model, 1)[0]
    assert stage.is_first
    assert stage.is_last
    assert whole_step(model, batch_of()).differs(staged_step({0: stage}, batch_of())) == []


def _sequence() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 2))


@pytest.mark.parametrize("as_list", [False, True])
def test_a_sequence_of_modules(as_list: bool) -> None:
    model = _sequence()
    batch = (torch.randn(4, 3), torch.randn(4, 2))
    stages = split(list(model) if as_list else model, 3, layers=(1, 3, 2), loss_fn=nn.functional.mse_loss)
    staged = staged_step(stages, batch, middle=False)
    torch.manual_seed(7)
    losses = []
    for inputs, target in microbatches(batch, 2):
        loss = nn.functional.mse_loss(model(inputs), target)
        loss.backward()
        losses.append(loss.detach())
    assert all(map(torch.equal, staged.losses, losses))
    assert list(staged.gradients) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(parameter.grad, staged.gradients[name]) for name, parameter in model.named_parameters())  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        hidden = stages[1](stages[0](None, batch[0]))
        assert torch.equal(stages[2](hidden), model(batch[0]))


def test_a_module_twice_in_a_sequence_is_tied() -> None:
    shared = nn.Linear(4, 4)
    stages = split([shared, nn.Tanh(), shared], 3, loss_fn=nn.functional.mse_loss)
    assert stages[1].tied == {"0.weight": {0: "0.weight", 2: "2.weight"}, "0.bias": {0: "0.bias", 2: "2.bias"}}


def test_microbatches_are_views() -> None:
    ids = torch.arange(12).view(6, 2)
    scale = torch.tensor(2.0)
    batch = {"ids": ids, "more": (ids[:, 0], None), "scale": scale, "name": "x"}
    parts = microbatches(batch, 3)
    assert torch.equal(torch.cat([part["ids"] for part in parts]), ids)
    assert [part["ids"].untyped_storage().data_ptr() for part in parts] == [ids.untyped_storage().data_ptr()] * 3
    assert torch.equal(parts[1]["more"][0], ids[2:4, 0])
    assert all(part["scale"] is scale and part["name"] == "x" and part["more"][1] is None for part in parts)


@pytest.mark.parametrize(
    ("batch", "count", "message"),
    [
        (torch.zeros(6, 2), 4, r"a batch of 6 samples has no 4 equal microbatches; give one of \[1, 2, 3, 6\]"),
        (torch.zeros(6, 2), 0, "no 0 equal"),
        ({"a": torch.zeros(6), "b": torch.zeros(4)}, 2, r"\[4, 6\] samples"),
        ({"a": torch.tensor(1)}, 2, "no samples"),
    ],
)
def test_uneven_batches(batch: Any, count: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        microbatches(batch, count)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters() -> None:
    """LoRA: models in models, and parameters without gradients."""
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)  # type: ignore[arg-type]
    stages = split(model, 3)
    whole = whole_step(model, batch_of())
    assert sum(gradient is not None for gradient in whole.gradients.values()) == 2 * NUM_LAYERS + 2
    assert whole.differs(staged_step(stages, batch_of())) == []


class Chained(nn.Module):
    """Its layers are a Sequential, called as one; all take one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
        self.scale = nn.Parameter(torch.ones(8))
        self.unused = nn.Parameter(torch.ones(8))

    def forward(self, input_ids: torch.Tensor, labels: Any = None, use_cache: bool = False) -> dict[str, Any]:
        logits = nn.functional.linear(self.layers(self.embedding(input_ids)) * self.scale, self.embedding.weight)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_layers_in_a_sequential_and_parameters_outside_modules() -> None:
    model = Chained()
    stages = split(model, 2)
    names = [{name for name, _ in stage.named_parameters()} for stage in stages.values()]
    layers = [{f"layers.{n}.{own}" for n in pair for own in ("weight", "bias")} for pair in ((0, 1), (2, 3))]
    assert names[0] == {"embedding.weight", "unused", *layers[0]}
    assert names[1] == {"embedding.weight", "scale", *layers[1]}
    assert stages[0].tied == {"embedding.weight": {0: "embedding.weight", 1: "embedding.weight"}}
    batch = batch_of()
    model(**batch)["loss"].backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    staged = staged_step(stages, batch, count=1).gradients
    torch.testing.assert_close(staged.pop("embedding.weight"), expected.pop("embedding.weight"))
    assert staged.pop("unused") is None
    assert expected.pop("unused") is None
    assert all(torch.equal(staged[name], expected[name]) for name in {*staged, *expected})  # type: ignore[arg-type]


def test_base_attributes() -> None:
    stages: dict[int, Stage] = split(build("llama"), 3, keep=[2, 0])
    assert list(stages) == [0, 2]
    assert (stages[0].is_first, stages[0].is_last, stages[2].is_first, stages[2].is_last) == (True, False, False, True)
    assert (stages[2].index, stages[2].num_stages) == (2, 3)
