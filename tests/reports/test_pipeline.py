"""Pictures of a step: what is drawn is what was given."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from stowplan.reports.pipeline import Lane, PipelineReport
from stowplan.reports.pipeline_files import to_html, to_svg


def report(limit: int | None = 2, name: str = "made up") -> PipelineReport:
    """Two devices, ten seconds; the second is above a limit of 2."""
    lanes = [
        Lane(
            begins=np.array([0.0, 5.0]),
            ends=np.array([5.0, 10.0]),
            kinds="FB",
            chunks=np.array([0, 1]),
            times=np.array([0.0, 5.0]),
            levels=np.array([peak, 0]),
        )
        for peak in (2, 3)
    ]
    return PipelineReport(
        name=name, num_microbatches=1, lanes=lanes, step_time=10.0, work_time=8.0, in_bytes=False, limit=limit
    )


def test_the_text_has_every_device_and_its_peak() -> None:
    text = report().render()
    assert "a step of 1 microbatch on 2 devices takes 10, 20.0% of it bubble" in text
    assert [line for line in text.splitlines() if line[:2] in {"0 ", "1 "}] == ["0 Fb 2", "1 Fb 3"]


@pytest.mark.parametrize("draw", [to_svg, to_html])
def test_marks_are_where_the_numbers_say(draw) -> None:
    drawn = draw(report())
    assert drawn.count("M0 0h9999v400h-9999z") == 2  # F: half of the width, tall
    assert drawn.count("M10000 120h9999v280h-9999z") == 2  # B of the second stage: the other half, short
    assert drawn.count('class="bad"') == 1  # the second device alone is above the limit
    assert drawn.count('class="limit"') == 2
    assert 'class="limit"' not in draw(report(limit=None))


@pytest.mark.parametrize("draw", [to_svg, to_html])
def test_text_from_outside_stays_text(draw) -> None:
    drawn = draw(report(name='<script>"&\x1b'))
    assert "<script" not in drawn
    assert "&lt;script&gt;" in drawn
    assert "\x1b" not in drawn


def test_an_svg_is_xml_and_a_page_runs_nothing() -> None:
    assert ElementTree.fromstring(to_svg(report())).tag == "{http://www.w3.org/2000/svg}svg"
    page = to_html(report())
    assert "default-src 'none'" in page
    assert not re.search(r"<script|style=|https?://", page)
