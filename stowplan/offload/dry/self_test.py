"""Dry against real, on a small model: does this build of torch do what dry capture takes for granted?"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention, silu

from stowplan.core.hardware import Hardware
from stowplan.core.program import StepProgram
from stowplan.offload.blocks import find_blocks
from stowplan.offload.dry.probes import Probes
from stowplan.offload.dry.run import DryRun
from stowplan.offload.tape.rng import restored

__all__ = ["TOLERANCE", "largest_difference"]

# What dry capture promises of every peak.
TOLERANCE = 0.02

_WIDTH, _HEADS, _LENGTH = 64, 4, 256
# Rates serve ops that are too large to be tried; none is here.
_ANY_RATES = Hardware(
    name="self-test",
    device_type="cpu",
    device_bytes=1 << 30,
    matmul_flops_per_second=1e11,
    memory_bytes_per_second=1e10,
    to_host_bytes_per_second=1e10,
    to_device_bytes_per_second=1e10,
)


class _Block(nn.Module):
    """Attention and an MLP: residuals whose gradients meet, dropout, a gate, a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.gate = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.up = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.down = nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + dropout(mixed, 0.1, self.training)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        y = x * scale
        result: torch.Tensor = x + self.down(silu(self.gate(y)) * self.up(y))
        return result


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(_WIDTH, 128, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = 1.5 * x + 2.5 * x + 3.5 * x  # three gradients meet, and nothing else sets the peak of this part
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


@cache
def largest_difference() -> float:
    """The largest relative difference of a dry peak from the real one, on the CPU; about a second, once a process.

    Forward and backward of a block, the parts around the blocks, and an AdamW step, in fp32 and under bf16 autocast.
    """
    cpu = torch.device("cpu")
    with restored([cpu]), torch.random.fork_rng([]):
        model = _Model().train()
        tokens = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) % 128
        optimizer = torch.optim.AdamW(model.parameters())
        differences = []
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                real = _peaks(_captured(model, tokens, optimizer, None))
                with DryRun(model, tokens, cpu, Probes(cpu, _ANY_RATES)) as run:
                    dry = _peaks(_captured(model, run.batch, optimizer, run))
            differences += [abs(a / b - 1) for a, b in zip(dry, real, strict=True)]
    return max(differences)


def _captured(
    model: nn.Module, tokens: torch.Tensor, optimizer: torch.optim.Optimizer, run: DryRun | None
) -> StepProgram:
    from stowplan.offload.capture.step import capture

    def loss_of(output: Any) -> torch.Tensor:
        loss: torch.Tensor = output
        return loss

    return capture(
        model,
        find_blocks(model),
        lambda: model(tokens),
        loss_of,
        optimizer=optimizer,
        batch=tokens,
        instruments=run,
    ).step


def _peaks(step: StepProgram) -> list[int]:
    blocks = [peak for p in step.programs for peak in (p.forward_peak_bytes, p.backward_peak_bytes, p.saved_bytes)]
    phases = (step.embedding_forward, step.head, step.embedding_backward, step.optimizer_step)
    return [*blocks, *(step.static_bytes + phase.peak_bytes for phase in phases)]
