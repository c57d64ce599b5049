"""What stands in the way of a budget, in words: where the least plan has its peak, and what would bring that down."""

from __future__ import annotations

from stowplan.core.plan import MomentBytes, Prediction
from stowplan.core.units import format_bytes

__all__ = ["advise"]


def advise(budget_bytes: int, least: Prediction) -> str:
    """One or two sentences for a budget that is below ``least``'s peak."""
    moment = max(least.moments, key=lambda moment: moment.peak_bytes)
    if moment.static_bytes >= budget_bytes:
        return (
            f"Parameters, optimizer states and the batch alone take {format_bytes(moment.static_bytes)}: no batch is "
            f"short enough. Take weights or an optimizer with fewer bytes, or shard them over more devices."
        )
    share = (budget_bytes - moment.static_bytes) / (moment.peak_bytes - moment.static_bytes)
    return (
        f"Its peak is in the {moment.name}: {format_bytes(moment.static_bytes)} of parameters, states and batch, "
        f"{format_bytes(moment.gradient_bytes)} of gradients, {format_bytes(moment.kept_bytes + moment.staged_bytes)} "
        f"kept, {format_bytes(moment.working_bytes)} at work. {_remedy(moment, share)}"
    )


def _remedy(moment: MomentBytes, share: float) -> str:
    shorter = f"about {share:.0%} of the batch's tokens, if bytes go with tokens"
    if moment.name == "optimizer step":
        return "An optimizer that steps in place (fused=True, or foreach=False) needs less there."
    if moment.name == "head":
        return f"A loss over chunks of tokens, or a fused one, never holds all logits; or take {shorter}."
    return f"What would fit: {shorter}; or a model with smaller blocks."
