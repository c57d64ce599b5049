"""Which versions of torch the engine works with. It uses names of torch that are private and may change."""

from __future__ import annotations

import re

from stowplan.core.errors import MissingDependency

__all__ = ["LEAST_TORCH", "TESTED_TORCH", "refuse_old_torch", "release_of"]

LEAST_TORCH = (2, 11)
TESTED_TORCH = (2, 13)  # as in constraints.txt


def release_of(version: str) -> tuple[int, ...]:
    """``(2, 13, 0)`` of ``"2.13.0+cpu"``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def refuse_old_torch(version: str) -> None:
    """Raise MissingDependency for a torch that stowplan does not work with."""
    if release_of(version)[:2] < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise MissingDependency(
            f"torch {version} is installed, and stowplan needs torch {least} or newer: pip install 'torch>={least}'."
        )
