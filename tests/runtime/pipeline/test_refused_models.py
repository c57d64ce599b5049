"""Models that stages cannot compute are refused when they are split, by name and with what to do; never wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from stowplan.core.errors import UnsupportedModel
from stowplan.runtime.pipeline.stages import split
from tests.runtime.pipeline.pieces import batch_of, build, staged_step
from tests.zoo import ZOO


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor, extra: Any = None) -> torch.Tensor:
        return torch.tanh(self.inner(hidden)) + (extra if isinstance(extra, torch.Tensor) else 0)


class Toy(nn.Module):
    """An embedding, layers, a head, and ways to do what pipelines cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.run(self.embedding(input_ids), input_ids))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class EmbeddingToLayers(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        embedded = hidden
        for layer in self.layers:
            hidden = layer(hidden, embedded)
        return hidden


class EmbeddingToHead(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().run(hidden, ids) + hidden


class SkipConnection(Toy):
    """From the first layer to the last, as in a U-Net."""

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](hidden)
        return self.layers[3](self.layers[2](self.layers[1](first)), first)  # type: ignore[no-any-return]


class SkipWithoutGradient(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](hidden)
        return self.layers[3](self.layers[2](self.layers[1](first)), first.detach())  # type: ignore[no-any-return]


class TableForAllLayers(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16), requires_grad=False)

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        table = self.table.exp()
        for layer in self.layers:
            hidden = layer(hidden, table)
        return hidden


class TokensForLayers(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, (ids % 2)[..., None])
        return hidden


