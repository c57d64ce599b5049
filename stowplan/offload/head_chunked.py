"""A model's head in chunks: which layer it is, whether it may be replaced, and the replacement itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.core.errors import NoLogits, PlanMismatch, StowplanError
from stowplan.offload.blocks import Block
from stowplan.offload.head import default_chunk_rows
from stowplan.offload.head_logits import Logits
from stowplan.offload.intercept import Forward, Interception

__all__ = [
    "TOLERANCES",
    "ChunkedHead",
    "FoundHead",
    "NotReplaceable",
    "chunk_sizes",
    "find_head",
    "head_named",
    "try_head",
]

# How far loss and gradients (by norm) of a chunked head may be from those of the model's own, relative, by the type
# that products are computed in. Measured: 5e-7 and 4e-3 (docs/head.md).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# Sizes of chunks that are priced, as multiples of the default.
_SIZES = (1, 4, 16)
# Each chunk reads the weight and adds to its gradient: at long context more chunks cost time and save next to nothing.
_MOST_CHUNKS = 128


class NotReplaceable(Exception):
    """The model's head stays as it is; the message says why."""


class FoundHead(NamedTuple):
    """The last layer of a model and its dotted name."""

    name: str
    layer: nn.Linear


def find_head(model: nn.Module, blocks: Sequence[Block]) -> FoundHead:
    """The linear layer whose output the loss is computed from, as far as one can see from outside.

    It is what ``model.get_output_embeddings()`` gives or, without that, the widest linear layer outside the blocks.
    Raises NotReplaceable.
    """
    inside = {id(module) for block in blocks for module in block.module.modules()}
    named = {name: module for name, module in model.named_modules() if id(module) not in inside}
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else _widest(list(named.values()))
    name = next((name for name, module in named.items() if module is layer), None)
    if layer is None or name is None:
        raise NotReplaceable(f"{type(model).__name__} has no linear layer outside its blocks that is its head")
    if type(layer) is not nn.Linear:
        raise NotReplaceable(f"{name} is a {type(layer).__name__}, not a torch.nn.Linear")
    if any(type(tensor) not in (nn.Parameter, FakeTensor) for tensor in layer.parameters()):
        raise NotReplaceable(f"the parameters of {name} are not plain tensors (sharded, or quantised)")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise NotReplaceable(f"{name} has hooks, which would not see its output")
    if not layer.training:
        raise NotReplaceable(f"{name} is in eval mode, where it is left alone: call model.train() before planning")
    return FoundHead(name, layer)


def _widest(modules: list[nn.Module]) -> nn.Module | None:
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    most = max((module.out_features for module in linear), default=0)
    widest = [module for module in linear if module.out_features == most]
    return widest[0] if len(widest) == 1 else None


def head_named(model: nn.Module, name: str) -> nn.Linear:
    """The layer that a plan replaces. Raises PlanMismatch if it is not there, or is no linear layer."""
    layer = dict(model.named_modules()).get(name)
    if type(layer) is not nn.Linear:
        what = "has no such module" if layer is None else f"has a {type(layer).__name__} there"
        raise PlanMismatch(
            f"the plan computes the head {name} in chunks, but {type(model).__name__} {what}. Plan anew."
        )
    return layer


