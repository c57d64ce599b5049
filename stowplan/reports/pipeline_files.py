"""A pipeline's step as a picture: each device's actions, and what it holds beneath. SVG, or a page without scripts.

Marks are whole numbers in a stretched picture, one path for each kind; text is not in the stretched part.
"""

from __future__ import annotations

import numpy as np

from stowplan.reports.markup import colours, escape, page
from stowplan.reports.pipeline import Lane, PipelineReport

__all__ = ["to_html", "to_svg"]

_WIDTH, _TALL, _SHORT, _MEMORY, _HEIGHT = 20_000, 400, 280, 480, 1_000  # of a lane's marks; the rest is empty
_NUM_TICKS = 5
_HEADROOM = 1.06
_KINDS = {"F": ("f", "forward"), "I": ("i", "gradient of the input"), "W": ("w", "gradient of the weights")}
_BOTH = ("i", "whole backward pass")

# The SVG's layout, in its own units.
_FULL_WIDTH, _LEFT, _RIGHT, _TOP, _LANE, _LINE = 1000, 84, 120, 44, 44, 22
_PLOT_WIDTH = _FULL_WIDTH - _LEFT - _RIGHT


def to_svg(report: PipelineReport) -> str:
    """A self-contained SVG; light, or dark where the viewer asks for it."""
    bottom = _TOP + _LANE * len(report.lanes)
    height = bottom + 3 * _LINE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_FULL_WIDTH} {height}" role="img" '
        f'aria-label="{escape(report.verdict)}">',
        f"<style>{colours('svg')}{_mark_style('svg')}{_SVG_STYLE}</style>",
        f'<rect class="bg" width="{_FULL_WIDTH}" height="{height}"/>',
        f'<text class="title" x="12" y="26">{escape(_short_verdict(report))}</text>',
    ]
    for device, lane in enumerate(report.lanes):
        top = _TOP + _LANE * device
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{top + 16}">device {device}</text>')
        parts.append(
            f'<svg x="{_LEFT}" y="{top}" width="{_PLOT_WIDTH}" height="{_LANE - 4}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'preserveAspectRatio="none">{_marks(report, lane)}</svg>'
        )
        over = " over" if _is_over(report, lane) else ""
        parts.append(
            f'<text class="peak{over}" x="{_FULL_WIDTH - _RIGHT + 8}" y="{top + 34}">'
            f"{escape(report.amount(lane.peak))}</text>"
        )
    for place, text in _ticks(report):
        parts.append(f'<text class="middle" x="{_LEFT + place * _PLOT_WIDTH:.1f}" y="{bottom + 16}">{text}</text>')
    for number, (name, label) in enumerate(_legend(report)):
        left = _LEFT + number * 180
        parts.append(f'<rect class="{name}" x="{left}" y="{bottom + _LINE + 9}" width="14" height="14"/>')
        parts.append(f'<text x="{left + 20}" y="{bottom + _LINE + 20}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def to_html(report: PipelineReport) -> str:
    """A self-contained page without scripts: verdict, figures, timeline, memory beneath."""
    lanes = []
    for device, lane in enumerate(report.lanes):
        over = ' class="over"' if _is_over(report, lane) else ""
        lanes.append(
            f'<div class="lane"><span>device {device}</span><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'preserveAspectRatio="none" aria-hidden="true">{_marks(report, lane)}</svg>'
            f"<b{over}>{escape(report.amount(lane.peak))}</b></div>"
        )
    style = [_PAGE_STYLE, colours(":root"), _mark_style(":root")]
    axis = []
    for number, (place, text) in enumerate(_ticks(report)):
        style.append(f".x{number}{{left:{100 * place:.3f}%}}")
        axis.append(f'<i class="x{number}">{text}</i>')
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{name}" width="14" height="14"/></svg>{escape(label)}</li>'
        for name, label in _legend(report)
    )
    figures = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in report.figures
    )
    question = (
        "Who is idle when, and is memory balanced? Actions above (a device's first stage tall, others short), what is"
    )
    body = [
        f"<main><h1>{escape(report.verdict)}</h1>",
        f'<table class="figures">{figures}</table>',
        f"<h2>Pipeline</h2><p>{question} held beneath; its peak at the right"
        f"{'' if report.limit is None else ', the limit dotted'}.</p>",
        "".join(lanes),
        f'<div class="lane axis"><span></span><div>{"".join(axis)}</div><b></b></div>',
        f'<ul class="key">{legend}</ul>',
        "</main>",
    ]
    return page(report.verdict, "".join(style), "\n".join(body))


def _short_verdict(report: PipelineReport) -> str:
    return (
        f"{report.name}: {len(report.lanes)} devices, {report.num_microbatches} microbatches, "
        f"{report.bubble:.1%} bubble, peak {report.amount(report.peak)}"
    )


def _is_over(report: PipelineReport, lane: Lane) -> bool:
    return report.limit is not None and lane.peak > report.limit


def _legend(report: PipelineReport) -> list[tuple[str, str]]:
    present = {kind for lane in report.lanes for kind in set(lane.kinds)}
    shown = [_KINDS[kind] for kind in "FIW" if kind in present]
    if "B" in present:
        shown.append(_BOTH)
    return [*shown, ("c4", "held")]


