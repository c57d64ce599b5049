"""The buffers of training steps, for packing: models of 2 to 32 blocks, everything kept and under plans.

Made by dry capture, so that deep models take no memory. ``benchmarks.packing`` packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
import transformers

import stowplan
from stowplan.core.allocations import AllocationTrace

BLOCKS = (2, 8, 32)
HIDDEN, HEADS, VOCABULARY, BATCH, LENGTH = 512, 8, 8192, 2, 512
PLANNED = 0.3  # of the room between the least budget and that of everything kept


class Step(NamedTuple):
    """One step's buffers, and a name for it."""

    name: str
    trace: AllocationTrace
    device_type: str


def _tokens() -> dict[str, Any]:
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def _llama(num_blocks: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_hidden_layers=num_blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=VOCABULARY,
    )
    return transformers.LlamaForCausalLM(config), {**_tokens(), "use_cache": False}


def _gpt2(num_blocks: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(n_embd=HIDDEN, n_layer=num_blocks, n_head=HEADS, vocab_size=VOCABULARY)
    return transformers.GPT2LMHeadModel(config), {**_tokens(), "use_cache": False}


def _vit(num_blocks: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=num_blocks, num_attention_heads=HEADS
    )
    labels = torch.zeros(BATCH, dtype=torch.long)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.zeros(BATCH, 3, 224, 224),
        "labels": labels,
    }


def _t5(num_blocks: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        d_model=HIDDEN,
        d_ff=4 * HIDDEN,
        num_layers=max(2, num_blocks // 2),  # of each side; one layer is no stack
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config), _tokens()


MODELS: dict[str, Callable[[int], tuple[torch.nn.Module, dict[str, Any]]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "vit": _vit,
    "t5": _t5,
}


def step_traces(models: Collection[str] = tuple(MODELS), blocks: Collection[int] = BLOCKS) -> Iterator[Step]:
    """The buffers of a step of each model at each depth, with everything kept and under a tight plan."""
    for model in models:
        for num_blocks in blocks:
            with stowplan.dry():
                module, batch = MODELS[model](num_blocks)
                optimizer = torch.optim.AdamW(module.train().parameters())
            roomy = stowplan.plan(
                module, batch, budget="1TiB", host_budget="1TiB", optimizer=optimizer, hold_output=False,
                hardware="h100-sxm", allocations=True,
            )  # fmt: skip
            device = roomy.hardware.device_type
            yield Step(f"{model} {num_blocks} kept", stowplan.allocations(roomy, planned=False), device)
            room = roomy.needed_by(roomy.unplanned) - roomy.least_budget_bytes
            tight = stowplan.replan(roomy, budget=roomy.least_budget_bytes + int(room * PLANNED))
            yield Step(f"{model} {num_blocks} planned", stowplan.allocations(tight), device)
