"""Finding the blocks, by size, name or hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, GPT2Config, GPT2Model, T5Config, T5Model

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.offload.blocks import Block, find_blocks, refuse_unsupported


class TwoStacks(nn.Module):
    """A small encoder, a large decoder, and a ModuleList of unlike things."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.decoder = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))
        self.heads = nn.ModuleList([nn.Linear(64, 64), nn.Embedding(64, 64)])


def names(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


ENCODER, DECODER = [f"encoder.{i}" for i in range(5)], ["decoder.0", "decoder.2", "decoder.3"]


def test_all_stacks_are_found() -> None:
    model = TwoStacks()
    found = find_blocks(model)
    assert names(found) == ENCODER + DECODER
    assert all(model.get_submodule(name) is module for name, module in found)


def test_blocks_of_real_models() -> None:
    gpt2 = GPT2Model(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=3, n_head=2))
    assert names(find_blocks(gpt2)) == ["h.0", "h.1", "h.2"]
    t5 = T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=2))
    encoder, decoder = [f"encoder.block.{i}" for i in range(2)], [f"decoder.block.{i}" for i in range(3)]
    assert names(find_blocks(t5)) == encoder + decoder
    assert names(find_blocks(t5, "encoder.block")) == ["encoder.block.0", "encoder.block.1"]


def test_a_model_that_is_itself_a_stack() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert names(find_blocks(model)) == ["0", "1"]


def test_a_stack_inside_a_block_is_smaller_than_the_stack_of_blocks() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)))
    assert names(find_blocks(model)) == ["0", "1", "2"]


def test_the_layers_of_stages_not_the_stages() -> None:
    """Stages differ in width, so that they are no stack; of each stage all layers are blocks, and nothing in them."""
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 32], depths=[2, 3, 2], num_stages=3))
    layers = [f"encoder.stages.{stage}.layers.{i}" for stage, depth in enumerate([2, 3, 2]) for i in range(depth)]
    assert names(find_blocks(model)) == layers


def test_blocks_of_other_kinds_belong_to_the_stack_they_are_in() -> None:
    class Other(nn.Sequential):
        pass

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), Other(nn.Linear(4, 2)), nn.Linear(4, 4)])})
    assert names(find_blocks(model)) == ["layers.0", "layers.1", "layers.2"]


def test_small_stacks_of_another_kind_are_left_out() -> None:
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(4)),
            "head": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)),
        }
    )
    assert names(find_blocks(model)) == [f"layers.{i}" for i in range(4)]


def test_by_the_names_of_the_containers() -> None:
    assert names(find_blocks(TwoStacks(), "encoder")) == ENCODER
    assert names(find_blocks(TwoStacks(), ["encoder", "heads"])) == [*ENCODER, "heads.0", "heads.1"]
    assert names(find_blocks(TwoStacks(), "heads")) == ["heads.0", "heads.1"]


def test_by_the_modules_in_the_order_given() -> None:
    model = TwoStacks()
    chosen = [model.decoder[3], model.encoder[0]]
    assert find_blocks(model, chosen) == [Block("decoder.3", chosen[0]), Block("encoder.0", chosen[1])]


def test_a_name_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(InvalidArgument, match=r"blocks='layers' is not in the model.*: encoder, decoder\."):
        find_blocks(TwoStacks(), "layers")
    with pytest.raises(InvalidArgument, match=r"containers of repeated modules: none\."):
        find_blocks(nn.Linear(2, 2), "layers")


def test_a_name_without_children() -> None:
    with pytest.raises(InvalidArgument, match=r"blocks='encoder\.0' has no children; name a container of blocks\."):
        find_blocks(TwoStacks(), "encoder.0")


@pytest.mark.parametrize(("modules", "named"), [([], "nothing"), ([nn.Linear(4, 4)], "Linear")])
def test_modules_that_are_not_in_the_model(modules: list[nn.Module], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"blocks= names {named}, which is not in the model"):
        find_blocks(TwoStacks(), modules)


def test_nothing_repeats() -> None:
    with pytest.raises(UnsupportedModel, match=r"^Linear has no ModuleList or Sequential of like modules.*blocks="):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_only_what_cannot_be_followed_is_refused() -> None:
    model = TwoStacks()
    blocks = find_blocks(model)
    refuse_unsupported(model, blocks)
    model.heads[0].forward = torch.compiler.disable(model.heads[0].forward)  # outside the blocks
    refuse_unsupported(model, blocks)
    model.gradient_checkpointing = False
    refuse_unsupported(model, blocks)
    model.encoder[0].gradient_checkpointing = True
    with pytest.raises(UnsupportedModel, match="TwoStacks has gradient checkpointing on"):
        refuse_unsupported(model, blocks)
