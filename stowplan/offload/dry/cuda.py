"""Fake tensors on a CUDA device that is not there, dispatched as a GPU would be.

Note: what is made believe
    ``cuda_device`` answers autograd's engine; ``cuda_attention`` chooses attention kernels. Here are the rest: autocast
    asks ``torch.cuda`` whether there is a GPU and whether it knows bf16; optimizers take the foreach path on cuda only
    for the plainest types of tensor, of which a fake one is none. The answers hold for the whole process while the
    device is pretended, but concern nothing but tensors on cuda, of which there are none but fake ones.
    ``torch.cuda.is_available()`` stays false: a library that asks takes its road for CPUs (an assumption of a plan).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.core.errors import MissingDependency
from stowplan.offload.dry.cuda_attention import CudaTarget, scaled_dot_product_attention
from stowplan.offload.dry.cuda_device import answering_hooks, device_guard

__all__ = ["CudaTarget", "pretended_cuda", "target_of"]

_BF16_CAPABILITY = (8, 0)
# By the beginning of a machine's name.
_CAPABILITIES = {"a100": (8, 0), "l40": (8, 9), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}

_lock = threading.RLock()
_targets: list[CudaTarget] = []  # of the thread that holds the lock


def target_of(machine: str) -> CudaTarget:
    """The GPU of the machine called that, such as ``"a100-sxm"``; an H100 if the name says nothing."""
    name = machine.lower()
    known = (capability for gpu, capability in _CAPABILITIES.items() if name.startswith(gpu))
    return CudaTarget(capability=next(known, CudaTarget().capability))


@contextmanager
def pretended_cuda(target: CudaTarget | None = None) -> Iterator[None]:
    """Inside, fake tensors may be on cuda although there is none, and ops are dispatched as ``target`` would.

    Forward under autocast, backward and optimizers run under ``FakeTensorMode``. Backward runs in the calling thread.
    On a machine with a GPU nothing is changed. The default target is an H100 with torch's own wheels.

    One thread at a time: a second waits until the first has left. A thread may enter again; the innermost target holds.

    Raises:
        MissingDependency: this torch lacks something that is needed; the message names it.
    """
    target = CudaTarget() if target is None else target
    if torch.cuda.is_available():
        yield
        return
    with _lock, ExitStack() as stack:
        _targets.append(target)
        stack.callback(_targets.pop)
        if len(_targets) == 1:
            device_guard()
            stack.enter_context(answering_hooks())
            _patch_python(stack)
            stack.enter_context(_attention_kernels())
        yield


def _patch_python(stack: ExitStack) -> None:
    """Answer in the place of ``torch.cuda``, and let optimizers take fake tensors for ordinary ones."""
    answers: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: _targets[-1].capability >= _BF16_CAPABILITY),
        (torch.cuda, "get_device_capability", lambda *_, **__: _targets[-1].capability),
    )
    for place, name, answer in answers:
        _probe(place, name)
        stack.enter_context(patch.object(place, name, answer))
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        place = importlib.import_module(module)  # torch.optim forgets the attribute
        _probe(place, "_foreach_supported_types")
        supported = place._foreach_supported_types  # the list itself: imports may add to it meanwhile
        supported.append(FakeTensor)
        stack.callback(supported.remove, FakeTensor)


@contextmanager
def _attention_kernels() -> Iterator[None]:
    """Put the target's choice of attention kernels in the place of torch's, for tensors on cuda."""
    _probe(torch.library, "_scoped_library")
    with torch.library._scoped_library("aten", "IMPL") as library:
        for key in ("AutogradCUDA", "CUDA"):
            library.impl("scaled_dot_product_attention", _attend, key)
        yield


def _attend(*args: Any, **kwargs: Any) -> Any:
    return scaled_dot_product_attention(_targets[-1], *args, **kwargs)


def _probe(place: Any, name: str) -> None:
    if not hasattr(place, name):
        raise MissingDependency(
            f"fake tensors cannot be on cuda with this torch ({torch.__version__}): {place.__name__} has no {name}. "
            "Plan on a machine with a GPU, or install a torch of a version that was tried (2.11 to 2.15)."
        )
