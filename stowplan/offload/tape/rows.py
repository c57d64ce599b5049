"""Token rows: which ops keep them apart, so that the first rows of a result can be made from first rows alone.

A block computes on N tokens, batch times sequence. A value is divided into rows where its storage is N equal,
contiguous stretches in the order of its dimensions (which need not be the leading ones: attention has heads between
batch and sequence). An op keeps rows apart if the first k rows of its results follow from the first k rows of some
arguments and the whole of the others. MEMO (arXiv 2407.12117, section 4.1) swaps and recomputes by such rows.

Note: rules propose, the proof disposes
    A rule says how arguments are to be cut, not that kernels give the same bits for fewer rows: they block and
    vectorise by shape. An op is run for first rows only where ``proof`` has seen the very bytes (``TapeOp.splits``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from stowplan.offload.tape.tape import Geometry, Origin, Ref, Tape, TapeOp, TapeValue

__all__ = ["RowRef", "RowWise", "grid", "num_tokens", "row_bytes", "row_wise", "rows_at", "splits_of"]

# Dimensions that enumerate rows, counted from the right, outermost first.
_Dims = tuple[int, ...]

# Proved at capture: so many points at most, and (on the CPU, elsewhere) at multiples of what kernels block rows by.
_MAX_POINTS = 8
_CPU_TILE, _DEVICE_TILE = 16, 128


class RowRef(NamedTuple):
    """A tensor argument of which an op needs no more rows than it gives."""

    ref: Ref
    dims: _Dims

    def first(self, num_rows: int) -> Geometry:
        """The view of the first ``num_rows`` rows: batch and sequence become one dimension."""
        geometry = self.ref.geometry
        size, stride = list(geometry.size), list(geometry.stride)
        step = stride[self.dims[-1]]
        for dim in self.dims:
            size[dim], stride[dim] = 1, num_rows * step
        size[self.dims[-1]], stride[self.dims[-1]] = num_rows, step
        return geometry._replace(size=tuple(size), stride=tuple(stride))


class RowWise(NamedTuple):
    """How an op runs for first rows: its arguments with RowRefs where they are cut, and the made values with rows."""

    args: tuple[Any, ...]
    cut: tuple[int, ...]  # values of the RowRefs
    makes: tuple[tuple[int, int], ...]  # (position among the results, value)


def num_tokens(tape: Tape) -> int:
    """The block's tokens, by its first argument that is a tensor of numbers; 0 where that has no rows."""
    inputs = [v for v in tape.values if v.origin is Origin.INPUT and v.geometry.dtype.is_floating_point]
    for value in sorted(inputs, key=lambda v: v.position):
        num_rows = math.prod(value.geometry.size[:-1])
        return num_rows if num_rows > 1 and row_bytes(value, num_rows) else 0
    return 0


