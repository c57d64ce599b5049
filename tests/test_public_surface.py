"""What users may rely on: names, flags, and that looking at a plan is quick."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

import stowplan
from stowplan.cli import app
from stowplan.core import errors
from tests.plans import example_plan

ROOT = Path(__file__).parent.parent

NAMES = [
    "Action",
    "ArenaUnavailable",
    "BudgetExceeded",
    "CompilationFailed",
    "Hardware",
    "InfeasibleBudget",
    "InfeasibleCapacity",
    "InfeasibleSchedule",
    "InvalidArgument",
    "InvalidPlanFile",
    "InvalidProblemFile",
    "InvalidSchedule",
    "InvalidSize",
    "Measurement",
    "MissingDependency",
    "NoGradients",
    "NoLogits",
    "Pipeline",
    "PipelinePlan",
    "Plan",
    "PlanMismatch",
    "PlanRejected",
    "Prediction",
    "ReplayMismatch",
    "Schedule",
    "SnapshotMemory",
    "SnapshotMemoryUnavailable",
    "SnapshotProcessUnavailable",
    "SnapshotRefused",
    "RankFailed",
    "SnapshotLimits",
    "Snapshotter",
    "SnapshotPeerRefused",
    "SnapshotPeerUnavailable",
    "SolverFailed",
    "StowplanError",
    "InvalidSnapshot",
    "SnapshotMismatch",
    "UnrecoverableSnapshot",
    "UnsupportedModel",
    "__version__",
    "allocations",
    "allow_replay",
    "applied",
    "apply",
    "arena",
    "dry",
    "linear_cross_entropy",
    "measure",
    "plan",
    "replan",
    "report",
    "wrap",
]

FLAGS = {
    "": ["--version"],
    "plan": [
        "--model",
        "--model-config",
        "--seq-len",
        "--batch-size",
        "--dtype",
        "--optimizer",
        "--budget",
        "--host-budget",
        "--snapshots",
        "--snapshot-m",
        "--snapshot-code",
        "--hardware",
        "--dry",
        "--chunked-head",
        "--inexact",
        "--tolerance",
        "--blocks",
        "--solver",
        "--time-limit",
        "--json",
        "--out",
        "--allocations",
    ],
    "report": ["file", "--json"],
    "pack": [
        "file",
        "--capacity",
        "--alignment",
        "--keep-offsets",
        "--solver",
        "--time-limit",
        "--out",
        "--picture",
        "--json",
    ],
    "demo": ["--out", "--steps", "--quick"],
    "schedule": [
        "--devices",
        "--microbatches",
        "--kind",
        "--times",
        "--communication",
        "--limit",
        "--activations",
        "--static",
        "--steps",
        "--time-limit",
        "--seed",
        "--csv",
        "--picture",
        "--json",
    ],
    "doctor": ["--json"],
    "snapshots": [],
    "snapshots status": ["--run", "--directory", "--json"],
    "snapshots end": ["--run", "--directory"],
}

HEAVY = {"torch", "transformers", "pulp", "highspy", "numpy", "ray", "deepspeed"}


def test_the_public_names_are_frozen() -> None:
    assert stowplan.__all__ == NAMES


def test_every_public_name_is_there_and_listed() -> None:
    for name in NAMES:
        assert getattr(stowplan, name) is not None
    assert set(NAMES) <= set(dir(stowplan))


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(stowplan.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'stowplan' has no attribute 'plam'"):
        stowplan.plam  # noqa: B018


def test_the_installed_version_is_that_of_the_package() -> None:
    try:
        installed = importlib.metadata.version("stowplan")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree")
    assert installed == stowplan.__version__


def _commands() -> dict[str, click.Command]:
    root = typer.main.get_command(app)
    commands = {"": root, **getattr(root, "commands", {})}
    groups = {name: command.commands for name, command in commands.items() if name and hasattr(command, "commands")}
    return commands | {f"{group} {name}": command for group, inner in groups.items() for name, command in inner.items()}


def test_the_flags_of_every_command_are_frozen() -> None:
    flags = {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in _commands().items()
    }
    assert flags == FLAGS


@pytest.mark.parametrize("name", ["plan", "report", "pack", "schedule", "demo", "doctor"])
def test_every_command_has_examples(name: str) -> None:
    result = _run("-m", "stowplan", name, "--help")
    assert f"Examples:\n\n    stowplan {name}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def _imported_by(code: str) -> set[str]:
    """Top-level modules that are loaded after ``code`` ran in a process of its own."""
    listing = "import sys; print('\\n'.join(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    return set(_run("-c", f"{code}\n{listing}").stderr.split())


def test_importing_the_package_is_light() -> None:
    code = "import stowplan; stowplan.Plan, stowplan.Hardware, stowplan.InfeasibleBudget"
    assert _imported_by(code) & (HEAVY | {"typer", "rich"}) == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["pack", "--help"], ["report", "PLAN"], ["report", "PLAN", "--json"]]
)
def test_help_and_reports_are_light(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    example_plan().save(path)
    given = [str(path) if argument == "PLAN" else argument for argument in arguments]
    code = f"""
import sys
from stowplan.cli import main
sys.argv = ["stowplan", *{given!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert _imported_by(code) & HEAVY == set()


def test_packing_needs_neither_torch_nor_a_mip_solver(tmp_path: Path) -> None:
    file = tmp_path / "buffers.csv"
    file.write_text("id,lower,upper,size\na,0,1,1\n")
    arguments = ["pack", str(file), "--picture", str(tmp_path / "map.html"), "--json"]
    code = f"""
import sys
from stowplan.cli import main
sys.argv = ["stowplan", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert _imported_by(code) & HEAVY == {"numpy"}
