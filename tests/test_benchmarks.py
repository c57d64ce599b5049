"""Benchmarks are programs that nobody else imports: they must at least start."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

PROGRAMS = [
    path.stem
    for path in sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_tells_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_:
        program.main()
    assert exit_.value.code == 0
    assert "usage:" in capsys.readouterr().out
