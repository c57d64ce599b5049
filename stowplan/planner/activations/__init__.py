"""Keep, swap or recompute: what happens to every saved value between forward and backward.

Start at ``solve``. ``Problem`` is what is given; ``evaluate`` (formulas) and ``simulate`` (events) say what decisions
cost; ``policies`` are the baselines. A solver is imported only when one is needed. See docs/planner.md.
"""

from stowplan.planner.activations import policies
from stowplan.planner.activations.evaluate import Evaluation, evaluate
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.simulate import simulate
from stowplan.planner.activations.solve import ActivationPlan, solve
from stowplan.planner.activations.verify import verify

__all__ = ["ActivationPlan", "Evaluation", "Problem", "evaluate", "policies", "simulate", "solve", "verify"]
