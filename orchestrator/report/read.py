"""What storage knows of every stage of an experiment, for its report.

Invariant: only reads, and storage alone: no cluster, no source and no weights are asked, so the report is the same when
all of these are gone (docs/design.md, "What a user sees"). A stage is what `<storage>/experiments/<name>/stages/` last
recorded under its name.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from modeling.errors import UserError
from orchestrator.accounts import Account, account
from orchestrator.graph import blocked_by
from orchestrator.ledger import Entry, Failure, Ledger, StageState, Token
from orchestrator.ledger import state as fold
from orchestrator.liveness import TIMEOUT_S, alive, last_beat
from orchestrator.places import Places, read_places
from orchestrator.plan import differences, read_mappings, stage_prefix
from orchestrator.progress import read_logs, read_metrics, read_progress
from orchestrator.spec import Experiment, Stage
from orchestrator.store import Missing, Store

AT_ONCE = 8  # stages read at a time
QUIET_S = 2 * TIMEOUT_S  # without a word of an attempt, after which it may be over
NOT_RUN, BLOCKED, INTERRUPTED = "not run yet", "blocked", "interrupted"
# What the attempts print: modeling/freeze.py, stages/plan_packs.py
_FREEZE = re.compile(r"^\S+ (\w+) +([\d,]+) +([\d,]+)  (.+)$", re.M)
_FREEZE_HEAD = re.compile(r"^\S+ module +parameters +trained  state$", re.M)
_PLANNED = re.compile(r"^\S+ ([\d,]+ packs of .*)$", re.M)


@dataclass(frozen=True)
class Module:
    """A row of the freeze table. Counts as they were printed: 1,203,296."""

    name: str
    parameters: str
    trained: str
    state: str


@dataclass(frozen=True)
class StageRead:
    """word: the state, for people. entries: of the ledger. rows: of the surviving lineage, of a training stage."""

    stage: Stage
    word: str = NOT_RUN
    fingerprint: str = ""
    prefix: str = ""
    entries: tuple[Entry, ...] = ()
    state: StageState = field(default_factory=StageState)
    sums: Account = field(default_factory=Account)
    note: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()  # since it ran: "lr: 4e-05 → 1e-05"
    rows: tuple[dict[str, Any], ...] = ()
    modules: tuple[Module, ...] = ()
    planned: str = ""
    waits_for: str = ""  # the failed stage in its way
    shared: str = ""  # the stage, before it in the file, that is the same one: shown once
    places: dict[Token, Places] = field(default_factory=dict)  # of a training stage's attempts
    beat: float = 0.0  # when the driver that runs it last gave a sign of life

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def failure(self) -> Failure | None:
        """The last one of a stage that is not completed."""
        return self.state.failures[-1] if self.state.failures and self.state.completed is None else None

    @property
    def summary(self) -> dict[str, Any]:
        return self.state.completed["summary"] if self.state.completed else {}

    @property
    def result(self) -> dict[str, Any]:
        """{folder, files} of a completed stage."""
        return self.state.completed["manifest"] if self.state.completed else {"folder": "", "files": []}


def read_stages(experiment: Experiment, store: Store) -> list[StageRead]:
    """In the order of the file. Raises UserError for what cannot be read."""
    known = read_mappings(store, experiment.name)

    def read(stage: Stage) -> StageRead:
        return _read(store, stage, known[stage.name]) if stage.name in known else StageRead(stage)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(read, experiment.stages.values()))
    blocked = blocked_by(experiment.needs, [one.name for one in found if one.word == "failed"])
    first: dict[str, str] = {}
    out = []
    for one in found:
        if one.word == NOT_RUN and one.name in blocked:
            one = replace(one, word=BLOCKED, waits_for=blocked[one.name])
        maker = first.setdefault(one.prefix, one.name) if one.prefix else one.name
        out.append(one if maker == one.name else replace(one, shared=maker))
    return out


def _read(store: Store, stage: Stage, record: dict[str, Any]) -> StageRead:
    prefix = stage_prefix(stage.kind.base, record["fingerprint"])
    entries = Ledger(store, prefix).entries()
    state = fold(entries)
    settings = record["identity"].get("params", {})
    rows: list[dict[str, Any]] = []
    modules: list[Module] = []
    planned, changed = "", []
    if stage.kind.trains:
        rows = _rows(store, prefix, state.completed is not None)
        logs = "".join(read_logs(store, prefix).values())
        modules, planned = _modules(logs), next(iter(_PLANNED.findall(logs)[-1:]), "")
        changed = differences({"params": settings}, {"params": stage.params.identity()})
    return StageRead(
        stage, word(state), record["fingerprint"], prefix, tuple(entries), state, account(entries),
        read_progress(store, prefix) or {}, settings, tuple(changed), tuple(rows), tuple(modules), planned,
        places=read_places(store, prefix) if stage.kind.trains else {},
        beat=last_beat(store, prefix, state.token[0]) if state.status == "running" else 0.0,
    )  # fmt: skip


def word(state: StageState) -> str:
    """The ledger's word; 'interrupted' where the driver that was running the stage is known to be gone."""
    if state.status == "new":
        return NOT_RUN
    if state.status in ("claimed", "running") and state.owner is not None and alive(state.owner) is False:
        return INTERRUPTED
    return state.status


def heard(sums: Account, note: dict[str, Any], beat: float) -> float:
    """When the newest attempt last wrote an entry or its progress note, or its driver gave a sign of life, in unix
    seconds. note: may be empty."""
    attempt = sums.attempts[-1]
    return max(attempt.heard, beat, note["time"] if note and tuple(note["token"]) == attempt.token else 0.0)


def billed_until(state: StageState, sums: Account, note: dict[str, Any], beat: float, now: float) -> float | None:
    """Until when the newest attempt is taken to run, in unix seconds; None where it is over.

    Of a driver on another machine nobody can see from here whether it lives: so a little longer than it was heard of,
    and to `now` at most.
    """
    if word(state) != "running":
        return None
    if state.owner is not None and alive(state.owner):
        return now
    return min(now, heard(sums, note, beat) + QUIET_S)


def _rows(store: Store, prefix: str, completed: bool) -> list[dict[str, Any]]:
    """A completed stage has them in one object, which was written from the segments."""
    if completed:
        try:
            return [json.loads(line) for line in store.get(f"{prefix}/metrics.jsonl").decode().splitlines()]
        except Missing:
            pass  # it made no step
    return read_metrics(store, prefix)


def _modules(logs: str) -> list[Module]:
    """The freeze table that the newest attempt printed."""
    heads = list(_FREEZE_HEAD.finditer(logs))
    if not heads:
        return []
    rows = []
    for line in logs[heads[-1].end() :].lstrip("\n").splitlines():
        match = _FREEZE.match(line)
        if match is None:
            break
        rows.append(Module(*match.groups()))
    return rows


def read_json(store: Store, key: str) -> Any:
    """A JSON file of a result. Raises UserError where it is damaged or gone."""
    where = f"{store.url}/{key}"
    try:
        return json.loads(store.get(key))
    except Missing:
        raise UserError("this file of a completed stage is gone", where=where,
                        remedy="restore it, or move the stage's folder away and run it anew") from None  # fmt: skip
    except ValueError as error:
        raise UserError(f"no JSON ({error})", where=where,
                        remedy="restore it, or move the stage's folder away and run it anew") from None  # fmt: skip
