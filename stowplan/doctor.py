"""``stowplan doctor``: what is installed, what the machine is, and whether planning works here.

Checks are functions in ``CHECKS``, run in order, each giving findings. One that raises is a finding, too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from stowplan.core.units import format_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["CHECKS", "Finding", "State", "examine", "render"]

_PYTHON = (3, 11)
_WIDTH, _ROWS, _NUM_STEPS = 32, 64, 4


class State(StrEnum):
    """What a finding means: fine, of note, or the reason that something does not work."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    section: str
    name: str
    state: State
    said: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


Check = Callable[[], Iterable[tuple[str, State, str]]]


def examine(on_progress: Callable[[str], None]) -> list[Finding]:
    """Run all checks; nothing that goes wrong in one keeps the others from running."""
    found: list[Finding] = []
    for section, check in CHECKS:
        on_progress(f"checking {section}")
        try:
            found += [Finding(section, *finding) for finding in check()]
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what the doctor is asked for
            said = " ".join(str(error).split())
            found.append(Finding(section, "check", State.BROKEN, f"{type(error).__name__}: {said}"))
    return found


def render(findings: Iterable[Finding]) -> str:
    """The findings as text, a section a paragraph."""
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section.upper()]
        lines.append(f"  {finding.state:<6}  {finding.name:<16}  {finding.said}")
    return "\n".join(lines[1:]) + "\n"


# ---- checks ----------------------------------------------------------------------------------------------------------
def _versions() -> Iterator[tuple[str, State, str]]:
    python = platform.python_version()
    right = tuple(map(int, platform.python_version_tuple()[:2])) >= _PYTHON
    yield "python", State.OK if right else State.BROKEN, f"{python} (3.11 or newer)"
    yield "stowplan", State.OK, importlib.metadata.version("stowplan")
    for requirement in importlib.metadata.requires("stowplan") or ():
        found = re.match(r"([\w.-]+)>=([\d.]+)(?:; extra == ['\"](\w+)['\"])?", requirement)
        if found is not None and found[3] in (None, "hf", "cuda"):
            yield _version(*found.groups())


def _version(package: str, least: str, extra: str | None) -> tuple[str, State, str]:
    from stowplan.offload.versions import TESTED_TORCH, release_of

    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if extra is None:
            return package, State.BROKEN, f"not installed: pip install '{package}>={least}'"
        return package, State.NOTE, f'not installed; optional: pip install "stowplan[{extra}]"'
    if release_of(version) < release_of(least):
        return package, State.BROKEN, f"{version} is too old: pip install '{package}>={least}'"
    if package == "torch" and release_of(version)[:2] > TESTED_TORCH:
        tested = ".".join(map(str, TESTED_TORCH))
        return package, State.NOTE, f"{version} is newer than the tested {tested}; the self-check below tells more"
    return package, State.OK, f"{version} ({least} or newer)"


def _devices() -> Iterator[tuple[str, State, str]]:
    import psutil
    import torch

    memory = format_bytes(int(psutil.virtual_memory().total))
    yield "cpu", State.OK, f"{os.cpu_count()} cores, {memory}, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        yield "cuda", State.NOTE, f"none: {why}; the CPU stands in for a device"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", State.OK, f"{properties.name}, {format_bytes(properties.total_memory)}"
    if torch.backends.mps.is_available():
        yield "mps", State.NOTE, "not supported: plans are for cpu and cuda"
    yield _nvml(torch.cuda.is_available())


def _nvml(needed: bool) -> tuple[str, State, str]:
    missing = State.BROKEN if needed else State.NOTE
    try:
        import pynvml
    except ImportError:
        return "nvml", missing, 'not installed; budget="auto" on CUDA needs it: pip install "stowplan[cuda]"'
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return "nvml", missing, f"installed, but without a driver ({error}); only CUDA devices need it"
    return "nvml", State.OK, f"driver {version}"


def _speeds() -> Iterator[tuple[str, State, str]]:
    from stowplan.offload.calibrate import measure_hardware

    for device in _usable_devices():
        machine = measure_hardware(device)
        yield (
            str(device),
            State.OK,
            f"to host {machine.to_host_bytes_per_second / 1e9:.1f} GB/s, to device "
            f"{machine.to_device_bytes_per_second / 1e9:.1f} GB/s, memory "
            f"{machine.memory_bytes_per_second / 1e9:.0f} GB/s, float32 matmul "
            f"{machine.matmul_flops_per_second / 1e12:.2f} TFLOP/s",
        )


