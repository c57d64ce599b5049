"""What CUDA takes beside the tensors that ops return: kernels' scratch, libraries' workspaces, rounding, the context.

Read from torch's sources (``aten/src/ATen`` and ``c10`` of 2.13 or the nearest version at hand); each rule names its
file. What is not known from a source is called a guess, here and in ``assumptions``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from stowplan.core.units import GIB, MIB, format_bytes
from stowplan.offload.dry.cuda_attention import CudaTarget

__all__ = ["CONTEXT_BYTES", "allocated_bytes", "assumptions", "library_bytes", "workspace_bytes"]

aten = torch.ops.aten

# c10/core/AllocatorConfig.h, kMinBlockSize: every allocation is a multiple of it.
_BLOCK_BYTES = 512

# Context, loaded kernels and driver structures of one process. A guess: 400 to 800 MiB are seen, more with NCCL.
CONTEXT_BYTES = 600 * MIB

# ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: 32 MiB on 9.0, else two of 4 MiB and eight of 16 KiB. Taken
# from torch's allocator at the first matrix product, for each stream, and kept.
_CUBLAS_BYTES_HOPPER = 32 * MIB
_CUBLAS_BYTES = 2 * 4 * MIB + 8 * 16 * 1024
# cuBLASLt works in the same bytes (TORCH_CUBLASLT_UNIFIED_WORKSPACE, on by default in torch's own builds).

_HALF = (torch.float16, torch.bfloat16)
_FLOAT_BYTES = 4

# ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu.
_EMBEDDING_MAX_UNSORTED = 3072
_EMBEDDING_ROWS_PER_THREAD = 10
_SORT_BUFFERS = 4  # keys and values, sorted and double-buffered by cub; a guess for the double buffers


def allocated_bytes(num_bytes: int) -> int:
    """What the caching allocator hands out for a storage of ``num_bytes``."""
    return _rounded(num_bytes, _BLOCK_BYTES)


def library_bytes(target: CudaTarget) -> int:
    """Bytes that cuBLAS and cuBLASLt hold from the first matrix product on, one stream."""
    return _CUBLAS_BYTES_HOPPER if target.capability == (9, 0) else _CUBLAS_BYTES


def workspace_bytes(op: Any, args: Any, result: Any) -> int:
    """Scratch bytes that the CUDA kernel of ``op`` allocates and frees again, at most."""
    rule = _RULES.get(op)
    return 0 if rule is None else rule(args, result)


def assumptions(target: CudaTarget) -> tuple[str, ...]:
    """What a plan rests on that was captured for ``target`` without it, in sentences."""
    capability = ".".join(map(str, target.capability))
    first = "cuDNN, then flash" if target.prefers_cudnn else "flash"
    return (
        f"attention kernels are chosen as torch 2.13 chooses them on compute capability {capability}: {first}, memory-"
        "efficient, math",
        f"cuBLAS and cuBLASLt hold {format_bytes(library_bytes(target))} (torch's defaults, one stream); the CUDA "
        f"context, {format_bytes(CONTEXT_BYTES)} by a guess, is not part of the budget",
        f"scratch of attention and of the embedding's backward follows torch's CUDA sources, that of cuDNN attention "
        f"and of convolutions is a guess, other kernels take none; storages are rounded up to {_BLOCK_BYTES} bytes",
        "libraries that ask torch.cuda.is_available() took their road for machines without a GPU; Triton and other "
        "custom kernels were not reached",
    )


# ---- rules ----------------------------------------------------------------------------------------------------------
def _flash_backward(args: Any, result: Any) -> int:
    """native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: softmax_d, dq_accum, dk and dv of each query head."""
    return _attention_backward_scratch(*args[:4])


def _attention_backward_scratch(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    batch, heads, tokens, head_dim = query.shape
    row_bytes = _FLOAT_BYTES * (1 + (_rounded(head_dim, 32) if head_dim <= 192 else 256))
    accumulated = batch * heads * _rounded(tokens, 128) * row_bytes
    expanded = 0 if key.shape[1] == heads else 2 * batch * heads * key.shape[2] * head_dim * key.element_size()
    copied = 0 if grad.transpose(1, 2).is_contiguous() else _bytes(grad)
    return accumulated + expanded + copied


def _cudnn_backward(args: Any, result: Any) -> int:
    """A guess: cuDNN's own workspace is what flash attention's backward takes."""
    return _attention_backward_scratch(*args[:4])


def _efficient_forward(args: Any, result: Any) -> int:
    """native/transformers/cuda/mem_eff_attention/kernel_forward.h: rows above 128 are accumulated in float."""
    value, out = args[2], result[0]
    return int(out.numel()) * _FLOAT_BYTES if value.shape[-1] > 128 and out.dtype in _HALF else 0


def _efficient_backward(args: Any, result: Any) -> int:
    """native/transformers/cuda/mem_eff_attention/kernel_backward.h: delta, and half gradients accumulated in float."""
    query, key = args[1], args[2]
    batch, heads, tokens, head_dim = map(int, query.shape)
    delta = batch * heads * tokens * _FLOAT_BYTES
    if query.dtype not in _HALF:
        return delta
    row_bytes = _rounded(head_dim, 64) * _FLOAT_BYTES
    rows = _rounded(tokens, 128) + (2 * _rounded(key.shape[2], 128) if head_dim > 128 else 0)
    return delta + batch * heads * rows * row_bytes


def _embedding_backward(args: Any, result: Any) -> int:
    """Sorted indices, and the sums of up to ten rows each in float; the number of distinct tokens is an upper bound."""
    grad, indices, num_weights = args[:3]
    count = indices.numel()
    copied = 0 if grad.is_contiguous() else _bytes(grad)
    if count <= _EMBEDDING_MAX_UNSORTED:
        return copied
    segments = min(count, num_weights)
    sums = (count // _EMBEDDING_ROWS_PER_THREAD + segments) * grad.shape[-1] * max(_FLOAT_BYTES, grad.element_size())
    return int(copied + sums + (_SORT_BUFFERS + 2) * _bytes(indices))


def _index_put(args: Any, result: Any) -> int:
    """native/cuda/Indexing.cu, index_put_with_sort_kernel: linear indices, their order, and cub's buffers."""
    accumulates = args[3] if len(args) > 3 else False
    shapes = [t.shape for t in args[1] if t is not None]
    return int(_SORT_BUFFERS * prod(torch.broadcast_shapes(*shapes)) * 8) if accumulates else 0


def _convolution(args: Any, result: Any) -> int:
    """A guess: cuDNN's workspace is as large as the largest tensor of activations."""
    tensors = [t for t in (*args[:3], *(result if isinstance(result, tuple) else (result,))) if t is not None]
    return min(max(map(_bytes, tensors)), GIB)


_RULES: dict[Any, Callable[[Any, Any], int]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put,
    aten._index_put_impl_.default: _index_put,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution,
}


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
