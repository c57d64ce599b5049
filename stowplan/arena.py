"""An allocator that serves a training step's memory at planned addresses.

    import stowplan
    stowplan.arena.install()      # the script's first line
    ...                           # the training script as it was
    print(stowplan.arena.stats())

Steps are watched; a sequence of allocations that comes back is packed (dynamic storage allocation) and from then on
served at the addresses that were planned. Whatever departs from the plan is served beside it, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from stowplan.core.errors import CompilationFailed
from stowplan.core.units import parse_bytes
from stowplan.offload.arena import installing
from stowplan.offload.arena.installing import Stats
from stowplan.offload.arena.library import Integers
from stowplan.planner.packing import Problem, pack, prepare

__all__ = ["Stats", "install", "stats", "step", "uninstall"]

_PACKING_SECONDS = 1.0  # at most, for each kind of step


def install(
    device: str | None = None,
    *,
    slab: int | str = 0,
    most_plans: int = 8,
    strict: bool = False,
    on_progress: Callable[[str], None] = installing.say,
) -> None:
    """Serve torch's allocations on ``device`` from an arena, from now on.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; by default the GPU of this process (``LOCAL_RANK``), or the CPU
            where there is none. On CUDA this must come before anything is on a GPU.
        slab: bytes to reserve for planned addresses at once; by default what the first plan needs, when it is made.
        most_plans: how many kinds of steps (lengths of batches) are remembered.
        strict: raise CompilationFailed where the arena cannot be compiled, instead of a warning that torch's own
            allocator serves.
        on_progress: told when it or the packer compiles (once for each version of torch); writes to stderr by default.

    Raises ArenaUnavailable (CUDA is in use already, or not there; installed twice; no memory for ``slab``),
    InvalidArgument, InvalidSize, CompilationFailed.
    """
    slab_bytes = parse_bytes(slab, "slab") if slab else 0
    installing.install(device, _packed, slab_bytes=slab_bytes, most_plans=most_plans, strict=strict, notify=on_progress)
    with suppress(CompilationFailed):  # whoever packs says so, and does without
        prepare(on_progress)


def uninstall() -> None:
    """Give torch its own CPU allocator back; tensors that are alive stay as they are.

    Raises ArenaUnavailable on CUDA, where torch keeps an allocator for the life of the process.
    """
    installing.uninstall()


def step() -> None:
    """Say that a training step ends here.

    By default the last optimizer's ``step()`` says it. Who calls this once marks every step from then on.
    """
    installing.step()


def stats() -> Stats:
    """What was served from plans and beside them, since the arena was installed."""
    return installing.stats()


def _packed(lower: Integers, upper: Integers, size: Integers, fixed: Integers, alignment: int) -> tuple[Integers, int]:
    problem = Problem(lower, upper, size, alignment=alignment, fixed=fixed)
    solution = pack(problem, time_limit_seconds=_PACKING_SECONDS)
    return solution.offsets, solution.height_bytes