def _budgets() -> Iterator[tuple[str, State, str]]:
    from stowplan.core.errors import StowplanError
    from stowplan.offload.calibrate import device_budget_bytes, host_budget_bytes

    for device in _usable_devices():
        try:
            budget = f'budget="auto" would be {format_bytes(device_budget_bytes(device))}'
        except StowplanError as error:
            yield str(device), State.NOTE, f'budget="auto" cannot be used: {error}'
        else:
            yield str(device), State.OK, budget
    yield "host", State.OK, f'host_budget="auto" would be {format_bytes(host_budget_bytes())}'


def _support() -> Iterator[tuple[str, State, str]]:
    import torch

    yield "plan, apply", State.OK, f"on {', '.join(map(str, _usable_devices()))}"
    if not torch.cuda.is_available():
        yield "CUDA training", State.NOTE, "not here: there is no CUDA device"
    if torch.cuda.device_count() > 1:
        yield "several devices", State.NOTE, "one device a process: start a process for each"
    peaks = "seen in passing" if torch.cuda.is_available() else "seen only inside stowplan.measure on the CPU"
    yield "peaks", State.OK, f"steps above the budget are {peaks}"
    yield "torch.compile", State.NOTE, "not supported around or inside planned blocks"


def _self_check() -> Iterator[tuple[str, State, str]]:
    import stowplan

    for device in _usable_devices():
        model, batch = _tiny(device)
        roomy = stowplan.plan(model, batch, budget="1GiB", host_budget="1GiB", loss_fn=_loss)
        plan = stowplan.replan(roomy, budget=roomy.least_budget_bytes)
        expected = _train(_tiny(device)[0], batch)
        with stowplan.apply(plan, model, verify="all") as applied:
            found = _train(model, batch)
        moved = applied.counters.swapped_bytes + applied.counters.recomputed_bytes
        said = f"{format_bytes(moved)} recomputed or swapped in {_NUM_STEPS} steps"
        if moved and found == expected:
            yield str(device), State.OK, f"{said}: losses, gradients and parameters equal the plain run's, bit for bit"
        else:
            yield str(device), State.BROKEN, f"{said}: the result differs from the plain run's; please report this"


# ---- what checks share -----------------------------------------------------------------------------------------------
def _usable_devices() -> list[torch.device]:
    import torch

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return devices


def _tiny(device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model with dropout, always the same, and its batch."""
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.TransformerEncoderLayer(_WIDTH, 2, 2 * _WIDTH, batch_first=True) for _ in range(3)]
    return torch.nn.Sequential(*layers).to(device), torch.randn(2, _ROWS, _WIDTH).to(device)


def _loss(output: torch.Tensor, batch: object) -> torch.Tensor:
    return output.square().mean()


def _train(model: torch.nn.Module, batch: torch.Tensor) -> list[bytes]:
    """Losses, gradients and parameters of a few steps, as bytes."""
    import torch

    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen: list[torch.Tensor] = []
    for _ in range(_NUM_STEPS):
        optimizer.zero_grad()
        loss = _loss(model(batch), batch)
        loss.backward()
        seen += [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        seen = [tensor.detach().clone() for tensor in seen]
        optimizer.step()
    return [tensor.detach().cpu().numpy().tobytes() for tensor in (*seen, *model.parameters())]


def _dry_capture() -> Iterator[tuple[str, State, str]]:
    from stowplan.offload.dry.self_test import TOLERANCE, largest_difference

    difference = largest_difference()
    fine = difference <= TOLERANCE
    said = f"peaks of a small step differ by {difference:.3%} from a real one (allowed: {TOLERANCE:.0%})"
    yield "self-test", State.OK if fine else State.BROKEN, said if fine else f"{said}: plan without --dry"


# In the order of the report. A check that needs more than seconds has no place here.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("versions", _versions),
    ("devices", _devices),
    ("speeds", _speeds),
    ("budgets", _budgets),
    ("support", _support),
    ("self-check", _self_check),
    ("dry capture", _dry_capture),
)
