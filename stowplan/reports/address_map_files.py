"""An address map as a file: an SVG, or an HTML page with the same marks, its figures and the largest buffers."""

from __future__ import annotations

from stowplan.core.units import format_bytes
from stowplan.reports.address_map import (
    HEIGHT,
    WIDTH,
    AddressMap,
    Category,
    categories,
    largest_at_peak,
    marks,
    ticks,
)
from stowplan.reports.markup import colours, escape, page

__all__ = ["to_html", "to_svg"]

_NUM_LARGEST = 9
_LONGEST_NAME = 60
_LONGEST_LABEL = 40

# The SVG's layout, in its own units.
_FULL_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT_HEIGHT, _LINE = 1000, 84, 12, 44, 440, 22
_PLOT_WIDTH = _FULL_WIDTH - _LEFT - _RIGHT
_LEGEND_COLUMNS = 3


def to_svg(chart: AddressMap) -> str:
    """A self-contained SVG; light, or dark where the viewer asks for it."""
    paths, num_left_out, share = marks(chart)
    kinds = categories(chart)
    across, up = ticks(chart)
    bottom = _TOP + _PLOT_HEIGHT
    notes = [_note(num_left_out, share)] if num_left_out else []
    legend_top = bottom + 2 * _LINE
    num_rows = -(-len(kinds) // _LEGEND_COLUMNS) + len(notes)
    height = legend_top + num_rows * _LINE + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_FULL_WIDTH} {height}" role="img" '
        f'aria-label="{escape(chart.verdict)}">',
        f"<style>{_svg_style()}</style>",
        f'<rect class="bg" width="{_FULL_WIDTH}" height="{height}"/>',
        f'<rect class="panel" x="{_LEFT}" y="{_TOP}" width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}"/>',
        f'<text class="title" x="12" y="26">{escape(_cut(chart.verdict, 110))}</text>',
    ]
    for tick in up:
        y = bottom - tick.place * _PLOT_HEIGHT
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}h{_PLOT_WIDTH}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{escape(tick.text)}</text>')
    parts.append(
        f'<svg x="{_LEFT}" y="{_TOP}" width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none">{paths}</svg>'
    )
    for tick in across:
        x = _LEFT + tick.place * _PLOT_WIDTH
        parts.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{escape(tick.text)}</text>')
    for kind, address, label in _lines(chart):
        y = bottom - address / chart.top_bytes * _PLOT_HEIGHT
        parts.append(f'<path class="{kind}" d="M{_LEFT} {y:.1f}h{_PLOT_WIDTH}"/>')
        place = (
            f'class="halo end" x="{_FULL_WIDTH - _RIGHT - 4}"' if kind == "used" else f'class="halo" x="{_LEFT + 4}"'
        )
        parts.append(f'<text {place} y="{y - 4:.1f}">{escape(label)}</text>')
    for number, category in enumerate(kinds):
        left = _LEFT + number % _LEGEND_COLUMNS * (_PLOT_WIDTH // _LEGEND_COLUMNS)
        line = legend_top + number // _LEGEND_COLUMNS * _LINE
        parts.append(f'<rect class="c{category.colour} o" x="{left}" y="{line - 11}" width="14" height="14"/>')
        parts.append(f'<text x="{left + 20}" y="{line}">{escape(_label(category))}</text>')
    for number, note in enumerate(notes, start=num_rows - len(notes)):
        parts.append(f'<text x="{_LEFT}" y="{legend_top + number * _LINE}">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def to_html(chart: AddressMap) -> str:
    """A self-contained page without scripts: verdict, figures, picture, the largest buffers at the peak."""
    paths, num_left_out, share = marks(chart)
    across, up = ticks(chart)
    style = [_PAGE_STYLE, colours(":root")]
    plot = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.verdict)}">{paths}</svg>'
    ]
    for number, tick in enumerate(up):
        style.append(f".y{number}{{bottom:{100 * tick.place:.3f}%}}")
        plot.insert(0, f'<i class="grid y{number}"></i>')
        plot.append(f'<span class="up y{number}">{escape(tick.text)}</span>')
    for number, tick in enumerate(across):
        style.append(f".x{number}{{left:{100 * tick.place:.3f}%}}")
        plot.append(f'<span class="across x{number}">{escape(tick.text)}</span>')
    for kind, address, label in _lines(chart):
        style.append(f".{kind}{{bottom:{100 * address / chart.top_bytes:.3f}%}}")
        plot.append(f'<b class="line {kind}"><em>{escape(label)}</em></b>')
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="c{category.colour} o" width="14" height="14"/></svg>'
        f"{escape(_label(category))}</li>"
        for category in categories(chart)
    )
    figures = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in chart.figures
    )
    body = [
        f"<main><h1>{escape(chart.verdict)}</h1>",
        f'<table class="figures">{figures}</table>',
        "<h2>Addresses</h2><p>Where does each buffer live? Time to the right, addresses upwards; what is empty below "
        "the highest address is a hole.</p>",
        f'<div class="plot">{"".join(plot)}</div><ul class="key">{legend}</ul>',
        f"<p>{escape(_note(num_left_out, share))}</p>" if num_left_out else "",
        _largest(chart),
        "</main>",
    ]
    return page(chart.verdict, "".join(style), "\n".join(body))


