"""Moving values between the device and the host slab: ``plain`` stops compute, ``overlapped`` runs beside it."""

from stowplan.offload.copies.overlapped import OverlappedCopies
from stowplan.offload.copies.plain import PlainCopies
from stowplan.offload.copies.protocol import CopyEngine, Freight, HostCopy, Manifest, Stop

__all__ = ["CopyEngine", "Freight", "HostCopy", "Manifest", "OverlappedCopies", "PlainCopies", "Stop"]
