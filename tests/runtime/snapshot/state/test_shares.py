"""How replicated tensors are divided: all of each, once, and about as much for each rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stowplan.runtime.snapshot.place import CodeGroup
from stowplan.runtime.snapshot.state.replicas import Replica
from stowplan.runtime.snapshot.state.shares import divided, portions

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


@given(shapes, st.integers(2, 6), st.integers(1, 2), st.randoms(use_true_random=False))
def test_copies_are_what_their_owners_have(shapes, num_ranks, m, random):
    """However nodes are numbered, and in whichever order a rank meets families."""
    num_ranks = max(num_ranks, m + 1)
    tensors = [torch.rand(shape) for shape in shapes]
    ranks = tuple(range(num_ranks))
    nodes = random.sample(ranks, num_ranks)
    families = [random.choice([ranks, tuple(range(num_ranks + 1))]) for _ in shapes]
    divisions = []
    for index, rank in enumerate(nodes):
        given = [Replica(str(i), tensor.clone(), families[i], False) for i, tensor in enumerate(tensors)]
        own = Replica("own", torch.rand(1000), (rank, 77), False)
        given = [
            each for family in random.sample([ranks, (*ranks, num_ranks)], 2) for each in given if each.ranks == family
        ]
        divisions.append(divided([own, *given], rank, (), CodeGroup(tuple(nodes), index, m)))
    for index, division in enumerate(divisions):
        assert [part.copied for path, part in division.portions.items()] == [
            path != "own" for path in division.portions
        ]
        for behind, payload in enumerate(division.shares):
            owned = divisions[index - behind].shares[0]
            assert (payload.offsets, payload.num_bytes) == (owned.offsets, owned.num_bytes)
            for copy, tensor in zip(payload.tensors, owned.tensors, strict=True):
                assert torch.equal(copy, tensor)


def test_copies_are_where_all_nodes_have_replicas():
    (replica,) = replicas([(100, 100)], 2)
    for nodes, copied in (((10, 11), True), ((10, 12), False)):
        division = divided([replica], 10, (), CodeGroup(nodes, 0, 1))
        assert [part.copied for part in division.portions.values()] == [copied]
        assert len(division.shares) == 2 * copied
    assert not divided([replica], 10).shares
