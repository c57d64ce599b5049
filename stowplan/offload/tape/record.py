"""Writing a tape: a dispatch mode below autograd beside the hooks for saved tensors.

Note: identity of storages
    A storage is known by the address of its C++ object. While the tape is being written every storage that was seen
    is pinned by a weak reference, which keeps the object's shell (not its bytes) alive, so that an address is never
    used twice. No tensor of the block is kept alive by the recorder itself.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from stowplan.offload.arguments import tensors_in
from stowplan.offload.refusals import refuse_checkpoint_inside
from stowplan.offload.streams import current_stream
from stowplan.offload.tape.rules import (
    ALLOCATIONS,
    advances_by_shape,
    draws_random_numbers,
    overwrites_whole,
    rules_of,
)
from stowplan.offload.tape.tape import Geometry, Origin, Ref, Slot, Tape, TapeOp, TapeValue

__all__ = ["Recorder", "module_stack"]

aten = torch.ops.aten


class _Known(NamedTuple):
    """A storage that was there before the call."""

    origin: Origin
    name: str
    position: int
    geometry: Geometry


class Recorder(TorchDispatchMode):
    """Records every op of one call of ``block`` into ``tape``, and by ``save`` every tensor that autograd saves.

    ``leaves`` are the flattened arguments of the call with their names; ``observe`` is told of each op that has run.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        leaves: Sequence[tuple[str, Any]],
        name: str = "",
        observe: Callable[[TapeOp], object] = lambda op: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observe = observe
        self.tape = Tape()
        self._values: dict[int, int] = {}  # storage -> value
        self._pins: list[StorageWeakRef] = []  # by value
        self._known: dict[int, _Known] = {}  # storage -> what it is outside the tape
        self._names: Counter[str] = Counter()
        self._stack: list[str] = [""]
        self._block = block
        self._name = name or type(block).__name__
        self._streams = {device: current_stream(device) for device in _devices(block, leaves)}
        self._can_rewind = True  # until a random op whose use of the generator cannot be repeated on stand-ins
        for position, (argument, leaf) in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                known = _Known(Origin.INPUT, argument, position, Geometry.of(leaf))
                self._known.setdefault(_storage_key(leaf), known)
        for parameter, tensor in _own_tensors(block):
            self._known[_storage_key(tensor)] = _Known(Origin.PARAMETER, parameter, -1, Geometry.of(tensor))

    # ---- what the hooks call --------------------------------------------------------------------------------------
    def save(self, tensor: torch.Tensor) -> Slot | None:
        """Note that autograd saves ``tensor``; gives its slot, None for tensor subclasses (not replayable)."""
        if not _is_plain(tensor):
            self.tape.forbid_steady(f"autograd saves a {type(tensor).__name__}")
            return None
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            self.tape.forbid_steady("autograd saves a sparse, conjugate or negative view")
            return None
        ref = self._ref(tensor)
        newest = self.tape.values[ref.value].writers[-1] == len(self.tape.ops) - 1
        custom = isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction)  # saves after its last op
        slot = Slot(*ref, newest=newest or custom)
        self.tape.slots.append(slot)
        return slot

    def value_of(self, tensor: torch.Tensor) -> int | None:
        """The value that is the tensor's storage; None if the block has not met it."""
        return self._values.get(_storage_key(tensor))

    def alive(self) -> set[int]:
        """Values whose storages are still alive."""
        return {value for value, pin in enumerate(self._pins) if not pin.expired()}

    def finish(self) -> Tape:
        """End the recording: forget the storages."""
        for name, tensor in _own_tensors(self._block):
            value = self._values.get(_storage_key(tensor))
            if value is not None and self.tape.values[value].origin is Origin.MADE:
                self.tape.forbid_steady(f"{name} was made by this very call")
        for met in self.tape.values:
            given = met.origin is Origin.INPUT or met.parameter in dict(self._block.named_parameters())
            if given and met.last_version > 0:
                self.tape.forbid_steady(f"it changes {met.name!r} in place")
        if self.tape.prefix is not None and not self.tape.prefix.num_slots:
            self.tape.forbid_steady(self.tape.prefix.reason)
        self._values.clear()
        self._pins.clear()
        return self.tape

    # ---- the mode -------------------------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_checkpoint_inside(self._name)
        result = self._record(func, args, kwargs) if self._is_dense(args, kwargs) else func(*args, **kwargs)
        if not self._is_dense((result,), {}):
            self.tape.forbid_steady("a sparse tensor")
        return result

    @staticmethod
    def _is_dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return all(tensor.layout is torch.strided for tensor in tensors_in((args, kwargs)))

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rules = rules_of(func)
        if rules.data_dependent and not _indexes_by_numbers(func, args):
            self.tape.end_prefix(f"{rules.name} depends on data")
        reads: list[tuple[int, int]] = []

        def read(tensor: torch.Tensor) -> Ref:
            ref = self._ref(tensor)
            reads.append((ref.value, ref.version))
            return ref

        op_args = tuple(_map_tensors(argument, read) for argument in args)
        op_kwargs = {name: _map_tensors(argument, read) for name, argument in kwargs.items()}
        written = list(_written(func, args, kwargs))
        result = func(*args, **kwargs)
        results = result if isinstance(result, tuple | list) else (result,)
        fresh = [(position, t) for position, t in enumerate(results) if self._is_fresh(t)]
        if not written and not fresh:
            return result  # a view, or nothing with storage: Refs carry all there is to know
        random = draws_random_numbers(func, args, kwargs)
        op = TapeOp(
            func=func,
            args=op_args,
            kwargs=op_kwargs,
            module=self._stack[-1],
            reads=tuple(reads),
            random=random,
            replayable=rules.replayable
            and self.tape.prefix is None
            and (not random or (self._can_rewind and advances_by_shape(func, kwargs))),
            flops=_flops(func, args, kwargs, result),
        )
        self._can_rewind &= not random or advances_by_shape(func, kwargs)
        if any(current_stream(device) != stream for device, stream in self._streams.items()):
            self.tape.forbid_steady("it runs on several streams")
        self._observe(op)
        number = len(self.tape.ops)
        self.tape.ops.append(op)
        op.makes = tuple((position, self._make(tensor, number, func, position)) for position, tensor in fresh)
        op.writes = tuple(self._write(tensor, number, func) for tensor in written)
        if func in ALLOCATIONS:
            _allocate_by_geometry(op, self.tape.values)
        return result

    def _ref(self, tensor: torch.Tensor) -> Ref:
        number = self._values.get(_storage_key(tensor))
        if number is None:
            number = self._meet(tensor)
        value = self.tape.values[number]
        if tensor.is_conj() or tensor.is_neg():
            value.opaque = True
        return Ref(number, value.last_version, Geometry.of(tensor))

    def _meet(self, tensor: torch.Tensor) -> int:
        """A storage that no op of the tape made."""
        storage = _storage_key(tensor)
        known = self._known.get(storage) or _Known(Origin.OUTSIDE, "outside", -1, Geometry.of(tensor))
        number = self._add(tensor, known.name, known.origin, None)
        value = self.tape.values[number]
        value.position, value.geometry = known.position, known.geometry
        if known.origin is Origin.PARAMETER:
            value.parameter = known.name
        elif known.origin is Origin.OUTSIDE and value.size_bytes == 0:
            value.constant = tensor.detach()
        return number

    def _make(self, tensor: torch.Tensor, op: int, func: Any, position: int) -> int:
        stem = ".".join(part for part in (self._stack[-1], rules_of(func).name) if part)
        value = self._add(tensor, f"{stem}.{position}" if position else stem, Origin.MADE, op)
        self.tape.values[value].opaque = func in ALLOCATIONS
        return value

    def _write(self, tensor: torch.Tensor, op: int, func: Any) -> tuple[int, int]:
        number = self._values[_storage_key(tensor)]
        value = self.tape.values[number]
        if rules_of(func).reshapes:
            value.opaque = True
        elif value.opaque and value.last_version == 0 and value.origin is Origin.MADE and overwrites_whole(func):
            value.opaque = tensor.numel() * tensor.element_size() != value.size_bytes
        value.writers.append(op)
        return number, value.last_version

    def _add(self, tensor: torch.Tensor, stem: str, origin: Origin, writer: int | None) -> int:
        self._names[stem] += 1
        name = stem if self._names[stem] == 1 else f"{stem}#{self._names[stem]}"
        storage = tensor.untyped_storage()
        number = len(self.tape.values)
        self.tape.values.append(TapeValue(name, origin, storage.nbytes(), tensor.device, Geometry.of(tensor), [writer]))
        self._values[storage._cdata] = number
        self._pins.append(StorageWeakRef(storage))
        return number

    def _is_fresh(self, result: Any) -> bool:
        return (
            isinstance(result, torch.Tensor)
            and result.layout is torch.strided
            and not ((key := _storage_key(result)) in self._values or key in self._known)
        )

    # ---- names ----------------------------------------------------------------------------------------------------
    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name values after the module of the block that makes them while this is open."""
        with module_stack(self._block, self._stack):
            yield


@contextmanager
def module_stack(block: torch.nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep in ``stack`` the dotted names of the block's modules that are running."""
    names = {id(module): name for name, module in block.named_modules()}
    own_thread = threading.get_ident()  # the hooks are everybody's

    def enter(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == own_thread:
            stack.append(names.get(id(module), stack[-1]))

    def leave(module: torch.nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() == own_thread:
            stack.pop()

    entering = torch.nn.modules.module.register_module_forward_pre_hook(enter)
    leaving = torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()


def _devices(block: torch.nn.Module, leaves: Sequence[tuple[str, Any]]) -> set[torch.device]:
    return {tensor.device for tensor in tensors_in(([leaf for _, leaf in leaves], list(block.parameters())))}


def _own_tensors(block: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if _is_plain(tensor):
            yield name, tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    """No subclass, save the fake tensors of a dry capture."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor) or (
        isinstance(tensor, FakeTensor) and isinstance(tensor, torch.nn.Parameter)
    )


def _storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _map_tensors(argument: Any, fn: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return fn(argument)
    if isinstance(argument, list | tuple):
        return [_map_tensors(item, fn) for item in argument]
    return argument


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for position, name, keyword_only in rules_of(func).writes:
        argument = kwargs.get(name) if keyword_only or name in kwargs or position >= len(args) else args[position]
        items: Iterable[Any] = argument if isinstance(argument, list | tuple) else (argument,)
        yield from (item for item in items if isinstance(item, torch.Tensor))


def _indexes_by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """``x[i]`` with integer tensors has a result shape known beforehand, in spite of its tag."""
    return func is aten.index.Tensor and all(i is None or i.dtype in (torch.int64, torch.int32) for i in args[1])


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if "scaled_dot_product" in func._schema.name and func.overloadpacket not in flop_registry:
        # The CPU's kernel is not registered. Older formulas know nothing of heads that are shared between queries.
        query, key, value = (argument.shape for argument in args[:3])
        return int(sdpa_flop_count(query, (*query[:-2], *key[-2:]), (*query[:-2], *value[-2:])))
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _allocate_by_geometry(op: TapeOp, values: list[TapeValue]) -> None:
    """Rewrite ``empty_like(x)`` and its kin so that they need no x, which may be gone when they run again."""
    ((_, made),) = op.makes
    geometry = values[made].geometry
    op.func = aten.empty_strided.default
    op.args = (list(geometry.size), list(geometry.stride))
    op.kwargs = {"dtype": geometry.dtype, "device": values[made].device}
    op.reads = ()
