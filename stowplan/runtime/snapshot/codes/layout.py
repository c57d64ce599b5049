"""Where chunks are in nodes' bytes, and plans: who sends what to whom, multiplied by what, to make or to recover it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stowplan.core.errors import InvalidArgument, UnrecoverableSnapshot
from stowplan.runtime.snapshot.codes.code import Area, Chunk, Code, Stripe
from stowplan.runtime.snapshot.codes.field import product, solve

__all__ = ["Layout", "Plan", "Span", "Term"]

_ALIGNMENT_BYTES = 64  # of chunks: a cache line


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Bytes ``offset`` to ``offset + length`` of ``area`` of ``node``."""

    node: int
    area: Area
    offset: int
    length: int

    def __str__(self) -> str:
        return f"bytes {self.offset} to {self.offset + self.length} of node {self.node}'s {self.area}"

    def part(self, begin: int, end: int) -> Span:
        """Its bytes ``begin`` to ``end``, counted from its own first one."""
        return Span(self.node, self.area, self.offset + begin, end - begin)


@dataclass(frozen=True, slots=True)
class Term:
    """One step of a plan: ``destination ^= coefficient · source`` over GF(2^8), both equally long, of different nodes.

    Both begin at ``column`` of their chunks in stripe ``stripe``.
    """

    source: Span
    destination: Span
    coefficient: int
    stripe: int
    column: int

    def part(self, begin: int, end: int) -> Term:
        """The same for bytes ``begin`` to ``end`` of both, for sending a chunk piece by piece."""
        spans = self.source.part(begin, end), self.destination.part(begin, end)
        return Term(*spans, self.coefficient, self.stripe, self.column + begin)


@dataclass(frozen=True, slots=True)
class Plan:
    """What makes ``destinations``, which begin as zeros, once all ``terms`` are added: in any order, and in parts.

    All terms of a destination begin where it begins, and some may end before it does.
    """

    destinations: tuple[Span, ...]
    terms: tuple[Term, ...]

    @property
    def sources(self) -> tuple[Span, ...]:
        """What has to be read, or fetched, each once."""
        return tuple(sorted({term.source for term in self.terms}))


