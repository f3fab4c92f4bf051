"""`stageline logs`: what the attempts of a stage said, from storage; or what a submitted job says, from its cluster."""

import argparse
import time
from typing import Any

from modeling.errors import UserError
from orchestrator.cli import jobs
from orchestrator.cli.commands import reachable, recorded
from orchestrator.ledger import Ledger
from orchestrator.liveness import alive, presumed_dead
from orchestrator.progress import read_logs
from orchestrator.report.read import QUIET_S, word
from orchestrator.spec import load_spec
from orchestrator.store import Store

LOOK_S = 2.0
FAILED_S = 15.0  # for which a failed stage has to stay so: its driver may start it again


def logs(options: argparse.Namespace) -> int:
    if jobs.is_job(options.experiment):
        return jobs.logs(options)
    experiment = load_spec(options.experiment, options.overrides)
    if options.stage is None:
        names = ", ".join(experiment.stages)
        raise UserError("no stage is named", where=f"logs {options.experiment}", remedy=f"add one of {names}")
    store = reachable(experiment)
    prefix = recorded(experiment, store, options.stage)
    printed: dict[str, int] = {}
    _print_new(store, prefix, printed)
    ledger, failed_at = Ledger(store, prefix), None

    def look(_: Any = None) -> None:
        time.sleep(LOOK_S)
        _print_new(store, prefix, printed)

    while options.follow:
        state, now = ledger.state(), time.monotonic()
        status = word(state)
        failed_at = (failed_at or now) if status == "failed" else None
        if status in ("completed", "interrupted") or (failed_at is not None and now - failed_at > FAILED_S):
            break
        if status not in ("claimed", "running") or state.owner is None or alive(state.owner) is not None:
            look()
        elif presumed_dead(store, prefix, state.token[0], state.owner, QUIET_S, sleep=look) and ledger.state() == state:
            _print_new(store, prefix, printed)
            who = f"pid {state.owner['pid']} on {state.owner['host']}"
            print(f"{options.stage} is interrupted: its driver ({who}) gives no sign of life; submit or run it again")
            break
    return 0


def _print_new(store: Store, prefix: str, printed: dict[str, int]) -> None:
    for name, text in read_logs(store, prefix).items():
        before = printed.get(name, -1)
        if before < 0:
            print(f"--- {name}")
        print(text[max(0, before) :], end="", flush=True)
        printed[name] = len(text)
