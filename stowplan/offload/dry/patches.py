"""What other libraries must not notice while a step is dry, put back afterwards.

Note: what is patched, and why
    - transformers takes a fake tensor for tracing: it would build an explicit mask and give up ``is_causal``.
    - ``copy.deepcopy`` of a fake Parameter would give each of its views a storage of its own.
    - While a model is being built, initialisers that look at what they drew (truncated normal) would not end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["uninitialised", "unnoticed"]


@contextmanager
def unnoticed() -> Iterator[None]:
    """Let code take fake tensors for ordinary ones."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _deep_copy, create=True))
        imports = sys.modules.get("transformers.utils.import_utils")
        if imports is not None and hasattr(imports, "is_fake_tensor"):
            stack.enter_context(patch.object(imports, "is_fake_tensor", lambda *_: False))
        yield


@contextmanager
def uninitialised() -> Iterator[None]:
    """Let models be built without drawing their weights."""
    with ExitStack() as stack:
        for name in dir(torch.nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(patch.object(torch.nn.init, name, _leave))
        modeling = sys.modules.get("transformers.modeling_utils")
        if modeling is not None:
            stack.enter_context(patch.object(modeling.PreTrainedModel, "initialize_weights", lambda *_, **__: None))
        yield


def _leave(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _deep_copy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        with torch.no_grad():
            copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    made: torch.Tensor = memo[id(tensor)]
    return made
