"""Which node a GPU is near to, and asking the system for that node's memory."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import pytest
import torch

from stowplan.offload import numa

ADDRESS = "0000:3b:00.0"


def machine(root: Path, num_nodes: int, said: str | None) -> Path:
    for node in range(num_nodes):
        (root / f"devices/system/node/node{node}").mkdir(parents=True)
    if said is not None:
        folder = root / "bus/pci/devices" / ADDRESS
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{said}\n")
    return root


@pytest.mark.parametrize(
    ("num_nodes", "said", "node"),
    [(2, "1", 1), (2, "0", 0), (1, "0", None), (2, "-1", None), (2, None, None), (2, "what", None), (0, "0", None)],
)
def test_the_node_of_a_device(tmp_path: Path, num_nodes: int, said: str | None, node: int | None) -> None:
    assert numa.node_of_pci(ADDRESS, machine(tmp_path, num_nodes, said)) == node


def test_memory_of_a_node_that_is_there() -> None:
    memory = torch.frombuffer(mmap.mmap(-1, 2**16), dtype=torch.uint8)
    done = numa.prefer(memory, 0)
    memory.fill_(7)
    assert memory.unique().tolist() == [7]
    if not done:
        pytest.skip(f"this {platform.system()} on {platform.machine()} does not place memory")


def test_memory_of_a_node_that_is_not_there_stays_where_it_is() -> None:
    memory = torch.frombuffer(mmap.mmap(-1, 2**16), dtype=torch.uint8)
    assert not numa.prefer(memory, 1023)
    memory.fill_(7)


def test_a_system_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "z80")
    assert not numa.prefer(torch.empty(4096, dtype=torch.uint8), 0)
