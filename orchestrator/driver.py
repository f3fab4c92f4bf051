"""One stage from claim to result: attempts under the ledger's tokens, and what follows each that fails.

Invariant: a stage counts as done when its ledger says completed, whatever a process returned: about one worker in
ten aborts at exit after all its work is committed (DeepSpeed's communication op).
"""

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from modeling import presets
from orchestrator.attendant import Attendant, Stop
from orchestrator.checkpoints import token_name
from orchestrator.control import hung, stopped_by
from orchestrator.drivernote import QUEUED
from orchestrator.errors import ErrorClass, Fenced, Hang, causes, classify, one_line
from orchestrator.fingerprint import Identity
from orchestrator.ledger import Ledger, Token
from orchestrator.liveness import Heartbeat, owner, presumed_dead
from orchestrator.plan import record_mapping, write_identity
from orchestrator.policy import GiveUp, decide
from orchestrator.progress import read_progress
from orchestrator.redaction import redact, sanitize
from orchestrator.s3 import with_patience
from orchestrator.spec import Experiment, Stage
from orchestrator.stageio import ParentRef, Task
from orchestrator.store import Store
from stages.params import Resources

SETTLE_S = 3.0  # for the resources of an attempt that ended to come free, before a smaller one is taken
TELL_S = 10.0  # of waiting for room before it is told
LOOK_S, LATE_LOOK_S = 0.05, 0.5  # between two looks for room, before and after SETTLE_S
STORE_PATIENCE_S = 900.0  # of the driver with a store that is away: nobody is served by its giving up sooner


Wish = Callable[[Resources, int, int], AbstractContextManager[bool]]


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
    attempt: Callable[[Task, Callable[[], bool]], None],
    events: Callable[[str, str], Any],
    stop: Stop | None = None,
    room: Callable[[Resources], int] = lambda resources: resources.most,
    waits: Callable[[Resources], str] = lambda resources: "there is no room",
    wish: Wish = lambda resources, together, more: nullcontext(False),
) -> None:
    """Bring a stage to completion, or raise StageFailed. attempt(task, stopping): runs one (launch.run_attempt).

    events(stage, message): what a user should see. stop: the driver was asked to stop. room(resources): workers of this
    size that fit on what is free now. waits(resources): why there is none for it. wish(resources, together, more):
    within it the cluster is asked for so many workers at once, and for each of so many more by itself; whether it is.
    Where a living driver has the stage, waits for its result or its end.
    """
    name, stop, impatient = job.stage.name, stop or Stop(), store
    store = with_patience(store, STORE_PATIENCE_S)
    write_identity(store, job.stage.kind.base, job.identity)
    record_mapping(store, job.experiment.name, name, job.identity, job.fingerprint)
    ledger = Ledger(store, job.prefix)
    try:
        token = _claim(store, ledger, job, events, stop)
        if token is None:
            return
        with Heartbeat(impatient, job.prefix, token[0]):
            _attempts(store, job, ledger, token, attempt, events, stop, room, waits, wish)
    except Fenced as error:
        if ledger.state().completed is not None:  # by whoever it gave way to, or a worker that it took for lost
            return events(name, "completed by another driver, reused")
        raise StageFailed(name, ErrorClass.fenced, error, "another driver took this stage over") from error


def _attempts(
    store: Store,
    job: Job,
    ledger: Ledger,
    token: Token,
    attempt: Callable[[Task, Callable[[], bool]], None],
    events: Callable[[str, str], Any],
    stop: Stop,
    room: Callable[[Resources], int],
    waits: Callable[[Resources], str],
    wish: Wish,
) -> None:
    """Attempts until one completes the stage. Raises StageFailed, or Fenced where a higher token is in the ledger."""
    name, params = job.stage.name, job.stage.params
    while True:
        if stop.is_set():
            raise StageFailed(name, ErrorClass.preempted, RuntimeError("stopped"), "the driver was stopped")
        workers = _size(name, params.resources, room, waits, wish, events, stop)
        token = ledger.start_attempt(token, workers)
        task = Task(
            storage=store.url, prefix=job.prefix, stage=name, kind=job.stage.kind_name,
            fingerprint=job.fingerprint, params=params, model=presets.as_planned(job.experiment.model_of(job.stage)),
            sources=job.experiment.data, sets=job.experiment.sets,
            digests={name: its["content"] for name, its in job.identity.get("sets", {}).items()},
            parents=parent_refs(store, job), token=token,
            keep=params.checkpoint.keep if job.stage.kind.trains else 1, workers=workers, followers=followers(job),
            experiment=job.experiment.name,
        )  # fmt: skip
        error: BaseException | None = None
        try:
            more = params.resources.most - workers if job.stage.kind.trains else 0
            with (
                wish(params.resources, 0, more),
                Attendant(store, job.prefix, token, workers, params.resources, stop, room),
            ):
                attempt(task, stop.is_set)
        except Exception as caught:
            error = sanitize(caught)
        state = ledger.state()
        if state.completed is not None:
            if state.token > token:
                events(name, "taken over and completed by another driver, reused")
            elif error is not None:
                events(name, f"its result is committed; its attempt then ended with {one_line(error, classify(error))}")
            return
        if error is None:
            error = RuntimeError(f"the attempt ended without a result; stageline logs {name} shows what it said")
        if stacks := hung(store, job.prefix, token):
            error = Hang(f"no step came to an end for {params.hang_timeout_s:g} s; the stacks of all ranks: {stacks}")
        error_class = classify(error)
        if error_class is ErrorClass.fenced:
            raise Fenced(str(error)) from error
        if not stop.is_set() or error_class is ErrorClass.preempted:
            _record_failure(store, ledger, job, token, error_class, error)
        if stop.is_set():
            raise StageFailed(name, ErrorClass.preempted, error, "the driver was stopped")
        decision = decide(error_class, state.since_progress)
        if isinstance(decision, GiveUp):
            raise StageFailed(name, error_class, error, decision.reason) from error
        events(name, f"{error_class.value}: {one_line(error, error_class)}; again in {decision.delay_s:.0f} s")
        stop.wait(decision.delay_s)


