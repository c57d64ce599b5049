"""Shared libraries of our own C++: prebuilt in a wheel, or compiled from the sources beside the Python on first use."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from stowplan.core.errors import CompilationFailed

__all__ = ["compiled", "loaded"]

_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
_LAST_LINES = 12  # of what the compiler said


def compiled(
    name: str,
    sources: Sequence[Path],
    *,
    headers: Sequence[Path] = (),
    flags: Sequence[str] = (),
    time_limit_seconds: float = 120.0,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """The path of shared library ``name``, compiled from ``sources`` if that has not been done before.

    A library beside the first source, as wheels have it, is taken as it is. Others are kept in
    ``$STOWPLAN_CACHE_DIR`` (default: ``stowplan`` in ``$XDG_CACHE_HOME``, ``~/.cache``), one for each version of
    sources, ``headers``, compiler and ``flags``; any number of processes may ask at once. The compiler is ``$CXX``, or
    the first of c++, g++ and clang++.

    Raises CompilationFailed: no compiler, what it said, longer than ``time_limit_seconds``, or no place to write.
    """
    prebuilt = sources[0].with_name(f"{name}.so")
    if prebuilt.exists():
        return prebuilt
    command = [*_compiler(name), *_FLAGS, *flags]
    content = b"\0".join(path.read_bytes() for path in (*sources, *headers))
    key = hashlib.sha256("\0".join((*command, sys.platform)).encode() + content).hexdigest()[:16]
    library = _cache_directory() / f"{name}-{key}.so"
    if library.exists():
        return library
    on_progress(f"compiling {name} (once)")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            draft = Path(directory) / library.name
            _run([*command, *map(str, sources), "-o", str(draft)], name, time_limit_seconds)
            draft.replace(library)
    except OSError as error:
        raise CompilationFailed(
            f"the library {name} cannot be kept in {library.parent}: {error}. Set STOWPLAN_CACHE_DIR to a directory "
            f"that can be written."
        ) from error
    return library


def loaded(library: Path) -> ctypes.CDLL:
    """A shared library that ``compiled`` has given. Raises CompilationFailed where the system refuses it."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilationFailed(
            f"the library {library} cannot be loaded: {error}. Set STOWPLAN_CACHE_DIR to a directory whose files may "
            f"be executed; a library that is not for this machine can be deleted."
        ) from error


def _compiler(name: str) -> list[str]:
    asked = os.environ.get("CXX", "").split()
    found = shutil.which(asked[0]) if asked else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        given = f"CXX={asked[0]!r} is not there" if asked else "neither c++, g++ nor clang++ is there"
        raise CompilationFailed(f"{name} is to be compiled and {given}: install g++, or set CXX to a C++20 compiler.")
    return [found, *asked[1:]]


def _cache_directory() -> Path:
    if asked := os.environ.get("STOWPLAN_CACHE_DIR"):
        return Path(asked)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stowplan"
    except RuntimeError as error:
        raise CompilationFailed(
            "this user has no home directory to keep compiled libraries in: set STOWPLAN_CACHE_DIR to a directory that "
            "can be written."
        ) from error


def _run(command: list[str], name: str, time_limit_seconds: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        raise CompilationFailed(f"compiling {name} took longer than {time_limit_seconds:g} s: stopped.") from None
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise CompilationFailed(f"{name} does not compile with {command[0]} (exit code {done.returncode}):\n{said}")
