"""From a tape and a set of targets to a flat Python function that makes them again.

The function is generated as source and compiled once; per op it costs the call and nothing else. Views are not
replayed as ops: an argument is ``as_strided`` out of its storage where its geometry is not the stored tensor's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from stowplan.offload.tape.rng import Position, rewound, stands_at
from stowplan.offload.tape.tape import Geometry, Ref, Tape, TapeOp, map_refs

__all__ = ["Replay", "Strayed", "advance", "below_autograd", "view_of"]


class Strayed(Exception):
    """The generator does not end where the forward pass left it: somebody else drew from it, then or now."""


class Replay:
    """Makes ``targets`` again. Call it with the tensors of ``sources``, in order; it gives those of ``targets``.

    ``geometries`` says how the source tensors view their storages. ``source`` is the generated function's text.
    """

    def __init__(
        self, tape: Tape, targets: Sequence[int], available: Collection[int], geometries: Mapping[int, Geometry]
    ) -> None:
        ops, sources = tape.closure(targets, available)
        self.targets = tuple(targets)
        self.sources = tuple(sorted(sources))
        self.ops = tuple(ops)
        self.random = any(tape.ops[k].random for k in ops)
        # Where the generators end can be told only if the last that the block drew is drawn again.
        last_random = _last_random(tape, ops)
        self.reaches_end = last_random == _last_random(tape, range(len(tape.ops)))
        writer = _Writer(tape, self.sources, geometries)
        self.source, self._call = writer.write(self.ops, self.targets, last_random)

    def __call__(
        self, sources: Sequence[torch.Tensor], position: Position, ending: Position | None = None
    ) -> Sequence[torch.Tensor]:
        """Make the targets. ``position`` is where the generators stood when the block began, ``ending`` when it ended;
        both are empty if not random.

        Raises Strayed if the block's own ops do not get the generators from the one to the other, as far as they are
        run to the end.
        """
        with below_autograd(), rewound(position) if self.random else nullcontext():
            tensors: Sequence[torch.Tensor] = self._call(*sources)
            if self.random and self.reaches_end and not stands_at(ending or {}):
                raise Strayed
        return tensors


@contextmanager
def below_autograd() -> Iterator[None]:
    """Run ops as recorded: below autograd, in-place tracking and autocast."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
        yield


def view_of(tensor: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """``tensor``'s storage seen through ``geometry``."""
    dtype, size, stride, offset = geometry
    if tensor.dtype is not dtype:
        whole = torch.empty(0, dtype=dtype, device=tensor.device)
        return whole.set_(tensor.untyped_storage(), offset, size, stride)
    if tensor.shape == size and tensor.stride() == stride and tensor.storage_offset() == offset:
        return tensor
    return tensor.as_strided(size, stride, offset)


def _last_random(tape: Tape, ops: Iterable[int]) -> int:
    return max((k for k in ops if tape.ops[k].random), default=-1)


class _Writer:
    """Writes the source of one replay function. Variables: ``v3`` value 3 made here, ``s3`` value 3 as a source."""

    def __init__(self, tape: Tape, sources: Sequence[int], geometries: Mapping[int, Geometry]) -> None:
        self.tape = tape
        self.sources = sources
        self.geometries = {f"s{v}": geometries[v] for v in sources}
        self.made: set[tuple[int, int]] = set()
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"as_strided": torch.as_strided, "view_of": view_of}
        self.constants |= {"advance": advance, "tape": tape}
        self.numbers = itertools.count()

    def write(self, ops: Sequence[int], targets: Sequence[int], last_random: int) -> tuple[str, Callable[..., Any]]:
        last_use = self._last_uses(ops, targets)
        chosen = set(ops)
        for k, op in enumerate(self.tape.ops):
            if k in chosen:
                self._write_op(op)
                done = [name for name, last in last_use.items() if last == k]
                if done:
                    self.lines.append(f"del {', '.join(done)}")
            elif op.random and k < last_random:
                self.lines.append(f"advance(tape, {self._constant(op)})")
        arguments = ", ".join(f"s{v}" for v in self.sources)
        results = "".join(f"v{v}, " for v in targets)
        body = "".join(f"    {line}\n" for line in (*self.lines, f"return ({results})"))
        text = f"def replay({arguments}):\n{body}"
        namespace = dict(self.constants)
        exec(compile(text, "<stowplan replay>", "exec"), namespace)
        return text, namespace["replay"]

    def _last_uses(self, ops: Sequence[int], targets: Sequence[int]) -> dict[str, int]:
        """The op after which each variable can go. Targets stay; results nobody reads go at once."""
        last: dict[str, int] = {}
        made: set[tuple[int, int]] = set()
        for k in ops:
            op = self.tape.ops[k]
            for value, version in op.reads:
                last[f"v{value}" if (value, version) in made else f"s{value}"] = k
            for _, value in op.makes:
                made.add((value, 0))
                last[f"v{value}"] = k
            for value, version in op.writes:
                made.add((value, version))
                last[f"v{value}"] = k
        return {name: k for name, k in last.items() if name not in {f"v{v}" for v in targets}}

    def _write_op(self, op: TapeOp) -> None:
        call = self._constant(op.func)
        arguments = [self._expression(argument) for argument in op.args]
        arguments += [f"{name}={self._expression(argument)}" for name, argument in op.kwargs.items()]
        expression = f"{call}({', '.join(arguments)})"
        if not op.makes:
            self.lines.append(expression)
        elif len(op.func._schema.returns) == 1 and not _returns_list(op):
            ((_, value),) = op.makes
            self.lines.append(f"v{value} = {expression}")
        else:
            result = f"r{next(self.numbers)}"
            self.lines.append(f"{result} = {expression}")
            self.lines += [f"v{value} = {result}[{position}]" for position, value in op.makes]
            self.lines.append(f"del {result}")
        for _, value in op.makes:
            self.made.add((value, 0))
            self.geometries[f"v{value}"] = self.tape.values[value].geometry
        self.made.update(op.writes)

    def _expression(self, argument: Any) -> str:
        if type(argument) is Ref:
            return self._tensor(argument)
        if type(argument) is list and any(type(item) is Ref for item in argument):
            return f"[{', '.join(self._expression(item) for item in argument)}]"
        return self._constant(argument)

    def _tensor(self, ref: Ref) -> str:
        name = f"v{ref.value}" if (ref.value, ref.version) in self.made else f"s{ref.value}"
        own = self.geometries[name]
        if own == ref.geometry:
            return name
        if own.dtype is not ref.geometry.dtype:
            return f"view_of({name}, {self._constant(ref.geometry)})"
        return f"as_strided({name}, {ref.geometry.size!r}, {ref.geometry.stride!r}, {ref.geometry.offset!r})"

    def _constant(self, constant: Any) -> str:
        if constant is None or type(constant) is bool:
            return repr(constant)
        name = f"c{next(self.numbers)}"
        self.constants[name] = constant
        return name


def _returns_list(op: TapeOp) -> bool:
    return isinstance(op.func._schema.returns[0].type, torch.ListType)


def advance(tape: Tape, op: TapeOp) -> None:
    """Move the generator as the random ``op`` would, on stand-ins for its arguments."""

    def stand_in(ref: Ref) -> torch.Tensor:
        dtype, size, stride, _ = ref.geometry
        return torch.empty_strided(size, stride, dtype=dtype, device=tape.values[ref.value].device).zero_()

    args = [map_refs(argument, stand_in) for argument in op.args]
    op.func(*args, **{name: map_refs(argument, stand_in) for name, argument in op.kwargs.items()})