def followers(job: Job) -> int:
    """Workers of the largest training stage that needs this one; 0 where there is none."""
    needing = [s.params for s in job.experiment.stages.values() if s.kind.trains and job.stage.name in s.params.needs]
    return max((params.resources.most for params in needing), default=0)


def _size(
    name: str,
    resources: Resources,
    room: Callable[[Resources], int],
    waits: Callable[[Resources], str],
    wish: Wish,
    events: Callable[[str, str], Any],
    stop: Stop,
) -> int:
    """How many workers the next attempt has: the most that fit, once what the last one held had time to come free.

    Where not even the fewest fit, the cluster is asked for more, as soon as it may start any, and why the stage waits
    is told whenever it changes.
    """
    began, told, looked, wished = time.monotonic(), "", 0.0, False
    with ExitStack() as wishes:
        while not stop.is_set():
            free, waited = room(resources), time.monotonic() - began
            if free >= resources.most or (free >= resources.least and waited >= SETTLE_S):
                workers = min(free, resources.most)
                if told:
                    events(name, f"there is room for {workers} workers")
                return workers
            if waited >= TELL_S and waited - looked >= TELL_S:
                if not wished:
                    more = resources.most - resources.least
                    wished = wishes.enter_context(wish(resources, resources.least, more))
                looked = waited
                reason = waits(resources)
                if reason != told:
                    told = reason
                    events(name, f"{QUEUED}{reason}")
            stop.wait(LOOK_S if waited < SETTLE_S else LATE_LOOK_S)
    raise StageFailed(name, ErrorClass.preempted, RuntimeError("stopped"), "the driver was stopped")


def _claim(store: Store, ledger: Ledger, job: Job, events: Callable[[str, str], Any], stop: Stop) -> Token | None:
    """A token for this driver, once no other one lives that has the stage; None where it is completed."""
    name, told = job.stage.name, 0
    while not stop.is_set():
        state = ledger.state()
        if state.completed is not None:
            if told:
                events(name, "completed by the other driver, reused")
            return None
        if state.owner is not None and not presumed_dead(store, job.prefix, state.token[0], state.owner, stop=stop):
            if told != state.token[0]:
                told = state.token[0]
                events(name, f"made by another driver (pid {state.owner['pid']} on {state.owner['host']}); waiting")
            continue
        now = ledger.state()  # watching takes a while
        if now.completed is not None or now.token[0] != state.token[0]:
            told = told or state.token[0]
            continue  # another driver came first, and is judged in its turn
        try:
            token = ledger.claim(owner(), after=state.token[0])
        except Fenced:
            continue
        if state.status == "running":  # nobody was left to say how that attempt ended
            message = "its driver was lost"
            step = _reached(store, job, state.token)
            ledger.append("failed", token, error_class=ErrorClass.lost_node, message=message, step=step)
        return token
    raise StageFailed(name, ErrorClass.preempted, RuntimeError("stopped"), "the driver was stopped")


def _record_failure(
    store: Store, ledger: Ledger, job: Job, token: Token, error_class: ErrorClass, error: BaseException
) -> None:
    step = _reached(store, job, token)
    if error_class is ErrorClass.preempted:
        origin = stopped_by(store, job.prefix, token, map(str, causes(error)))
        ledger.append("preempted", token, step=step, reason=one_line(error, error_class), origin=origin)
        return
    ledger.append("failed", token, error_class=error_class.value, message=one_line(error, error_class), step=step)
    text = "".join(traceback.format_exception(error))
    store.put(f"{job.prefix}/logs/{token_name(token)}-error.log", redact(text).encode())


def _reached(store: Store, job: Job, token: Token) -> int:
    """The last step that the attempt is known to have trained, from its progress note; at most a second old."""
    note = read_progress(store, job.prefix)
    return int(note["step"]) if note is not None and tuple(note["token"]) == token else 0
