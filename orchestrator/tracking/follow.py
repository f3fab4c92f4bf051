"""Beside the driver's stages: passes on what they leave in storage to the trackers that the experiment names.

Invariant: trackers read storage and nothing waits for them. No training ends or stands still because a tracker, its
server or the network fails: it is told, tried again at the next look, and given up at the end of the driver. Ranks know
nothing of trackers, so a lost worker loses nothing and keys are needed on the head alone. What a driver that was killed
did not pass on the next one does, also of stages that were completed by then.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from orchestrator.errors import StorageTransient
from orchestrator.fingerprint import Identity, fp16
from orchestrator.ledger import Ledger
from orchestrator.liveness import owner
from orchestrator.plan import StagePlan
from orchestrator.redaction import redact, redact_all
from orchestrator.spec import Experiment, Stage
from orchestrator.store import Missing, Store
from orchestrator.tracking import tensorboard, wandb_run
from orchestrator.tracking.about import About, Tracker
from orchestrator.tracking.params import TrackingParams
from orchestrator.tracking.rows import flat, rows_after

LOOK_S = 15.0  # between two looks at a stage's rows, which are stored as often
RETRY_S = 300.0  # before a tracker that could not be opened is tried again
LEAVE_S = wandb_run.INIT_S + 15  # for trackers to take the last rows when the driver ends, or to say why not
CARD = "card.html"  # of a prepare stage

log = logging.getLogger(__name__)
Make = Callable[[About], Tracker]


def check(params: TrackingParams) -> None:
    """Raises UserError where a tracker cannot serve."""
    if params.wandb:
        wandb_run.check(params.wandb)
    if params.tensorboard:
        tensorboard.check(params.tensorboard)


def makers(params: TrackingParams) -> list[Make]:
    out: list[Make] = []
    if (wandb := params.wandb) is not None:
        out.append(lambda about: wandb_run.WandbRun(wandb, about))
    if (board := params.tensorboard) is not None:
        out.append(lambda about: tensorboard.TensorBoardRun(board, about))
    return out


class Tracking:
    """Of one driver, until the end of its `with` block. events(name, message): what a user should see.

    Raises UserError where a tracker cannot serve.
    """

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        plans: Mapping[str, StagePlan],
        events: Callable[[str, str], Any],
        look_s: float = LOOK_S,
    ):
        check(experiment.tracking)
        self._experiment, self._store, self._plans, self._events = experiment, store, plans, events
        self._look_s = look_s
        self._makers = makers(experiment.tracking)
        self._followers: list[Follower] = []

    def __enter__(self) -> "Tracking":
        for name, item in self._plans.items() if self._makers else ():
            if item.action == "reuse" and item.shared is None and unfinished(self._store, item.prefix):
                self._follow(name, None).end()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def following(self, name: str, identity: Identity) -> Iterator[None]:
        """While a stage is run by this driver. Its end waits for no tracker."""
        if not self._makers or self._experiment.stages[name].kind.base not in ("train", "evaluate"):
            yield
            return
        follower = self._follow(name, identity)
        try:
            yield
        finally:
            follower.end()

    def close(self, within_s: float = LEAVE_S) -> None:
        """Wait until the trackers have all there is; at most `within_s`."""
        until = time.monotonic() + within_s
        for follower in self._followers:
            follower.end()
        for follower in self._followers:
            if not follower.join(max(0.0, until - time.monotonic())):
                self._events(follower.stage, "not all of it is with its trackers yet; run again to go on with that")
        self._followers.clear()

    def _follow(self, name: str, identity: Identity | None) -> "Follower":
        stage, prefix = self._experiment.stages[name], self._plans[name].prefix
        digest = self._plans[name].fingerprint or ""
        what = {"fingerprint": digest, "kind": stage.kind_name, "experiment": self._experiment.name}
        what |= {key: inner for key, inner in (identity or {}).items() if key not in ("params", "kind")}
        config = redact_all({**stage.params.model_dump(mode="json"), **what})
        needs = [need for need in stage.params.needs if self._experiment.stages[need].kind.base == "prepare"]

        def cards(folder: Path) -> Sequence[Path]:
            return [path for need in needs if (path := _card(self._store, self._plans[need].prefix, need, folder))]

        def about(first: str) -> About:
            run = f"{fp16(digest)}-{first[:6]}"
            group = self._experiment.name
            return About(run, group, name, stage.kind_name, config, self._store, prefix, cards)

        follower = Follower(
            self._store, prefix, stage, self._makers, self._events, self._look_s, about, ours=identity is None
        )
        self._followers.append(follower)
        return follower


def _card(store: Store, prefix: str, name: str, folder: Path) -> Path | None:
    try:
        text = store.get(f"{prefix}/{CARD}").decode()
    except Missing:
        return None
    path = folder / f"data-card-{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(redact(text), encoding="utf-8")
    return path


class Follower:
    """A thread that follows one stage through all its attempts. about(nonce): of its run, by the ledger's first entry.

    ours: what is there was begun for this experiment, whichever driver owned the stage last.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        stage: Stage,
        makers: Sequence[Make],
        events: Callable[[str, str], Any],
        look_s: float,
        about: Callable[[str], About],
        ours: bool,
    ):
        self.stage = stage.name
        self._store, self._prefix, self._kind, self._makers = store, prefix, stage.kind.base, makers
        self._events, self._look_s, self._about, self._ours = events, look_s, about, ours
        self._ledger = Ledger(store, prefix)
        self._trackers: dict[int, Tracker] = {}  # that are open, by the place of their maker
        self._current: set[int] = set()  # of them, which took all that the last look found
        self._again: dict[int, float] = {}  # when others are tried
        self._told: dict[str, str] = {}
        self._me = owner()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracking-{stage.name}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The stage is over: one last look, then all is finished."""
        self._ended.set()

    def join(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ended.wait(self._look_s):
            self._attempt("storage", self._look)
        if self._attempt("storage", self._look):
            self._finish()

    def _attempt(self, what: str, action: Callable[[], Any]) -> bool:
        """Whether it went well; what went wrong is told once, whatever it was."""
        try:
            action()
            return True
        except Exception as error:  # a tracker's library may raise anything, and the stage must not end of it
            transient = isinstance(error, OSError | StorageTransient | UserError)
            text = f"{type(error).__name__}: {error}" if not transient else str(error)
            if self._told.get(what) != text:
                self._told[what] = text
                self._events(self.stage, f"tracking does not reach {what}, the stage goes on: {text}")
                log.debug("tracking of %s", self.stage, exc_info=error)
            return False

    def _look(self) -> None:
        """Pass on what is new to each tracker."""
        entries = self._ledger.entries()
        if not entries or not self._is_ours():
            return
        for place, make in enumerate(self._makers):
            if place not in self._trackers:
                if not self._has_rows():
                    return
                if time.monotonic() < self._again.get(place, 0.0) and not self._ended.is_set():
                    continue
                tracker = make(self._about(entries[0].nonce))
                _note(self._store, self._prefix, finished=False)
                if not self._attempt(tracker.name, tracker.open):
                    self._again[place] = time.monotonic() + RETRY_S
                    continue
                self._trackers[place] = tracker
                if tracker.moved:
                    self._events(self.stage, tracker.moved)
            tracker = self._trackers[place]
            rows = self._rows(tracker.last)
            self._current.discard(place)
            if self._attempt(tracker.name, lambda tracker=tracker, rows=rows: tracker.log(rows)):
                self._current.add(place)

    def _is_ours(self) -> bool:
        """Whether this driver has the stage: another one tells its own trackers."""
        return self._ours or self._ledger.state().owned_by(self._me)

    def _has_rows(self) -> bool:
        if self._kind == "train":
            return bool(self._store.list(f"{self._prefix}/metrics/"))
        return bool(self._rows(0))

    def _rows(self, step: int) -> list[dict[str, Any]]:
        if self._kind == "train":
            return rows_after(self._store, self._prefix, step)
        completed = self._ledger.state().completed
        return [{"step": 1, **flat(completed["summary"])}] if completed and step < 1 else []

    def _finish(self) -> None:
        done = self._ledger.state().completed is not None
        whole = len(self._current) == len(self._makers)
        for tracker in self._trackers.values():
            whole = self._attempt(tracker.name, lambda tracker=tracker: tracker.finish(done)) and whole
        if done and whole:
            self._attempt("storage", lambda: _note(self._store, self._prefix, finished=True))


def _note(store: Store, prefix: str, finished: bool) -> None:
    store.put(f"{prefix}/tracking/state.json", json.dumps({"finished": finished}).encode())


def unfinished(store: Store, prefix: str) -> bool:
    """Whether a driver began to pass a stage's rows on and did not come to an end with it."""
    try:
        return not json.loads(store.get(f"{prefix}/tracking/state.json"))["finished"]
    except Missing:
        return False
