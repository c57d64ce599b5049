"""Fake tensors on a CUDA device that is not there, dispatched as a GPU would be.

Note: what is made believe
    ``cuda_device`` answers autograd's engine; ``cuda_attention`` chooses attention kernels. Here are the rest: autocast
    asks ``torch.cuda`` whether there is a GPU and whether it knows bf16; optimizers take the foreach path on cuda only
    for the plainest types of tensor, of which a fake one is none. The answers hold for the whole process while the
    device is pretended, but concern nothing but tensors on cuda, of which there are none but fake ones.
    ``torch.cuda.is_available()`` stays false: a library that asks takes its road for CPUs (an assumption of a plan).
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.core.errors import InvalidArgument, MissingDependency
from stowplan.offload.dry.cuda_attention import CudaTarget, scaled_dot_product_attention
from stowplan.offload.dry.cuda_device import answering_hooks, device_guard

__all__ = ["CudaTarget", "pretended_cuda"]

_BF16_CAPABILITY = (8, 0)

_lock = threading.RLock()
_targets: list[CudaTarget] = []  # of the thread that holds the lock


@contextmanager
def pretended_cuda(target: CudaTarget | None = None) -> Iterator[None]:
    """Inside, fake tensors may be on cuda although there is none, and ops are dispatched as ``target`` would.

    Forward under autocast, backward and optimizers run under ``FakeTensorMode``. Backward runs in the calling thread.
    On a machine with a GPU nothing is changed. The default target is an H100 with torch's own wheels.

    One thread at a time: a second waits until the first has left. A thread may enter again, for the same target.

    Raises:
        InvalidArgument: entered again for another target.
        MissingDependency: this torch lacks something that is needed; the message names it.
    """
    target = CudaTarget() if target is None else target
    if torch.cuda.is_available():
        yield
        return
    with _lock, ExitStack() as stack:
        if not _targets:
            device_guard()
            stack.enter_context(answering_hooks())
            _patch_python(stack, target)
            stack.enter_context(_attention_of(target))
        elif _targets[-1] != target:
            raise InvalidArgument(f"already pretending {_targets[-1]}; leave that before pretending {target}.")
        _targets.append(target)
        stack.callback(_targets.pop)
        yield


def _patch_python(stack: ExitStack, target: CudaTarget) -> None:
    """Answer in the place of ``torch.cuda``, and let optimizers take fake tensors for ordinary ones."""
    has_bf16 = target.capability >= _BF16_CAPABILITY
    for place, name, answer in (
        (torch.cuda.amp.common, "amp_definitely_not_available", False),
        (torch.cuda, "is_bf16_supported", has_bf16),
        (torch.cuda, "get_device_capability", target.capability),
    ):
        _probe(place, name)
        stack.enter_context(patch.object(place, name, functools.partial(_answer, answer)))
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        place = importlib.import_module(module)  # torch.optim forgets the attribute
        _probe(place, "_foreach_supported_types")
        plain = place._foreach_supported_types
        stack.enter_context(patch.object(place, "_foreach_supported_types", [*plain, FakeTensor]))


def _answer(answer: Any, *_: Any, **__: Any) -> Any:
    return answer


@contextmanager
def _attention_of(target: CudaTarget) -> Iterator[None]:
    """Put the target's choice of attention kernels in the place of torch's, for tensors on cuda."""
    _probe(torch.library, "_scoped_library")
    attention = functools.partial(scaled_dot_product_attention, target)
    with torch.library._scoped_library("aten", "IMPL") as library:
        for key in ("AutogradCUDA", "CUDA"):
            library.impl("scaled_dot_product_attention", attention, key)
        yield


def _probe(place: Any, name: str) -> None:
    if not hasattr(place, name):
        raise MissingDependency(
            f"fake tensors cannot be on cuda with this torch ({torch.__version__}): {place.__name__} has no {name}. "
            "Plan on a machine with a GPU, or install torch 2.13."
        )
