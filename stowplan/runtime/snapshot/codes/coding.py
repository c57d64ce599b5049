"""Plans carried out on buffers: whole ones at once, where all bytes are at hand, or term by term as bytes arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TypeAlias

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.snapshot.codes.code import Area
from stowplan.runtime.snapshot.codes.kernels import Bytes, Kernels, as_bytes, best_kernels
from stowplan.runtime.snapshot.codes.layout import Layout, Plan, Span, Term

__all__ = ["accumulate", "carry_out", "decode", "encode"]

_Buffers: TypeAlias = dict[tuple[int, Area], Bytes]


def accumulate(term: Term, source: object, destination: object, *, kernels: Kernels | None = None) -> None:
    """Add one term, or a part of one: ``destination ^= term.coefficient · source``, in place.

    ``source`` has the bytes of ``term.source`` alone, as they arrived; ``destination`` is the whole area that
    ``term.destination`` is in, and that was zeros there before its first term.

    Raises InvalidArgument: no contiguous buffers, other lengths, or a read-only or overlapping ``destination``.
    """
    given = as_bytes(source, "source")
    area = as_bytes(destination, "destination", writable=True)
    if len(given) != term.source.length:
        raise InvalidArgument(f"source has {len(given)} bytes: the term's has {term.source.length}.")
    if len(area) < term.destination.offset + term.destination.length:
        raise InvalidArgument(f"destination has {len(area)} bytes: the term writes {term.destination}.")
    if not len(given):
        return
    out = _piece(area, term.destination)
    _check_overlap(given, out, f"source and {term.destination}")
    (kernels or best_kernels()).combine([[term.coefficient]], [given], [out], add=True)


def encode(
    layout: Layout,
    data: Mapping[int, object],
    parity: Mapping[int, object],
    *,
    kernels: Kernels | None = None,
) -> None:
    """Make the parities of all nodes in ``parity``, whose buffers are overwritten, from the nodes' ``data``.

    ``data``: node to its ``node_bytes``, of all nodes that have a part in it; ``parity``: node to a writable buffer of
    ``layout.parity_bytes``. Raises InvalidArgument: a buffer is missing, of another length, read-only or overlaps.
    """
    made = [layout.exchange(node) for node in sorted(layout.code.nodes(parity))]
    spans = tuple(span for plan in made for span in plan.destinations)
    terms = tuple(term for plan in made for term in plan.terms)
    carry_out(layout, Plan(spans, terms), data, parity, kernels=kernels)


def decode(
    layout: Layout,
    data: Mapping[int, object],
    parity: Mapping[int, object],
    *,
    lost: Iterable[int] = (),
    bad: Iterable[Span] = (),
    kernels: Kernels | None = None,
) -> None:
    """Make what is lost, data and parity, in place: ``data`` and ``parity`` have buffers for lost nodes, too.

    What is in the buffers of lost nodes and in ``bad`` spans is overwritten, all else only read. Raises
    UnrecoverableSnapshot before anything is written, and InvalidArgument as ``encode`` and ``Layout.recovery``.
    """
    carry_out(layout, layout.recovery(lost, bad), data, parity, kernels=kernels)


def carry_out(
    layout: Layout,
    plan: Plan,
    data: Mapping[int, object],
    parity: Mapping[int, object],
    *,
    kernels: Kernels | None = None,
) -> None:
    """Overwrite a plan's destinations with what it makes; errors as ``encode``, before anything is written."""
    buffers = _checked(layout, plan, {Area.DATA: data, Area.PARITY: parity})
    chosen = kernels or best_kernels()
    ends: dict[Span, int] = {}
    ordered = sorted(plan.terms, key=lambda term: (term.stripe, term.column))
    for _, found in groupby(ordered, key=lambda term: (term.stripe, term.column)):
        terms = tuple(found)
        # Sources may end before others do: up to each end, the sum of those that are as long.
        for begin, end in pairwise((0, *sorted({term.source.length for term in terms}))):
            _sum([term.part(begin, end) for term in terms if term.source.length >= end], buffers, chosen)
        for term in terms:
            start = term.destination.part(0, 0)
            ends[start] = max(ends.get(start, 0), term.destination.length)
    for span in plan.destinations:
        _piece(buffers[span.node, span.area], span)[ends.get(span.part(0, 0), 0) :] = 0


def _sum(terms: Sequence[Term], buffers: _Buffers, kernels: Kernels) -> None:
    sources = list(dict.fromkeys(term.source for term in terms))
    outs = list(dict.fromkeys(term.destination for term in terms))
    coefficients = [[0] * len(sources) for _ in outs]
    for term in terms:
        coefficients[outs.index(term.destination)][sources.index(term.source)] = term.coefficient
    pieces = [[_piece(buffers[span.node, span.area], span) for span in spans] for spans in (sources, outs)]
    kernels.combine(coefficients, *pieces, add=False)


def _checked(layout: Layout, plan: Plan, given: Mapping[Area, Mapping[int, object]]) -> _Buffers:
    written = {(span.node, span.area) for span in plan.destinations}
    read = {(span.node, span.area) for span in plan.sources}
    buffers: _Buffers = {}
    for node, area in sorted(written | read):
        if node not in given[area]:
            raise InvalidArgument(f"{area} has no buffer for node {node}, which this takes.")
        name, size = f"{area}[{node}]", layout.area_bytes(node, area)
        buffer = as_bytes(given[area][node], name, writable=(node, area) in written)
        if len(buffer) != size:
            raise InvalidArgument(f"{name} has {len(buffer)} bytes: it is {size} in this layout.")
        buffers[node, area] = buffer
    # Any two different areas; the spans of one area are apart by how plans are made.
    for place in written:
        for other, buffer in buffers.items():
            if other != place:
                _check_overlap(buffers[place], buffer, f"{place[1]}[{place[0]}] and {other[1]}[{other[0]}]")
    return buffers


def _check_overlap(one: Bytes, other: Bytes, names: str) -> None:
    begin, end = one.ctypes.data, other.ctypes.data
    if begin < end + len(other) and end < begin + len(one):
        raise InvalidArgument(f"{names} overlap in memory: give buffers of their own.")


def _piece(area: Bytes, span: Span) -> Bytes:
    return area[span.offset : span.offset + span.length]