def _largest(chart: AddressMap) -> str:
    peak, largest = largest_at_peak(chart, _NUM_LARGEST)
    rows = "".join(_row(chart, buffer) for buffer in largest.tolist())
    return (
        f"<h2>At the peak</h2><p>The largest buffers at time {peak:,}, when most bytes are alive.</p>"
        "<table><thead><tr><th>buffer</th><th>size</th><th>offset</th><th>lifetime</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _row(chart: AddressMap, buffer: int) -> str:
    lower, upper = int(chart.lower[buffer]), int(chart.upper[buffer])
    cells = (
        escape(_cut(chart.names[buffer], _LONGEST_NAME)),
        format_bytes(int(chart.size[buffer])),
        format_bytes(int(chart.offsets[buffer])),
        f"{lower:,} to {upper:,}",
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _lines(chart: AddressMap) -> list[tuple[str, int, str]]:
    """(class, address, label) of the lines across the picture."""
    label = f"highest address {format_bytes(chart.height_bytes)}"
    if chart.capacity_bytes is None:
        return [("used", chart.height_bytes, label)]
    capacity = format_bytes(chart.capacity_bytes)
    if chart.drawn_capacity_bytes is None:
        return [("used", chart.height_bytes, f"{label} of {capacity}")]
    return [("capacity", chart.capacity_bytes, f"capacity {capacity}"), ("used", chart.height_bytes, label)]


def _note(num_left_out: int, share: float) -> str:
    return f"The {num_left_out:,} smallest buffers, {share:.2%} of all bytes × time, are not drawn."


def _label(category: Category) -> str:
    return f"{_cut(category.label, _LONGEST_LABEL)} ({len(category.members):,})"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _svg_style() -> str:
    return (
        colours("svg") + "text{font:12px system-ui,sans-serif;fill:var(--ink2);font-variant-numeric:tabular-nums}"
        ".title{font-size:15px;font-weight:650;fill:var(--ink)}.end{text-anchor:end}.middle{text-anchor:middle}"
        ".halo{paint-order:stroke;stroke:var(--panel);stroke-width:3px}"
        ".bg{fill:var(--bg)}.panel{fill:var(--panel)}.grid{stroke:var(--grid);fill:none}"
        ".capacity{stroke:var(--ink);stroke-width:1.5;fill:none}"
        ".used{stroke:var(--ink2);stroke-dasharray:5 4;fill:none}"
    )


_PAGE_STYLE = (
    ":root{color-scheme:light dark}"
    "body{margin:0;background:var(--bg);color:var(--ink);font:16px/24px system-ui,sans-serif;"
    "font-variant-numeric:tabular-nums}"
    "main{max-width:1120px;margin:0 auto;padding:24px}"
    "h1{font-size:28px;line-height:35px;font-weight:650;margin:0 0 16px}"
    "h2{font-size:20px;line-height:26px;margin:48px 0 0}"
    "p{max-width:52em;margin:0 0 12px;color:var(--ink2)}"
    "table{border-collapse:collapse;font-size:14px}"
    "th,td{text-align:left;padding:4px 24px 4px 0;border-bottom:1px solid var(--rule);font-weight:400;"
    "vertical-align:top}"
    "th{color:var(--ink2);white-space:nowrap}h1,td{overflow-wrap:anywhere}"
    ".plot{position:relative;height:440px;margin:0 12px 32px 84px;background:var(--panel)}"
    ".plot>svg{position:absolute;width:100%;height:100%}"
    ".plot>i,.plot>b,.plot>span{position:absolute;font-size:12px;line-height:16px;font-weight:400;color:var(--ink2)}"
    ".grid{left:0;right:0;border-bottom:1px solid var(--grid)}"
    ".up{right:100%;margin:0 8px -8px 0;white-space:nowrap}"
    ".across{top:100%;transform:translateX(-50%);margin-top:6px;white-space:nowrap}"
    ".line{left:0;right:0;height:18px}"
    ".line em{font-style:normal;white-space:nowrap;background:var(--panel);padding:0 4px}"
    ".plot>.capacity{border-bottom:1.5px solid var(--ink);color:var(--ink)}"
    ".plot>.used{border-bottom:1px dashed var(--ink2);text-align:right}"
    ".key{list-style:none;display:flex;flex-wrap:wrap;gap:6px 24px;margin:0 0 12px 84px;padding:0;font-size:13px}"
    ".key svg{width:14px;height:14px;margin-right:6px;vertical-align:-2px}"
    "@media (max-width:760px){main{padding:16px}h1{font-size:21px;line-height:27px}th,td{padding-right:12px}}"
    "@media (max-width:760px){.plot,.key{margin-left:64px}}"
    "@media (max-width:760px){.across:nth-of-type(even){display:none}}"
)
