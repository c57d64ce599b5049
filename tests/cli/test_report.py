from __future__ import annotations

from pathlib import Path

import pytest

import stowplan
from stowplan.reports.text import render
from tests.cli.commands import run, told
from tests.plans import example_plan


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    example_plan().save(path)
    return path


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"stowplan {stowplan.__version__}\n")


def test_report_prints_the_text_report(plan_file: Path) -> None:
    result = run("report", plan_file)
    assert (result.exit_code, result.stdout, result.stderr) == (0, render(example_plan()), "")


def test_report_as_json_is_the_plan(plan_file: Path) -> None:
    result = run("report", plan_file, "--json")
    assert result.exit_code == 0
    assert result.stdout == plan_file.read_text()


def test_report_of_no_file(tmp_path: Path) -> None:
    line = told(run("report", tmp_path / "none.json"), 2)
    assert line == f"stowplan: {tmp_path / 'none.json'}: No such file or directory"


def test_report_of_a_directory(tmp_path: Path) -> None:
    assert "Is a directory" in told(run("report", tmp_path), 2)


def test_report_of_a_damaged_file(plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"budget_bytes"', '"budget"', 1))
    line = told(run("report", plan_file), 2)
    assert "$: unknown key 'budget'" in line
    assert "Make it anew" in line


def test_what_a_file_says_never_reaches_the_terminal_raw(plan_file: Path) -> None:
    plan_file.write_text('{"format": "stowplan-plan", "version": "\\u001b[2J\\n[bold]"}')
    result = run("report", plan_file)
    assert "\x1b" not in result.stderr
    assert "[bold]" in told(result, 2)