def row_bytes(value: TapeValue, num_rows: int) -> int:
    """Bytes of one row of a value; 0 if its storage is not ``num_rows`` rows."""
    size_bytes = value.size_bytes
    if num_rows < 2 or not size_bytes or size_bytes % (num_rows * value.geometry.dtype.itemsize):
        return 0
    row = size_bytes // num_rows
    return row if _row_dims(value.geometry, num_rows, row // value.geometry.dtype.itemsize) else 0


def _row_dims(geometry: Geometry, num_rows: int, row: int) -> _Dims:
    """Dimensions that step through storage row by row; empty if there are none such.

    ``row`` is the length of a row in elements. What is left of the view must stay within one row.
    """
    _, size, stride, offset = geometry
    long = [dim for dim, length in enumerate(size) if length > 1]
    dims = [dim for dim in long if stride[dim] >= row]
    if not dims or stride[dims[-1]] != row or math.prod(size[dim] for dim in dims) != num_rows:
        return ()
    if any(stride[a] != stride[b] * size[b] for a, b in itertools.pairwise(dims)):
        return ()
    if offset + sum((size[dim] - 1) * stride[dim] for dim in long if dim not in dims) >= row:
        return ()
    return tuple(dim - len(size) for dim in dims)


def row_wise(tape: Tape, num_rows: int) -> dict[int, RowWise]:
    """The ops that keep ``num_rows`` rows apart, by number."""
    rows = _Rows(tape, num_rows)
    found = {k: rows.rule(op) for k, op in enumerate(tape.ops)} if num_rows else {}
    return {k: rule for k, rule in found.items() if rule is not None}


class _Rows:
    def __init__(self, tape: Tape, num_rows: int) -> None:
        self.tape = tape
        self.num_rows = num_rows

    def rule(self, op: TapeOp) -> RowWise | None:
        if op.writes or op.random or not op.replayable or any(_refs(list(op.kwargs.values()))):
            return None
        makes = tuple((p, v) for p, v in op.makes if self._is_divided(self.tape.values[v]))
        rule = _rule_of(op)
        if not makes or rule is None:
            return None
        cut = {ref: dims for ref in _refs(list(op.args)) if (dims := self._dims(ref))}
        chosen = rule(op, cut)
        if not chosen or (rule is _pointwise and any(self._dims_of(v) != cut[next(iter(chosen))] for _, v in makes)):
            return None
        args = tuple(_cut(argument, {ref: cut[ref] for ref in chosen}) for argument in op.args)
        return RowWise(args, tuple(dict.fromkeys(ref.value for ref in chosen)), makes)

    def _is_divided(self, value: TapeValue) -> bool:
        """Has the value rows, and never but one content?"""
        return value.last_version == 0 and not value.opaque and row_bytes(value, self.num_rows) > 0

    def _dims(self, ref: Ref) -> _Dims:
        value = self.tape.values[ref.value]
        of_tokens = value.origin in (Origin.INPUT, Origin.MADE)
        if not of_tokens or not self._is_divided(value) or ref.geometry.dtype is not value.geometry.dtype:
            return ()
        return self._dims_within(value, ref.geometry)

    def _dims_of(self, value: int) -> _Dims:
        """Where the rows of a divided value are, as its maker gave it."""
        made = self.tape.values[value]
        return self._dims_within(made, made.geometry)

    def _dims_within(self, value: TapeValue, geometry: Geometry) -> _Dims:
        return _row_dims(geometry, self.num_rows, row_bytes(value, self.num_rows) // geometry.dtype.itemsize)


def _refs(arguments: Iterable[Any]) -> Iterator[Ref]:
    for argument in arguments:
        if type(argument) is Ref:
            yield argument
        elif type(argument) is list:
            yield from _refs(argument)


def _cut(argument: Any, chosen: Mapping[Ref, _Dims]) -> Any:
    if type(argument) is Ref:
        return RowRef(argument, chosen[argument]) if argument in chosen else argument
    if type(argument) is list:
        return [_cut(item, chosen) for item in argument]
    return argument


# ---- rules, op by op -------------------------------------------------------------------------------------------------
# Given an op and the arguments that have rows (with their dimensions): which arguments are cut; none: not row-wise.
_Rule = Callable[[TapeOp, Mapping[Ref, _Dims]], Collection[Ref]]


def _rule_of(op: TapeOp) -> _Rule | None:
    if torch.Tag.pointwise in op.func.tags:
        return _pointwise
    return RULES.get(op.func._schema.name.removeprefix("aten::"))


def _pointwise(op: TapeOp, cut: Mapping[Ref, _Dims]) -> Collection[Ref]:
    """All that has rows is cut, in the same dimensions; the rest is broadcast over them."""
    dims = set(cut.values())
    if len(dims) != 1:
        return ()
    (rows,) = dims
    others = [ref for ref in _refs(op.args) if ref not in cut]
    return tuple(cut) if all(_is_broadcast(ref, rows) for ref in others) else ()


def _is_broadcast(ref: Ref, dims: _Dims) -> bool:
    size = ref.geometry.size
    return all(-dim > len(size) or size[dim] == 1 for dim in dims)


def _matrix_product(op: TapeOp, cut: Mapping[Ref, _Dims]) -> Collection[Ref]:
    """Rows of the left matrix; the right one and a bias are whole."""
    *bias, left, right = [argument for argument in op.args if type(argument) is Ref]
    fits = left != right and cut.get(left) == (-2,) and all(_is_broadcast(ref, (-2,)) for ref in bias)
    return (left,) if fits else ()


def _normalisation(op: TapeOp, cut: Mapping[Ref, _Dims]) -> Collection[Ref]:
    """Over the last dimensions, as many as the shape in the second argument has."""
    return _only_over(op, cut, range(-len(op.args[1]), 0))


def _over_dim(op: TapeOp, cut: Mapping[Ref, _Dims]) -> Collection[Ref]:
    """Softmax and reductions, over other dimensions than those of the rows."""
    dims = _argument(op, "dim")
    if dims is None or dims == []:
        return ()
    return _only_over(op, cut, dims if isinstance(dims, list) else [dims])


def _only_over(op: TapeOp, cut: Mapping[Ref, _Dims], over: Iterable[int]) -> Collection[Ref]:
    argument = op.args[0]
    if argument not in cut:
        return ()
    num_dims = len(argument.geometry.size)
    mixed = {dim - num_dims if dim >= 0 else dim for dim in over}
    return () if mixed & set(cut[argument]) else (argument,)


def _concatenation(op: TapeOp, cut: Mapping[Ref, _Dims]) -> Collection[Ref]:
    """Of tensors that all have rows, along another dimension."""
    refs = list(_refs(op.args))
    if not all(ref in cut for ref in refs) or len(set(cut.values())) != 1:
        return ()
    dim, num_dims = _argument(op, "dim"), len(refs[0].geometry.size)
    return () if (dim - num_dims if dim >= 0 else dim) in cut[refs[0]] else tuple(dict.fromkeys(refs))


def _causal_attention(op: TapeOp, cut: Mapping[Ref, _Dims]) -> Collection[Ref]:
    """Within one sequence, the first queries see the first keys alone."""
    query, key, value = op.args[:3]
    one_sequence = all(cut.get(ref) == (-2,) and len(ref.geometry.size) == 4 for ref in (query, key, value))
    masked = any(_argument(op, name) is not None for name in ("attn_mask", "attn_bias"))
    if not one_sequence or masked or not _argument(op, "is_causal") or query.geometry.size[0] != 1:
        return ()
    return tuple(dict.fromkeys((query, key, value)))


def _argument(op: TapeOp, name: str) -> Any:
    """An argument by its name in the schema, or its default; None if there is no such."""
    for position, argument in enumerate(op.func._schema.arguments):
        if argument.name == name:
            return op.kwargs.get(name, op.args[position] if position < len(op.args) else argument.default_value)
    return None


RULES: dict[str, _Rule] = {
    **dict.fromkeys(("mm", "addmm", "_addmm_activation"), _matrix_product),
    **dict.fromkeys(("_to_copy", "clone"), _pointwise),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _normalisation),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "glu"), _over_dim),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "var_mean", "linalg_vector_norm", "logsumexp"), _over_dim),
    "cat": _concatenation,
    "_scaled_dot_product_flash_attention_for_cpu": _causal_attention,
    "_scaled_dot_product_flash_attention": _causal_attention,
    "_scaled_dot_product_efficient_attention": _causal_attention,
    "_scaled_dot_product_cudnn_attention": _causal_attention,
}


