"""Benchmarks are programs that nobody else imports: they must at least start."""

from __future__ import annotations

import importlib
import json
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


@pytest.mark.slow
def test_pipelines_in_their_quick_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module("benchmarks.pipeline")
    monkeypatch.setattr(sys, "argv", ["pipeline", "--quick", "--output", str(tmp_path / "pipeline.json")])
    program.main()
    rows = json.loads((tmp_path / "pipeline.json").read_text())["rows"]
    for what in ("peak", "makespan", "step"):
        assert {row["contender"] for row in rows if row["what"] == what} == set(program.NAMES)
    assert all(size > 0 for row in rows if row["what"] == "peak" for size in row["bytes"])
    assert "÷ torch ZBV" in capsys.readouterr().out


@pytest.mark.slow
def test_snapshots_in_their_quick_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module("benchmarks.snapshots")
    monkeypatch.setattr(sys, "argv", ["snapshots", "--quick", "--output", str(tmp_path / "snapshots.json")])
    program.main()
    rows = json.loads((tmp_path / "snapshots.json").read_text())["rows"]
    for case in program.QUICK:
        assert {row["contender"] for row in rows if row["case"] == case.name} == set(program.CONTENDERS)
    assert all(row["whole_seconds"] >= row["blocked_seconds"] > 0 for row in rows)
    assert (tmp_path / "snapshots.md").read_text().strip() in capfd.readouterr().out
