"""What trainers, agents and the memory process say to each other: requests, each with its answer, as plain dataclasses.

On the socket a message is a JSON object with the class's name as "kind" and its fields. Numbers are not negative and
below 2^63. ``rank`` is the local rank on this node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, get_args

from stowplan.core.errors import InvalidArgument, SnapshotRefused
from stowplan.core.records import RecordError, from_plain, to_plain
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.memory.layout import Coding
from stowplan.runtime.snapshot.memory.slots import State

__all__ = [
    "PROTOCOL_VERSION",
    "Abandon",
    "Adopt",
    "Answer",
    "Attach",
    "Attached",
    "Await",
    "Begin",
    "Begun",
    "Detach",
    "Done",
    "End",
    "GetStatus",
    "Hello",
    "Inspect",
    "Inspected",
    "Listen",
    "Listening",
    "Lost",
    "Meet",
    "Peer",
    "RaiseGeneration",
    "RankStatus",
    "Recover",
    "Recovered",
    "Refused",
    "Request",
    "Reserve",
    "RollBack",
    "Skipped",
    "SlotStatus",
    "Status",
    "Unavailable",
    "Waited",
    "Welcome",
    "Written",
    "answer_from_plain",
    "check_name",
    "message_to_plain",
    "request_from_plain",
]

PROTOCOL_VERSION = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_RANKS = 4096


# ---- requests ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Hello:
    """First on each connection; answered by Welcome. An observer (no generation) writes no snapshots."""

    run: str
    generation: int | None = None
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Reserve:
    """Memory for a rank's two slots of so many bytes each; done already if it is there. Answered by Attached."""

    rank: int
    data_bytes: int
    parity_bytes: int = 0
    coding: Coding = field(default_factory=Coding)


@dataclass(frozen=True, slots=True)
class Attach:
    """A descriptor of a rank's memory, to write (one process at a time) or to hold. Answered by Attached with it."""

    rank: int
    write: bool


@dataclass(frozen=True, slots=True)
class Adopt:
    """Sent with a descriptor of memory that a former memory process gave. Answered by Attached; writes from now on."""

    rank: int
    data_bytes: int
    parity_bytes: int
    coding: Coding


@dataclass(frozen=True, slots=True)
class Detach:
    """The sender has unmapped this rank's memory, so another process may write. Answered by Done."""

    rank: int


@dataclass(frozen=True, slots=True)
class Begin:
    """A slot for a snapshot; ``data_bytes`` has schema and payload. Answered by Begun, or Skipped if coding is late.

    ``shares`` are as of codes' Layout. Snapshot ``kept``, if any, is not overwritten.
    """

    rank: int
    sequence: int
    step: int
    data_bytes: int
    schema_bytes: int
    kept: int = 0
    shares: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """All bytes of the snapshot are in memory: checksums may be computed. Answered by Done at once."""

    rank: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """The snapshot is given up; up to LOCAL. Answered by Done."""

    rank: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Await:
    """Answered by Waited when the snapshot has come to ``state``, or when the time is over."""

    rank: int
    sequence: int
    state: State
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Inspect:
    """What of a rank can be restored: all bytes are checked now. Answered by Inspected."""

    rank: int


@dataclass(frozen=True, slots=True)
class RollBack:
    """The job restores ``sequence``: what is newer on any rank of this node is given up. Answered by Done."""

    sequence: int


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Answered by Status."""


@dataclass(frozen=True, slots=True)
class RaiseGeneration:
    """The job was restarted: older generations are refused from now on. Answered by Done."""

    generation: int


@dataclass(frozen=True, slots=True)
class End:
    """The process ends, and memory that nobody else holds is gone. Answered by Done."""


@dataclass(frozen=True, slots=True)
class Listen:
    """The rank's exchange with its group is to listen. Answered by Listening."""

    rank: int
    limits: SnapshotLimits = field(default_factory=SnapshotLimits)


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a node of a group listens."""

    node: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Meet:
    """All nodes of the rank's group. Answered by Done."""

    rank: int
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class Recover:
    """Make the newest snapshot whole that the rank's group can, with these nodes. Answered by Recovered, or Lost."""

    rank: int
    alive: tuple[int, ...]
    newest_on_disk: str = ""
    attempt: int = 0


# ---- answers -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Welcome:
    """Who answers."""

    run: str
    node: str
    generation: int
    pid: int
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Attached:
    """A rank's memory, whose layout follows from these numbers."""

    rank: int
    data_bytes: int
    parity_bytes: int
    coding: Coding


