"""The DAG of stages: order, what may start, what cannot.

Invariant: every answer keeps the order in which the stages stand in the YAML, so two runs of one file do
the same things in the same order. A graph is a dict from stage name to the names it needs; names that are
not keys of the dict are the caller's error (spec.py reports them with file and line).
"""

from collections.abc import Collection, Mapping, Sequence

Needs = Mapping[str, Sequence[str]]


def find_cycle(needs: Needs) -> list[str] | None:
    """A cycle as [a, b, ..., a], each needing the next; None where there is none. A self-need is [a, a]."""
    finished: set[str] = set()
    for start in needs:
        path: list[str] = []
        stack: list[tuple[str, bool]] = [(start, False)]
        on_path: set[str] = set()
        while stack:
            name, leaving = stack.pop()
            if leaving:
                path.pop()
                on_path.discard(name)
                finished.add(name)
            elif name in on_path:
                return [*path[path.index(name) :], name]
            elif name not in finished:
                path.append(name)
                on_path.add(name)
                stack.append((name, True))
                stack += [(need, False) for need in reversed(needs[name]) if need in needs]
    return None


def topological_order(needs: Needs) -> list[str]:
    """All stages, each after what it needs; among those that could come next, the first in the YAML."""
    assert find_cycle(needs) is None, "cycles are refused when the file is read"
    order: list[str] = []
    placed: set[str] = set()
    waiting = list(needs)
    while waiting:
        name = next(n for n in waiting if all(need in placed for need in needs[n]))
        waiting.remove(name)
        placed.add(name)
        order.append(name)
    return order


def ancestors(needs: Needs, name: str) -> list[str]:
    """Everything `name` needs, directly or not, in YAML order."""
    found: set[str] = set()
    todo = list(needs[name])
    while todo:
        need = todo.pop()
        if need not in found:
            found.add(need)
            todo += needs[need]
    return [n for n in needs if n in found]


def descendants(needs: Needs, name: str) -> list[str]:
    """Everything that needs `name`, directly or not, in YAML order."""
    return [n for n in needs if name in ancestors(needs, n)]


def ready(needs: Needs, done: Collection[str], running: Collection[str], failed: Collection[str]) -> list[str]:
    """Stages that may start now, in YAML order: not started, everything they need done."""
    busy = {*done, *running, *failed}
    return [name for name in needs if name not in busy and all(need in done for need in needs[name])]


def blocked_by(needs: Needs, failed: Collection[str]) -> dict[str, str]:
    """Each stage that can never start, with the failed stage (the first in YAML order) in its way."""
    out = {}
    for name in needs:
        if name in failed:
            continue
        culprit = next((n for n in ancestors(needs, name) if n in failed), None)
        if culprit is not None:
            out[name] = culprit
    return out
