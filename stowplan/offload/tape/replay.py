"""From a tape and a set of targets to a flat Python function that makes them again.

The function is generated as source and compiled once; per op it costs the call and nothing else. Views are not
replayed as ops: an argument is ``as_strided`` out of its storage where its geometry is not the stored tensor's own.

Note: rows in a replay
    A target of which only the first rows are wanted lies in a whole tensor, which the caller has filled with the other
    rows. As soon as its first rows are made they are copied in, so whatever reads it later, in part or whole, finds it
    complete. Ops that keep rows apart run for as many as are wanted of their results (``rows.rows_at``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from stowplan.offload.tape.rng import Position, rewound, stands_at
from stowplan.offload.tape.rows import RowRef, RowWise, row_bytes, rows_at
from stowplan.offload.tape.tape import Geometry, Ref, Tape, TapeOp, map_refs

__all__ = ["Replay", "Strayed", "advance", "below_autograd", "view_of"]


class Strayed(Exception):
    """The generator does not end where the forward pass left it: somebody else drew from it, then or now."""


class Replay:
    """Makes ``targets`` again. Call it with the tensors of ``sources``, in order, and with whole tensors for the
    targets that are wanted in part (``joined``), whose first rows it fills; it gives those of the others (``whole``).

    ``targets`` says how many first rows are wanted of each value, 0 for all of ``num_rows``; ``rules`` which ops keep
    rows apart; ``geometries`` how the source tensors view their storages. ``source`` is the generated function's text.
    """

    def __init__(
        self,
        tape: Tape,
        targets: Mapping[int, int],
        available: Collection[int],
        geometries: Mapping[int, Geometry],
        num_rows: int = 0,
        rules: Mapping[int, RowWise] | None = None,
    ) -> None:
        rules = rules or {}
        ops, sources = tape.closure(targets, available)
        self.whole = tuple(value for value, rows in targets.items() if not rows)
        self.joined = tuple(value for value, rows in targets.items() if rows)
        self.sources = tuple(sorted(sources))
        self.ops = tuple(ops)
        self.rows_at = rows_at(tape, rules, ops, targets, sources)
        self.random = any(tape.ops[k].random for k in ops)
        # Where the generators end can be told only if the last that the block drew is drawn again.
        last_random = _last_random(tape, ops)
        self.reaches_end = last_random == _last_random(tape, range(len(tape.ops)))
        writer = _Writer(tape, self.sources, geometries, targets, num_rows, rules, self.rows_at)
        self.source, self._call = writer.write(self.ops, last_random)

    def __call__(
        self,
        sources: Sequence[torch.Tensor],
        position: Position,
        ending: Position | None = None,
        joined: Sequence[torch.Tensor] = (),
    ) -> Sequence[torch.Tensor]:
        """Make the targets. ``position`` is where the generators stood when the block began, ``ending`` when it ended;
        both are empty if not random.

        Raises Strayed if the block's own ops do not get the generators from the one to the other, as far as they are
        run to the end.
        """
        with below_autograd(), rewound(position) if self.random else nullcontext():
            tensors: Sequence[torch.Tensor] = self._call(*sources, *joined)
            if self.random and self.reaches_end and not stands_at(ending or {}):
                raise Strayed
        return tensors


class below_autograd:  # noqa: N801 (a context manager)
    """Run ops as recorded: below autograd, in-place tracking and autocast."""

    __slots__ = ("_autocast", "_below", "_grad")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._below, self._autocast = torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast()
        self._below.__enter__()
        self._autocast.__enter__()

    def __exit__(self, *raised: object) -> None:
        self._autocast.__exit__(*raised)
        self._below.__exit__(*raised)
        torch._C._set_grad_enabled(self._grad)


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


def _fill(whole: torch.Tensor, part: torch.Tensor, num_elements: int) -> None:
    """Copy the first elements of ``part``'s storage to where they belong in ``whole``'s."""
    whole.as_strided((num_elements,), (1,), 0).copy_(part.as_strided((num_elements,), (1,), 0))


class _Writer:
    """Writes the source of one replay function. Variables: ``v3`` value 3 made here, ``s3`` value 3 as a source, ``j3``
    value 3 joined of rows made here and others.
    """

    def __init__(
        self,
        tape: Tape,
        sources: Sequence[int],
        geometries: Mapping[int, Geometry],
        targets: Mapping[int, int],
        num_rows: int,
        rules: Mapping[int, RowWise],
        rows_at: Mapping[int, int],
    ) -> None:
        self.tape = tape
        self.sources = sources
        self.targets = targets
        self.num_rows = num_rows
        self.rules = rules
        self.rows_at = rows_at
        self.geometries = {f"s{v}": geometries[v] for v in sources}
        self.names: dict[tuple[int, int], str] = {}  # of what is made here; all else is a source
        self.first_rows: set[str] = set()  # variables that hold no more
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"as_strided": torch.as_strided, "view_of": view_of, "fill": _fill}
        self.constants |= {"advance": advance, "tape": tape}
        self.numbers = itertools.count()

    def write(self, ops: Sequence[int], last_random: int) -> tuple[str, Callable[..., Any]]:
        last_use = self._last_uses(ops)
        chosen = set(ops)
        for k, op in enumerate(self.tape.ops):
            if k in chosen:
                self._write_op(k, op)
                done = [name for name, last in last_use.items() if last == k]
                if done:
                    self.lines.append(f"del {', '.join(done)}")
            elif op.random and k < last_random:
                self.lines.append(f"advance(tape, {self._constant(op)})")
        joined = [f"j{value}" for value, rows in self.targets.items() if rows]
        arguments = ", ".join((*(f"s{v}" for v in self.sources), *joined))
        results = "".join(f"v{value}, " for value, rows in self.targets.items() if not rows)
        body = "".join(f"    {line}\n" for line in (*self.lines, f"return ({results})"))
        text = f"def replay({arguments}):\n{body}"
        namespace = dict(self.constants)
        exec(compile(text, "<stowplan replay>", "exec"), namespace)
        return text, namespace["replay"]

    def _last_uses(self, ops: Sequence[int]) -> dict[str, int]:
        """The op after which each variable can go. Targets stay; results nobody reads go at once."""
        last: dict[str, int] = {}
        made: set[tuple[int, int]] = set()
        for k in ops:
            op = self.tape.ops[k]
            for value, version in op.reads:
                if not self.targets.get(value):
                    again = (value, version) in made and not self._is_source(value, version)
                    last[f"v{value}" if again else f"s{value}"] = k
            for value, version in (*((value, 0) for _, value in op.makes), *op.writes):
                made.add((value, version))
                last[f"v{value}"] = k
        stay = {f"v{value}" for value, rows in self.targets.items() if not rows}
        return {name: k for name, k in last.items() if name not in stay}

    def _write_op(self, number: int, op: TapeOp) -> None:
        rows = self.rows_at.get(number, 0)
        args = self.rules[number].args if rows else op.args
        arguments = [self._expression(argument, rows) for argument in args]
        arguments += [f"{name}={self._expression(argument)}" for name, argument in op.kwargs.items()]
        expression = f"{self._constant(op.func)}({', '.join(arguments)})"
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
            self._take(value, rows)
        self.names |= {(value, version): f"v{value}" for value, version in op.writes}

    def _take(self, value: int, rows: int) -> None:
        """Note what variable holds a value that was just made, and join it with its other rows if it has such."""
        name = f"v{value}"
        made = self.tape.values[value]
        if rows:
            self.first_rows.add(name)
        if wanted := self.targets.get(value):
            num_elements = wanted * row_bytes(made, self.num_rows) // made.geometry.dtype.itemsize
            self.lines.append(f"fill(j{value}, {name}, {num_elements})")
            name = f"j{value}"
        self.names[value, 0] = name
        self.geometries[name] = made.geometry

    def _expression(self, argument: Any, rows: int = 0) -> str:
        if type(argument) is RowRef:
            return self._tensor(argument.ref, argument.first(rows))
        if type(argument) is Ref:
            return self._tensor(argument, argument.geometry)
        if type(argument) is list and any(type(item) in (Ref, RowRef) for item in argument):
            return f"[{', '.join(self._expression(item, rows) for item in argument)}]"
        return self._constant(argument)

    def _tensor(self, ref: Ref, geometry: Geometry) -> str:
        name = f"s{ref.value}"
        if not self._is_source(ref.value, ref.version):
            name = self.names.get((ref.value, ref.version), name)
        own = self.geometries[name]
        if own == geometry and name not in self.first_rows:
            return name
        if own.dtype is not geometry.dtype:
            return f"view_of({name}, {self._constant(geometry)})"
        return f"as_strided({name}, {geometry.size!r}, {geometry.stride!r}, {geometry.offset!r})"

    def _is_source(self, value: int, version: int) -> bool:
        """Is the value at hand? Its op may run again for the sake of its other results."""
        return value in self.sources and version == self.tape.values[value].last_version

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
