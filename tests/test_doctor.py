"""What the doctor finds, and what it makes of what is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stowplan
from stowplan import doctor
from stowplan.cli import app
from stowplan.doctor import Finding, State
from stowplan.offload import versions
from stowplan.offload.versions import refuse_old_torch, release_of

ROOT = Path(__file__).parent.parent


def examined(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_sound_machine_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    result = examined("--json")
    assert result.exit_code == 0, result.stdout
    told = json.loads(result.stdout)
    assert told["fine"] is True
    found = {(finding["section"], finding["name"]): finding for finding in told["findings"]}
    assert torch.__version__ in found["versions", "torch"]["said"]
    assert found["self-check", "cpu"]["state"] == "ok"
    assert "bit for bit" in found["self-check", "cpu"]["said"]
    assert "GB/s" in found["speeds", "cpu"]["said"]
    assert "GiB" in found["budgets", "cpu"]["said"]
    assert [line for line in result.stderr.splitlines() if line] == [f"checking {name}" for name, _ in doctor.CHECKS]


def test_the_text_has_a_line_for_every_finding() -> None:
    findings = [
        Finding("one", "a", State.OK, "well"),
        Finding("one", "b", State.NOTE, "so"),
        Finding("two", "c", State.BROKEN, "ill"),
    ]
    assert doctor.render(findings).splitlines() == [
        "ONE",
        "  ok      a                 well",
        "  note    b                 so",
        "",
        "TWO",
        "  broken  c                 ill",
    ]


def test_a_check_that_raises_is_broken_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> Any:
        yield "first", State.OK, "before"
        raise OSError("no such\nthing")

    monkeypatch.setattr(doctor, "CHECKS", (("bad", bad), ("good", lambda: [("it", State.OK, "is")])))
    result = examined()
    assert result.exit_code == 1
    assert "  broken  check             OSError: no such thing" in result.stdout
    assert "GOOD\n  ok      it" in result.stdout
    assert json.loads(examined("--json").stdout)["fine"] is False


def test_a_wrong_result_of_the_self_check_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([[b"1"], [b"2"]])
    monkeypatch.setattr(doctor, "CHECKS", (("self-check", doctor._self_check),))
    monkeypatch.setattr(doctor, "_train", lambda model, batch: next(runs))
    result = examined()
    assert result.exit_code == 1
    assert "differs from the plain run's; please report this" in result.stdout


@pytest.mark.parametrize(
    ("package", "version", "state", "said"),
    [
        ("torch", "2.10.1+cpu", State.BROKEN, "2.10.1+cpu is too old: pip install 'torch>=2.11'"),
        ("torch", "2.13.0+cpu", State.OK, "2.13.0+cpu"),
        ("torch", "99.1.0", State.NOTE, "99.1.0 is newer than the tested 2.13"),
        ("transformers", None, State.NOTE, 'optional: pip install "stowplan[hf]"'),
        ("pulp", None, State.BROKEN, "not installed: pip install 'pulp>=3.0'"),
        ("nvidia-ml-py", None, State.NOTE, "stowplan[cuda]"),
    ],
)
def test_versions_in_and_out_of_range(
    package: str, version: str | None, state: State, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version

    def other(name: str) -> str:
        if name != package:
            return installed(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = {name: (state, said) for name, state, said in doctor._versions()}
    assert found[package][0] is state
    assert said in found[package][1]


@pytest.mark.parametrize("version", ["2.10.2", "1.13.0+cu117", "2.9.0.dev20250101", "unknown"])
def test_an_old_torch_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(
        stowplan.MissingDependency, match=re.escape(f"torch {version} is installed") + r".*'torch>=2\.11'"
    ):
        refuse_old_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0a0+git1234", "3.0"])
def test_a_torch_that_may_work_is_not_refused(version: str) -> None:
    refuse_old_torch(version)


def test_the_versions_are_those_of_the_project() -> None:
    least = ".".join(map(str, versions.LEAST_TORCH))
    assert f'"torch>={least}"' in (ROOT / "pyproject.toml").read_text()
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert release_of(pinned)[:2] == versions.TESTED_TORCH
