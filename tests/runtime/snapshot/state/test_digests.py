"""Digests of tensors: equal for equal bytes, another one for any change."""

from __future__ import annotations

import pytest
import torch

from stowplan.runtime.snapshot.state.digests import digests, sums

KINDS = {"crc": lambda tensor: digests([tensor]), "sums": lambda tensor: sums(tensor.view(torch.uint8)).tolist()}
NUM_BYTES = 3 * 32768 + 8 * 5 + 3  # rows, words and bytes that are left over


@pytest.fixture
def content():
    return torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("digest", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("place", [0, 40000, 3 * 32768 + 1, NUM_BYTES - 1])
def test_any_bit_changes_it(digest, content, place):
    other = content.clone()
    assert digest(other) == digest(content)
    other[place] ^= 4
    assert digest(other) != digest(content)


@pytest.mark.parametrize("digest", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("length", [8, 64, 32768])
def test_what_changes_places_changes_it(digest, content, length):
    other = content.clone()
    other[:length], other[32768 : 32768 + length] = content[32768 : 32768 + length], content[:length]
    assert digest(other) != digest(content)


def test_where_bytes_lie_in_memory_does_not_matter(content):
    shifted = torch.cat([content[:3], content])[3:]
    assert sums(shifted).tolist() == sums(content).tolist()
    assert digests([shifted]) == digests([content])
    matrix = content[:4096].view(torch.int64).view(16, 32)
    assert digests([matrix.t().contiguous().t()]) == digests([matrix])


def test_tensors_of_all_types_have_one():
    values = [torch.tensor([1.0, 2.0]), torch.zeros(3, dtype=torch.bool), torch.ones(2, dtype=torch.complex64).conj()]
    values += [torch.ones((), dtype=torch.bfloat16), torch.ones(2, dtype=torch.complex64)]
    found = digests(values)
    assert found[2] != found[4]  # the bytes of a conjugate are meant
    assert len(set(found)) == len(values)