def chunk_sizes(num_rows: int, num_classes: int) -> list[int]:
    """Rows of a chunk to be priced, in ascending order: few enough to matter, each less than all rows."""
    base = max(default_chunk_rows(num_classes), -(-num_rows // _MOST_CHUNKS))
    sizes = [size for size in (base * factor for factor in _SIZES) if size < num_rows]
    return sizes or [max(1, -(-num_rows // 8))]


class ChunkedHead:
    """Chunks in place of a layer and the cross entropy after it, until ``remove``.

    In eval mode, and without gradients, the layer is its own. ``num_calls`` and ``losses`` (rows of each) tell what it
    was used for.
    """

    def __init__(self, layer: nn.Linear, chunk_rows: int, noise: torch.Tensor | None = None) -> None:
        self.num_calls = 0
        self.losses: list[int] = []
        self._layer, self._chunk_rows, self._noise = layer, chunk_rows, noise
        self._interception = Interception(layer, self._call)

    def _call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (torch.is_grad_enabled() and self._layer.training):
            return forward(*args, **kwargs)
        (hidden,) = (*args, *kwargs.values())
        self.num_calls += 1
        return Logits(
            hidden if self._noise is None else self._noise, self._layer, self._chunk_rows, None, self.losses.append
        )

    def remove(self) -> None:
        """The layer is its own again."""
        self._interception.remove()


def try_head(model: nn.Module, found: FoundHead, run: Callable[[], torch.Tensor], *, dry: bool) -> int:
    """Run the model with its head in chunks and compare loss and gradients with its own; gives the number of rows.

    ``run`` gives the loss of a forward pass; what reaches the head in it is replaced by random numbers, as the blocks
    before it may be stood in for. In a ``dry`` run nothing can be compared. Raises NotReplaceable, with the reason.
    """
    layer = found.layer
    own = None if dry else _Compared.of(layer, run)
    rows = 2  # any two chunks will do where there are no values
    if own is not None:
        rows = min(chunk_sizes(own.noise.shape[:-1].numel(), layer.out_features)[0], own.noise.shape[:-1].numel())
    chunked = ChunkedHead(layer, rows if own is not None else 1 << 30, None if own is None else own.noise)
    try:
        loss = run()
        if chunked.num_calls != 1 or len(chunked.losses) != 1:
            raise NotReplaceable(
                f"{type(model).__name__} computed {len(chunked.losses)} cross entropies from {chunked.num_calls} calls "
                f"of {found.name}; there must be one of one"
            )
        if own is not None:
            own.compare(layer, loss)
    except NoLogits as error:
        raise NotReplaceable(
            f"{type(model).__name__} does this with its logits before the loss: {error.asked}"
        ) from None
    except (StowplanError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise NotReplaceable(f"{type(model).__name__} fails without its logits: {error}") from error
    finally:
        chunked.remove()
    return chunked.losses[0]


class _Compared(NamedTuple):
    """Random hidden states, and what the model's own head makes of them."""

    noise: torch.Tensor
    loss: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    @staticmethod
    def of(layer: nn.Linear, run: Callable[[], torch.Tensor]) -> _Compared:
        noise: list[torch.Tensor] = []
        dtypes: list[torch.dtype] = []

        def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            (hidden,) = (*args, *kwargs.values())
            noise.append(torch.randn_like(hidden).requires_grad_())
            logits = forward(noise[-1])
            dtypes.append(logits.dtype)
            return logits

        interception = Interception(layer, call)
        try:
            loss = run()
        finally:
            interception.remove()
        if len(noise) != 1:
            raise NotReplaceable(f"the head is called {len(noise)} times in a forward pass; it must be once")
        return _Compared(noise[0], loss.detach(), _gradients(loss, layer, noise[0]), dtypes[0])

    def compare(self, layer: nn.Linear, loss: torch.Tensor) -> None:
        """Raises NotReplaceable where loss or gradients are too far from the own ones."""
        allowed = TOLERANCES.get(self.dtype)
        if allowed is None:
            raise NotReplaceable(f"its logits are {self.dtype}; allowed: {', '.join(map(str, TOLERANCES))}")
        pairs = [(self.loss, loss.detach())]
        pairs += zip(self.gradients, _gradients(loss, layer, self.noise), strict=True)
        for (one, other), what in zip(pairs, ("loss", *["gradient"] * len(self.gradients)), strict=True):
            distance, size = (one - other).norm(), one.norm()
            no_targets = what == "loss" and one.isnan() and other.isnan()
            if not (distance <= allowed * size or no_targets):
                raise NotReplaceable(
                    f"in chunks its {what} is {float(distance / size):.1e} off (relative), and {allowed:.0e} is "
                    f"allowed for {self.dtype}"
                )


def _gradients(loss: torch.Tensor, layer: nn.Linear, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    asked = [noise, *(tensor for tensor in layer.parameters() if tensor.requires_grad)]
    device = noise.device.type
    with torch.autocast(device, enabled=False):
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(loss, asked, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, asked, strict=True))
