from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.errors import InvalidSize
from stowplan.core.units import GIB, KIB, MIB, TIB, format_bytes, format_seconds, parse_bytes

UNITS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("60GiB", 60 * GIB), (" 512 MiB ", 512 * MIB), ("1.5gib", 3 * GIB // 2), ("80GB", 80 * 10**9), ("7", 7)],
)
def test_text_with_a_unit_is_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_every_unit_is_exact_for_whole_numbers(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == parse_bytes(f"{number} {unit.lower()}") == number * UNITS[unit]


@given(st.integers(1, 2**70))
def test_an_int_is_bytes(num_bytes: int) -> None:
    assert parse_bytes(num_bytes) == num_bytes


@given(st.floats())
def test_fractions_are_refused_with_the_reason(ratio: float) -> None:
    with pytest.raises(
        InvalidSize, match=r"Ratios are refused because .* how many bytes this process may use"
    ) as caught:
        parse_bytes(ratio, "budget")  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"budget={ratio!r}")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, "not positive"),
        (-1, "not positive"),
        ("0GiB", "not positive"),
        ("0.5", "a fraction but no unit"),
        ("90%", "not a size"),
        ("-1GiB", "not a size"),
        ("1 PiB", "not a size"),
        ("", "not a size"),
        ("1GiB extra", "not a size"),
        ("١GiBx", "not a size"),
        (True, "a bool"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_size_is_refused(size: object, reason: str) -> None:
    with pytest.raises(InvalidSize, match=reason) as caught:
        parse_bytes(size, "host_budget")  # type: ignore[arg-type]
    assert "host_budget" in str(caught.value)
    assert '"60GiB"' in str(caught.value)  # what is allowed


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (-MIB, "-1.00 MiB"),
        (TIB, "1.00 TiB"),
    ],
)
def test_bytes_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(1, 2**60))
def test_what_is_written_reads_back_within_rounding(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.006)


@pytest.mark.parametrize(("seconds", "text"), [(1.25, "1.25 s"), (0.0125, "12.5 ms"), (8e-5, "80 us"), (0, "0 us")])
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
