"""Seconds by a machine's rates: for a device that is not there, and for ops that are too large to be tried.

A lower bound made likely: every op takes the longer of its arithmetic and its memory traffic, at the share of the
rates that kernels usually reach. Shares for a GPU: matrix products 0.7 of the data sheet's dense rate with
K / (K + 256) for short inner dimensions; attention 0.35 of it forward, 2.5 times the work at 0.85 of that speed
backward (flash attention 2 on an H100); memory 0.85. These are estimates, and plans made from them say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from stowplan.core.hardware import Hardware
from stowplan.offload.dry.mode import Cost

__all__ = ["Datasheet", "roofline_seconds"]

_LAUNCH_SECONDS = {"cpu": 3e-6, "cuda": 4e-6}
_MATMUL_SHARE, _ATTENTION_SHARE, _MEMORY_SHARE = 0.7, 0.35, 0.85
_SHORT_INNER = 256
# Dense rates fall with the width of numbers; data sheets give bf16.
_SLOWDOWN = {torch.float32: 2.0, torch.float64: 16.0}  # float32 by TF32 tensor cores


class Datasheet:
    """Costs on ``machine`` by its rates. ``workspace_bytes(func, args, result)`` knows its kernels' scratch."""

    def __init__(
        self, machine: Hardware, workspace_bytes: Callable[[Any, Any, Any], int] = lambda func, args, result: 0
    ) -> None:
        self.guesses: dict[str, None] = {
            f"seconds are estimates from the rates of {machine.name} ({machine.origin}), nothing was timed": None
        }
        self._machine = machine
        self._workspace_bytes = workspace_bytes

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Cost:
        if all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return Cost()
        seconds = roofline_seconds(self._machine, func, args, kwargs, result)
        return Cost(seconds, self._workspace_bytes(func, args, result))


def roofline_seconds(machine: Hardware, func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """The longer of arithmetic and memory traffic, and the launch."""
    tensors = {id(t): t for t in tree_iter((args, kwargs, result)) if isinstance(t, torch.Tensor)}
    traffic = sum(t.numel() * t.element_size() for t in tensors.values())
    flops = _flops(func, args, kwargs, result)
    memory_share, compute_share = 1.0, 1.0  # measured rates are what kernels reach
    if machine.device_type == "cuda":
        memory_share = _MEMORY_SHARE
        compute_share = _compute_share(func, args)
    arithmetic = flops / (machine.matmul_flops_per_second * compute_share)
    return max(arithmetic, traffic / (machine.memory_bytes_per_second * memory_share)) + _LAUNCH_SECONDS.get(
        machine.device_type, 0.0
    )


def _compute_share(func: Any, args: Any) -> float:
    if "scaled_dot_product" in func._schema.name:
        return _ATTENTION_SHARE * (0.85 if "backward" in func._schema.name else 1.0)
    matrix = next((t for t in args if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
    if matrix is None:
        return 1.0
    inner = matrix.shape[-1]
    return _MATMUL_SHARE / _SLOWDOWN.get(matrix.dtype, 1.0) * inner / (inner + _SHORT_INNER)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = func._schema.name
    if "scaled_dot_product" in name:
        query, key, value = args[1:4] if "backward" in name else args[:3]
        forward = sdpa_flop_count(query.shape, key.shape, value.shape)
        causal = any(
            argument.name == "is_causal" and (kwargs.get("is_causal") or (i < len(args) and args[i] is True))
            for i, argument in enumerate(func._schema.arguments)
        )
        return int(forward * (2.5 if "backward" in name else 1.0) * (0.5 if causal else 1.0))
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
