"""What the machines of a stage cost, attempt by attempt: in all, and what of it was wasted.

Invariant: a pure fold over the ledger's account (accounts.py) and the notes of where attempts ran (places.py), with the
prices of `cluster:` (cluster/shape.py); what is not known is told as unknown and never counts as nothing.

What counts: a worker costs the price of its machine times the largest of its shares of it, GPUs or cores, from when the
attempt begins to the newest entry that it wrote or, while it runs, to now; to a little after it was last heard of where
nobody can see from here whether it runs (billed_until). An attempt begins once there is room for its workers, so
queueing costs nothing, but planning packs and waiting for a machine that is being started do count. Of an attempt whose
driver was lost nobody knows how long it went on: it counts to its newest entry. The part of a machine
that no stage occupies is charged to nobody; the head, which all share, costs while any attempt goes on. Wasted is the
time of an attempt without its steps that survive, at its price: starts, lost steps, storing the result; of a stage that
does not train, attempts that did not complete.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.shape import MARKET, NODE_TYPE, ClusterParams, NodeParams
from orchestrator.accounts import Account, Attempt
from orchestrator.ledger import Token
from orchestrator.placement import allows
from orchestrator.places import Places
from orchestrator.spec import Stage
from stages.params import ACCELERATOR, Resources

HOUR = 3600.0


@dataclass(frozen=True)
class Cost:
    """In the currency of `cluster:`. wasted: a part of total. at_most: some of it is estimated from above (_guessed).
    unknown: attempts that are in neither."""

    total: float = 0.0
    wasted: float = 0.0
    at_most: bool = False
    unknown: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.total + other.total, self.wasted + other.wasted, self.at_most or other.at_most,
            self.unknown + other.unknown,
        )  # fmt: skip


def priced(cluster: ClusterParams | None) -> ClusterParams | None:
    """The cluster where it names any price: without one nothing is said of costs."""
    if cluster is None or all(its.price is None for its in (cluster.head, *cluster.nodes.values())):
        return None
    return cluster


def stage_costs(
    cluster: ClusterParams, resources: Resources, trains: bool, sums: Account, places: Mapping[Token, Places],
    now: float | None = None,
) -> list[Cost]:  # fmt: skip
    """Of each attempt, in order. now: unix seconds to which the last one runs (billed_until); None where none does."""
    out = []
    for attempt, (began, end) in zip(sums.attempts, spans(sums, now)):
        running = now is not None and attempt is sums.attempts[-1] and attempt.ended is None
        seconds = end - began
        hourly = _known(cluster, places.get(attempt.token)) if trains else _guessed(cluster, resources)
        if hourly is None:
            out.append(Cost(unknown=1))
        else:
            cost = hourly * seconds / HOUR
            out.append(Cost(cost, cost * _wasted(attempt, seconds, trains, running), at_most=not trains))
    return out


def spans(sums: Account, now: float | None = None) -> list[tuple[float, float]]:
    """(began, end) of each attempt, in unix seconds, as far as it counts. now: as in stage_costs()."""
    out = []
    for attempt in sums.attempts:
        end = max(attempt.began, attempt.heard)
        if now is not None and attempt is sums.attempts[-1] and attempt.ended is None:
            end = max(end, now)
        out.append((attempt.began, end))
    return out


def union_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of them."""
    total, until = 0.0, float("-inf")
    for began, end in sorted(spans):
        total += max(0.0, end - max(began, until))
        until = max(until, end)
    return total


def _wasted(attempt: Attempt, seconds: float, trains: bool, running: bool) -> float:
    """The share of an attempt's time. While it runs, what came after its newest entry may yet count."""
    if not trains:
        return float(attempt.cause != "completed" and not running)
    lost = attempt.heard - attempt.began - attempt.useful_s
    return min(1.0, max(0.0, lost) / seconds) if seconds > 0 else 0.0


def _known(cluster: ClusterParams, places: Places | None) -> float | None:
    """An hour of the worker group; None where its note, a machine's type or a price is missing."""
    if places is None:
        return None
    prices = [_on(cluster, labels, places) for labels in places.nodes]
    known = [price for price in prices if price is not None]
    return sum(known) if len(known) == len(prices) else None


