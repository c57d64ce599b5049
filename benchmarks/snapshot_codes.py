"""How fast snapshots are coded and checked, as multiples of memcpy: our kernels and the peers that are installed.

    python -m benchmarks.snapshot_codes                  # about a minute
    python -m benchmarks.snapshot_codes --mebibytes 256 --rounds 9

One thread. The figure is bytes of sources read in a second ÷ bytes that memcpy copies in a second: a sum of six
buffers of 64 MiB counts 384 MiB, whatever it writes. Buffers are larger than caches and have all been written to
before. Everything is timed in turn, round by round, in one process, each right after a memcpy that it is compared
with; times are CPU seconds of the thread, so that other processes count less, and the median round counts. Peers take
part when they are installed (``pip install zfec pyeclib crc32c isal``). Results go to
benchmarks/results/snapshot_codes.json and, as a table, .md.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_record
from stowplan.runtime.snapshot.codes import Layout, NativeKernels, NumpyKernels, code_for, crc32c, decode, encode
from stowplan.runtime.snapshot.codes.field import inverse, power
from stowplan.runtime.snapshot.codes.native import variants

RESULTS = Path(__file__).parent / "results"
PEERS = ("zfec", "pyeclib", "crc32c", "isal")
MOST_SOURCES = 6
SLOW_ROUNDS = 2  # of what takes this many times memcpy's time, or more:
SLOW = 10


@dataclass(frozen=True)
class Case:
    work: str
    who: str
    read_bytes: int
    run: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=64, help="of each buffer")
    parser.add_argument("--rounds", type=int, default=7, help="of everything, in turn")
    parser.add_argument("--output", type=Path, default=RESULTS / "snapshot_codes.json", help="where the JSON goes")
    given = parser.parse_args()
    size = given.mebibytes << 20
    random = np.random.default_rng(0)
    sources = [random.integers(0, 256, size, dtype=np.uint8) for _ in range(MOST_SOURCES)]
    outs = [np.ones(size, np.uint8) for _ in range(2)]
    cases = [*ours(sources, outs), *groups(sources), *peers(sources, outs)]
    rows = measure(memcpy(sources[0], outs[0]), cases, given.rounds)
    text = table(rows)
    print(text)
    options = {"mebibytes": given.mebibytes, "rounds": given.rounds, "threads": 1}
    write_record(given.output, rows, options=options, peers=versions())
    given.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def measure(copy: Case, cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    ratios: dict[Case, list[float]] = {case: [] for case in cases}
    speed(copy)
    for _ in range(rounds):
        for case, found in ratios.items():
            if len(found) < SLOW_ROUNDS or max(found) * SLOW > 1:
                copied = speed(copy)
                found.append(speed(case) / copied)
    return [
        {"work": case.work, "who": case.who, "times_memcpy": round(statistics.median(found), 3), "rounds": len(found)}
        for case, found in ratios.items()
    ]


def speed(case: Case) -> float:
    began = time.thread_time()
    case.run()
    return case.read_bytes / (time.thread_time() - began)


def memcpy(source: Any, out: Any) -> Case:
    copy = ctypes.CDLL(None).memcpy
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return Case("copy", "memcpy", len(source), lambda: copy(out.ctypes.data, source.ctypes.data, len(source)))


def ours(sources: list[Any], outs: list[Any]) -> list[Case]:
    size = len(sources[0])
    cases = []
    for kernels in (*map(NativeKernels, reversed(variants())), NumpyKernels()):

        def add(work: str, matrix: list[list[int]], more: bool = False, kernels: Any = kernels) -> None:
            k = len(matrix[0])
            run = lambda: kernels.combine(matrix, sources[:k], outs[: len(matrix)], add=more)  # noqa: E731
            cases.append(Case(work, f"stowplan {kernels.name}", k * size, run))

        add("XOR, 1 chunk into a parity", [[1]], more=True)
        add("P+Q, 1 chunk into a parity", [[29]], more=True)
        for k in (2, 3, 6):
            add(f"XOR, {k} chunks", [[1] * k])
        for k in (2, 4, 6):
            add(f"P+Q, {k} chunks", [[1] * k, [power(i) for i in range(k)]])
        add("P+Q, 2 of 6 lost", [[power(9 * i + 1) for i in range(6)], [inverse(power(5 * i + 2)) for i in range(6)]])
        check = lambda kernels=kernels: crc32c(sources[0], kernels=kernels)  # noqa: E731
        cases.append(Case("CRC-32C", f"stowplan {kernels.name}", size, check))
    return cases


def groups(sources: list[Any]) -> list[Case]:
    """Whole groups of five nodes, by their plans: all parities, then lost nodes with theirs."""
    cases = []
    n = 5
    for m, work in ((1, "raim5"), (2, "rs")):
        layout = Layout(code_for(n, m), len(sources[0]))
        data = dict(enumerate(sources[:n]))
        parity = {node: np.ones(layout.parity_bytes, np.uint8) for node in data}
        # A chunk counts once, into however many parities it goes, or out of however many lost chunks it is taken.
        read = n * len(sources[0])
        cases.append(Case(f"{work} of 5 nodes, encode", "stowplan", read, lambda v=(layout, data, parity): encode(*v)))
        lost = tuple(range(m))
        fetched = sum(span.length for span in layout.recovery(lost).sources)
        cases.append(
            Case(
                f"{work} of 5 nodes, {m} lost",
                "stowplan",
                fetched,
                lambda v=(layout, data, parity), lost=lost: decode(*v, lost=lost),
            )
        )
    return cases


def peers(sources: list[Any], outs: list[Any]) -> list[Case]:
    size, first = len(sources[0]), memoryview(sources[0])
    cases = [Case("CRC-32", "zlib.crc32", size, lambda: zlib.crc32(first))]
    cases.append(
        Case(
            "XOR, 1 chunk into a parity",
            "numpy, whole buffers",
            size,
            lambda: np.bitwise_xor(outs[0], sources[0], out=outs[0]),
        )
    )
    if importlib.util.find_spec("isal"):
        from isal import isal_zlib

        cases.append(Case("CRC-32", "isal_zlib.crc32", size, lambda: isal_zlib.crc32(first)))
    if importlib.util.find_spec("crc32c"):
        import crc32c as peer

        cases.append(Case("CRC-32C", "crc32c", size, lambda: peer.crc32c(first)))
    if importlib.util.find_spec("zfec"):
        import zfec

        views = [memoryview(source) for source in sources]
        for k in (4, 6):
            coder = zfec.Encoder(k, k + 2)
            run = lambda coder=coder, k=k: coder.encode(views[:k], [k, k + 1])  # noqa: E731
            cases.append(Case(f"P+Q, {k} chunks", "zfec", k * size, run))
    if importlib.util.find_spec("pyeclib"):
        from pyeclib.ec_iface import ECDriver

        for k in (4, 6):
            driver, whole = ECDriver(k=k, m=2, ec_type="isa_l_rs_vand"), b"".join(sources[:k])
            run = lambda driver=driver, whole=whole: driver.encode(whole)  # noqa: E731
            cases.append(Case(f"P+Q, {k} chunks", "pyeclib (ISA-L)", k * size, run))
    return cases


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}


def table(rows: list[dict[str, Any]]) -> str:
    who = list(dict.fromkeys(row["who"] for row in rows))
    found = {(row["work"], row["who"]): row["times_memcpy"] for row in rows}
    works = list(dict.fromkeys(row["work"] for row in rows))
    lines = ["| × memcpy | " + " | ".join(who) + " |", "|---" * (len(who) + 1) + "|"]
    for work in works:
        cells = (f"{found[work, name]:.2f}" if (work, name) in found else "" for name in who)
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
