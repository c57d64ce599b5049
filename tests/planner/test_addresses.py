import pytest

from stowplan.core.allocations import Allocation, AllocationTrace, Kind
from stowplan.core.errors import InvalidArgument
from stowplan.planner.addresses import place


def test_more_bytes_than_there_are_addresses() -> None:
    trace = AllocationTrace((Allocation(2**64, 0, 1, Kind.TRANSIENT, "head"),), (), 2)
    with pytest.raises(InvalidArgument, match="18446744073709551616 bytes are alive together"):
        place(trace, "cpu")
