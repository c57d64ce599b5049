"""The codes once more, from their formulas: slow, on padded lists of chunks, with arithmetic of its own."""

from __future__ import annotations

from itertools import combinations

import numpy as np

LOG = [0] * 256
ANTILOG = [0] * 510
_number = 1
for _exponent in range(255):
    ANTILOG[_exponent] = ANTILOG[_exponent + 255] = _number
    LOG[_number] = _exponent
    _number = (_number << 1) ^ (0x11D if _number & 0x80 else 0)


def times(a, b):
    return 0 if 0 in (a, b) else ANTILOG[LOG[a] + LOG[b]]


def times_bytes(a, chunk):
    return np.array([times(a, x) for x in range(256)], np.uint8)[chunk]


def inverted(matrix):
    """Over GF(2^8), by eliminating below, then above."""
    n = len(matrix)
    rows = [list(row) + [1 if i == j else 0 for j in range(n)] for i, row in enumerate(matrix)]
    for c in range(n):
        swap = c
        while rows[swap][c] == 0:
            swap += 1
        rows[c], rows[swap] = rows[swap], rows[c]
        scale = ANTILOG[255 - LOG[rows[c][c]]]
        rows[c] = [times(scale, x) for x in rows[c]]
        for r in range(c + 1, n):
            rows[r] = [x ^ times(rows[r][c], y) for x, y in zip(rows[r], rows[c], strict=True)]
    for c in reversed(range(n)):
        for r in range(c):
            rows[r] = [x ^ times(rows[r][c], y) for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[n:] for row in rows]


def members(name, n, s):
    """Of stripe ``s``: [(node, chunk)] of data, [(node, chunk)] of parities, rows of coefficients."""
    if name == "mirror":
        return [(s, 0)], [((s + 1) % n, 0)], [[1]]
    if name == "raim5":
        data = [(i, s if i > s else s - 1) for i in range(n) if i != s]
        return data, [(s, 0)], [[1] * (n - 1)]
    data = [((s + k) % n, k - 2) for k in range(2, n)]
    return data, [(s, 0), ((s + 1) % n, 1)], [[1] * (n - 2), [ANTILOG[i] for i in range(n - 2)]]


def cut(node, num_chunks, chunk_bytes):
    padded = np.zeros(num_chunks * chunk_bytes, np.uint8)
    padded[: len(node)] = np.frombuffer(node, np.uint8)
    return padded.reshape(num_chunks, chunk_bytes)


def summed(row, chunks):
    total = np.zeros_like(chunks[0])
    for factor, chunk in zip(row, chunks, strict=True):
        total ^= times_bytes(factor, chunk)
    return total


def parities(name, nodes, num_chunks, chunk_bytes):
    """Node to its parity bytes."""
    n = len(nodes)
    chunks = [cut(node, num_chunks, chunk_bytes) for node in nodes]
    kept = {}
    for s in range(n):
        data, places, rows = members(name, n, s)
        for place, row in zip(places, rows, strict=True):
            kept[place] = summed(row, [chunks[i][j] for i, j in data])
    per_node = max(j for _, j in kept) + 1
    return [np.concatenate([kept[i, j] for j in range(per_node)]).tobytes() for i in range(n)]


def recovered(name, nodes, parity, lost, num_chunks, chunk_bytes):
    """The lost nodes' bytes, padded, from those of the others: ``nodes`` and ``parity`` of lost ones are not read."""
    n = len(nodes)
    chunks = {i: cut(nodes[i], num_chunks, chunk_bytes) for i in range(n) if i not in lost}
    found = {i: np.zeros((num_chunks, chunk_bytes), np.uint8) for i in lost}
    for s in range(n):
        data, places, rows = members(name, n, s)
        size = len(data)
        known = [([int(a == b) for b in range(size)], chunks[i][j]) for a, (i, j) in enumerate(data) if i not in lost]
        for (i, j), row in zip(places, rows, strict=True):
            if i not in lost:
                kept = np.frombuffer(parity[i], np.uint8).reshape(-1, chunk_bytes)
                known.append((row, kept[j]))
        # The last ones that do, where ours takes the first: another way to the same bytes.
        chosen = known[-size:]
        back = inverted([row for row, _ in chosen])
        for a, (i, j) in enumerate(data):
            if i in lost:
                found[i][j] = summed(back[a], [chunk for _, chunk in chosen])
    return {i: chunk.reshape(-1).tobytes() for i, chunk in found.items()}


def crc32c(data, crc=0):
    """Bit by bit."""
    register = crc ^ 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def losses(n, most):
    return [lost for size in range(most + 1) for lost in combinations(range(n), size)]
