"""What nodes ask each other, as frozen dataclasses; each names its answer, and payloads are beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from stowplan.runtime.snapshot.codes import Area, Span
from stowplan.runtime.snapshot.exchange.node_store import Held
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

__all__ = [
    "REQUESTS",
    "AskDecision",
    "AskHoldings",
    "AskResult",
    "AskState",
    "AskTable",
    "Decision",
    "DecisionAnswer",
    "Done",
    "Holdings",
    "Read",
    "Request",
    "ResultAnswer",
    "StateAnswer",
    "Verified",
    "Verify",
]


@dataclass(frozen=True, slots=True)
class Done:
    """An answer that is its payload."""


@dataclass(frozen=True, slots=True)
class AskState:
    """How far is this snapshot? → StateAnswer."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class StateAnswer:
    """``given_up``: the node had it, or has a newer one, and it will never be complete there."""

    state: State
    given_up: bool


@dataclass(frozen=True, slots=True)
class AskTable:
    """The table of ``node`` as this one has it → Done, with the packed table or nothing."""

    snapshot: Snapshot
    node: int


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes within one block → Done, with the bytes; ``urgent`` (recovery) is not limited in rate."""

    snapshot: Snapshot
    area: Area
    offset: int
    length: int
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class AskHoldings:
    """What is in the slots? → Holdings."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Slots that are LOCAL or more."""

    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """Look at all bytes; the payload is the node's own table, to be put in place of one that is damaged → Verified."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Verified:
    """Spans that are not as they were written; ``parity_bytes`` is what the node has of it."""

    bad: tuple[Span, ...]
    parity_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What all do next in a recovery.

    Attributes:
        verdict: "rebuild" what is lost of ``snapshot``; "commit", all have; "refused", nothing can be restored;
            "ended", a node was lost meanwhile, ``advice`` says which.
        node_bytes, shares: of each node, as of ``Layout``.
        lost: nodes without the snapshot.
        bad: spans of the others that count as lost.
        names, stands, advice: of UnrecoverableSnapshot.
    """

    verdict: str
    snapshot: Snapshot | None = None
    node_bytes: tuple[int, ...] = ()
    shares: tuple[tuple[int, ...], ...] = ()
    lost: tuple[int, ...] = ()
    bad: tuple[Span, ...] = ()
    names: tuple[str, ...] = ()
    stands: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True)
class AskDecision:
    """Decision ``number`` of this generation's recovery → DecisionAnswer."""

    number: int


@dataclass(frozen=True, slots=True)
class DecisionAnswer:
    """None: not yet."""

    decision: Decision | None


@dataclass(frozen=True, slots=True)
class AskResult:
    """What came of decision ``number``? → ResultAnswer."""

    number: int


@dataclass(frozen=True, slots=True)
class ResultAnswer:
    """None: not yet; "": done; else what went wrong."""

    problem: str | None


Request: TypeAlias = AskState | AskTable | Read | AskHoldings | Verify | AskDecision | AskResult
Answer: TypeAlias = StateAnswer | Done | Holdings | Verified | DecisionAnswer | ResultAnswer
REQUESTS: dict[str, type[Request]] = {
    each.__name__: each for each in (AskState, AskTable, Read, AskHoldings, Verify, AskDecision, AskResult)
}
