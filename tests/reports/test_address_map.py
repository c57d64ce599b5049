from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowplan.reports import address_map
from stowplan.reports.address_map import HEIGHT, WIDTH, AddressMap, categories, largest_at_peak, marks, ticks
from stowplan.reports.address_map_files import to_html, to_svg

HOSTILE = [
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "]]><svg/onload=alert(1)>",
    "&lt;b&gt;&amp;",
    "\x1b[2J\x00\x07￾\u202e\u2028",
    "\ud800",
]
RECTANGLE = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z")


def chart(
    rows: list[tuple[int, int, int, int]], kinds: list[str] | None = None, capacity_bytes: int | None = None
) -> AddressMap:
    """Rows of lower, upper, size, offset."""
    lower, upper, size, offsets = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return AddressMap(
        lower=lower,
        upper=upper,
        size=size,
        offsets=offsets,
        names=[f"b{number}" for number in range(len(rows))],
        kinds=kinds,
        capacity_bytes=capacity_bytes,
        verdict="Solved.",
        figures=[("height", "1 MiB")],
    )


def rectangles(paths: str) -> dict[str, list[tuple[int, int, int, int]]]:
    """Of each path's class: left, bottom (from below), right, top in the picture's numbers."""
    found = {}
    for name, drawn in re.findall(r'<path class="([^"]*)" d="([^"]*)"/>', paths):
        pieces = RECTANGLE.findall(drawn)
        assert "".join(f"M{a} {b}h{c}v{d}h-{e}z" for a, b, c, d, e in pieces) == drawn
        corners = [tuple(map(int, piece)) for piece in pieces]
        found[name] = [(x, HEIGHT - y - high, x + wide, HEIGHT - y) for x, y, wide, high, _ in corners]
    return found


# ---- marks -----------------------------------------------------------------------------------------------------------


