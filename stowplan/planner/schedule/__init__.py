"""Who computes what, and when, in a pipeline: known schedules, a checker, a simulator, a search.

Start at ``search`` for the fastest schedule within a memory limit, or at ``generate`` for one with a name. ``check``
says whether a schedule can be run, ``simulate`` what it takes. See docs/schedules.md.
"""

from stowplan.planner.schedule.check import activation_peaks, check, check_bytes, order_peaks_bytes
from stowplan.planner.schedule.costs import Costs, StageCosts
from stowplan.planner.schedule.generate import NAMES, generate, stages_per_device
from stowplan.planner.schedule.search import Found, search
from stowplan.planner.schedule.simulate import Memory, Timeline, simulate

__all__ = [
    "NAMES",
    "Costs",
    "Found",
    "Memory",
    "StageCosts",
    "Timeline",
    "activation_peaks",
    "check",
    "check_bytes",
    "generate",
    "order_peaks_bytes",
    "search",
    "simulate",
    "stages_per_device",
]
