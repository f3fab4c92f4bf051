"""The DAG of stages as inline SVG: layers by depth from left to right, each box with its name, kind and state in words.

Invariants: every stage is in exactly one box; an edge never runs through a box of a layer that it passes. Where a sweep
makes more than SHOWN stages, those of one role share a box: same kind, and parents and children of the same roles
(the coarsest partition that neighbours agree on).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup

from orchestrator.report.figures import number
from orchestrator.report.lines import shortened
from stages.prepare import svg
from stages.prepare.page import markup

SHOWN = 24  # stages; with more, those of one role share a box
WIDTH, HEIGHT = 166, 50  # of a box whose name takes one line
NAME_LINE, NAME_CHARACTERS = 14, 19
ACROSS, DOWN = 36, 14  # between boxes
DOT, DOTS = 9, 16  # the squares of a shared box: pitch, and how many a row
CHARACTERS = 24  # of the lines below the name
WORST = ("failed", "running", "claimed", "interrupted")  # told first of a shared box, which has the first one's colour
SWEEPS = 8  # of the ordering within layers


@dataclass(frozen=True)
class Node:
    """A stage, or several of one role. states: (name, state) of each."""

    name: str
    kind: str
    states: tuple[tuple[str, str], ...]

    @property
    def title(self) -> list[str]:
        """In one or two lines, broken behind a _ or -."""
        if len(self.states) > 1:
            return [shortened(f"{len(self.states)} × {self.kind}", NAME_CHARACTERS)]
        if len(self.name) <= NAME_CHARACTERS:
            return [self.name]
        end = max(self.name.rfind(mark, 0, NAME_CHARACTERS) for mark in "_-") + 1 or NAME_CHARACTERS
        return [self.name[:end], shortened(self.name[end:], NAME_CHARACTERS)]

    @property
    def head(self) -> int:
        return HEIGHT + NAME_LINE * (len(self.title) - 1)

    @property
    def height(self) -> int:
        return self.head + (DOT * -(-len(self.states) // DOTS) + 3 if len(self.states) > 1 else 0)


Edges = Mapping[str, Sequence[str]]  # child -> parents


def draw(nodes: Sequence[Node], needs: Edges) -> Markup:
    """The graph. nodes: one for each stage, in the order of the file."""
    if len(nodes) > SHOWN:
        nodes, needs = grouped(nodes, needs)
    layers = _ordered(layered([node.name for node in nodes], needs), needs)
    by_name = {node.name: node for node in nodes}
    places = _places(layers, by_name)
    width = len(layers) * (WIDTH + ACROSS) - ACROSS + 4
    height = max(y + _height(point, by_name) for point, (_, y) in places.items()) + 4
    out = [
        markup(
            '<svg class="dag" role="img" aria-label="The stages and what they need" width="{w}" height="{h}" '
            'viewBox="0 0 {w} {h}">',
            w=svg.coordinate(width), h=svg.coordinate(height),
        )
    ]  # fmt: skip
    for child, parents in needs.items():
        out += [_edge(_way(parent, child, layers), places, by_name) for parent in parents]
    out += [_box(node, *places[node.name, 0]) for node in nodes]
    return Markup().join([*out, Markup("</svg>")])


def grouped(nodes: Sequence[Node], needs: Edges) -> tuple[list[Node], dict[str, list[str]]]:
    """Nodes of one role as one, named after the first."""
    children: dict[str, list[str]] = {node.name: [] for node in nodes}
    for child, parents in needs.items():
        for parent in parents:
            children[parent].append(child)
    role: dict[str, int] = {}
    signs: dict[str, object] = {node.name: node.kind for node in nodes}
    while True:
        ids = {sign: i for i, sign in enumerate(dict.fromkeys(signs.values()))}
        known, role = role, {name: ids[sign] for name, sign in signs.items()}
        if len(set(known.values())) == len(ids):
            break
        signs = {
            name: (
                role[name],
                frozenset(role[parent] for parent in needs[name]),
                frozenset(role[child] for child in children[name]),
            )
            for name in signs
        }
    members: dict[int, list[Node]] = {}
    for node in nodes:
        members.setdefault(role[node.name], []).append(node)
    named = {number: found[0].name for number, found in members.items()}
    out = [replace(found[0], states=tuple(s for node in found for s in node.states)) for found in members.values()]
    edges = {
        named[number]: list(dict.fromkeys(named[role[parent]] for node in found for parent in needs[node.name]))
        for number, found in members.items()
    }
    return out, edges


def layered(names: Sequence[str], needs: Edges) -> dict[str, int]:
    """The layer of each: one more than the deepest that it needs; what needs nothing stands right before its first
    use."""
    depth: dict[str, int] = {}
    todo = list(names)
    while todo:
        name = next(n for n in todo if all(parent in depth for parent in needs[n]))
        todo.remove(name)
        depth[name] = 1 + max((depth[parent] for parent in needs[name]), default=-1)
    for name in names:
        uses = [depth[child] for child in names if name in needs[child]]
        if not needs[name] and uses:
            depth[name] = min(uses) - 1
    return depth


Point = tuple[str, int]  # a node as (name, 0), or where an edge of that child passes a layer as ("parent>child", layer)


def _way(parent: str, child: str, layers: Sequence[Sequence[Point]]) -> list[Point]:
    first = next(i for i, layer in enumerate(layers) if (parent, 0) in layer)
    last = next(i for i, layer in enumerate(layers) if (child, 0) in layer)
    return [(parent, 0), *((parent, layer) for layer in range(first + 1, last)), (child, 0)]


def _ordered(depth: Mapping[str, int], needs: Edges) -> list[list[Point]]:
    """Nodes, and the places where edges pass, in layers; each near the mean of its neighbours (Sugiyama, 1981). Edges
    from one parent pass a layer together."""
    layers: list[list[Point]] = [[] for _ in range(max(depth.values()) + 1)]
    for name, layer in depth.items():
        layers[layer].append((name, 0))
        last = max((depth[child] for child, parents in needs.items() if name in parents), default=layer)
        for passed in range(layer + 1, last):
            layers[passed].append((name, passed))
    links: dict[Point, list[Point]] = {point: [] for layer in layers for point in layer}
    for child, parents in needs.items():
        for parent in parents:
            way = _way(parent, child, layers)
            for a, b in pairwise(way):
                links[a].append(b)
                links[b].append(a)
    order = {point: (i + 1) / (len(layer) + 1) for layer in layers for i, point in enumerate(layer)}
    for _ in range(SWEEPS):
        for layer in layers:
            mean = {p: sum(order[q] for q in links[p]) / len(links[p]) if links[p] else order[p] for p in layer}
            layer.sort(key=mean.__getitem__)
            order |= {point: (i + 1) / (len(layer) + 1) for i, point in enumerate(layer)}
    return layers


def _height(point: Point, nodes: Mapping[str, Node]) -> float:
    return 0 if point[1] else nodes[point[0]].height


def _places(layers: Sequence[Sequence[Point]], nodes: Mapping[str, Node]) -> dict[Point, tuple[float, float]]:
    """The upper left corner of each; layers centred on each other."""
    heights = [sum(_height(point, nodes) + DOWN for point in layer) - DOWN for layer in layers]
    places = {}
    for i, (layer, height) in enumerate(zip(layers, heights, strict=True)):
        y = (max(heights) - height) / 2 + 2
        for point in layer:
            places[point] = (i * (WIDTH + ACROSS) + 2, y)
            y += _height(point, nodes) + DOWN
    return places


def _edge(way: Sequence[Point], places: Mapping[Point, tuple[float, float]], nodes: Mapping[str, Node]) -> Markup:
    """From the right of the parent to the left of the child, straight across the layers between them."""
    f = svg.coordinate
    x, y = places[way[0]]
    x, y = x + WIDTH, y + _height(way[0], nodes) / 2
    drawn = f"M{f(x)} {f(y)}"
    for point in way[1:]:
        next_x, next_y = places[point]
        next_y += _height(point, nodes) / 2
        middle = (x + next_x) / 2
        drawn += f"C{f(middle)} {f(y)} {f(middle)} {f(next_y)} {f(next_x)} {f(next_y)}"
        x, y = next_x, next_y
        if point[1]:
            x += WIDTH
            drawn += f"H{f(x)}"
    said = f"{way[0][0]} → {way[-1][0]}"
    return markup('<path class="edge" d="{drawn}"><title>{said}</title></path>', drawn=drawn, said=said)


def _box(node: Node, x: float, y: float) -> Markup:
    many = len(node.states) > 1
    states = Counter(state for _, state in node.states)
    listed = sorted(states, key=lambda state: (WORST.index(state) if state in WORST else len(WORST), state))
    first = listed[0] if len(states) == 1 or listed[0] in WORST else "mixed"
    told = ", ".join(f"{number(states[state])} {state}" for state in listed) if many else first
    below = f"{_shared_start([name for name, _ in node.states])} …" if many else node.kind
    said = "\n".join(f"{name}: {state}" for name, state in node.states)
    out = [
        markup('<g class="stage {state}"><title>{said}</title>', state=css(first), said=said),
        markup(
            '<rect class="box" x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>'
            '<rect class="edge-of" x="{x}" y="{y}" width="5" height="{h}"/>',
            x=svg.coordinate(x), y=svg.coordinate(y), w=WIDTH, h=node.height,
        ),
        *(svg.text(x + 13, y + 16 + i * NAME_LINE, said, "start", "heading") for i, said in enumerate(node.title)),
        svg.text(x + 13, y + node.head - 20, shortened(below, CHARACTERS), "start"),
        svg.text(x + 13, y + node.head - 7, shortened(told, CHARACTERS), "start", "state"),
    ]  # fmt: skip
    if many:
        for i, (name, state) in enumerate(node.states):
            left, top = x + 13 + i % DOTS * DOT, y + node.head + i // DOTS * DOT
            out.append(svg.bar(f"square {css(state)}", left, top, DOT - 2, DOT - 2, f"{name}: {state}"))
    return Markup().join([*out, Markup("</g>")])


def _shared_start(names: Sequence[str]) -> str:
    """What the variants of a template begin with: full_finetune, where they are full_finetune-tiny-0_25 and so on."""
    first, last = min(names), max(names)  # by the alphabet, all others stand between them
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return first[:same].rstrip("-_") or names[0]


def css(state: str) -> str:
    """The class of a state or of how an attempt ended, in the page's style."""
    return "is-" + state.replace(" ", "-").replace("_", "-")