class NormBetweenLayers(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = self.norm(layer(hidden))
        return hidden


class ObjectForLayers(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        shared = object()
        for layer in self.layers:
            hidden = layer(hidden, shared)
        return hidden


class DictForLayers(Toy):
    """Empty when the first layer gets it, so that layers can only be meant to fill it."""

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        shared: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            hidden = layer(hidden, shared)
        return hidden


class LayersTwice(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().run(super().run(hidden, ids), ids)


class LayersLeftOut(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](hidden))  # type: ignore[no-any-return]


class LayersAtRandom(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if float(torch.rand(())) < 2:
                hidden = layer(hidden)
        return hidden


class SequenceFirst(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().run(hidden.transpose(0, 1), ids).transpose(0, 1)


class Two(Layer):
    def forward(self, hidden: torch.Tensor, extra: Any = None) -> Any:
        return super().forward(hidden), hidden


class LayersGiveTwo(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Two() for _ in range(4)])

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        before = hidden
        for layer in self.layers:
            hidden, before = layer(hidden + before)
        return hidden


class ListsOfModules(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.same = list(self.layers)


class ReplacedForward(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.forward  # type: ignore[method-assign]


class CheckpointsAround(Toy):
    gradient_checkpointing = True


MORE = "depends on more than the hidden state"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (EmbeddingToLayers, rf"EmbeddingToLayers, stage 1 of 2: \[0\]\[1\] of layers.2 {MORE}"),
        (EmbeddingToHead, rf"EmbeddingToHead, stage 1 of 2: \['logits'\] of the output {MORE}"),
        (SkipConnection, rf"\[0\]\[1\] of layers.3 {MORE}"),
        (SkipWithoutGradient, rf"\[0\]\[1\] of layers.3 {MORE}"),
        (TableForAllLayers, rf"\[0\]\[1\] of layers.2 {MORE}"),
        (TokensForLayers, rf"\[0\]\[1\] of layers.2 {MORE}"),
        (NormBetweenLayers, "norm.weight is used between layers"),
        (ObjectForLayers, r"layers.2 is called with \[0\]\[1\], a object"),
        (DictForLayers, r"layers.2 is called with \[0\]\[1\], a dict"),
        (LayersTwice, r"once each and in order \(layers.0 is call 4\)"),
        (LayersLeftOut, "calls 2 of its 4 layers"),
        (LayersAtRandom, "random numbers are drawn between layers.*layerdrop=0"),
        (SequenceFirst, r"hidden state of \(batch, sequence, width\)"),
        (LayersGiveTwo, "more than the first item"),
        (ListsOfModules, "same holds modules outside torch's registry.*ModuleList"),
        (ReplacedForward, "its forward was replaced on the instance"),
        (CheckpointsAround, "gradient checkpoints around its layers.*gradient_checkpointing_disable"),
    ],
)
def test_what_stages_cannot_compute(kind: Callable[[], Toy], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        split(kind(), 2)


@pytest.mark.parametrize(
    "kind", [EmbeddingToLayers, EmbeddingToHead, SkipConnection, TableForAllLayers, NormBetweenLayers]
)
def test_on_the_meta_device(kind: Callable[[], Toy]) -> None:
    with pytest.raises(UnsupportedModel):
        split(kind().to("meta"), 2)


def test_what_stays_within_a_stage_is_none_of_their_business() -> None:
    model = SkipConnection()
    stages = split(model, 2, layers=(1, 3))
    batch = batch_of()
    torch.manual_seed(7)
    whole = model(**batch)["loss"]
    assert torch.equal(staged_step(stages, batch, count=1).losses[0], whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "T5ForConditionalGeneration is an encoder and decoder"),
        ("convnext", "several stacks of layers|cannot be run with"),
        ("vit", "cannot be run with input_ids.*sequence of modules"),
        ("albert", r"no ModuleList or Sequential.*give split\(\) a sequence"),
    ],
)
def test_models_of_other_kinds(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        split(ZOO[name].build("eager"), 2)


def test_several_stacks() -> None:
    model = Toy()
    model.more = nn.ModuleList([Layer() for _ in range(4)])
    with pytest.raises(UnsupportedModel, match=r"several stacks of layers \(layers, more\)"):
        split(model, 2)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_router_logits"])
def test_outputs_of_all_layers(option: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{option}=True asks for outputs of all layers"):
        split(build("mixtral", **{option: True}), 2)
    stage = split(build("mixtral"), 2)[0]
    with pytest.raises(UnsupportedModel, match=f"stage 0 of 2: {option}=True"):
        stage(None, batch_of() | {option: True})


def test_layerdrop() -> None:
    with pytest.raises(UnsupportedModel, match="layerdrop=0"):
        split(build("opt", layerdrop=0.1), 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_models() -> None:
    with pytest.raises(UnsupportedModel, match="compiled"):
        split(torch.compile(build("llama"), backend="eager"), 2)  # type: ignore[arg-type]
    model = build("llama")
    model.model.layers[1].compile(backend="eager")  # type: ignore[union-attr, index, operator]
    with pytest.raises(UnsupportedModel, match="compiled"):
        split(model, 2)


def test_parameters_on_several_devices() -> None:
    model = Toy()
    model.head.to("meta")
    with pytest.raises(UnsupportedModel, match="parameters on cpu, meta"):
        split(model, 2)


def test_a_part_that_was_not_read_when_split() -> None:
    class Conditional(Toy):
        def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            hidden = super().run(hidden, ids)
            return hidden + self.embedding(ids) if ids.shape[1] > 8 else hidden

    stages = split(Conditional(), 2)
    with pytest.raises(UnsupportedModel, match=r"stage 1 of 2: embedding.weight is read"):
        stages[1](torch.randn(2, 12, 16), batch_of(2))


class SkipInLongBatches(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result = super().run(hidden, ids)
        return result + hidden if ids.shape[1] > 8 else result


class ExtraInLongBatches(Toy):
    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](hidden)
        extra = first if ids.shape[1] > 8 else None
        return self.layers[3](self.layers[2](self.layers[1](first)), extra)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "what"), [(SkipInLongBatches, "the output"), (ExtraInLongBatches, "an argument of layers.3")]
)
def test_what_passes_between_stages_in_real_batches_only(kind: Callable[[], Toy], what: str) -> None:
    stage = split(kind(), 2)[1]
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match=f"stage 1 of 2: {what} {MORE}"):
            stage(torch.randn(2, 12, 16), batch_of(2))
    assert all(not module._forward_pre_hooks for module in stage.modules())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    with pytest.raises(UnsupportedModel, match=r"wrapped by DistributedDataParallel.*data parallelism to its stages"):
        split(DistributedDataParallel(build("llama")), 2)
    model = Toy()
    model.layers[1] = DistributedDataParallel(model.layers[1])
    with pytest.raises(UnsupportedModel, match=r"layers.1 is wrapped by DistributedDataParallel"):
        split(model, 2)
    with pytest.raises(UnsupportedModel, match=r"1 is wrapped by DistributedDataParallel"):
        split([nn.Linear(2, 2), DistributedDataParallel(nn.Linear(2, 2))], 2)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning", "ignore:.*FullyShardedDataParallel:FutureWarning")
def test_sharded_models() -> None:
    with pytest.raises(UnsupportedModel, match="sharded by FullyShardedDataParallel"):
        split(FullyShardedDataParallel(build("llama"), device_id=torch.device("cpu")), 2)
    model = build("llama")
    fully_shard(model.model.layers[0], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))  # type: ignore[union-attr, index]
    with pytest.raises(UnsupportedModel, match=r"fully_shard was called on model.layers.0.*split the model first"):
        split(model, 2)


def test_hidden_states_only() -> None:
    """A layer of a sequence that gives something else than a tensor."""
    stages = split([nn.Linear(4, 4), nn.LSTM(4, 4)], 2)
    with pytest.raises(UnsupportedModel, match="stage 1 of 2 gives tuple"):
        stages[1](torch.randn(2, 4))
