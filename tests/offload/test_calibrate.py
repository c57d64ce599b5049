"""Measured hardware, and how much memory "auto" finds."""

from __future__ import annotations

import psutil
import torch

from stowplan.core.units import GIB
from stowplan.offload import calibrate

CPU = torch.device("cpu")


def test_the_machine_has_positive_rates() -> None:
    hardware = calibrate.measure_hardware(CPU)
    assert (hardware.name, hardware.device_type, hardware.origin) == ("cpu", "cpu", "measured")
    assert not hardware.overlapped_copies
    rates = (
        hardware.matmul_flops_per_second,
        hardware.memory_bytes_per_second,
        hardware.to_host_bytes_per_second,
        hardware.to_device_bytes_per_second,
    )
    assert all(rate > 0 for rate in rates)
    assert 0 < hardware.device_bytes <= psutil.virtual_memory().total


def test_budgets_are_within_the_machine() -> None:
    total = psutil.virtual_memory().total
    assert 0 < calibrate.host_budget_bytes() < total
    if psutil.virtual_memory().available > 2 * GIB:
        assert 0 < calibrate.device_budget_bytes(CPU) <= total
