"""The parts of the report: how figures are written, thinned curves, charts, the graph, the axis of time."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.report import figures
from orchestrator.report.curves import thin
from orchestrator.report.dag import Node, draw, grouped, layered
from orchestrator.report.lines import Line, chart, spread
from orchestrator.report.timeline import UNITS, axis

reals = st.floats(-1e6, 1e6, allow_subnormal=False)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (figures.interval(0.912, 0.88, 0.936), ".912 [.880, .936]"),
        (figures.interval(1.0, None, None), "1.000"),
        (figures.difference(0.024, -0.004, 0.052), "+.024 [-.004, +.052]"),
        (figures.difference(-0.0002, None, None), ".000"),
        (figures.probability(0.0004), "< .001"),
        (figures.probability(0.0312), ".031"),
        (figures.real(0.029642), "0.0296"),
        (figures.real(4092.4), "4,092"),
        (figures.real(2e-5), "2e-05"),
        (figures.real(float("nan")), "–"),
        (figures.short(20_000), "20k"),
        (figures.count(1, "stage"), "1 stage"),
        (figures.moment(0), "1970-01-01 00:00 UTC"),
    ],
)
def test_figures(said, text):
    assert said == text


@given(st.lists(st.none() | reals, min_size=1, max_size=300), st.integers(1, 100))
@settings(max_examples=50)
def test_a_thinned_curve_keeps_its_extremes(values, most):
    line = thin(range(len(values)), values, most)
    assert len(line.x) == len(line.y) <= most
    known = [value for value in values if value is not None]
    if known and line.low:
        assert min(v for v in line.low if v is not None) == min(known)
        assert max(v for v in line.high if v is not None) == max(known)
    assert any(value is not None for value in line.y) == bool(known)


@given(
    st.lists(st.tuples(st.floats(1e-9, 1e9), st.none() | st.floats(1e-9, 1e9)), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example([(1.0, 1.0), (2.0, math.nextafter(1.0, 2))], False, False, False)
@example([(1.0, 1e-9), (2.0, 1.0001e-9)], False, False, False)
@example([(1e-9, 1.0), (1.0000000000000003e-9, 2.0)], True, False, False)
@example([(1e9, 1.0), (math.nextafter(1e9, 2e9), 2.0)], True, False, False)
def test_a_chart_stays_within_its_frame(points, log_x, log_y, zero):
    points = sorted(points, key=lambda point: point[0])
    x, y = [p[0] for p in points], [p[1] for p in points]
    if not any(value is not None for value in y):
        return
    lines = [Line(x, y, y, y, name="a long name of a method", kind=1), Line(x, y, name="other", kind=9)]
    drawn = chart("c", "t", lines, x="x", y="y", log_x=log_x, log_y=log_y, from_zero=zero and not log_y)
    (height,) = map(float, re.findall(r'viewBox="0 0 380 ([\d.]+)"', drawn))
    places = [tuple(map(float, p.split(","))) for p in " ".join(re.findall(r'points="([^"]*)"', drawn)).split()]
    assert all(49.9 <= px <= 368.1 and 45.9 <= py <= height - 45.9 for px, py in places)
    ticks = re.findall(r'class="tick" x="44"', drawn)
    assert 2 <= len(ticks) <= 9


@given(st.lists(st.tuples(st.floats(0, 300), st.floats(1, 40)), max_size=8))
@settings(max_examples=200)
def test_names_do_not_lie_on_each_other(boxes):
    boxes.sort()
    heights = [height for _, height in boxes]
    places = spread([want for want, _ in boxes], heights, 40, 40 + max(300, sum(heights)))
    for (a, height), b in zip(zip(places, heights), places[1:]):
        assert a + height <= b + 1e-6
    assert all(place >= 40 - 1e-6 for place in places)
    assert all(place + height <= 40 + max(300, sum(heights)) + 1e-6 for place, height in zip(places, heights))


def sweep(n: int) -> tuple[list[Node], dict[str, list[str]]]:
    """data -> n × train -> n × evaluate -> study, and one training apart."""
    kinds = {"data": "prepare", "study": "scaling", "lonely": "train"}
    needs = {"data": [], "lonely": ["data"]}
    for i in range(n):
        kinds |= {f"train-{i}": "train", f"evaluate-{i}": "evaluate"}
        needs |= {f"train-{i}": ["data"], f"evaluate-{i}": ["data", f"train-{i}"]}
    needs["study"] = [f"evaluate-{i}" for i in range(n)]
    nodes = [Node(name, kinds[name], ((name, "failed" if name == "train-3" else "completed"),)) for name in needs]
    return nodes, needs


def test_a_sweep_shares_boxes_by_role():
    nodes, needs = sweep(30)
    boxes, edges = grouped(nodes, needs)
    assert {box.name: len(box.states) for box in boxes} == {
        "data": 1, "lonely": 1, "train-0": 30, "evaluate-0": 30, "study": 1,
    }  # fmt: skip
    assert edges == {
        "data": [], "lonely": ["data"], "train-0": ["data"], "evaluate-0": ["data", "train-0"], "study": ["evaluate-0"],
    }  # fmt: skip
    drawn = str(draw(nodes, needs))
    assert drawn.count('class="box"') == 5 and drawn.count('class="square') == 60
    assert "1 failed, 29 comple" in drawn and "train-3: failed" in drawn


def earlier(i: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, i - 1), max_size=3) if i else st.just(set())


graphs = st.integers(1, 14).flatmap(lambda n: st.tuples(*map(earlier, range(n))))


@given(graphs)
@settings(max_examples=50)
def test_every_stage_stands_behind_what_it_needs_and_on_no_other(parents):
    names = [f"s{i}" for i in range(len(parents))]
    needs = {names[i]: [names[p] for p in sorted(found)] for i, found in enumerate(parents)}
    depth = layered(names, needs)
    assert all(depth[parent] < depth[child] for child, found in needs.items() for parent in found)
    drawn = str(draw([Node(name, "train", ((name, "completed"),)) for name in names], needs))
    boxes = [
        tuple(map(float, box))
        for box in re.findall(r'class="box" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)
    ]
    assert len(boxes) == len(names)
    assert drawn.count('class="edge"') == sum(map(len, needs.values()))
    for i, (x, y, width, height) in enumerate(boxes):
        for x2, y2, _, height2 in boxes[:i]:
            assert abs(x - x2) >= width or y >= y2 + height2 or y2 >= y + height


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.1, 1e4)), min_size=1, max_size=12))
def test_time_goes_on_and_idle_time_is_cut(spans):
    spans = [(begin, begin + length) for begin, length in spans]
    scale = axis(spans)
    times = sorted(time for span in spans for time in span)
    places = [scale(time) for time in times]
    assert all(0 <= place <= UNITS + 1e-6 for place in places)
    assert all(a <= b + 1e-6 for a, b in pairwise(places))
    assert places[-1] == pytest.approx(UNITS)


def test_a_day_in_which_nothing_ran_takes_little_room():
    scale = axis([(0, 100), (86_400, 86_500)])
    assert scale(100) == pytest.approx(1000 * 100 / 210) and scale(86_400) == pytest.approx(1000 * 110 / 210)
    assert scale.cuts == (pytest.approx(1000 * 105 / 210),)
