"""The arena under random, wrong and failing use by several threads: bytes never shared, nothing crashes or leaks."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from stowplan.offload import arena

HERE = Path(__file__).parent
SOURCES = Path(arena.__file__).parent
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


def built(directory: Path, sources: Path = SOURCES, flags: tuple[str, ...] = ()) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = directory / "fuzz"
    files = [str(sources / "arena.cpp"), str(sources / "interface.cpp"), str(HERE / "fuzz.cpp")]
    options = ["-std=c++20", "-g", "-O1", "-pthread", *flags, "-I", str(sources)]
    subprocess.run([compiler, *options, *files, "-o", str(program)], check=True, timeout=200)
    return program


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    "sanitizer",
    ["plain", pytest.param("address", marks=pytest.mark.slow), pytest.param("thread", marks=pytest.mark.slow)],
)
def test_no_use_corrupts_or_crashes(sanitizer: str, tmp_path: Path) -> None:
    program = built(tmp_path, flags=SANITIZERS[sanitizer])
    hits = overlaps = failures = waits = 0
    for seed in range(2):
        for pooled in (0, 1):
            done = run(program, seed, 3, 2000, pooled)
            assert done.returncode == 0, done.stderr
            counted = json.loads(done.stdout)
            assert (counted["planned_bytes"], counted["fallback_bytes"]) == (0, 0)
            assert counted["unknown_frees"] > 0
            hits += counted["hits"]
            overlaps += counted["overlaps"]
            failures += counted["out_of_memory"]
            waits += counted["stream_waits"]
    assert min(hits, overlaps, failures, waits) > 0


@pytest.mark.slow
def test_without_the_overlap_guard_bytes_are_shared(tmp_path: Path) -> None:
    """The check itself: addresses that are handed out while in use are noticed."""
    for file in (*SOURCES.glob("*.h"), SOURCES / "interface.cpp"):
        shutil.copy(file, tmp_path)
    code = (SOURCES / "arena.cpp").read_text(encoding="utf-8")
    guard = "slab_->in_use(start, end)"
    assert guard in code
    (tmp_path / "arena.cpp").write_text(code.replace(guard, "false"), encoding="utf-8")
    program = built(tmp_path, sources=tmp_path)
    assert any(run(program, seed, 3, 4000, 0).returncode != 0 for seed in range(3))
