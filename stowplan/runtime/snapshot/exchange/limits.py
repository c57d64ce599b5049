"""How much of the network, and how much time, the exchange of snapshots may take."""

from __future__ import annotations

from dataclasses import dataclass

from stowplan.core.errors import InvalidArgument

__all__ = ["SnapshotLimits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotLimits:
    """What the exchange of snapshots between nodes may take; the same on all nodes of a job.

    A node holds ``most_pieces`` pieces of up to a block (4 MiB) that it asked for, and one block for each node that
    asks. Raises InvalidArgument for numbers that are not above 0.

    Attributes:
        bytes_per_second: that each local rank sends for coding; None: as fast as it goes. Recovery is not limited.
        deadline_seconds: of a snapshot's coding; it is given up then, unless others may have completed it.
        recovery_seconds: of a restart's recovery.
        timeout_seconds: of one request; it is asked again until the deadline. In recovery, who cannot be reached for as
            long is lost.
    """

    bytes_per_second: float | None = None
    deadline_seconds: float = 120.0
    recovery_seconds: float = 600.0
    timeout_seconds: float = 20.0
    handshake_seconds: float = 5.0
    poll_seconds: float = 0.05
    most_backoff_seconds: float = 1.0
    most_pieces: int = 4

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgument(f"{name}={value} of the exchange of snapshots: give a number above 0.")
