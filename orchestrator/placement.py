"""Where the workers of a stage fit: pure, on the machines that are there and those that may be started.

Invariant: "never" is never said of what Ray could place on an empty cluster. Workers go one by one to the first machine
that has room and the labels asked for, as Ray's own packing does; a worker never spans machines.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.shape import MARKET, NODE_TYPE, ClusterParams
from stages.params import ACCELERATOR, Resources

NAMES = ("CPU", "GPU")
EPSILON = 1e-9
_SELECTOR = re.compile(r"(!?)(?:in\((.*)\)|(.*))")


@dataclass(frozen=True)
class Machine:
    """room: {"CPU": n, "GPU": n}, in all or free. there: False for one that the cluster may still start."""

    room: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    there: bool = True


def allows(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is meant by Ray's label selector: 'v', '!v', 'in(a,b)', '!in(a,b)'."""
    for name, text in selector.items():
        match = _SELECTOR.fullmatch(text)
        assert match is not None, "matches everything"
        negated, several, one = match.groups()
        values = [value.strip() for value in several.split(",")] if several is not None else [one]
        if (labels.get(name) in values) == bool(negated):
            return False
    return True


def each(resources: Resources) -> dict[str, float]:
    """What one worker occupies."""
    return {"CPU": resources.cpus, "GPU": resources.gpus}


def fitting(resources: Resources, machines: Iterable[Machine]) -> int:
    """Workers of this size that fit on all machines together."""
    asked = [(what, amount) for what, amount in each(resources).items() if amount > 0]
    return sum(
        min(int(machine.room.get(what, 0.0) / amount + EPSILON) for what, amount in asked)
        for machine in machines
        if allows(machine.labels, resources.selector)
    )


def fits(resources: Resources, beside: Iterable[Resources], machines: Sequence[Machine]) -> bool:
    """Whether the fewest workers of a stage fit beside stages that have, or will have, their most."""
    taken = [dict.fromkeys(NAMES, 0.0) for _ in machines]  # summed up: taking off and adding back would drift

    def place(wanted: Resources, workers: int) -> int:
        """How many of them found no machine."""
        one, pairs = each(wanted), list(zip(machines, taken))
        if not wanted.gpus:  # as Ray does, work without a GPU goes to machines without one first
            pairs.sort(key=lambda its: its[0].room.get("GPU", 0) > 0)
        for machine, used in pairs:
            while workers and allows(machine.labels, wanted.selector) and all(
                used[what] + one[what] <= machine.room.get(what, 0.0) + EPSILON for what in NAMES
            ):  # fmt: skip
                workers -= 1
                for what in NAMES:
                    used[what] += one[what]
        return workers

    for other in beside:
        place(other, other.most)
    return place(resources, resources.least) == 0


def may_come(cluster: ClusterParams | None, present: Iterable[Mapping[str, str]]) -> list[Machine]:
    """Machines that the cluster may start beyond those present, whose labels are given."""
    there = Counter(labels.get(NODE_TYPE) for labels in present)
    return [
        Machine({"CPU": its.cpus, "GPU": its.gpus}, its.labels(name), there=False)
        for name, its in (cluster.nodes.items() if cluster else ())
        for _ in range(its.max - there[name])
    ]


def asked(resources: Resources) -> str:
    """'2 workers × (1 CPU, 8 GPU) on nodes with ray.io/accelerator-type=H100'."""
    size = ", ".join(f"{amount:g} {what}" for what, amount in each(resources).items() if amount > 0)
    where = ", ".join(f"{name}={value}" for name, value in resources.selector.items())
    count = f"{resources.least} worker{'s' if resources.least > 1 else ''}"
    return f"{count} × ({size})" + (f" on nodes with {where}" if where else "")


def shown(machines: Iterable[Machine]) -> str:
    """'2 × (16 CPU, 8 GPU, H100, spot), 1 × (4 CPU)', the largest first; what may still be started is said to be so."""
    ordered = sorted(machines, key=lambda its: (not its.there, -its.room.get("GPU", 0), -its.room.get("CPU", 0)))
    groups = Counter((_one(machine), machine.there) for machine in ordered)
    parts = [f"{count} × ({text})" + ("" if there else " not started") for (text, there), count in groups.items()]
    return ", ".join(parts) or "no node"


def _one(machine: Machine) -> str:
    parts = [f"{amount:g} {what}" for what in NAMES if (amount := machine.room.get(what, 0.0)) or what == "CPU"]
    parts += [machine.labels[name] for name in (ACCELERATOR, MARKET, NODE_TYPE) if machine.labels.get(name)]
    return ", ".join(parts)
