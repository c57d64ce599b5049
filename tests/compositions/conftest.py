"""Processes that the tests here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two ranks of a gloo group, started at the first use."""
    group = Ranks(2)
    yield group
    group.stop()
