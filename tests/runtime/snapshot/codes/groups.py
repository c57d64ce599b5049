"""Groups of nodes with bytes in them, for tests."""

from __future__ import annotations

import numpy as np

from stowplan.runtime.snapshot.codes import Layout, code_for, encode

CODES = [("mirror", 1), ("raim5", 1), ("rs", 2)]


def least_nodes(m):
    return m + 1


class Group:
    """Nodes of the given sizes, with the parities that ``kernels`` make; ``damaged`` gives buffers without some.

    ``shares``: of each node, behind these; copies of the shares of nodes before it follow.
    """

    def __init__(self, name, sizes, kernels, seed=0, shares=()):
        random = np.random.default_rng([seed, len(sizes), *sizes, *shares])
        self.code = code_for(len(sizes), 2 if name == "rs" else 1, name)
        n, m = self.code.n, self.code.m

        def bytes_of(numbers):
            return [random.integers(0, 256, number, dtype=np.uint8).tobytes() for number in numbers]

        coded, own = bytes_of(sizes), bytes_of(shares)
        held = [[own[(i - behind) % n] for behind in range(m + 1)] if shares else [] for i in range(n)]
        self.data = {i: coded[i] + b"".join(held[i]) for i in range(n)}
        self.layout = Layout(self.code, [len(data) for data in self.data.values()], [list(map(len, h)) for h in held])
        # What was in a buffer before must not matter.
        made = {i: bytearray(b"\xa5" * self.layout.parity_bytes) for i in self.data}
        encode(self.layout, self.data, made, kernels=kernels)
        self.parity = {i: bytes(buffer) for i, buffer in made.items()}

    def damaged(self, lost):
        """Buffers of survivors, which cannot be written to, and others for the lost nodes, full of rubbish."""
        return tuple(
            {i: bytearray(b"\x5a" * len(kept)) if i in lost else kept for i, kept in area.items()}
            for area in (self.data, self.parity)
        )
