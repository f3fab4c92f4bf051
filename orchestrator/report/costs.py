"""What the stages of an experiment cost, for its report: by stage, by attempt, and the head that serves them all.

Invariant: shown only where `cluster:` has prices; the figures are those of `status` (orchestrator/cost.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cli.watch import duration
from orchestrator.cost import Bill, Cost, money, priced
from orchestrator.report import figures
from orchestrator.report.read import StageRead, billed_until
from orchestrator.spec import Experiment


@dataclass(frozen=True)
class Line:
    """Of a stage, of all or of one attempt; as a table shows them."""

    name: str
    cost: str
    wasted: str
    note: str


@dataclass(frozen=True)
class Costs:
    """total: of all workers. head: what, and in how long; '' where it has no price. attempts: by (stage, number)."""

    lines: list[Line]
    total: Line
    head: tuple[str, str]
    attempts: dict[tuple[str, int], Line]


def read_costs(experiment: Experiment, stages: Sequence[StageRead], now: float) -> Costs | None:
    """now: unix seconds, of stages that run. None where there are no prices, or nothing was ever tried."""
    cluster = priced(experiment.cluster)
    if cluster is None:
        return None
    bill, lines, attempts = Bill(cluster), [], {}
    for one in stages:
        if one.shared or not one.sums.attempts:
            continue
        until = billed_until(one.state, one.sums, one.note, one.beat, now)
        costs = bill.add(one.stage, one.sums, one.prefix, one.places, until)
        lines.append(_line(one.name, costs, bill.currency))
        attempts |= {(one.name, i): _line(one.name, [cost], bill.currency) for i, cost in enumerate(costs, 1)}
    if not lines:
        return None
    head = "" if bill.head is None else money(bill.head, bill.currency)
    return Costs(lines, _line("all workers", bill.costs, bill.currency), (head, duration(bill.head_s)), attempts)


def _line(name: str, costs: list[Cost], currency: str) -> Line:
    cost = sum(costs, Cost())
    known = cost.unknown < len(costs)
    notes = ["at most"] if cost.at_most and known else []
    notes += [f"and {figures.count(cost.unknown, 'attempt')} of unknown cost"] if cost.unknown and known else []
    return Line(
        name,
        money(cost.total, currency) if known else "unknown",
        money(cost.wasted, currency) if cost.wasted else figures.DASH,
        "; ".join(notes),
    )
