"""Where training steps end, told by the order in which optimizers step."""

from __future__ import annotations

import pytest

from stowplan.offload.arena.boundaries import Boundaries


def ends(order: str) -> str:
    """A bar after each step that ends a training step."""
    boundaries = Boundaries()
    return "".join(name + "|" * boundaries.stepped(ord(name)) for name in order)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("AAAA", "A|A|A|A|"),
        ("ABABAB", "A|BAB|AB|"),
        ("ABCABCABC", "A|BCABC|ABC|"),  # each parameter its own optimizer
        ("DDDGDDDGDDD", "D|D|D|GD|D|D|GD|D|D|"),  # several steps of one for each of the other
        ("ABABBBBB", "A|BAB|B|B|B|B|"),  # one leaves
        ("BABABAAAA", "B|ABA|BA|A|A|A|"),  # and here the first
        ("AAABBBBB", "A|A|A|BBB|B|B|"),  # another training begins
    ],
)
def test_the_last_of_a_round_ends_the_step(order: str, expected: str) -> None:
    assert ends(order) == expected
