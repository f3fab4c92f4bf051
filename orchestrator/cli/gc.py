"""`stageline gc`: give back what an experiment's stages hold in storage in vain. What that is, is gc.py's business."""

import argparse
import math

from rich.table import Table

from orchestrator.cli.commands import reachable
from orchestrator.cli.watch import console_for_output
from orchestrator.gc import collect
from orchestrator.plan import read_mappings, stage_prefix
from orchestrator.spec import load_spec


def gc(options: argparse.Namespace) -> int:
    """options: experiment, dry_run. All stages that this experiment ever ran under a name count, as last recorded."""
    experiment = load_spec(options.experiment)
    store = reachable(experiment)
    names: dict[str, list[str]] = {}
    for name, body in read_mappings(store, experiment.name).items():
        names.setdefault(stage_prefix(body["identity"]["kind"], body["fingerprint"]), []).append(name)
    freed = collect(store, names, options.dry_run)
    what = "would be freed" if options.dry_run else "freed"
    table = Table(box=None, pad_edge=False)
    for title in ("stage", what, "objects", "note"):
        table.add_column(title, justify="right" if title in (what, "objects") else "left", overflow="fold")
    for item in freed:
        table.add_row(", ".join(names[item.prefix]), size(item.bytes), f"{item.objects:,}", item.note)
    table.add_row("total", size(sum(item.bytes for item in freed)), f"{sum(item.objects for item in freed):,}", "")
    console_for_output().print(table)
    return 0


def size(count: float) -> str:
    """Bytes for people: '0 B', '1.5 kB', '23.4 GB'."""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(4, int(math.log10(count) / 3))
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