def _ticks(report: PipelineReport) -> list[tuple[float, str]]:
    step = report.step_time
    return [(number / _NUM_TICKS, f"{step * number / _NUM_TICKS:,.4g}") for number in range(_NUM_TICKS + 1)]


def _marks(report: PipelineReport, lane: Lane) -> str:
    """The paths of one lane: actions by kind, and memory; red where it is above the limit."""
    left = np.rint(lane.begins * (_WIDTH / report.step_time)).astype(np.int64)
    right = np.maximum(np.rint(lane.ends * (_WIDTH / report.step_time)).astype(np.int64), left + 1)
    drawn: dict[str, list[str]] = {"f": [], "i": [], "w": []}
    for kind, chunk, begin, end in zip(lane.kinds, lane.chunks.tolist(), left.tolist(), right.tolist(), strict=True):
        height = _TALL if chunk == 0 else _SHORT
        gap = 1 if end - begin > 8 else 0
        name, _ = _KINDS.get(kind, _BOTH)
        drawn[name].append(f"M{begin} {_TALL - height}h{end - begin - gap}v{height}h-{end - begin - gap}z")
    paths = [f'<path class="{name}" d="{"".join(marks)}"/>' for name, marks in drawn.items() if marks]
    top = _HEADROOM * max(report.peak, report.limit or 0, 1)
    heights = np.rint(lane.levels * (_MEMORY / top)).astype(np.int64)
    paths.append(f'<path class="c4" d="{_area(report, lane, heights)}"/>')
    if report.limit is not None:
        limit = round(report.limit * _MEMORY / top)
        if lane.peak > report.limit:
            over = np.where(lane.levels > report.limit, heights, 0)
            paths.append(f'<path class="bad" d="{_area(report, lane, over)}"/>')
        paths.append(f'<path class="limit" d="M0 {_HEIGHT - limit}h{_WIDTH}"/>')
    return "".join(paths)


def _area(report: PipelineReport, lane: Lane, heights: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    places = np.rint(lane.times * (_WIDTH / report.step_time)).astype(np.int64).tolist()
    steps = "".join(f"H{place}V{_HEIGHT - height}" for place, height in zip(places, heights.tolist(), strict=True))
    return f"M0 {_HEIGHT}{steps}H{_WIDTH}V{_HEIGHT}z"


def _mark_style(selector: str) -> str:
    """Actions are grey, as they are not memory."""
    return (
        f"{selector}{{--f:#bcc4ce;--i:#5a6472;--w:#8f99a6;--badfill:#d93a32}}"
        f"@media (prefers-color-scheme:dark){{{selector}{{--f:#5c6672;--i:#c3cad3;--w:#8a94a1;--badfill:#ff6157}}}}"
        ".f{fill:var(--f)}.i{fill:var(--i)}.w{fill:var(--w)}.bad{fill:var(--badfill)}"
        ".limit{stroke:var(--ink);stroke-dasharray:2 3;fill:none;vector-effect:non-scaling-stroke}"
    )


_SVG_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:var(--ink2);font-variant-numeric:tabular-nums}"
    ".title{font-size:15px;font-weight:650;fill:var(--ink)}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".bg{fill:var(--bg)}.over{fill:var(--bad);font-weight:650}"
)

_PAGE_STYLE = (
    ":root{color-scheme:light dark}"
    "body{margin:0;background:var(--bg);color:var(--ink);font:16px/24px system-ui,sans-serif;"
    "font-variant-numeric:tabular-nums}"
    "main{max-width:1120px;margin:0 auto;padding:24px}"
    "h1{font-size:28px;line-height:35px;font-weight:650;margin:0 0 16px;overflow-wrap:anywhere}"
    "h2{font-size:20px;line-height:26px;margin:48px 0 0}"
    "p{max-width:52em;margin:0 0 12px;color:var(--ink2)}"
    "table{border-collapse:collapse;font-size:14px}"
    "th,td{text-align:left;padding:4px 24px 4px 0;border-bottom:1px solid var(--rule);font-weight:400}"
    "th{color:var(--ink2);white-space:nowrap}"
    ".lane{display:grid;grid-template-columns:64px 1fr 112px;gap:8px;align-items:center;font-size:12px;"
    "line-height:16px;color:var(--ink2);break-inside:avoid}"
    ".lane>svg{width:100%;height:44px}.lane b{font-weight:400;align-self:end}"
    ".lane .over{color:var(--bad);font-weight:650}"
    ".axis div{position:relative;height:20px}.axis i{position:absolute;transform:translateX(-50%);font-style:normal}"
    ".key{list-style:none;display:flex;flex-wrap:wrap;gap:6px 24px;margin:12px 0;padding:0 0 0 72px;font-size:13px}"
    ".key svg{width:14px;height:14px;margin-right:6px;vertical-align:-2px}"
    "@media (max-width:760px){main{padding:16px}h1{font-size:21px;line-height:27px}th,td{padding-right:12px}"
    ".lane{grid-template-columns:52px 1fr 60px}.axis i:nth-of-type(even){display:none}}"
)
