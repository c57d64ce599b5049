from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.units import GIB, KIB, MIB
from stowplan.reports.lines import bytes_unit, clean, cut, cut_middle, seconds_unit, wrap


@given(st.text())
def test_only_printable_ascii_is_left(text: str) -> None:
    assert len(clean(text)) == len(text)
    assert all(0x20 <= ord(character) <= 0x7E for character in clean(text))


def test_what_a_terminal_would_obey_becomes_a_question_mark() -> None:
    assert clean("a\x1b[31mred\nb\u202ec\x7f") == "a?[31mred?b?c?"


@given(st.text(), st.integers(0, 40))
def test_cut_text_fits(text: str, width: int) -> None:
    assert len(cut(text, width)) <= width
    assert len(cut_middle(text, width)) <= width


def test_cut_text_shows_that_something_is_missing() -> None:
    assert cut("abcdefgh", 6) == "abc..."
    assert cut("abcdef", 6) == "abcdef"
    assert cut_middle("layer.attention.mul#2", 12) == "layer...ul#2"
    assert cut_middle("abcdef", 6) == "abcdef"


@given(st.text(), st.integers(10, 100))
def test_wrapped_text_fits_and_loses_nothing(text: str, width: int) -> None:
    lines = wrap(text, width, indent="  ")
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == clean(text).replace(" ", "")


@pytest.mark.parametrize(
    ("largest_bytes", "name"), [(0, "B"), (KIB, "KiB"), (MIB - 1, "KiB"), (MIB, "MiB"), (GIB, "GiB"), (2**60, "GiB")]
)
def test_one_unit_for_all_sizes(largest_bytes: int, name: str) -> None:
    assert bytes_unit(largest_bytes).name == name


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.50 s"), (0.0125, "12.5 ms"), (8e-5, "80.0 us"), (0.0, "0.0 us")]
)
def test_one_unit_for_all_durations(seconds: float, text: str) -> None:
    assert seconds_unit(seconds).text(seconds) == text


def test_differences_carry_a_sign_or_say_same() -> None:
    unit = bytes_unit(GIB)
    assert unit.difference(GIB) == "+1.00"
    assert unit.difference(-GIB // 4) == "-0.25"
    assert unit.difference(MIB) == "same"
    assert unit.difference(float("nan")) == "n/a"
