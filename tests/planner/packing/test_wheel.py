"""What a wheel and a source distribution bring along; built from a copy, with the tools that are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
PACKING = "stowplan/planner/packing"
CODES = "stowplan/runtime/snapshot/codes"
CODES_SOURCES = ("codes.cpp", "field.hpp", "multiply.hpp", "checksum.hpp")
SOURCES = (
    "pack.cpp",
    "instance.hpp",
    "placing.hpp",
    "greedy.hpp",
    "improve.hpp",
    "rules.hpp",
    "search.hpp",
    "portfolio.hpp",
)
# Packs and checks with the wheel's libraries: no compiler is to be found, and -S leaves the editable install out.
PROGRAM = """
from stowplan.planner.packing import Problem, library, pack
assert library.__file__.startswith({place!r}), library.__file__
print(pack(Problem([0, 1, 2], [2, 3, 4], [1, 2, 1]), solver="exact").height_bytes)
from stowplan.runtime.snapshot.codes import crc32c
print(hex(crc32c(b"123456789")))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "stowplan", copy / "stowplan", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "c++"))), reason="wheels are built with cmake and a compiler")
def test_a_wheel_has_the_library_and_needs_no_compiler(tree, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    files = {path.name for path in (place / PACKING).iterdir()}
    assert {"stowplan_pack.so", *SOURCES} <= files
    assert {"stowplan_codes.so", *CODES_SOURCES} <= {path.name for path in (place / CODES).iterdir()}
    paths = f"{place}:{Path(np.__file__).parents[1]}"
    environment = {"PYTHONPATH": paths, "CXX": "no-such-compiler", "STOWPLAN_CACHE_DIR": str(tmp_path / "cache")}
    program = [sys.executable, "-S", "-W", "error", "-c", PROGRAM.format(place=str(place))]
    done = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("3\n0xe3069283", "")


@pytest.mark.slow
def test_a_source_distribution_has_the_sources(tree, tmp_path):
    code = f"import scikit_build_core.build as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    assert {"CMakeLists.txt", *(f"{PACKING}/{source}" for source in SOURCES)} <= names
    assert not [name for name in names if name.endswith(".so")]
