"""Traces like those of a training step, and problems without any structure."""

from __future__ import annotations

import numpy as np

from stowplan.planner.packing import Problem

ALIGNMENT = 512


def layered(num_blocks: int, seed: int = 0) -> Problem:
    """Forward and backward passes over equal blocks: temporaries within each, saved values from one to the other."""
    chance = np.random.default_rng(seed)
    forward = [(int(size), int(life)) for size, life in zip(*chance.integers(2, (40, 8), (12, 2)).T, strict=True)]
    backward = [(int(size), int(life)) for size, life in zip(*chance.integers(2, (40, 8), (20, 2)).T, strict=True)]
    saved_sizes = [int(size) for size in chance.integers(1, 60, 6)]
    rows: list[list[int]] = [[0, 0, 5000]]  # lives all step
    saved: list[list[int]] = []
    now = 1
    for _ in range(num_blocks):
        saved.append([])
        for number, (size, life) in enumerate(forward):
            rows.append([now, now + life, size])
            now += 1
            if number % 2 == 0:
                saved[-1].append(len(rows))
                rows.append([now, 0, saved_sizes[number // 2]])
                now += 1
        now += 10
    for size in (7, 900, 33):
        rows.append([now, now + 3, size])
        now += 1
    for block in reversed(saved):
        for number, (size, life) in enumerate(backward):
            rows.append([now, now + life, size])
            now += 1
            if number % 4 == 0:
                rows[block.pop()][1] = now
                now += 1
        rows[block.pop()][1] = now
        now += 10
    rows[0][1] = now
    lower, upper, size = np.array(rows, dtype=np.int64).T
    return Problem(lower=lower, upper=upper, size=size * ALIGNMENT, alignment=ALIGNMENT)


def churn(num_buffers: int, seed: int = 0) -> Problem:
    """Random lifetimes and sizes."""
    chance = np.random.default_rng(seed)
    lower = chance.integers(0, num_buffers, num_buffers)
    upper = lower + chance.integers(1, 12, num_buffers)
    return Problem(lower=lower, upper=upper, size=chance.integers(1, 30, num_buffers) * 512, alignment=512)
