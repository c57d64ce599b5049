"""HTML and SVG that cannot be made to do anything: escaped text, one palette for all pictures, no scripts.

Text from outside goes through ``escape`` into text nodes and ``aria-label`` alone, never into styles, links or names.
"""

from __future__ import annotations

import base64
import hashlib
import html

__all__ = ["NUM_COLOURS", "OTHER_COLOUR", "colours", "escape", "page"]

# The fill of each category in the order of a stack: parameters, gradients, optimizer state, CUDA and slack, activations
# kept, swap in flight, recomputed, temporaries. The worst pair is 10 apart in OKLab x 100, also under protanopia,
# deuteranopia and tritanopia (Machado 2009).
_LIGHT = ("#0d2b86", "#4f78d8", "#b4d3f0", "#8c8389", "#d87400", "#64294e", "#3cc2a0", "#f6cd2e")
_DARK = ("#3d52c4", "#8fb2dc", "#c9ecf3", "#77686f", "#f2701f", "#b467d6", "#35a67c", "#ecd06a")
_EDGES = {2: "#5b87b4", 6: "#1c8f75", 7: "#a17f00"}  # of fills that have less than 3:1 against white
NUM_COLOURS = len(_LIGHT)
OTHER_COLOUR = 3  # grey

_LIGHT_PAGE = {
    "bg": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#14181f",
    "ink2": "#4d5663",
    "rule": "#d5dae1",
    "grid": "#e6e9ee",
    "ok": "#12693c",
    "bad": "#b3201a",
}
_DARK_PAGE = {
    "bg": "#14171c",
    "panel": "#1d2229",
    "ink": "#eceff3",
    "ink2": "#aab3bf",
    "rule": "#39414c",
    "grid": "#272d36",
    "ok": "#5fd394",
    "bad": "#ff8a80",
}


def escape(text: str) -> str:
    """``text`` for a text node or a quoted attribute; what is not printable becomes ``?`` (XML has no place for it)."""
    return html.escape("".join(character if character.isprintable() else "?" for character in text), quote=True)


def colours(selector: str) -> str:
    """CSS: the palette as variables of ``selector``, light, or dark where asked; and of marks in the picture.

    Class ``c0`` fills a mark with the first category's colour, and so on; ``o`` outlines it.
    """
    light, dark = _variables(_LIGHT_PAGE, _LIGHT), _variables(_DARK_PAGE, _DARK)
    fills = "".join(f".c{number}{{fill:var(--c{number})}}" for number in range(NUM_COLOURS))
    edges = "".join(f".c{number}.o{{stroke:{colour}}}" for number, colour in _EDGES.items())
    return (
        f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}{fills}"
        f".o{{stroke:var(--panel);stroke-width:.4;vector-effect:non-scaling-stroke}}"
        f"@media (prefers-color-scheme:light){{{edges}}}"
    )


def _variables(plain: dict[str, str], fills: tuple[str, ...]) -> str:
    variables = plain | {f"c{number}": fill for number, fill in enumerate(fills)}
    return "".join(f"--{name}:{colour};" for name, colour in variables.items())


def page(title: str, style: str, body: str) -> str:
    """A whole HTML document in one file: ``title`` is text, ``style`` CSS of ours, ``body`` markup.

    Its policy lets a browser load nothing, run nothing, and take no style but this one, by its hash.
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