# ---- how many rows ---------------------------------------------------------------------------------------------------
def grid(num_rows: int, device: torch.device) -> tuple[int, ...]:
    """Numbers of first rows worth proving: a few, evenly spread, at multiples of what kernels block rows by."""
    tile = _CPU_TILE if device.type == "cpu" else _DEVICE_TILE
    num_points = min(_MAX_POINTS, (num_rows - 1) // tile)
    nearest = (round(i * num_rows / (num_points + 1) / tile) * tile for i in range(1, num_points + 1))
    return tuple(sorted({rows for rows in nearest if 0 < rows < num_rows}))


def rows_at(
    tape: Tape,
    rules: Mapping[int, RowWise],
    ops: Sequence[int],
    targets: Mapping[int, int],
    sources: Collection[int],
    proved: bool = True,
) -> dict[int, int]:
    """How many first rows each of ``ops`` makes; ops that are not named run whole.

    An op runs for as many rows as anyone wants of its results, if it can: it is row-wise and, where only what is
    ``proved`` counts, gives the same bits at that number.

    Args:
        ops: ascending; all that the targets need.
        targets: first rows wanted of values, 0: all. A value that is wanted in part is joined with its other rows as
            soon as they are made, so ops that read it find it whole, as they find ``sources``.
    """
    whole: set[int] = {value for value, rows in targets.items() if not rows}
    wanted = {value: rows for value, rows in targets.items() if rows}
    at: dict[int, int] = {}
    for k in reversed(ops):
        op, rule = tape.ops[k], rules.get(k)
        made = {v for _, v in op.makes} | {v for v, _ in op.writes}
        rows = max((wanted.get(v, 0) for v in made), default=0)
        divided = {v for _, v in rule.makes} if rule is not None else set()
        if made & whole or not made & wanted.keys() <= divided or (proved and rows not in op.splits):
            rows = 0
        if rows:
            at[k] = rows
        for value, version in op.reads:
            at_hand = value in sources and version == tape.values[value].last_version
            if at_hand or targets.get(value):
                continue
            if rows and rule is not None and value in rule.cut:
                wanted[value] = max(wanted.get(value, 0), rows)
            else:
                whole.add(value)
    return at


def splits_of(tape: Tape, rules: Mapping[int, RowWise], saved: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Numbers of first rows that each value can be made again by, alone: every op on its way does as much there.

    A way ends at ``saved`` values, which are there in whole, and at what the block was given.
    """
    splits: dict[int, tuple[int, ...]] = {}
    for k, rule in sorted(rules.items()):
        points = set(tape.ops[k].splits)
        for value, _ in tape.ops[k].reads:
            if tape.values[value].origin is Origin.MADE and value not in saved:
                points &= set(splits.get(value, ())) if value in rule.cut else set()
        if points:
            splits |= {value: tuple(sorted(points)) for _, value in rule.makes}
    return splits
