"""Each attention kernel that a GPU may pick, under random plans: bit for bit as without a plan."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stowplan import session
from tests import models
from tests.plans import random_decisions

pytestmark = pytest.mark.gpu

HEADS_OF_64 = {"hidden": 256}  # flash attention and cuDNN take heads of 64, not of 8
_HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def batch() -> dict[str, Any]:
    made = models.batch_for(0, batch=2, sequence=256)
    return {name: item.cuda() if isinstance(item, torch.Tensor) else item for name, item in made.items()}


def train(model: torch.nn.Module, backend: SDPBackend | None) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[torch.Tensor] = []
    torch.manual_seed(7)
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16), nullcontext() if backend is None else sdpa_kernel(backend):
            loss = model(**batch()).loss
            loss.backward()
        seen += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def check(build: Any, backend: SDPBackend | None, seed: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected = train(build(), backend)
    model = build()
    with torch.autocast("cuda", torch.bfloat16), nullcontext() if backend is None else sdpa_kernel(backend):
        plan = session.plan(model, batch(), budget="8GiB", host_budget="1GiB")
    with session.apply(random_decisions(plan, seed), model, verify="all"):
        found = train(model, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
)
def test_kernels_of_torch(backend: SDPBackend, dropout: float, seed: int) -> None:
    """Those with dropout draw from the device's generator by seed and offset."""

    def build() -> torch.nn.Module:
        model = models.llama(**HEADS_OF_64).cuda()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        return model

    check(build, backend, seed)


@pytest.mark.skipif(not _HAS_FLASH_ATTN, reason="flash-attn is not installed")
@pytest.mark.parametrize("seed", range(4))
def test_flash_attn(seed: int) -> None:
    def build() -> torch.nn.Module:
        model = models.llama(**HEADS_OF_64).cuda()
        model.set_attn_implementation("flash_attention_2")
        return model

    check(build, None, seed)
