"""What `plan` tells of every mixture that is prepared: samples, tokens, and whose they are, before anything trains."""

from rich.console import Console
from rich.table import Table

from orchestrator.ledger import Ledger
from orchestrator.plan import StagePlan
from orchestrator.store import Store

SETS_SHOWN = 8


def show_mixtures(console: Console, store: Store, plans: list[StagePlan]) -> None:
    """A table of the prepare stages whose result is there; nothing where there is none."""
    table = Table(title="Mixtures, by tokens of an epoch", title_justify="left", box=None, pad_edge=False)
    for title in ("stage", "kept", "rejected", "tokens", "by type", "by set"):
        table.add_column(title, overflow="fold", justify="right" if title in ("kept", "rejected", "tokens") else "left")
    for plan in plans:
        if plan.kind != "prepare" or plan.action != "reuse":
            continue
        done = Ledger(store, plan.prefix).state().completed
        summary = done["summary"] if done else {}
        if "shares" not in summary:
            continue
        shares = summary["shares"]
        table.add_row(
            plan.name, f"{summary['kept']:,}", f"{summary['rejected']:,}", f"{shares['tokens_per_epoch']:,.0f}",
            _listed(shares["by_type"]), _listed(shares["by_set"]),
        )  # fmt: skip
    if table.row_count:
        console.print(table)


def _listed(shares: dict[str, float]) -> str:
    """The largest first."""
    largest = sorted(shares.items(), key=lambda item: -item[1])
    more = f", {len(largest) - SETS_SHOWN} more" if len(largest) > SETS_SHOWN else ""
    return ", ".join(f"{name} {share:.1%}" for name, share in largest[:SETS_SHOWN]) + more
