"""Weight gradients that are computed later than the gradients of inputs, bit for bit as autograd does it.

A stage's backward of one microbatch is split in two. The first part is an ordinary backward that the stage before waits
for; linear layers give their input's gradient there and queue what the gradients of weight and bias need. The second
part, ``PendingGradients.run``, computes those whenever the schedule has time for it.

Note: the same bits
    Products are rounded by how they are computed, so every product here is the one that autograd would have chosen: a
    gradient of a factor that lies in memory by columns is computed transposed (``FunctionsManual.cpp``,
    ``mm_mat1_grad`` and ``mm_mat2_grad``), and ``linear`` adds the bias within the product only if the input is a
    matrix or contiguous. All gradients that one backward has for one parameter are added up before they are added to
    ``.grad``: by uses, and under autocast first among the uses of one copy of the weight.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stowplan.core.errors import InvalidArgument
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.storages import modified_in_place, storage_bytes
from stowplan.runtime.pipeline.data_parallel import refuse_wrappers

__all__ = ["PendingGradients", "WeightGradients"]


class WeightGradients:
    """The deferred weight gradients of one stage.

    From ``install`` to ``remove`` a backward through the stage leaves out the gradients of the weights and biases of
    its linear layers (``torch.nn.Linear`` and transformers' ``Conv1D``), and ``collect`` gives what it left out. One
    backward at a time: call ``collect`` after each, or ``clear`` if it failed. Which layers are left as they are, and
    so have their gradients at once: docs/pipeline.md.

    Attributes:
        num_deferred: layers that are deferred, unless their call is one of those that cannot be.
        active: False lets all calls through as if nothing were installed: who calls ``collect`` is not there then.
    """

    def __init__(self) -> None:
        self.active = True
        self._interceptions: list[Interception] = []
        self._hook: Any = None
        self._forwards = _Count()
        self._uses: list[_Use] = []
        self._at_once = False

    @property
    def num_deferred(self) -> int:
        return len(self._interceptions)

    def install(self, stage: nn.Module) -> None:
        """Defer the layers of ``stage``; in any order with ``fully_shard`` and with ``stowplan.apply``.

        Raises InvalidArgument if this object is installed already, UnsupportedModel if the stage is wrapped for data
        parallelism by what needs every gradient in backward.
        """
        if self._hook is not None:
            raise InvalidArgument("these weight gradients are installed already: make another object for each stage")
        refuse_wrappers(stage)
        self._hook = stage.register_forward_pre_hook(self._forwards)
        self._interceptions = [self._intercept(layer) for layer in _deferrable(stage)]

    def remove(self) -> None:
        """Give the layers their own forward back, and forget what is queued. Removing twice does nothing."""
        for interception in self._interceptions:
            interception.remove()
        if self._hook is not None:
            self._hook.remove()
        self._interceptions, self._hook = [], None
        self.clear()

    def collect(self) -> PendingGradients:
        """What the backward since the last ``collect`` left out; empty if it left out nothing."""
        uses, self._uses = self._uses, []
        return PendingGradients(uses)

    def clear(self) -> None:
        """Forget what a failed backward queued, or one that was to make no gradients of weights."""
        self._uses = []

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Active while this is open; what is left over if it fails is forgotten."""
        before, self.active = self.active, True
        try:
            yield
        except BaseException:
            self.clear()
            raise
        finally:
            self.active = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While this is open, gradients of weights are computed in backward, and ``collect`` gives nothing.

        For trials, not for training: what one backward has for a weight that is used twice is added one by one.
        """
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def queue(self, use: _Use) -> None:
        """Called by the backward of a layer; on a GPU that is in a thread of autograd's."""
        if self._at_once:
            PendingGradients([use]).run()
        else:
            self._uses.append(use)

    def _intercept(self, layer: Any) -> Interception:
        by_rows = type(layer) is nn.Linear
        anchor = torch.zeros((), requires_grad=True, device=layer.weight.device)

        def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not (self.active and torch.is_grad_enabled()) or kwargs or not _is_plain_call(layer, *args):
                return forward(*args, **kwargs)
            (x,) = args
            weight, bias = layer.weight, layer.bias
            copy: Hashable = None
            w, b = weight.detach(), None if bias is None else bias.detach()
            device_type = x.device.type
            if torch.is_autocast_enabled(device_type):
                dtype = torch.get_autocast_dtype(device_type)
                if w.dtype is not dtype:
                    copy = self._forwards.number if torch.is_autocast_cache_enabled() else object()
                x, w, b = _cast(x, dtype), _cast(w, dtype), None if b is None else _cast(b, dtype)
            trained = None if bias is None or not bias.requires_grad else bias
            layer_call = _Layer(self, weight, trained, by_rows, copy)
            return _Deferred.apply(x, anchor, w, b, layer_call)  # type: ignore[no-untyped-call]

        return Interception(layer, call)


class PendingGradients:
    """What one backward of a stage left out: the gradients of weights and biases, still to be computed.

    It holds the layers' inputs and the gradients of their outputs until ``run``, or until it is dropped.
    """

    def __init__(self, uses: list[_Use]) -> None:
        self._uses = deque(uses)

    def tensors(self) -> list[torch.Tensor]:
        """What is held. Others may hold it, too."""
        return [tensor for use in self._uses for tensor in (use.x, use.gradient)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages that are held, each once."""
        return storage_bytes(self.tensors())

    @torch.no_grad()
    def run(self) -> None:
        """Compute the gradients and add them to ``.grad``, as backward would have; what is held goes bit by bit.

        On a GPU call it on the stream that backward was called on. Running twice does nothing. Raises RuntimeError,
        as backward does, if a layer's input or its output's gradient was changed in place.
        """
        if not self._uses:
            return
        with torch.autocast(self._uses[0].x.device.type, enabled=False):
            self._run()

    def _run(self) -> None:
        num_left = Counter(id(parameter) for use in self._uses for parameter in use.parameters())
        sums: dict[int, dict[Hashable, torch.Tensor]] = {}
        while self._uses:
            use = self._uses.popleft()
            for parameter, gradient in use.gradients():
                copies = sums.setdefault(id(parameter), {})
                copy = use.layer.copy
                copies[copy] = copies[copy] + gradient if copy in copies else gradient
                num_left[id(parameter)] -= 1
                if not num_left[id(parameter)]:
                    _accumulate(parameter, sums.pop(id(parameter)))
                del copies, gradient


class _Count:
    """Forward passes of a stage. Within one, autocast's copies of parameters are shared."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, *unused: Any) -> None:
        self.number += 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """A call of a layer, as far as it is known in forward.

    ``by_rows``: the weight has a row for each output, not a column. ``copy``: calls that share one of autocast's
    copies of the parameters have the same; None where the parameters are used as they are.
    """

    owner: WeightGradients
    weight: nn.Parameter
    bias: nn.Parameter | None  # if it is trained
    by_rows: bool
    copy: Hashable


@dataclass(frozen=True, slots=True)
class _Use:
    """A call of a layer after its backward. ``x``: (rows, inputs); ``gradient``: of the output, rows over any number of
    dimensions.
    """

    layer: _Layer
    x: torch.Tensor
    gradient: torch.Tensor
    versions: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", (self.x._version, self.gradient._version))

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.layer.weight
        if self.layer.bias is not None:
            yield self.layer.bias

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        for tensor, version in zip((self.x, self.gradient), self.versions, strict=True):
            if tensor._version != version:
                raise modified_in_place(tensor, version)
        weight, bias = self.layer.weight, self.layer.bias
        rows = _as_matrix(self.gradient)
        outputs_first = weight.stride() == ((weight.shape[1], 1) if self.layer.by_rows else (1, weight.shape[0]))
        product = rows.t().mm(self.x) if outputs_first else self.x.t().mm(rows)
        yield weight, product if outputs_first == self.layer.by_rows else product.t()
        if bias is not None:
            yield bias, self.gradient.sum_to_size(bias.shape)


class _Deferred(torch.autograd.Function):
    """A linear layer whose backward gives the gradient of its input alone.

    The anchor has it recorded where the input requires no gradient: the first layer of a model.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, layer: _Layer
    ) -> torch.Tensor:
        fused = x.dim() == 2 or x.is_contiguous() or not layer.by_rows
        rows = x
        if not layer.by_rows:
            assert b is not None
            rows = x.view(-1, x.shape[-1])
            y = torch.addmm(b, rows, w).view(*x.shape[:-1], w.shape[1])
        elif fused:
            y = F.linear(x, w, b)
        else:  # with gradients of weights to come, linear makes rows of any input, and adds the bias by itself
            rows = x.reshape(-1, x.shape[-1])
            y = torch.ops.aten._unsafe_view(rows.mm(w.t()), [*x.shape[:-1], w.shape[0]])
            if b is not None:
                y.add_(b)
        ctx.save_for_backward(rows, w)
        ctx.layer, ctx.shape, ctx.fused = layer, x.shape, fused
        # Views that are made here could not be written to in place.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        x, w = ctx.saved_tensors
        layer: _Layer = ctx.layer
        rows, x = _as_matrix(gradient), _as_matrix(x)
        keeps_shape = layer.bias is not None and not ctx.fused  # a bias's gradient is rounded by how it is summed
        layer.owner.queue(_Use(layer, x.detach(), gradient if keeps_shape else rows))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        if x.stride() == (1, x.shape[0]):
            given = (w.t() if layer.by_rows else w).mm(rows.t()).t()
        else:
            given = rows.mm(w if layer.by_rows else w.t())
        return given if len(ctx.shape) == 2 else given.reshape(ctx.shape), None, None, None, None


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As autocast casts what it gives to a matrix product."""
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def _accumulate(parameter: nn.Parameter, copies: dict[Hashable, torch.Tensor]) -> None:
    """Add one backward's gradient to ``.grad`` as autograd does: a first one becomes it, laid out as the parameter."""
    first, *others = (gradient.to(parameter.dtype) for gradient in copies.values())
    for other in others:
        first = first + other
    if parameter.grad is not None:
        parameter.grad += first
    elif first.stride() == parameter.stride():
        parameter.grad = first
    else:
        parameter.grad = torch.empty_like(parameter).copy_(first)


def _deferrable(stage: nn.Module) -> list[nn.Module]:
    """The layers whose calls may be deferred. A parameter that a module beside them has, too (an embedding tied to the
    head) gets its gradients from both in one backward, which have to be added up first.
    """
    modules = list(stage.modules())
    layers = [module for module in modules if _is_known(module)]
    while True:
        chosen = set(map(id, layers))
        elsewhere = {id(p) for m in modules if id(m) not in chosen for p in m._parameters.values() if p is not None}
        fewer = [layer for layer in layers if elsewhere.isdisjoint(map(id, layer.parameters()))]
        if len(fewer) == len(layers):
            return layers
        layers = fewer


def _is_known(module: nn.Module) -> bool:
    """A linear layer of a class whose forward is known, and that runs it."""
    kind = type(module)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    own = "forward" not in module.__dict__ and module._compiled_call_impl is None
    return own and (kind is nn.Linear or conv1d) and "weight" in module._parameters and "bias" in module._parameters


def _is_plain_call(layer: Any, x: Any = None, *others: Any) -> bool:
    """May this call be deferred? Everything else is left to autograd."""
    weight, bias = layer.weight, layer.bias
    if others or type(x) is not torch.Tensor or x.dim() < 2 or not weight.requires_grad:
        return False
    if not (_is_plain(weight) and (bias is None or _is_plain(bias))):
        return False
    # Autocast makes one copy of such an input for all that read it, and their gradients are added up in its dtype.
    shared = x.is_leaf and x.requires_grad and x.dtype is torch.float32
    return not (shared and torch.is_autocast_enabled(x.device.type) and torch.is_autocast_cache_enabled())


def _is_plain(parameter: Any) -> bool:
    """No subclass (distributed, quantised), and nobody who wants to know when it gets its gradient."""
    return (
        type(parameter) is nn.Parameter
        and parameter.is_floating_point()
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )
