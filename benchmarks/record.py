"""Results as JSON, with the machine, the versions and the commit that they belong to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["write_record"]


def write_record(path: Path, rows: Any, **more: Any) -> None:
    """Write ``rows`` and where they come from to ``path``."""
    record = {"about": {**_about(), **more}, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def _about() -> dict[str, Any]:
    packages = ("stowplan", "torch", "transformers", "pulp", "highspy")
    installed = {p.metadata["Name"].lower() for p in importlib.metadata.distributions()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages if package in installed},
        "machine": _processor(),
        "num_cores": os.cpu_count(),
        "accelerator": _accelerator(),
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown" if result.returncode == 0 and arguments[0] != "status" else result.stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
