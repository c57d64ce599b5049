"""Which kernel ``scaled_dot_product_attention`` takes on a GPU, and the ops around it.

The choice is ``select_sdp_backend`` of torch's ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, the ops around
it are ``scaled_dot_product_attention`` of ``aten/src/ATen/native/transformers/attention.cpp`` (torch 2.13): a build
without CUDA has neither, and would take the math path for every call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.nn import functional

__all__ = ["CudaTarget", "Kernel", "attention_kernel", "scaled_dot_product_attention"]

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256
_CUDNN_MAX_HEAD_DIM, _CUDNN_MAX_HEAD_DIM_HOPPER = 128, 256
_MASK_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaTarget:
    """The GPU that is not there.

    ``capability`` is the compute capability. ``cudnn_attention``: torch prefers cuDNN's attention on 9.0 and 10.0 if
    it has cuDNN newer than 9.15 and ``TORCH_CUDNN_SDPA_DEPRIORITIZED`` is not set; the wheels since torch 2.11 do.
    """

    capability: tuple[int, int] = (9, 0)
    cudnn_attention: bool = True

    @property
    def prefers_cudnn(self) -> bool:
        wanted = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED", "0").lower() not in {"1", "on", "y", "yes", "true"}
        return self.cudnn_attention and wanted and self.capability in {(9, 0), (10, 0)}


class Kernel(Enum):
    """A backend of scaled_dot_product_attention."""

    CUDNN = "cudnn"
    FLASH = "flash"
    EFFICIENT = "efficient"
    MATH = "math"


def attention_kernel(
    target: CudaTarget,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    grouped: bool,
) -> Kernel:
    """The first kernel, in torch's order of preference, that takes these tensors (batch, heads, tokens, head_dim)."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or 0 in (query.shape[-2], key.shape[-2]):
        return Kernel.MATH
    batch = query.shape[0] == key.shape[0] == value.shape[0]
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    heads = same_heads or (grouped and query.shape[1] % key.shape[1] == 0 and key.shape[1] == value.shape[1])
    if not batch or not heads or any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (query, key, value)):
        return Kernel.MATH
    if target.prefers_cudnn and _cudnn_takes(target, query, key, value, dropout):
        return Kernel.CUDNN
    if mask is None and _flash_takes(target, query, key, value, dropout, is_causal):
        return Kernel.FLASH
    if same_heads and _efficient_takes(target, query, key, value):
        return Kernel.EFFICIENT
    return Kernel.MATH


def _cudnn_takes(target: CudaTarget, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, drop: float) -> bool:
    most = _CUDNN_MAX_HEAD_DIM_HOPPER if target.capability == (9, 0) else _CUDNN_MAX_HEAD_DIM
    return (
        torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and query.dtype in _HALF
        and all(t.shape[-1] <= most and t.shape[-1] % 8 == 0 for t in (query, value))
        and key.shape[-2] > 1
        and not (query.shape[-2] == 1 and drop > 0)
    )


def _flash_takes(
    target: CudaTarget, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, drop: float, is_causal: bool
) -> bool:
    head_dim = query.shape[-1]
    small_caches = (8, 6) <= target.capability <= (8, 9) or target.capability >= (12, 0)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and (8, 0) <= target.capability <= (12, 1)
        and query.dtype in _HALF
        and head_dim == key.shape[-1] == value.shape[-1] <= _FLASH_MAX_HEAD_DIM
        and not (small_caches and training and (192 < head_dim <= 224 or (head_dim > 224 and drop > 0)))
        and not (is_causal and query.shape[-2] != key.shape[-2])
    )


def _efficient_takes(target: CudaTarget, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    half = query.dtype in _HALF
    dtypes = {torch.float16, torch.float32} | ({torch.bfloat16} if target.capability >= (8, 0) else set())
    alignment = (8 if half else 4) if target.capability >= (8, 0) else (8 if half else 1)
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and query.dtype in dtypes
        and query.shape[-1] == key.shape[-1]
        and all(t.shape[-1] % alignment == 0 for t in (query, value))
    )


def scaled_dot_product_attention(
    target: CudaTarget,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Dispatch the ops that torch would dispatch on ``target``."""
    kernel = attention_kernel(target, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    mask = _additive(attn_mask, query)
    needs_statistics = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if kernel is Kernel.CUDNN:
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, mask, needs_statistics, dropout_p, is_causal, False, scale=scale
        )[0]
    if kernel is Kernel.FLASH:
        head_dim = query.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        padded = [functional.pad(t, (0, -head_dim % 8)) if head_dim % 8 else t for t in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :head_dim] if head_dim % 8 else out
    if kernel is Kernel.EFFICIENT:
        bias = None if mask is None else _aligned(mask.expand(*query.shape[:3], key.shape[2]))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_statistics, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    outside, inside = (torch.scalar_tensor(v, dtype=query.dtype, device=query.device) for v in (-torch.inf, 0.0))
    return torch.where(mask, inside, outside)


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """A bias whose rows begin at multiples of 16 elements."""
    tokens = bias.shape[-1]
    if tokens % _MASK_ALIGNMENT:
        return functional.pad(bias, (0, _MASK_ALIGNMENT - tokens % _MASK_ALIGNMENT))[..., :tokens]
    return bias.contiguous() if any(stride % _MASK_ALIGNMENT for stride in bias.stride()[:-1]) else bias
