"""One stage from claim to result: attempts under the ledger's tokens, and what follows each that fails.

Invariant: a stage counts as done when its ledger says completed, whatever a process returned: about one worker in
ten aborts at exit after all its work is committed (DeepSpeed's communication op).
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modeling.errors import UserError
from orchestrator.errors import ErrorClass, Fenced, classify
from orchestrator.fingerprint import Identity
from orchestrator.ledger import Ledger, Token
from orchestrator.liveness import Heartbeat, owner, presumed_dead
from orchestrator.plan import record_mapping, write_identity
from orchestrator.policy import GiveUp, decide
from orchestrator.spec import Experiment, Stage
from orchestrator.stageio import ParentRef, Task
from orchestrator.store import Store


class StageFailed(Exception):
    """A stage that ended without a result. error: what ended its last attempt."""

    def __init__(self, stage: str, error_class: ErrorClass, error: BaseException, reason: str):
        super().__init__(f"{stage}: {error_class.value}: {error}")
        self.stage, self.error_class, self.error, self.reason = stage, error_class, error, reason


@dataclass(frozen=True)
class Job:
    """A stage with everything its attempts need to know of the experiment."""

    experiment: Experiment
    stage: Stage
    identity: Identity
    fingerprint: str
    prefix: str
    parents: dict[str, str]  # parent stage name -> its prefix in the store


def parent_refs(store: Store, job: Job) -> tuple[ParentRef, ...]:
    """Where the parents' results lie, from their ledgers."""
    refs = []
    for name, prefix in job.parents.items():
        done = Ledger(store, prefix).state().completed
        assert done is not None, f"{job.stage.name} started before {name} was completed"
        parent = job.experiment.stages[name]
        refs.append(
            ParentRef(
                name, parent.kind.base, prefix.rsplit("/", 1)[1], done["manifest"]["folder"],
                parent.params.model_dump(mode="json"),
            )
        )  # fmt: skip
    return tuple(refs)


def run_stage(
    store: Store,
    job: Job,
    attempt: Callable[[Task], None],
    events: Callable[[str, str], Any],
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Bring a stage to completion, or raise StageFailed. attempt: runs one attempt (launch.run_attempt).

    events(stage, message): what a user should see. stopping(): the driver is on its way out, so that what ends an
    attempt now is no failure. Raises UserError where a living driver holds the stage.
    """
    name = job.stage.name
    write_identity(store, job.stage.kind.base, job.identity)
    record_mapping(store, job.experiment.name, name, job.identity, job.fingerprint)
    ledger = Ledger(store, job.prefix)
    token = _claim(store, ledger, job)
    if token is None:
        return
    try:
        with Heartbeat(store, job.prefix, token[0]):
            _attempts(store, job, ledger, token, attempt, events, stopping)
    except Fenced as error:
        raise StageFailed(name, ErrorClass.fenced, error, "another driver took this stage over") from error


def _attempts(
    store: Store,
    job: Job,
    ledger: Ledger,
    token: Token,
    attempt: Callable[[Task], None],
    events: Callable[[str, str], Any],
    stopping: Callable[[], bool],
) -> None:
    """Attempts until one completes the stage. Raises StageFailed, or Fenced where a higher token is in the ledger."""
    name, params = job.stage.name, job.stage.params
    while True:
        token = ledger.start_attempt(token, params.resources.workers)
        task = Task(
            storage=store.url, prefix=job.prefix, stage=name, kind=job.stage.kind_name,
            fingerprint=job.fingerprint, params=params, model=job.experiment.model, sources=job.experiment.data,
            parents=parent_refs(store, job), token=token,
            keep=params.checkpoint.keep if job.stage.kind.trains else 1,
        )  # fmt: skip
        error: BaseException | None = None
        try:
            attempt(task)
        except Exception as caught:
            error = caught
        state = ledger.state()
        if state.completed is not None:
            if error is not None:
                events(name, f"its result is committed; its attempt then ended with {_first_line(error)}")
            return
        if stopping():
            raise StageFailed(name, ErrorClass.preempted, error or RuntimeError("stopped"), "the driver was stopped")
        if error is None:
            error = RuntimeError(f"the attempt ended without a result; stageline logs {name} shows what it said")
        error_class = classify(error)
        if error_class is ErrorClass.fenced:
            raise Fenced(str(error)) from error
        _record_failure(store, ledger, job, token, error_class, error)
        decision = decide(error_class, state.since_progress)
        if isinstance(decision, GiveUp):
            raise StageFailed(name, error_class, error, decision.reason) from error
        events(name, f"{error_class.value}: {_first_line(error)}; again in {decision.delay_s:.0f} s")
        time.sleep(decision.delay_s)


def _claim(store: Store, ledger: Ledger, job: Job) -> Token | None:
    """A token for this driver; None where the stage is completed already."""
    state, judged = ledger.state(), 0
    while state.completed is None and state.owner is not None and state.token[0] != judged:
        judged = state.token[0]
        if not presumed_dead(store, job.prefix, judged, state.owner):
            who = f"pid {state.owner['pid']} on {state.owner['host']}"
            raise UserError(
                f"another driver ({who}) is running this stage",
                where=f"stages.{job.stage.name}", remedy="wait for it, or end it and run again",
            )  # fmt: skip
        state = ledger.state()  # watching takes a while: another driver may have come first, and is judged in its turn
    if state.completed is not None:
        return None
    try:
        return ledger.claim(owner())
    except Fenced as error:
        raise UserError(
            "another driver claimed this stage just now",
            where=f"stages.{job.stage.name}", remedy="run again: it waits or reuses the result",
        ) from error  # fmt: skip


def _record_failure(
    store: Store, ledger: Ledger, job: Job, token: Token, error_class: ErrorClass, error: BaseException
) -> None:
    if error_class is ErrorClass.preempted:
        ledger.append("preempted", token)
    else:
        ledger.append("failed", token, error_class=error_class.value, message=_first_line(error))
    text = "".join(traceback.format_exception(error))
    store.put(f"{job.prefix}/logs/e{token[0]:04d}a{token[1]:04d}-error.log", text.encode())


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]
