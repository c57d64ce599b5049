"""Toy blocks and real models, plans for any of them, and the comparison of a run under a plan with one without.

Every comparison is bit for bit: losses, gradients, parameters, buffers and the random generator's position.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stowplan.core.program import Action
from stowplan.offload.blocks import Block
from stowplan.offload.copies import CopyEngine, PlainCopies
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.intercept import Interception
from stowplan.offload.recording import record_call
from stowplan.offload.tape.course import allowed_actions
from stowplan.offload.tape.run import Counters
from stowplan.offload.tape.tape import Tape

__all__ = [
    "Body",
    "KEEP",
    "NUM_RECORDINGS",
    "NUM_STEPS",
    "POLICIES",
    "RECOMPUTE",
    "ROWS",
    "SLAB_BYTES",
    "SWAP",
    "Stack",
    "Tensors",
    "ToyBlock",
    "WIDTH",
    "actions_of",
    "all_policies",
    "assert_exact",
    "assert_same",
    "assert_toy_is_exact",
    "block_names",
    "call_language_model",
    "call_toy",
    "call_with_input_gradient",
    "choose",
    "collector_off",
    "decide",
    "feed_forward",
    "gradients",
    "make_gpt2",
    "make_llama",
    "num_alive",
    "put_under_plan",
    "rows",
    "stack",
    "tokens",
    "train_toy",
    "views_of_the_input",
    "with_custom_function",
    "with_dropout",
]

KEEP, SWAP, RECOMPUTE = Action.KEEP, Action.SWAP, Action.RECOMPUTE
ROWS, WIDTH = 4, 16
NUM_RECORDINGS = 2  # equal ones in a row, before calls of a signature follow the tape
NUM_STEPS = NUM_RECORDINGS + 2
SLAB_BYTES = 2**22

POLICIES: dict[str, Sequence[Action]] = {
    "swap": (SWAP,),
    "recompute": (RECOMPUTE,),
    "mixed": (SWAP, RECOMPUTE, KEEP),
}
all_policies = pytest.mark.parametrize("policy", POLICIES)

Tensors = list[torch.Tensor]


# ---- plans for any block -------------------------------------------------------------------------------------------
class Planned(NamedTuple):
    """A model with a plan in force. ``decisions`` is what the plan says, by block."""

    model: Any
    engine: Engine
    slab: HostSlab
    decisions: list[dict[str, Action]]


def choose(tape: Tape, policy: str) -> dict[str, Action]:
    """The policy's actions in turn; where one is not allowed, keeping."""
    return {
        tape.values[value].name: wanted if wanted in allowed else KEEP
        for (value, allowed), wanted in zip(allowed_actions(tape).items(), cycle(POLICIES[policy]), strict=False)
    }


