"""Kernels give the bytes of slow arithmetic, at any length and alignment, and touch nothing else."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan import CompilationFailed, InvalidArgument
from stowplan.runtime.snapshot.codes import NativeKernels, best_kernels, crc32c
from stowplan.runtime.snapshot.codes import kernels as kernels_module
from stowplan.runtime.snapshot.codes.field import inverse, power, product, solve
from stowplan.runtime.snapshot.codes.native import Variant, variants
from tests.runtime.snapshot.codes import reference
from tests.runtime.snapshot.codes.conftest import KERNELS

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 4095, 4096, 4097, 8192 + 33, 256 * 1024 + 77]
# RFC 3720, B.4, the bytes of an iSCSI command last; and the check value of the catalogue of CRCs.
KNOWN = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
    (
        bytes.fromhex("01c00000 00000000 00000000 00000000 14000000 00000400")
        + bytes.fromhex("00000014 00000018 28000000 00000000 02000000 00000000"),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
]


def test_the_field_is_that_of_the_tables():
    for a in range(256):
        assert [product(a, b) for b in range(256)] == [reference.times(a, b) for b in range(256)]
    assert all(product(a, inverse(a)) == 1 for a in range(1, 256))
    assert [power(e) for e in range(510)] == reference.ANTILOG


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 255), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
@settings(deadline=None, max_examples=60)
def test_solving_inverts_as_the_reference_does(matrix):
    identity = [[int(i == j) for j in range(len(matrix))] for i in range(len(matrix))]
    try:
        expected = reference.inverted(matrix)
    except IndexError:
        with pytest.raises(StopIteration):
            solve(matrix, identity)
    else:
        assert solve(matrix, identity) == expected


def test_every_product(kernels):
    every = np.arange(256, dtype=np.uint8)
    for coefficient in range(256):
        out = np.empty(256, np.uint8)
        kernels.combine([[coefficient]], [every], [out], add=False)
        assert out.tolist() == [reference.times(coefficient, x) for x in range(256)], coefficient


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("num_outs", "num_sources"), [(1, 1), (1, 5), (2, 1), (2, 4), (3, 3)])
def test_sums_of_multiples_at_any_length_and_alignment(kernels, length, add, num_outs, num_sources):
    random = np.random.default_rng([length, num_outs, num_sources])
    coefficients = random.choice([0, 1, 2, 29, 255], (num_outs, num_sources)).tolist()
    sources = [random.integers(0, 256, length + 64, dtype=np.uint8)[i % 7 : i % 7 + length] for i in range(num_sources)]
    for source in sources:
        source.flags.writeable = False
    frames = [random.integers(0, 256, length + 64, dtype=np.uint8) for _ in range(num_outs)]
    before = [frame.copy() for frame in frames]
    kernels.combine(coefficients, sources, [f[3 + o : 3 + o + length] for o, f in enumerate(frames)], add=add)
    for o, (frame, old) in enumerate(zip(frames, before, strict=True)):
        begin = 3 + o
        expected = reference.summed(coefficients[o], sources) ^ (old[begin : begin + length] if add else 0)
        assert np.array_equal(frame[begin : begin + length], expected)
        assert np.array_equal(frame[:begin], old[:begin])
        assert np.array_equal(frame[begin + length :], old[begin + length :])


@pytest.mark.parametrize(("data", "expected"), KNOWN)
def test_known_checksums(kernels, data, expected):
    assert crc32c(data, kernels=kernels) == expected == reference.crc32c(data)


@pytest.mark.parametrize("length", [*range(0, 300, 13), 767, 768, 769, 3 * 4096, 3 * 4096 + 3 * 256 + 5, 70_001])
def test_checksums_at_any_length_and_alignment(kernels, length):
    data = np.random.default_rng(length).integers(0, 256, length + 8, dtype=np.uint8)
    for begin in (0, 1, 5):
        piece = data[begin : begin + length]
        assert crc32c(piece, kernels=kernels) == reference.crc32c(piece.tolist())


def test_checksums_of_large_buffers_agree(kernels):
    data = np.random.default_rng(1).integers(0, 256, (5 << 20) + 3, dtype=np.uint8)
    if "portable" in KERNELS:
        assert crc32c(data, kernels=kernels) == crc32c(data, kernels=KERNELS["portable"]())
    split = 1_234_567
    assert crc32c(data[split:], crc32c(data[:split], kernels=kernels), kernels=kernels) == crc32c(data, kernels=kernels)


@given(st.binary(max_size=2000), st.integers(0, 2000), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_a_checksum_goes_on_from_where_it_was(data, at, crc):
    for make in KERNELS.values():
        one = make()
        first = crc32c(data[:at], crc, kernels=one)
        assert crc32c(data[at:], first, kernels=one) == crc32c(data, crc, kernels=one) == reference.crc32c(data, crc)


@given(st.binary(min_size=1, max_size=3000), st.data())
@settings(deadline=None, max_examples=50)
def test_a_flipped_bit_shows(data, draw):
    at = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    for make in KERNELS.values():
        assert crc32c(flipped, kernels=make()) != crc32c(data, kernels=make())


def test_any_contiguous_buffer_is_taken_as_bytes():
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = crc32c(numbers.tobytes())
    assert crc32c(numbers) == crc32c(memoryview(numbers)) == crc32c(bytearray(numbers.tobytes())) == expected
    with mmap.mmap(-1, 48) as mapped:
        mapped[:] = numbers.tobytes()
        assert crc32c(mapped) == expected
    assert crc32c(np.empty((0, 3))) == crc32c(b"") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("text",), "buffer is str, which gives no buffer"),
        (([1, 2],), "buffer is list, which gives no buffer"),
        ((np.zeros((4, 4), np.uint8)[:, 1],), "buffer is not contiguous"),
        ((b"", -1), "crc=-1 is no CRC of 32 bits"),
        ((b"", 1 << 32), "crc=4294967296 is no CRC"),
    ],
)
def test_what_has_no_checksum_is_refused(arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        crc32c(*arguments)


def test_without_a_compiler_numpy_serves_and_says_so_once(monkeypatch):
    def fails():
        raise CompilationFailed("neither c++, g++ nor clang++ is there")

    monkeypatch.setattr(kernels_module, "NativeKernels", fails)
    best_kernels.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"coded and checked by NumPy.*neither c\+\+"):
            assert crc32c(b"123456789") == 0xE3069283
        assert crc32c(b"123456789") == 0xE3069283  # a second warning would be an error
    finally:
        best_kernels.cache_clear()


@pytest.mark.skipif(len(KERNELS) == 1, reason="no compiler")
def test_an_instruction_that_is_not_there_is_refused():
    missing = next(variant for variant in Variant if variant not in variants())
    with pytest.raises(InvalidArgument, match=f"variant={missing.name} is nothing that this processor runs"):
        NativeKernels(missing)