class Layout:
    """A code over nodes with so many bytes each: ``node_bytes`` for all, or a number for each node.

    Chunks have ``chunk_bytes``, from the largest node and a multiple of 64; bytes behind a node's end count as zeros
    and are neither sent nor stored.

    At the end of its bytes a node may have *shares*: its own, and copies of those of the m nodes before it. ``shares``
    has their sizes in this order for each node, or nothing for all. They need no parity: a share that is lost is read
    where a copy of it is, as in a mirror with m copies.

    Raises InvalidArgument: numbers below 0, or not one for each node; copies that are not as long as what they are of.
    """

    def __init__(self, code: Code, node_bytes: int | Sequence[int], shares: Sequence[Sequence[int]] = ()) -> None:
        sizes = (node_bytes,) * code.n if isinstance(node_bytes, int) else tuple(node_bytes)
        if len(sizes) != code.n:
            raise InvalidArgument(f"node_bytes has {len(sizes)} numbers: give one, or one for each of {code.n} nodes.")
        self.code = code
        self.node_bytes = sizes
        self.shares = _checked_shares(code, shares)
        self.coded_bytes = tuple(size - sum(own) for size, own in zip(sizes, self.shares, strict=True))
        if min(self.coded_bytes) < 0:
            raise InvalidArgument(f"node_bytes has {min(sizes)}: numbers of bytes are 0 or more, and hold the shares.")
        pieces = code.num_data_chunks * _ALIGNMENT_BYTES
        self.chunk_bytes = -(-max(self.coded_bytes) // pieces) * _ALIGNMENT_BYTES
        self.stripes = (*code.stripes, *(_share(code, node) for node in range(code.n) if self.shares[node]))

    @property
    def parity_bytes(self) -> int:
        """What each node has to keep for the group."""
        return self.code.num_parity_chunks * self.chunk_bytes

    def area_bytes(self, node: int, area: Area) -> int:
        """How long this area of this node is."""
        return self.node_bytes[node] if area is Area.DATA else self.parity_bytes

    def span(self, chunk: Chunk) -> Span:
        """Where a chunk is; shorter than ``chunk_bytes``, or empty, at the end of a node's data. Shares are chunks."""
        total = self.parity_bytes
        if chunk.area is Area.DATA:
            total, behind = self.coded_bytes[chunk.node], chunk.index - self.code.num_data_chunks
            if behind >= 0:
                begin = total + sum(self.shares[chunk.node][:behind])
                return Span(chunk.node, chunk.area, begin, self.shares[chunk.node][behind])
        begin = min(chunk.index * self.chunk_bytes, total)
        return Span(chunk.node, chunk.area, begin, min(self.chunk_bytes, total - begin))

    def exchange(self, destination: int | None = None) -> Plan:
        """What makes all parities, or those that node ``destination`` keeps, from nodes' data but for their shares."""
        wanted = self.code.nodes(range(self.code.n) if destination is None else (destination,))
        spans: list[Span] = []
        terms: list[Term] = []
        for number, stripe in enumerate(self.code.stripes):
            for parity, row in zip(stripe.parity, stripe.coefficients, strict=True):
                if parity.node in wanted:
                    spans.append(self.span(parity))
                    terms += self._terms(number, spans[-1], zip(stripe.data, row, strict=True), 0)
        return Plan(tuple(spans), tuple(terms))

    def recovery(self, lost: Iterable[int] = (), bad: Iterable[Span] = ()) -> Plan:
        """What makes all that is lost, data and parity, from what is left: whole nodes, and ``bad`` bytes of others.

        Bytes are looked at column by column: what one column of a stripe has lost does not matter to the next, so bad
        blocks that a checksum found need not be chunks. Where there is a choice parities that are XORs are used.

        Raises UnrecoverableSnapshot where a column of a stripe has lost more chunks than the stripe has parities;
        InvalidArgument for what is no node, and for spans outside a node's bytes.
        """
        gone, spans = self.code.nodes(lost), tuple(bad)
        for span in spans:
            self._check(span)
        if not self.code.survives(gone):  # also where these nodes are too small for all their stripes
            raise UnrecoverableSnapshot([f"node {node}" for node in sorted(gone)], self.code.stands)
        made: list[Span] = []
        terms: list[Term] = []
        beyond: set[Chunk] = set()
        for number, stripe in enumerate(self.stripes):
            holes = {chunk: list(self._holes(chunk, gone, spans)) for chunk in stripe.chunks}
            edges = sorted({edge for found in holes.values() for hole in found for edge in hole})
            for begin, end in pairwise(edges):
                erased = [
                    chunk for chunk, found in holes.items() if any(first <= begin < last for first, last in found)
                ]
                if len(erased) > len(stripe.parity):
                    beyond.update(erased)
                    continue
                for chunk, row in _solution(stripe, erased):
                    made.append(self.span(chunk).part(begin, end))
                    terms += self._terms(number, made[-1], row, begin)
        if beyond:
            raise self._unrecoverable(gone, beyond)
        return Plan(tuple(made), tuple(terms))

    def _check(self, span: Span) -> None:
        self.code.nodes((span.node,))
        total = self.area_bytes(span.node, span.area)
        if span.length < 0 or not 0 <= span.offset <= span.offset + span.length <= total:
            raise InvalidArgument(f"{span} are not there: it has {total} bytes.")

    def _holes(self, chunk: Chunk, gone: frozenset[int], bad: Sequence[Span]) -> Iterator[tuple[int, int]]:
        """The columns that are lost of a chunk."""
        whole = self.span(chunk)
        if chunk.node in gone:
            bad = (whole,)
        for span in bad:
            if (span.node, span.area) == (chunk.node, chunk.area):
                begin = max(span.offset - whole.offset, 0)
                end = min(span.offset + span.length - whole.offset, whole.length)
                if begin < end:
                    yield begin, end

    def _terms(self, stripe: int, made: Span, row: Iterable[tuple[Chunk, int]], column: int) -> Iterator[Term]:
        """``made``, which begins at ``column``, from the chunks of ``row`` with their coefficients."""
        for chunk, coefficient in row:
            source = self.span(chunk)
            length = min(made.length, source.length - column)
            if coefficient and length > 0:
                yield Term(source.part(column, column + length), made.part(0, length), coefficient, stripe, column)

    def _unrecoverable(self, gone: frozenset[int], beyond: set[Chunk]) -> UnrecoverableSnapshot:
        nodes = [f"node {node}" for node in sorted(gone & {chunk.node for chunk in beyond})]
        chunks = [str(chunk) for chunk in sorted(beyond) if chunk.node not in gone]
        return UnrecoverableSnapshot([*nodes, *chunks], self.code.stands)


def _checked_shares(code: Code, shares: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    if not any(shares):
        return ((),) * code.n
    found = tuple(tuple(own) for own in shares)
    if [len(own) for own in found] != [code.m + 1] * code.n:
        raise InvalidArgument(
            f"shares={shares!r}: give {code.m + 1} numbers for each of {code.n} nodes, for its own share and those of "
            f"the {code.m} before it, or nothing."
        )
    for node, own in enumerate(found):
        for behind, size in enumerate(own):
            owner = (node - behind) % code.n
            if size != found[owner][0] or size < 0:
                raise InvalidArgument(
                    f"shares={shares!r}: node {node} has {size} bytes of node {owner}'s share of {found[owner][0]}."
                )
    return found


def _share(code: Code, node: int) -> Stripe:
    """A node's share, with its copies for parities."""
    chunks = [Chunk((node + k) % code.n, Area.DATA, code.num_data_chunks + k) for k in range(code.m + 1)]
    return Stripe((chunks[0],), tuple(chunks[1:]), ((1,),) * code.m)


def _solution(stripe: Stripe, erased: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[tuple[Chunk, int]]]]:
    """Each erased chunk as a sum of chunks that are left.

    With data d, G the identity above the parities' coefficients, and chunks G · d: rows of G for as many chunks that
    are left as there are data are S; S · d is known, and an erased chunk with row e is e · S⁻¹ · (S · d).
    """
    size = len(stripe.data)
    identity = [tuple(int(i == j) for j in range(size)) for i in range(size)]
    generator = dict(zip(stripe.chunks, (*identity, *stripe.coefficients), strict=True))
    left = [chunk for chunk in stripe.chunks if chunk not in erased][:size]
    inverted = solve([generator[chunk] for chunk in left], identity)
    for chunk in erased:
        row = [0] * size
        for factor, line in zip(generator[chunk], inverted, strict=True):
            row = [number ^ product(factor, more) for number, more in zip(row, line, strict=True)]
        yield chunk, list(zip(left, row, strict=True))
