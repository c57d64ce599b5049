"""How much memory of the host this process may take: the machine's, and what its control groups leave."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_bytes", "control_groups", "memory_limit_bytes"]


def memory_limit_bytes() -> int:
    """What all of this process's memory may take: the machine's, or less by a control group's limit."""
    return min(int(psutil.virtual_memory().total), *(limit for limit, _ in control_groups()), 2**63)


def available_bytes() -> int:
    """What can be allocated now without swapping (the kernel's MemAvailable), within the control groups' limits."""
    available = int(psutil.virtual_memory().available)
    return max(0, min(available, *(limit - used for limit, used in control_groups()), 2**63))


def control_groups(root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """(limit, use) in bytes of this process's memory cgroups, from its own up; empty where there are no limits."""
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, use_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, use_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = _read(folder / limit_name).strip(), _read(folder / use_name).strip()
            if limit.isdigit() and used.isdigit():
                found.append((int(limit), int(used) - _page_cache_bytes(folder / "memory.stat")))
            if folder == base:
                break
    return found


def _page_cache_bytes(stat: Path) -> int:
    """File pages that the kernel gives up when memory is asked for."""
    entries = dict(line.split(maxsplit=1) for line in _read(stat).splitlines() if " " in line)
    inactive = entries.get("inactive_file", "0").strip()
    return int(inactive) if inactive.isdigit() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
