"""What ranks agree on: results of all, or the failures of some."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from stowplan.core.errors import InvalidArgument, RankFailed, SnapshotMemoryUnavailable, StowplanError
from stowplan.runtime.snapshot.place import own_address
from tests.runtime.snapshot.agreement import of_threads


def on_all(agreement, function, world_size=3):
    def on_rank(rank):
        agreement.ranks.rank = rank
        return function(agreement(), rank)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(on_rank, range(world_size)))


def test_all_have_what_work_gave_on_each():
    said = on_all(of_threads(3), lambda agreement, rank: agreement.together("counting", lambda: 10 * rank))
    assert said == [[0, 10, 20]] * 3


@pytest.mark.parametrize("error", [SnapshotMemoryUnavailable("too little", 9, 1), ZeroDivisionError("by zero")])
def test_what_fails_on_one_is_raised_on_all(error):
    def body(agreement, rank):
        def work():
            if rank == 1:
                raise error

        with pytest.raises(Exception) as raised:  # noqa: PT011 - looked at below
            agreement.together("reserving", work)
        assert agreement.gather(rank) == [0, 1, 2], "nobody is left waiting"
        return raised.value

    first, second, third = on_all(of_threads(3), body)
    assert second is error
    for other in (first, third):
        assert isinstance(other, RankFailed)
        assert "reserving failed on 1 other rank(s)" in str(other)
        assert str(error) in str(other.failures[1])
        assert isinstance(other.failures[1], StowplanError)


def test_an_address_that_others_cannot_reach_is_refused(monkeypatch):
    assert own_address(one_host=True) == "127.0.0.1"
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(InvalidArgument, match="here, at which other nodes cannot reach it: give listen="):
        own_address(one_host=False)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.7")
    assert own_address(one_host=False) == "10.0.0.7"


def test_a_failure_can_be_sent():
    sent = pickle.loads(pickle.dumps(RankFailed("saving", {2: InvalidArgument("no")})))
    assert (sent.doing, str(sent.failures[2])) == ("saving", "no")
