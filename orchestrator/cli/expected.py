"""What `plan` tells of the money that training will cost: a range for each stage, from its FLOPs.

Invariant: every assumption stands beside the figures. Packs are taken as full (sizes.py); MFU lies between MFU's ends
(benchmarks/RESULTS.md: .28 to .42 on an H200, with `compile: false` and without); starts, saves, lost steps and stages
that do not train come on top. What is unknown is said to be, and is in no sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cluster.shape import ClusterParams
from modeling.estimate import PEAK
from orchestrator.cli.sizes import pack_flops
from orchestrator.cli.watch import duration
from orchestrator.cost import HOUR, machines_for, money, priced, worker_price
from orchestrator.plan import StagePlan
from orchestrator.spec import Experiment
from stages.params import TrainParams

MFU = (0.25, 0.42)


@dataclass(frozen=True)
class Expected:
    """Each (least, most). seconds: with the most workers at best, with the fewest at worst. cost: None where a price is
    missing. machines: names of node types."""

    gpu_hours: tuple[float, float]
    seconds: tuple[float, float]
    cost: tuple[float, float] | None
    machines: tuple[str, ...]


def expected(cluster: ClusterParams, params: TrainParams, flops: float) -> Expected | str:
    """Of so many useful floating-point operations; a text that says why it is unknown.

    A rank works on one GPU, or on its share of one; Ray's names of accelerators begin with that of the chip: A100-80G.
    """
    wanted = params.resources
    if not wanted.gpus or params.precision != "bf16":
        return "no GPU is asked for" if not wanted.gpus else f"no peak is known for {params.precision}"
    nodes = machines_for(cluster, wanted)
    if not nodes:
        return "no type of machine fits"
    speeds = {name: PEAK.get((node.accelerator or "").split("-")[0]) for name, node in nodes.items()}
    seconds: dict[str, tuple[float, float]] = {}  # of one worker by itself
    for name, peak in speeds.items():
        if peak is None:
            return f"no peak is known for the GPUs of {name}"
        at_peak = flops / (peak * min(1.0, wanted.gpus))
        seconds[name] = (at_peak / MFU[1], at_peak / MFU[0])
    least, most = _ends(seconds.values())
    prices = {name: worker_price(node, wanted.cpus, wanted.gpus) for name, node in nodes.items()}
    costs = [
        (seconds[name][0] * price / HOUR, seconds[name][1] * price / HOUR)
        for name, price in prices.items()
        if price is not None
    ]
    return Expected(
        gpu_hours=(least * wanted.gpus / HOUR, most * wanted.gpus / HOUR),
        seconds=(least / wanted.most, most / wanted.least),
        cost=_ends(costs) if len(costs) == len(nodes) else None,
        machines=tuple(nodes),
    )


def _ends(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
    low, high = zip(*ranges)
    return min(low), max(high)


def show_expected(console: Console, experiment: Experiment, plans: Iterable[StagePlan]) -> None:
    """A table of the training stages that are left to do, where `cluster:` has prices."""
    cluster = priced(experiment.cluster)
    if cluster is None:
        return
    trained = [item for item in plans if experiment.stages[item.name].kind.trains]
    left = [item for item in trained if item.action not in ("reuse", "share")]
    table = Table(title="Expected cost of training", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "GPU hours", "time", "cost", "on"):
        table.add_column(name)
    known = []
    for item in left:
        found = _of_stage(experiment, cluster, item)
        if isinstance(found, str):
            table.add_row(item.name, f"unknown: {found}")
            continue
        known.append(found)
        cost = _money(found.cost, cluster.currency) if found.cost else "unknown: a price is missing"
        time = " to ".join(duration(seconds) for seconds in found.seconds)
        table.add_row(item.name, _hours(found.gpu_hours), time, cost, ", ".join(found.machines))
    costs = [found.cost for found in known if found.cost is not None]
    if len(left) > 1 and known:
        low, high = zip(*(found.gpu_hours for found in known))
        total = _money((sum(c[0] for c in costs), sum(c[1] for c in costs)), cluster.currency) if costs else "unknown"
        more = f" + {len(left) - len(costs)} of unknown cost" if costs and len(costs) < len(left) else ""
        table.add_row("all", _hours((sum(low), sum(high))), "", total + more, "")
    if left:
        console.print(table)
        console.print(
            f"expected with all packs full and an MFU of {MFU[0]:.0%} to {MFU[1]:.0%}, at the prices of cluster.nodes; "
            "beside it: starts, saves, lost steps, stages that do not train, the head"
        )


def _of_stage(experiment: Experiment, cluster: ClusterParams, item: StagePlan) -> Expected | str:
    stage = experiment.stages[item.name]
    params: TrainParams = stage.params
    if params.steps is None:
        return "its steps, until prepare"
    flops = pack_flops(stage, experiment.model_of(stage))
    if flops is None:
        return "the sizes of its model"
    return expected(cluster, params, flops * params.global_batch * (params.steps - (item.step or 0)))


def _hours(ends: tuple[float, float]) -> str:
    return " to ".join(f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}" for hours in ends)


def _money(ends: tuple[float, float], currency: str) -> str:
    return f"{money(ends[0], currency).removesuffix(f' {currency}')} to {money(ends[1], currency)}"
