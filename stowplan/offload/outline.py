"""The model around its blocks: a forward and backward in which blocks hand on tensors of the right shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stowplan.core.errors import UnsupportedModel
from stowplan.offload.arguments import flatten, signature
from stowplan.offload.block_capture import BlockCapture, capture_block
from stowplan.offload.blocks import Block
from stowplan.offload.instruments import Instruments
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.memory_log import Segment

__all__ = ["Call", "Moment", "Outline"]

EMBEDDING_FORWARD, BLOCKS_FORWARD, HEAD = "embedding forward", "blocks forward", "head"
BLOCKS_BACKWARD, EMBEDDING_BACKWARD, END = "blocks backward", "embedding backward", "end"


@dataclass(slots=True)
class Call:
    """One call of a block: which, of what kind, and the storages of its tensor arguments by position."""

    block: int
    kind: Any
    storages: dict[int, StorageWeakRef]
    output_bytes: int


@dataclass(slots=True)
class Moment:
    """A part of the model outside the blocks, measured."""

    segment: Segment
    seconds: float


@dataclass
class Outline:
    """Runs a model with its blocks stood in for.

    ``explore`` captures each kind of block at its first call and learns the order of calls; ``measure`` then measures
    what is around the blocks. No more than one block's activations are alive at a time.
    """

    blocks: Sequence[Block]
    instruments: Instruments
    hold_gradients: bool
    hold_output: bool
    on_progress: Callable[[str], None]
    captures: dict[Any, BlockCapture] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    _templates: dict[Any, Any] = field(default_factory=dict)
    _mark: Callable[[str], None] = lambda name: None
    _num_expected: int = -1
    _shared: dict[Any, set[int]] = field(default_factory=dict)

    def explore(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> None:
        """Fill ``captures`` and ``calls``. Raises UnsupportedModel if blocks are called twice, or none is called."""
        with self._standing_in():
            self._run(forward, loss_of)
        if not self.calls:
            raise UnsupportedModel("the forward pass calls none of the blocks; name those that it calls with blocks=.")

    def measure(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> dict[str, Moment]:
        """Bytes and seconds of the parts outside the blocks, by name."""
        order = [call.block for call in self.calls]
        self._shared = self.shared_positions()
        self.calls = []
        self._num_expected = len(order)
        times: list[float] = []
        marked: set[str] = set()
        with self._standing_in(), self.instruments.memory_log() as log:

            def mark(name: str) -> None:
                marked.add(name)
                times.append(self.instruments.seconds())
                log.mark(name)

            self._mark = mark
            self._run(forward, loss_of)
            for name in (BLOCKS_BACKWARD, EMBEDDING_BACKWARD):
                if name not in marked:  # frozen blocks, or an output that the loss does not use
                    mark(name)
            mark(END)
            times.append(times[-1])
        if [call.block for call in self.calls] != order:
            raise UnsupportedModel(
                "the model called its blocks in another order in its second forward pass on the same batch; blocks "
                "that are skipped at random (layer drop) are not supported yet: turn that off."
            )
        segments = [segment for segment in log.segments if segment.name != "start"]
        return {
            segment.name: Moment(segment, (end - start) * self.instruments.scale)
            for segment, start, end in zip(segments, times, times[1:], strict=False)
        }

    def _run(self, forward: Callable[[], Any], loss_of: Callable[[Any], torch.Tensor]) -> None:
        """One forward and backward of the model."""
        torch.clear_autocast_cache()
        self._mark(EMBEDDING_FORWARD)
        output = forward()
        loss = loss_of(output)
        if not self.hold_output:
            del output
        torch.clear_autocast_cache()
        if self.calls:
            with torch.autocast(self.instruments.device.type, enabled=False):
                loss.backward()

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        interceptions = [Interception(block.module, self._handler(i)) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for interception in interceptions:
                interception.remove()

    def _handler(self, number: int) -> Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]:
        def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._call(number, forward, args, kwargs)

        return call

    def _call(self, number: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = self.blocks[number]
        if any(call.block == number for call in self.calls):
            raise UnsupportedModel(
                f"{block.name} is called more than once in a forward pass, which is not supported yet; leave it out of "
                f"the plan with blocks=."
            )
        if not self.calls:
            self._mark(BLOCKS_FORWARD)
        leaves = flatten(args, kwargs)
        kind = (_likeness(block.module), signature(leaves, kwargs, ()))
        if kind not in self.captures:
            self.on_progress(f"measuring {block.name} ({type(block.module).__name__})")
            self.captures[kind], self._templates[kind] = capture_block(
                block.module, forward, args, kwargs, self.hold_gradients, self.instruments
            )
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        storages = {i: StorageWeakRef(tensor.untyped_storage()) for i, tensor in tensors.items()}
        first, last = not self.calls, len(self.calls) + 1 == self._num_expected
        marks = [name for name, due in ((BLOCKS_BACKWARD, last), (EMBEDDING_BACKWARD, first)) if due]
        # A block's graph keeps the shared arguments that it saves (masks, rotary tables); so must what stands for it.
        held = [tensors[position] for position in self._held_positions(kind) if position in tensors]

        def on_backward() -> None:
            held.clear()
            for name in marks:
                self._mark(name)

        output = _stand_in(self._templates[kind], list(tensors.values()), self.instruments, on_backward)
        self.calls.append(Call(number, kind, storages, self.captures[kind].output_gradient_bytes))
        if last:
            self._mark(HEAD)
        return output

    def shared_positions(self) -> dict[Any, set[int]]:
        """Per kind of block, the arguments (by position) whose storage some other call was given as well."""
        num_calls = Counter(key for call in self.calls for key in {s.cdata for s in call.storages.values()})
        return {
            call.kind: {position for position, storage in call.storages.items() if num_calls[storage.cdata] > 1}
            for call in self.calls
        }

    def _held_positions(self, kind: Any) -> set[int]:
        tape = self.captures[kind].tape
        saved = {tape.values[slot.value].position for slot in tape.slots}
        return saved & self._shared.get(kind, set())


class _StandIn(torch.autograd.Function):
    """Makes a block's outputs out of nothing, and its inputs' gradients out of its outputs' gradients."""

    @staticmethod
    def forward(
        ctx: Any, on_backward: Callable[[], object], outputs: list[torch.Tensor], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.on_backward = on_backward
        ctx.shapes = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in inputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.on_backward()
        by_shape = {(g.shape, g.dtype, g.device): g for g in gradients}
        return None, None, *(None if shape is None else _gradient(shape, by_shape) for shape in ctx.shapes)


def _gradient(shape: tuple[Any, ...], by_shape: dict[Any, torch.Tensor]) -> torch.Tensor:
    size, dtype, device = shape
    return by_shape[shape] if shape in by_shape else torch.zeros(size, dtype=dtype, device=device)


def _stand_in(
    template: Any, inputs: list[torch.Tensor], instruments: Instruments, on_backward: Callable[[], object]
) -> Any:
    """Outputs like ``template`` (tensors on the meta device), joined to ``inputs`` in the graph."""
    tensors = [leaf for leaf in flatten((template,), {}) if isinstance(leaf, torch.Tensor)]
    shapes = [tensor for tensor in tensors if tensor.requires_grad]
    anchor = torch.zeros((), device=instruments.device, requires_grad=True)
    made = [_filled(shape, instruments) for shape in shapes]
    outputs = iter(_StandIn.apply(on_backward, made, anchor, *inputs))  # type: ignore[no-untyped-call]
    plain = (_filled(tensor, instruments) for tensor in tensors if not tensor.requires_grad)
    return _rebuild(template, outputs, plain)


def _filled(shape: torch.Tensor, instruments: Instruments) -> torch.Tensor:
    tensor = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=instruments.device)
    if instruments.dry:
        return tensor  # what a block gives is not known
    return tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()


def _rebuild(tree: Any, outputs: Iterator[torch.Tensor], plain: Iterator[torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return next(outputs) if tree.requires_grad else next(plain)
    if isinstance(tree, tuple | list):
        return type(tree)([_rebuild(item, outputs, plain) for item in tree])
    if isinstance(tree, dict):
        return {key: _rebuild(item, outputs, plain) for key, item in tree.items()}
    return tree


_POSITION_NAMES = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "idx", "index"})


def _likeness(module: torch.nn.Module) -> tuple[Any, ...]:
    """What blocks must have in common to count as doing the same: classes, parameters, numbers; not their position.

    It serves planning alone: the engine records and proves every block by itself.
    """
    parts: list[Any] = []
    for name, child in module.named_modules():
        own = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in child.named_parameters(recurse=False)]
        numbers = [
            (key, value)
            for key, value in child.__dict__.items()
            if isinstance(value, bool | int | float | str) and key not in _POSITION_NAMES
        ]
        parts.append((name, type(child), tuple(own), tuple(sorted(numbers))))
    return tuple(parts)
