"""What the metrics of a stage say now, from its ledger and its progress note.

Invariant: pure. A note of an earlier attempt says nothing of the running one, nor does any where none runs, so a stage
that waits for machines has a goodput and no loss.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.monitoring.catalogue import FROM_ROW, SUMS
from orchestrator.accounts import account
from orchestrator.errors import ErrorClass
from orchestrator.ledger import Entry, state

# how an attempt can end that is a failure of the stage
FAILING = tuple(each for each in ErrorClass if each not in (ErrorClass.preempted, ErrorClass.fenced))

SAID = {
    "stageline_loss": "loss {:.4f}",
    "stageline_tokens_per_second": "{:,.0f} tokens/s",
    "stageline_mfu_ratio": "MFU {:.1%}",
    "stageline_goodput_ratio": "goodput {:.1%}",
    "stageline_checkpoint_step": "checkpoint {:,.0f}",
}


@dataclass(frozen=True)
class Readings:
    """Gauges and failures by class; sums: of the steps of the attempt `token` so far, by counter."""

    token: tuple[int, int]
    running: bool  # that attempt
    gauges: dict[str, float]
    failures: dict[str, int]
    sums: dict[str, float] = field(default_factory=dict)


def readings(entries: Iterable[Entry], note: dict[str, Any] | None, now: float) -> Readings:
    """entries: the ledger's. note: progress.json. now: unix time."""
    entries = list(entries)
    at, spent = state(entries), account(entries)
    running = at.status == "running"
    gauges: dict[str, float | None] = {
        "stageline_stage_running": 1,
        "stageline_attempts": at.attempts,
        "stageline_steps_lost": spent.steps_lost,
        "stageline_preemptions": at.endings[ErrorClass.preempted],
        "stageline_goodput_ratio": spent.goodput(now),
        "stageline_checkpoint_step": at.checkpoints[0].step if at.checkpoints else None,
        "stageline_workers": spent.attempts[-1].workers if running and spent.attempts else None,
    }
    sums: dict[str, float] = {}
    if note is not None and tuple(note["token"]) == at.token:
        row = note["row"]
        gauges |= {"stageline_step": note["step"], "stageline_steps": note["total"]}
        if running:
            gauges["stageline_eta_seconds"] = note["eta_s"]
            gauges |= {name: row.get(key) for name, (key, _) in FROM_ROW.items()}
        told = note.get("sums", {})
        sums = {name: told[key] for name, (key, _) in SUMS.items() if key in told}
    known = {name: float(value) for name, value in gauges.items() if value is not None and math.isfinite(value)}
    return Readings(at.token, running, known, {each.value: spent.causes[each] for each in FAILING}, sums)


def sentence(now: Readings) -> str:
    """How far the running attempt is, as one line; empty before its first step, and where none runs."""
    told = now.gauges
    if not now.running or "stageline_step" not in told:
        return ""
    parts = [f"step {told['stageline_step']:,.0f} of {told['stageline_steps']:,.0f}"]
    for name, form in SAID.items():
        if name in told:
            parts.append(form.format(told[name]))
    return "  ".join(parts)
