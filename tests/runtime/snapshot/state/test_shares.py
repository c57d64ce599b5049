"""How replicated tensors are divided: all of each, once, and about as much for each rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stowplan.runtime.snapshot.state.replicas import Replica
from stowplan.runtime.snapshot.state.shares import portions

PAGE_BYTES = 4096  # no part is smaller, but where dimensions are


def replicas(shapes, num_ranks, dtype=torch.float32):
    ranks = tuple(range(10, 10 + num_ranks))
    return [Replica(str(i), torch.zeros(shape, dtype=dtype), ranks, False) for i, shape in enumerate(shapes)]


shapes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=8)


@given(shapes, st.integers(2, 9), st.sampled_from([torch.float32, torch.float64, torch.int8]))
def test_parts_make_each_tensor_whole(shapes, num_ranks, dtype):
    given = replicas(shapes, num_ranks, dtype)
    by_rank = [list(portions(given, rank)) for rank in given[0].ranks]
    for index, replica in enumerate(given):
        found = sorted((part.share.begin, part.length) for _, part in (parts[index] for parts in by_rank))
        (share,) = {(part.share.dim, part.share.whole, part.share.family) for _, part in (p[index] for p in by_rank)}
        assert share == (share[0], replica.tensor.shape[share[0]], 10)
        end = 0
        for begin, length in found:
            assert begin == end or not length
            end += length
        assert end == share[1]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize(
    "shapes",
    [
        [(512, 512), (512,)] * 12,
        [(1001, 64), (64, 1001), (7,)] * 6,
        [(64, 3, 7, 7), (64,), (3, 5, 4096)] * 5,
        [(13, 31)] * 48,
    ],
)
def test_ranks_have_about_the_same_bytes(shapes, num_ranks):
    given = replicas(shapes, num_ranks)
    loads = [sum(part.of(replica.tensor).nbytes for replica, part in portions(given, rank)) for rank in given[0].ranks]
    assert sum(loads) == sum(math.prod(shape) * 4 for shape in shapes)
    assert max(loads) < 1.1 * sum(loads) / num_ranks + PAGE_BYTES


def test_what_shares_memory_is_divided_once():
    one, other = replicas([(100, 100), (100, 100)], 3)
    tied = Replica("tied", one.tensor, one.ranks, False)
    (_, first), (_, again), (_, last) = portions([one, tied, other], 11)
    assert first == again != last
