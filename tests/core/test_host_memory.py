"""Limits of control groups, and what is available within them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from stowplan.core.host_memory import available_bytes, control_groups, memory_limit_bytes


def test_what_is_available_is_within_the_limit() -> None:
    assert 0 < available_bytes() < memory_limit_bytes() <= psutil.virtual_memory().total


@pytest.fixture
def own_groups() -> list[tuple[str, str]]:
    """(controllers, path) of this process, as the system has them."""
    file = Path("/proc/self/cgroup")
    if not file.exists():
        pytest.skip("no control groups on this system")
    return [tuple(line.split(":", 2)[1:]) for line in file.read_text().splitlines()]  # type: ignore[misc]


def write(folder: Path, limit_name: str, limit: str, use_name: str, use: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / use_name).write_text(f"{use}\n")


def test_a_system_without_limits(tmp_path: Path) -> None:
    assert control_groups(tmp_path) == []


def test_limits_of_the_own_group_and_those_above(tmp_path: Path, own_groups: list[tuple[str, str]]) -> None:
    unified = [path for controllers, path in own_groups if controllers == ""]
    classic = [path for controllers, path in own_groups if "memory" in controllers.split(",")]
    expected = []
    for path in unified:
        write(tmp_path / path.lstrip("/"), "memory.max", "1000", "memory.current", "300")
        expected.append((1000, 300))
    for path in classic:
        group = tmp_path / "memory" / path.lstrip("/")
        write(group, "memory.limit_in_bytes", "2000", "memory.usage_in_bytes", "500")
        expected.append((2000, 500))
    if not expected:
        pytest.skip("this process is in no memory group")
    assert sorted(control_groups(tmp_path)) == sorted(expected)


def test_no_limit_is_no_number(tmp_path: Path, own_groups: list[tuple[str, str]]) -> None:
    for controllers, path in own_groups:
        if controllers == "":
            write(tmp_path / path.lstrip("/"), "memory.max", "max", "memory.current", "300")
    assert control_groups(tmp_path) == []


def test_every_group_up_to_the_root_counts(tmp_path: Path, own_groups: list[tuple[str, str]]) -> None:
    paths = [path for controllers, path in own_groups if controllers == ""]
    if not paths:
        pytest.skip("this process is in no unified group")
    group = tmp_path / paths[0].lstrip("/")
    folders = [folder for folder in (group, *group.parents) if folder == tmp_path or tmp_path in folder.parents]
    for number, folder in enumerate(folders):
        write(folder, "memory.max", str(1000 + number), "memory.current", str(number))
    write(tmp_path.parent, "memory.max", "1", "memory.current", "1")  # above the root: nobody looks there
    assert control_groups(tmp_path) == [(1000 + number, number) for number in range(len(folders))]
