import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from stowplan.core.errors import CompilationFailed
from stowplan.core.native import compiled, loaded

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("STOWPLAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    file = tmp_path / "answer.cpp"
    file.write_text(SOURCE)
    return file


def test_compiles_once_for_each_content_and_flags(source, tmp_path):
    said = []
    first = compiled("answer", [source], flags=["-DANSWER=42"], on_progress=said.append)
    assert ctypes.CDLL(str(first)).answer() == 42
    assert compiled("answer", [source], flags=["-DANSWER=42"], on_progress=said.append) == first
    assert said == ["compiling answer (once)"]
    other = compiled("answer", [source], flags=["-DANSWER=43"])
    assert ctypes.CDLL(str(other)).answer() == 43
    source.write_text(SOURCE.replace("ANSWER", "7"))
    assert ctypes.CDLL(str(compiled("answer", [source], flags=["-DANSWER=42"]))).answer() == 7


def test_a_changed_header_compiles_again(source, tmp_path):
    header = tmp_path / "answer.h"
    source.write_text('#include "answer.h"\n' + SOURCE)
    libraries = set()
    for answer in (1, 2):
        header.write_text(f"#define ANSWER {answer}\n")
        library = compiled("answer", [source], headers=[header])
        assert ctypes.CDLL(str(library)).answer() == answer
        libraries.add(library)
    assert len(libraries) == 2


def test_a_library_beside_its_source_is_taken(source, tmp_path):
    prebuilt = tmp_path / "answer.so"
    prebuilt.touch()
    assert compiled("answer", [source]) == prebuilt


def test_many_may_ask_at_once(source):
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(lambda _: compiled("answer", [source], flags=["-DANSWER=5"]), range(4)))
    assert len(libraries) == 1
    assert [file.suffix for file in libraries.pop().parent.iterdir()] == [".so"]


def test_what_the_compiler_said_is_told(source):
    source.write_text("this is no C++\n")
    with pytest.raises(CompilationFailed, match=r"(?s)does not compile with .*\(exit code 1\).*this"):
        compiled("answer", [source])


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilationFailed, match="CXX='no-such-compiler' is not there"):
        compiled("answer", [source])
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilationFailed, match=r"neither c\+\+, g\+\+ nor clang\+\+ is there: install"):
        compiled("answer", [source])


def test_too_slow(source, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    with pytest.raises(CompilationFailed, match=r"longer than 0\.2 s"):
        compiled("answer", [source], time_limit_seconds=0.2)


def test_no_place_to_keep_it(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STOWPLAN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CompilationFailed, match="STOWPLAN_CACHE_DIR"):
        compiled("answer", [source], flags=["-DANSWER=1"])


def test_no_home(source, monkeypatch):
    for name in ("STOWPLAN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that the system does not know
    with pytest.raises(CompilationFailed, match="set STOWPLAN_CACHE_DIR"):
        compiled("answer", [source], flags=["-DANSWER=1"])


def test_a_library_that_does_not_load(tmp_path):
    library = tmp_path / "answer.so"
    library.write_bytes(b"for another machine")
    with pytest.raises(CompilationFailed, match=r"answer\.so cannot be loaded: .*STOWPLAN_CACHE_DIR"):
        loaded(library)