@dataclass(frozen=True, slots=True)
class Begun:
    """Bytes may be written into this slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """No snapshot now: snapshot ``sequence`` is ``state`` and needs its slot for longer."""

    sequence: int
    state: State


@dataclass(frozen=True, slots=True)
class Waited:
    """What the snapshot has come to."""

    state: State


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """One slot; of a FREE one the other numbers are 0. ``damaged_*``: spans (offset, bytes) found at the last look."""

    state: State
    sequence: int = 0
    step: int = 0
    generation: int = 0
    data_bytes: int = 0
    schema_bytes: int = 0
    parity_bytes: int = 0
    damaged_data: tuple[tuple[int, int], ...] = ()
    damaged_parity: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Inspected:
    """Both slots as they are now."""

    slots: tuple[SlotStatus, ...]


@dataclass(frozen=True, slots=True)
class RankStatus:
    """A rank's memory, and which process writes it.

    Of its last complete snapshot: for how long it was written by the trainer, how long it took until it was GLOBAL, and
    how many bytes came from other nodes for its parity; None where this process has seen none.
    """

    rank: int
    data_bytes: int
    parity_bytes: int
    coding: Coding
    writer_pid: int | None
    slots: tuple[SlotStatus, ...]
    blocking_seconds: float | None = None
    total_seconds: float | None = None
    received_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """``global_sequence`` is the newest that is GLOBAL on all ranks (0: none); ``reduced``: what redundancy lacks."""

    run: str
    node: str
    pid: int
    generation: int
    num_ranks: int
    global_sequence: int
    reduced: tuple[str, ...]
    ranks: tuple[RankStatus, ...]


@dataclass(frozen=True, slots=True)
class Listening:
    """The address for the other nodes."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """The snapshot that is GLOBAL now; ``lost`` nodes and ``num_bad`` spans of others were computed."""

    sequence: int
    step: int
    lost: tuple[int, ...]
    num_bad: int


@dataclass(frozen=True, slots=True)
class Lost:
    """``UnrecoverableSnapshot``."""

    names: tuple[str, ...]
    stands: str
    advice: str


@dataclass(frozen=True, slots=True)
class Done:
    """It is done."""


@dataclass(frozen=True, slots=True)
class Refused:
    """``SnapshotRefused``."""

    reason: str
    problem: str


@dataclass(frozen=True, slots=True)
class Unavailable:
    """``SnapshotMemoryUnavailable``."""

    problem: str
    needed_bytes: int
    available_bytes: int | None


Request: TypeAlias = (
    Hello | Reserve | Attach | Adopt | Detach | Begin | Written | Abandon | Await | Inspect | RollBack | GetStatus
    | RaiseGeneration | End | Listen | Meet | Recover
)  # fmt: skip
Answer: TypeAlias = (
    Welcome | Attached | Begun | Skipped | Waited | Inspected | Status | Done | Refused | Unavailable | Listening
    | Recovered | Lost
)  # fmt: skip
_REQUESTS = {kind.__name__: kind for kind in get_args(Request)}
_ANSWERS = {kind.__name__: kind for kind in get_args(Answer)}


def message_to_plain(message: Request | Answer) -> dict[str, Any]:
    """JSON's values."""
    return {"kind": type(message).__name__, **to_plain(message)}


def request_from_plain(plain: Any) -> Request:
    """Raises SnapshotRefused ("malformed")."""
    request: Request = _from_plain(plain, _REQUESTS)
    rank = getattr(request, "rank", 0)
    if rank >= _MOST_RANKS:
        raise SnapshotRefused("malformed", f"rank={rank} is no local rank: 0 to {_MOST_RANKS - 1} are.")
    return request


def answer_from_plain(plain: Any) -> Answer:
    """Raises SnapshotRefused ("malformed")."""
    answer: Answer = _from_plain(plain, _ANSWERS)
    return answer


def check_name(name: str, argument: str, most: int = 64) -> str:
    """A run's or a node's name, as it is; it becomes part of a file's name. Raises SnapshotRefused ("malformed")."""
    if not _NAME.fullmatch(name) or len(name) > most:
        raise SnapshotRefused(
            "malformed",
            f"{argument}={name!r}: 1 to {most} letters, digits, dots, underscores and hyphens are allowed, the first "
            f"one a letter or a digit.",
        )
    return name


def _from_plain(plain: Any, kinds: dict[str, Any]) -> Any:
    if not isinstance(plain, dict) or not isinstance(name := plain.pop("kind", None), str) or name not in kinds:
        raise SnapshotRefused(
            "malformed", f"a message has to be a JSON object whose kind is one of {', '.join(kinds)}."
        )
    try:
        message = from_plain(kinds[name], plain)
    except (RecordError, InvalidArgument) as error:
        raise SnapshotRefused("malformed", f"a message {name} is not as it should be: {error}.") from None
    for each in fields(message):
        value = getattr(message, each.name)
        if isinstance(value, int | float) and not 0 <= value < 1 << 63:
            raise SnapshotRefused("malformed", f"{name}.{each.name}={value} is not from 0 to 2^63 - 1.")
    return message
