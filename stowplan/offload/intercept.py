"""Standing between a module and its forward, without a trace in the module tree or the state dict."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Forward", "Interception"]

Forward = Callable[..., Any]


class Interception:
    """Calls ``handler(forward, args, kwargs)`` wherever ``module.forward(*args, **kwargs)`` is called.

    It sits in the module's ``__dict__`` as ``forward``. A deep copy or a pickle of the module has its plain forward
    again: a copy must never run the original's parameters.
    """

    def __init__(
        self, module: torch.nn.Module, handler: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        self.module = module
        self.handler = handler
        self.forward: Forward = module.forward
        self.replaced = module.__dict__.get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.forward, args, kwargs)

    def remove(self) -> None:
        """Put the module's own forward back. Removing twice does nothing."""
        if self.module.__dict__.get("forward") is not self:
            return
        if self.replaced is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self.replaced

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return types.MethodType(type(self.module).forward, memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return types.MethodType, (type(self.module).forward, self.module)
