"""Standing between a module and its forward, without a trace in the module tree or the state dict."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Forward", "Interception"]

Forward = Callable[..., Any]
Handler = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Calls ``handler(forward, args, kwargs)`` wherever ``module.forward(*args, **kwargs)`` is called.

    It sits in the module's ``__dict__`` as ``forward``. A deep copy or a pickle of the module has its plain forward
    again: a copy must never run the original's parameters. Several may stand on one module and go in any order.
    """

    def __init__(self, module: torch.nn.Module, handler: Handler) -> None:
        self.module = module
        self.handler: Handler | None = handler
        # torch.compile around the model breaks its graph here; what runs inside stays eager.
        self._call: Handler = torch.compiler.disable(handler)
        self.forward: Forward = module.forward
        self.replaced = module.__dict__.get("forward")
        # Who asks for the forward's signature (trainers do) is to see the module's own.
        self.__signature__ = inspect.signature(self.forward)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.forward, args, kwargs)

    @property
    def __func__(self) -> Forward:
        """As a bound method's: who replaces ``forward`` by a function of the module's (Accelerate) calls this."""
        return lambda module, *args, **kwargs: self(*args, **kwargs)

    @property
    def __wrapped__(self) -> Forward:
        """What it stands before, for who takes wrappers off again (Accelerate's ``unwrap_model``)."""
        return self.forward

    def remove(self) -> None:
        """Put the module's own forward back. Removing twice does nothing.

        While another stands in front of it, this one only lets calls through; it goes when the other does.
        """
        self.handler = None
        self._call = _pass_on
        top = self.module.__dict__.get("forward")
        while isinstance(top, Interception) and top.handler is None:
            if top.replaced is None:
                del self.module.__dict__["forward"]
            else:
                self.module.forward = top.replaced
            top = top.replaced

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        if self.replaced is not None:
            own: Forward = copy.deepcopy(self.replaced, memo)
            return own
        return types.MethodType(type(self.module).forward, memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.replaced is not None:
            return _itself, (self.replaced,)
        # While the copy is being made it has no attributes yet, so this finds its class's method.
        return getattr, (self.module, "forward")


def _itself(forward: Forward) -> Forward:
    return forward


def _pass_on(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)
