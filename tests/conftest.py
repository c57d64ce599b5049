"""Settings and processes that every test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.distributed import Ranks

# Tests run side by side: one thread each. Read by torch when it is imported, here or in a subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A failure prints the line that repeats it. No deadline: machines may be busy.
settings.register_profile("default", derandomize=False, print_blob=True, deadline=None)
settings.register_profile("ci", settings.get_profile("default"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where tests were started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two ranks of a gloo group, started at the first use."""
    group = Ranks(2)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def ranks4() -> Iterator[Ranks]:
    """Four ranks, started at the first use in a module."""
    group = Ranks(4)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def ranks8() -> Iterator[Ranks]:
    """Eight ranks, started at the first use in a module."""
    group = Ranks(8)
    yield group
    group.stop()