def _on(cluster: ClusterParams, labels: Mapping[str, str], worker: Places) -> float | None:
    """An hour of one worker on a node with these labels. A node that nobody started from a type has the price of those
    with its accelerator and market, where these agree on one."""
    named = cluster.nodes.get(labels.get(NODE_TYPE, ""))
    if named is not None:
        return worker_price(named, worker.cpus, worker.gpus)
    if not labels.keys() & {ACCELERATOR, MARKET}:
        return None
    prices = {
        worker_price(node, worker.cpus, worker.gpus)
        for node in cluster.nodes.values()
        if node.accelerator == labels.get(ACCELERATOR)
        and labels.get(MARKET) in (None, "spot" if node.spot else "on-demand")
    }
    return prices.pop() if len(prices) == 1 else None


def worker_price(node: NodeParams, cpus: float, gpus: float) -> float | None:
    """Of one worker an hour on a machine; None where this has no price, or not the GPUs that were asked for."""
    if node.price is None or (gpus and not node.gpus):
        return None
    return node.price * min(1.0, max(cpus / node.cpus, gpus / node.gpus if gpus else 0.0))


def machines_for(cluster: ClusterParams, resources: Resources) -> dict[str, NodeParams]:
    """The types on which a worker of this size may run, by name."""
    return {
        name: node
        for name, node in cluster.nodes.items()
        if allows(node.labels(name), resources.selector) and resources.cpus <= node.cpus and resources.gpus <= node.gpus
    }


def _guessed(cluster: ClusterParams, resources: Resources) -> float | None:
    """Of a stage that does not train, and so leaves no note: its most workers all the time, on the dearest type that
    fits; None where one that fits has no price, for it may be the dearest."""
    nodes = machines_for(cluster, resources).values()
    prices = [worker_price(node, resources.cpus, resources.gpus) for node in nodes]
    known = [price for price in prices if price is not None]
    return max(known) * resources.most if known and len(known) == len(prices) else None


class Bill:
    """Of an experiment: what was added, each stage once, whatever its names. costs: of all attempts."""

    def __init__(self, cluster: ClusterParams):
        self.cluster, self.currency = cluster, cluster.currency
        self.costs: list[Cost] = []
        self._seen: set[str] = set()
        self._spans: list[tuple[float, float]] = []

    def add(
        self, stage: Stage, sums: Account, prefix: str, places: Mapping[Token, Places], now: float | None = None
    ) -> list[Cost]:
        """As stage_costs(). prefix: the stage's folder in the store."""
        costs = stage_costs(self.cluster, stage.params.resources, stage.kind.trains, sums, places, now)
        if prefix not in self._seen:
            self._seen.add(prefix)
            self.costs += costs
            self._spans += spans(sums, now)
        return costs

    @property
    def head_s(self) -> float:
        """Seconds in which an attempt of any stage went on. (What is reused may have been trained long before.)"""
        return union_s(self._spans)

    @property
    def head(self) -> float | None:
        """What the head cost in that time; None where it has no price, or nothing was ever tried."""
        price = self.cluster.head.price
        return price * self.head_s / HOUR if price is not None and self._spans else None


def money(amount: float, currency: str) -> str:
    """12.40 USD; 1,204 USD from a thousand on."""
    if 0 < amount < 0.005:
        return f"< 0.01 {currency}"
    return f"{amount:,.0f} {currency}" if amount >= 1000 else f"{amount:.2f} {currency}"


def told(costs: Sequence[Cost], currency: str) -> str:
    """Their sum: '12.40 USD (1.10 wasted)', 'at most 0.31 USD', '12.40 USD + 1 attempt of unknown cost', 'unknown'; ''
    for none."""
    cost = sum(costs, Cost())
    if cost.unknown == len(costs):
        return "unknown" if costs else ""
    wasted = money(cost.wasted, currency).removesuffix(f" {currency}")
    text = ("at most " if cost.at_most else "") + money(cost.total, currency)
    text += f" ({wasted} wasted)" if cost.wasted else ""
    return text + (f" + {cost.unknown} attempt{'s' * (cost.unknown != 1)} of unknown cost" if cost.unknown else "")
