"""A model's head in chunks: which layer it is, whether it may be replaced, and the replacement itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.core.errors import NoLogits, PlanMismatch, StowplanError
from stowplan.offload.blocks import Block
from stowplan.offload.head.logits import Logits
from stowplan.offload.head.loss import default_chunk_rows
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.observer import is_allocation_failure

__all__ = [
    "TOLERANCES",
    "ChunkedHead",
    "FoundHead",
    "NotReplaceable",
    "chunk_sizes",
    "find_head",
    "failures_refuse",
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


# Runs the model and hands its loss on.
WithLoss = Callable[[Callable[[torch.Tensor], None]], None]


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
    unfit = _unfit(layer)
    if unfit is not None:
        raise NotReplaceable(f"{name} {unfit}")
    assert isinstance(layer, nn.Linear)
    if any(type(tensor) not in (nn.Parameter, FakeTensor) for tensor in layer.parameters()):
        raise NotReplaceable(f"the parameters of {name} are not plain tensors (sharded, or quantised)")
    if not layer.training:
        raise NotReplaceable(f"{name} is in eval mode, where it is left alone: call model.train() before planning")
    return FoundHead(name, layer)


def _unfit(layer: nn.Module) -> str | None:
    """What does not let others stand for the layer, when planning and when a plan is applied."""
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, not a torch.nn.Linear"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks, which would not see its output"
    forward = layer.__dict__.get("forward")
    while isinstance(forward, Interception):
        forward = forward.replaced
    return None if forward is None else "has a forward of its own, beside that of its class"


def _widest(modules: list[nn.Module]) -> nn.Module | None:
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    most = max((module.out_features for module in linear), default=0)
    widest = [module for module in linear if module.out_features == most]
    return widest[0] if len(widest) == 1 else None


def head_named(model: nn.Module, name: str) -> nn.Linear:
    """The layer that a plan replaces. Raises PlanMismatch if it is not there, or others cannot stand for it."""
    layer = dict(model.named_modules()).get(name)
    unfit = "is not there" if layer is None else _unfit(layer)
    if unfit is not None:
        raise PlanMismatch(
            f"the plan computes the head of {type(model).__name__}, {name}, in chunks, but it {unfit}. Plan anew."
        )
    assert isinstance(layer, nn.Linear)
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


@contextmanager
def failures_refuse(model: nn.Module) -> Iterator[None]:
    """What fails in here is a reason to leave the head of ``model`` as it is: NotReplaceable, with the reason."""
    name = type(model).__name__
    try:
        yield
    except NoLogits as error:
        raise NotReplaceable(f"{name} does this with its logits before the loss: {error.asked}") from None
    except (StowplanError, RuntimeError, TypeError, ValueError, AttributeError, MemoryError) as error:
        if is_allocation_failure(error):
            raise NotReplaceable("comparing it takes more memory than there is: plan dry (dry=True)") from None
        raise NotReplaceable(f"{name} fails when its head is tried: {error}") from error


def try_head(model: nn.Module, found: FoundHead, with_loss: WithLoss, *, dry: bool) -> int:
    """Run the model with its head in chunks and compare loss and gradients with its own; gives the number of rows.

    ``with_loss`` runs a forward pass; what reaches the head in it is replaced by random numbers, as the blocks before
    it may be stood in for. In a ``dry`` run nothing can be compared. Raises NotReplaceable, with the reason.
    """
    with failures_refuse(model):
        own = None if dry else _Compared.of(found, with_loss)
        return _tried(model, found, with_loss, own)


def _tried(model: nn.Module, found: FoundHead, with_loss: WithLoss, own: _Compared | None) -> int:
    rows = 1 << 30  # one chunk will do where there are no values
    if own is not None:
        num_rows = own.noise.shape[:-1].numel()
        rows = min(chunk_sizes(num_rows, found.layer.out_features)[0], num_rows)
    chunked = ChunkedHead(found.layer, rows, None if own is None else own.noise)

    def check(loss: torch.Tensor) -> None:
        if chunked.num_calls != 1 or len(chunked.losses) != 1:
            raise NotReplaceable(
                f"{type(model).__name__} computed {len(chunked.losses)} cross entropies from {chunked.num_calls} calls "
                f"of {found.name}; there must be one of one"
            )
        if own is not None:
            own.compare(found, loss)

    try:
        with_loss(check)
    finally:
        chunked.remove()
    return chunked.losses[0]


class _Compared(NamedTuple):
    """Random hidden states, and what the model's own head makes of them: the loss, gradients by name."""

    noise: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    dtype: torch.dtype

    @staticmethod
    def of(found: FoundHead, with_loss: WithLoss) -> _Compared:
        noise: list[torch.Tensor] = []
        dtypes: list[torch.dtype] = []
        made: list[_Compared] = []

        def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            (hidden,) = (*args, *kwargs.values())
            noise.append(torch.randn_like(hidden).requires_grad_())
            logits = forward(noise[-1])
            dtypes.append(logits.dtype)
            return logits

        def keep(loss: torch.Tensor) -> None:
            if len(noise) != 1:
                raise NotReplaceable(f"the head is called {len(noise)} times in a forward pass; it must be once")
            gradients = _gradients(loss, found, noise[0])
            made.append(_Compared(noise[0], loss.detach(), gradients, dtypes[0]))

        interception = Interception(found.layer, call)
        try:
            with_loss(keep)
        finally:
            interception.remove()
        return made[0]

    def compare(self, found: FoundHead, loss: torch.Tensor) -> None:
        """Raises NotReplaceable where loss or gradients are too far from the own ones."""
        allowed = TOLERANCES.get(self.dtype)
        if allowed is None:
            raise NotReplaceable(f"its logits are {self.dtype}; allowed: {', '.join(map(str, TOLERANCES))}")
        own = {"loss": self.loss} | self.gradients
        other = {"loss": loss.detach()} | _gradients(loss, found, self.noise)
        for what, one in own.items():
            distance, size = (one - other[what]).norm(), one.norm()
            no_targets = what == "loss" and one.isnan() and other[what].isnan()
            if not (distance <= allowed * size or no_targets):
                raise NotReplaceable(
                    f"in chunks its {what} is {float(distance / size):.1e} off (relative), and {allowed:.0e} is "
                    f"allowed for {self.dtype}"
                )


def _gradients(loss: torch.Tensor, found: FoundHead, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of hidden states and of what is trained of the layer; every one of them must have one."""
    trained = {name: tensor for name, tensor in found.layer.named_parameters() if tensor.requires_grad}
    asked = {"hidden states": noise, **trained}
    with torch.autocast(noise.device.type, enabled=False):
        gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
    made = {}
    for name, gradient in zip(asked, gradients, strict=True):
        if gradient is None:
            raise NotReplaceable(f"the loss does not depend on the {name} of {found.name}")
        made[f"gradient of {name}"] = gradient
    return made
