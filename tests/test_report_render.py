"""The report card's renderings: values with their units, escaped text, and curves within their frame."""

import math
import re

import pytest

from nanochat import report_render
from nanochat.report_render import (
    Curve,
    draw_curve,
    escape_markdown,
    fence,
    format_count,
    format_label,
    format_value,
    make_ticks,
    smooth,
)


@pytest.mark.parametrize(("count", "shown"), [
    (0, "0"), (999, "999"), (1234, "1.23 K"), (999_499, "999 K"), (999_817_216, "1 B"), (-2.5e6, "-2.5 M")])
def test_format_count(count, shown):
    assert format_count(count) == shown


def test_fence_and_escape():
    assert fence("a ```` b") == ["`````text", "a ```` b", "`````"]
    assert escape_markdown("a|b\nc_d") == "a\\|b c\\_d"


@pytest.mark.parametrize(("label", "value", "shown"), [
    ("peak_bytes", 3 * 2**29, "1.5 GiB"), ("x_bytes", 0, "0 B"), ("wall_sec", 3725.0, "1 h 2 m"),
    ("wall_sec", 59.9, "1 m 0 s"), ("wall_sec", 3599.9, "1 h 0 m"), ("wall_sec", 1.234, "1.23 s"),
    ("tokens_per_sec", 12345.6, "12,346"), ("mfu_pct", 21.34, "21.34%"), ("crop_frac", 0.0213, "2.13%"),
    ("step_ms", 5, "5 ms"), ("n", 1234567, "1,234,567"), ("lr", 0.00123, "0.00123"),
    ("bpb", 1.23456, "1.2346"), ("flag", True, "yes"),
    ("x", None, "–"), ("x", math.nan, "nan"), ("x", {"a": 1, "b_ms": 2}, "a 1, b_ms 2")])
def test_format_value(label, value, shown):
    assert format_value(label, value) == shown


def test_format_label():
    assert [format_label(name) for name in ("tokens_per_sec", "peak_memory_bytes", "loss")] == \
        ["tokens per sec", "peak memory", "loss"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.2, 9.7), (0.8, 0.8), (0, 0), (-3, 1e6), (2.0, 2.0001)])
def test_ticks_span_the_values(low, high):
    ticks = make_ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_smooth_is_unbiased_from_the_start():
    assert [value for _, value in smooth([(0, 2.0), (1, 2.0), (5, 2.0)])] == pytest.approx([2.0] * 3)


def test_curve_stays_in_its_frame():
    train = [(step, 10 - step / 1000 + (100 if step == 5000 else 0)) for step in range(9000)]  # with one spike
    drawing = draw_curve(Curve(train, [(0, 3.0), (8999, 1.0)]))
    points = [tuple(map(float, point)) for point in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)(?=[L\"])", drawing)]
    assert len(points) > 2 * report_render.MAX_CURVE_POINTS
    assert all(report_render.LEFT <= x <= report_render.RIGHT for x, _ in points)
    assert all(report_render.TOP <= y <= report_render.BOTTOM for _, y in points)
    assert "step 8,999: 1.0000" in drawing
