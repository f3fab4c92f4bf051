"""Stages of one experiment that are the same stage: one is run, the others have its result.

Invariant: two names with one fingerprint would make the same result in the same folder of the store (fingerprint.py),
so of each fingerprint the first in the order of the plan runs, and everything that needs any of its names waits for
that one. Names stay: each has its own record of what it means, its own line in `status`, and can be asked.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.graph import Needs
from orchestrator.plan import StagePlan
from orchestrator.sweep import Sweep


def shared_with(plans: Iterable[StagePlan]) -> dict[str, str]:
    """Stage -> the one that makes its result, for those that do not make their own."""
    return {item.name: item.shared for item in plans if item.shared is not None}


def distinct_needs(needs: Needs, shared: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The graph of the stages that make their own result."""
    return {
        name: tuple(dict.fromkeys(shared.get(need, need) for need in listed))
        for name, listed in needs.items()
        if name not in shared
    }


@dataclass(frozen=True)
class Saving:
    """naive: stages if every combination were run by itself; expanded: of the file with its sweep written out;
    distinct: those that make a result of their own."""

    naive: int
    expanded: int
    distinct: int

    @property
    def saved(self) -> int:
        return self.naive - self.distinct


def saving(sweep: Sweep, plans: list[StagePlan]) -> Saving:
    """Stages whose identity is unknown until something is prepared count as distinct."""
    return Saving(sweep.naive, len(plans), len(plans) - len(shared_with(plans)))


def told(sweep: Sweep, plans: list[StagePlan]) -> list[str]:
    """What `plan` says of a sweep."""
    found = saving(sweep, plans)
    axes = " × ".join(f"{len(values)} {axis}" for axis, values in sweep.axes.items())
    unknown = sum(item.fingerprint is None for item in plans)
    later = f" ({unknown} of them unknown until prepare)" if unknown else ""
    return [
        f"sweep: {axes} = {sweep.combinations} combinations; each by itself would make {found.naive} stages in all",
        f"it expands to {found.expanded} stages, {found.distinct} of them distinct{later}: "
        f"{found.saved} saved by sharing ({found.saved / found.naive:.0%})",
    ]