def decide(model: nn.Module, names: Sequence[str], policy: str, call: Callable[[Any], Any]) -> list[dict[str, Action]]:
    """Record one call of every block, on a copy of the model, and decide on all that the blocks save."""
    twin = copy.deepcopy(model)
    decisions: dict[str, dict[str, Action]] = {}

    def intercept(name: str) -> None:
        module = twin.get_submodule(name)

        def handle(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            recording = record_call(module, forward, args, kwargs, PlainCopies(HostSlab(1)), Counters())
            decisions[name] = choose(recording.recorder.finish(), policy)
            recording.run.keep_all()
            return recording.output

        Interception(module, handle)

    for name in names:
        intercept(name)
    with torch.random.fork_rng(devices=[]):
        call(twin)
    return [decisions[name] for name in names]


make_copies: Callable[[HostSlab], CopyEngine] = PlainCopies


def put_under_plan(
    model: Any, policy: str, call: Callable[[Any], Any], names: Sequence[str] = (), slab_bytes: int = SLAB_BYTES
) -> Planned:
    names = names or block_names(model)
    decisions = decide(model, names, policy, call)
    slab = HostSlab(slab_bytes)
    blocks = [Block(name, model.get_submodule(name)) for name in names]
    return Planned(model, Engine(model, blocks, decisions, make_copies(slab)), slab, decisions)


def block_names(model: nn.Module) -> list[str]:
    container = {LlamaForCausalLM: "model.layers", GPT2LMHeadModel: "transformer.h"}.get(type(model), "blocks")
    return [f"{container}.{name}" for name, _ in model.get_submodule(container).named_children()]


# ---- models --------------------------------------------------------------------------------------------------------
Body = Callable[[Any, torch.Tensor], torch.Tensor]


class ToyBlock(nn.Module):
    """Two linear layers and whatever ``body`` makes of them. It may look into ``unseen``, which no signature does."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.body = body
        self.unseen: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, body: Body, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(body) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def feed_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(functional.gelu(torch.tanh(block.first(x)) * 2.0)) + x


def with_dropout(block: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.dropout(functional.gelu(block.first(x)), 0.3)
    return functional.dropout(block.second(hidden), 0.2) + x


class SavesItsOutput(torch.autograd.Function):
    """Several ops inside, and the last one's result saved: kept as it is, it would keep its own node alive."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scaled = x * 0.5
        result = torch.exp(torch.sin(scaled))
        other = torch.cos(scaled)
        ctx.save_for_backward(result, other)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        result, other = ctx.saved_tensors
        return gradient * result * other * 0.5


def with_custom_function(block: Any, x: torch.Tensor) -> torch.Tensor:
    return block.second(SavesItsOutput.apply(block.first(x))) + x


def views_of_the_input(block: Any, x: torch.Tensor) -> torch.Tensor:
    left, right = x.view(ROWS, 2, WIDTH // 2).unbind(1)
    return block.second(torch.cat([x[:, : WIDTH // 2].sigmoid() * left.sin(), right.cos()], -1).tanh()) + x


def stack(body: Body, num_blocks: int = 3) -> Stack:
    torch.manual_seed(0)
    return Stack(body, num_blocks)


def rows(num_rows: int = ROWS) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH)


def call_toy(model: Any) -> torch.Tensor:
    return model(rows())


def make_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=32, n_layer=3, n_head=4))


def tokens(seed: int, num_tokens: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 48, (2, num_tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def call_language_model(model: Any) -> Any:
    return model(**tokens(0), use_cache=False)


def call_with_input_gradient(model: Any) -> torch.Tensor:
    return model(rows().requires_grad_())


def gradients(model: nn.Module) -> Tensors:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def state(model: nn.Module) -> Tensors:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


# ---- comparisons ---------------------------------------------------------------------------------------------------
Training = Callable[[Any], Tensors]


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert len(found) == len(expected)
    for position, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert b.isfinite().all(), "a comparison of nothing with nothing"
        assert torch.equal(a, b), f"tensor {position} of {len(found)} differs by {(a - b).abs().max()}"


def assert_exact(
    make: Callable[[], Any], train: Training, policy: str, call: Callable[[Any], Any], names: Sequence[str] = ()
) -> Planned:
    """``train`` gives the same tensors and leaves the same model and generator, with and without a plan."""
    plain_model = make()
    torch.manual_seed(1)
    expected = [*train(plain_model), *state(plain_model), torch.get_rng_state()]
    planned = put_under_plan(make(), policy, call, names)
    torch.manual_seed(1)
    found = [*train(planned.model), *state(planned.model), torch.get_rng_state()]
    assert_same(found, expected)
    assert planned.slab.used_bytes == 0
    return planned


def train_toy(model: Any, num_steps: int = NUM_STEPS) -> Tensors:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    found: Tensors = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(rows()).square().mean()
        loss.backward()
        optimizer.step()
        found += [loss.detach(), *gradients(model)]
    return found


def assert_toy_is_exact(body: Body, policy: str) -> Planned:
    return assert_exact(lambda: stack(body), train_toy, policy, call_toy)


def actions_of(planned: Planned, stem: str) -> list[Action]:
    """What the plan does with the values called ``stem`` in the first block."""
    return [action for name, action in planned.decisions[0].items() if name.split("#")[0] == stem]


@contextmanager
def collector_off() -> Iterator[None]:
    """References alone must free what training leaves behind; ``num_alive`` counts what is made from here on."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def num_alive(*kinds: type) -> int:
    return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())