def test_a_rectangle_is_where_its_buffer_is() -> None:
    drawn, left_out, share = marks(chart([(0, 10, 100, 0), (5, 20, 50, 100)], capacity_bytes=200))
    assert (left_out, share) == (0, 0.0)
    (found,) = rectangles(drawn).values()
    scale = HEIGHT / (1.04 * 200)
    assert found == [
        (0, 0, WIDTH // 2, round(100 * scale)),
        (WIDTH // 4, round(100 * scale), WIDTH, round(150 * scale)),
    ]


@pytest.mark.parametrize("first", [-(2**62), 17 * 10**17, 2**62 - 400])
def test_times_far_from_zero_are_drawn_as_those_near_it(first: int) -> None:
    rows = [(0, 400, 100, 0), (100, 300, 50, 100)]
    near, far = chart(rows), chart([(first + lower, first + upper, *rest) for lower, upper, *rest in rows])
    assert marks(far) == marks(near)
    for tick in ticks(far)[0]:
        assert tick.place == (int(tick.text.replace(",", "")) - first) / 400
    assert 4 <= len(ticks(far)[0]) <= 6


@given(
    st.lists(
        st.tuples(
            st.integers(-(2**62), 2**62 - 1), st.integers(1, 2**61), st.integers(1, 2**50), st.integers(0, 2**60)
        ),
        max_size=30,
    ),
    st.none() | st.integers(1, 2**60),
)
@settings(deadline=None)
def test_every_buffer_is_drawn_inside_the_picture(rows: list[tuple[int, int, int, int]], capacity: int | None) -> None:
    drawn = chart([(lower, min(lower + life, 2**62), *rest) for lower, life, *rest in rows], None, capacity)
    found = [piece for pieces in rectangles(marks(drawn)[0]).values() for piece in pieces]
    assert len(found) == len(rows)
    for left, bottom, right, top in found:
        assert 0 <= left < right <= WIDTH + 1
        assert 0 <= bottom < top <= HEIGHT
    for text in (to_svg(drawn), to_html(drawn)):
        assert "nan" not in text
        assert "inf" not in text
    for axis in ticks(drawn):
        assert 1 <= len(axis) <= 12
        assert all(0 <= tick.place <= 1 for tick in axis)
        assert len({tick.text for tick in axis}) == len(axis)


def test_many_buffers_lose_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_map, "MOST_RECTANGLES", 2)
    many = chart([(0, 1, 10, 0), (0, 4, 20, 10), (1, 4, 10, 0), (0, 100, 30, 40)])
    drawn, left_out, share = marks(many)
    assert left_out == 2
    assert share == (10 + 30) / (10 + 80 + 30 + 3000)
    assert [pieces[0][1] for pieces in rectangles(drawn).values()] == [round(10 * HEIGHT / (1.04 * 70))]
    said = "The 2 smallest buffers, 1.28% of all bytes × time, are not drawn."
    assert said in to_svg(many)
    assert said in to_html(many)


def test_a_hundred_thousand_buffers_are_a_file_of_a_megabyte() -> None:
    chance = np.random.default_rng(0)
    lower = chance.integers(0, 10**9, 100_000)
    columns = [lower, lower + chance.integers(1, 10**8, 100_000), *chance.integers(1, 2**40, (2, 100_000))]
    large = chart(np.stack(columns, axis=1).tolist())
    assert len(to_svg(large)) < 2**21
    assert len(to_html(large)) < 2**21


# ---- categories ------------------------------------------------------------------------------------------------------


def test_sizes_make_categories_where_there_are_no_kinds() -> None:
    sizes = [1, 4095, 4096, 2**20 - 1, 2**20, 2**40]
    found = categories(chart([(0, 1, size, 0) for size in sizes]))
    assert [(category.label, category.members.tolist()) for category in found] == [
        ("below 4 KiB", [0, 1]),
        ("4 KiB to 64 KiB", [2]),
        ("64 KiB to 1 MiB", [3]),
        ("1 MiB to 16 MiB", [4]),
        ("4 GiB and more", [5]),
    ]
    assert len({category.colour for category in found}) == len(found)


def test_kinds_that_are_known_keep_their_colour_and_others_share_the_rest() -> None:
    kinds = ["Gradients", "x", "weights", "y", "", "x"]
    found = categories(chart([(0, 1, 1 + number, 0) for number in range(6)], kinds))
    assert {category.label: (category.colour, category.members.tolist()) for category in found} == {
        "weights": (0, [2]),
        "Gradients": (1, [0]),
        "x": (4, [1, 5]),
        "no kind": (2, [4]),
        "y": (6, [3]),
    }


def test_more_kinds_than_colours() -> None:
    found = categories(chart([(0, 1, 100 - number, 0) for number in range(20)], [f"k{n:02}" for n in range(20)]))
    assert len(found) == 8
    assert found[3].label == "k07, k08, k09 and 10 other kinds"
    assert sorted(np.concatenate([category.members for category in found]).tolist()) == list(range(20))


def test_the_largest_at_the_peak() -> None:
    rows = [(0, 5, 10, 0), (5, 9, 30, 0), (5, 6, 8, 30), (6, 9, 1, 30), (1, 8, 2, 40)]
    peak, largest = largest_at_peak(chart(rows), 2)
    assert (peak, largest.tolist()) == (5, [1, 2])
    assert largest_at_peak(chart([]), 2)[1].tolist() == []


# ---- files -----------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags with their attributes, texts, and what stands in style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def hostile(text: str) -> AddressMap:
    return AddressMap(
        lower=np.array([0]),
        upper=np.array([4]),
        size=np.array([7]),
        offsets=np.array([0]),
        names=[text],
        kinds=[text],
        capacity_bytes=9,
        verdict=text,
        figures=[(text, text)],
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    plain, page = _Page(to_html(hostile("plain"))), _Page(to_html(hostile(text)))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [set(given) for _, given in page.tags] == [set(given) for _, given in plain.tags]
    assert page.texts.count(shown) == plain.texts.count("plain") == 5  # title, heading, figure and its value, buffer
    picture = to_svg(hostile(text))
    picture.encode("utf-8")
    root = ElementTree.fromstring(picture)
    tags = [element.tag for element in ElementTree.fromstring(to_svg(hostile("plain"))).iter()]
    assert [element.tag for element in root.iter()] == tags
    assert shown in [element.text for element in root.iter()]
    assert root.get("aria-label") == shown


def test_the_page_loads_nothing_and_takes_only_its_own_style() -> None:
    text = to_html(chart([(0, 1, 5, 0)], capacity_bytes=9))
    page = _Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "a", "object", "form", "base"}
    assert not {name for _, given in page.tags for name in given} & {"style", "href", "src", "onload"}
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in text
    assert "@import" not in text


def test_lines_say_capacity_and_highest_address() -> None:
    for draw in (to_svg, to_html):
        assert "capacity" not in re.sub(r"<style>.*?</style>", "", draw(chart([(0, 1, 2**20, 0)])))
        text = draw(chart([(0, 1, 2**20, 0)], capacity_bytes=2**19))
        assert ">capacity 512.00 KiB<" in text
        assert ">highest address 1.00 MiB<" in text
        text = draw(chart([(0, 1, 2**20, 0)], capacity_bytes=2**30))
        assert ">highest address 1.00 MiB of 1.00 GiB<" in text
        assert ">capacity" not in text


def test_rectangles_are_outlined_unless_they_are_too_low() -> None:
    assert list(rectangles(marks(chart([(0, 1, 50, 0), (0, 1, 50, 50)]))[0])) == ["c7 o"]
    many = [(0, 1, 50, 50 * number) for number in range(400)]
    assert list(rectangles(marks(chart(many))[0])) == ["c7"]


def test_nothing_to_draw() -> None:
    ElementTree.fromstring(to_svg(chart([])))
    assert "Solved." in to_html(chart([]))


@pytest.mark.browser
@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_a_browser_has_nothing_to_complain_of(suffix: str, tmp_path: Path) -> None:
    names = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no headless browser")
    file = tmp_path / f"map{suffix}"
    draw = to_html if suffix == ".html" else to_svg
    file.write_text(draw(hostile("".join(HOSTILE))), encoding="utf-8")
    picture = tmp_path / "picture.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--screenshot={picture}"]
    done = subprocess.run([browser, *flags, file.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert picture.stat().st_size > 5000  # an empty page has fewer
