"""The ledger of a stage: create-only entries 00000000.json, 00000001.json, ... that say what happened.

Invariants (design.md, "The ledger"): entries are never changed or deleted; the token (epoch, attempt) of the
entries that count never falls, and an entry with a lower token than one before it is void; an appender whose
token is lower than one it reads is told to stop (Fenced) and can commit nothing. Each entry carries a nonce, so
an appender whose put failed without an answer learns from reading back whether it was its own.
Everything known about a stage is a fold over its entries: `state`.
"""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from modeling.errors import UserError
from orchestrator.errors import ErrorClass, Fenced
from orchestrator.redaction import redact
from orchestrator.store import Exists, Store

VERSION = 2
PUT_TRIES = 3  # for a put that fails without an answer
AHEAD = 64  # entries asked for at once, at most, by a reader that is far behind

Token = tuple[int, int]  # (epoch, attempt): a driver's claim, and its start of a worker group; attempts count from 1
Status = Literal["new", "claimed", "running", "failed", "completed"]

log = logging.getLogger(__name__)

# Each type of entry and the fields it has beside type, token, nonce, time and version. Steps count optimizer steps.
FIELDS: dict[str, tuple[str, ...]] = {
    "claimed": ("owner",),
    "attempt": ("workers",),
    "started": ("step",),  # an attempt made its first step after resuming from `step`
    "checkpoint": ("step", "manifest", "train_s"),  # train_s: seconds of the steps since the entry before or the start
    "preempted": ("step", "reason", "origin"),  # step: the last one that was trained; origin: a key of ORIGINS
    "failed": ("class", "message", "step"),
    "retired": ("step", "manifest"),
    "completed": ("manifest", "summary", "train_s"),
}
# Who ended an attempt that saved and stopped, and what that is called: the announced end of a machine, the driver for a
# larger attempt, a user or whoever ends the driver.
ORIGINS = {"notice": "preempted", "grown": "grown", "asked": "stopped"}
_OPTIONAL = {"origin"}  # which earlier entries do not have: "notice" then
# What entries of version 1 do not say.
_ADDED = {"train_s": 0.0, "step": 0, "reason": "asked to stop"}


@dataclass(frozen=True)
class Entry:
    """time: wall clock of the writer, seconds; for people, never for decisions."""

    number: int
    type: str
    token: Token
    nonce: str
    time: float
    fields: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    step: int
    manifest: str
    token: Token
    time: float
    train_s: float = 0.0


@dataclass(frozen=True)
class Failure:
    """One attempt that ended without a result. step: of the newest checkpoint by then; reached: the last one known to
    have been trained. origin: a key of ORIGINS where it was preempted, else empty."""

    error_class: ErrorClass
    message: str
    token: Token
    time: float
    step: int
    reached: int = 0
    origin: str = ""

    @property
    def ending(self) -> str:
        """The class, in which a stop that no machine's end asked for is told apart: "grown", "stopped"."""
        return ORIGINS.get(self.origin, self.error_class.value)


@dataclass(frozen=True)
class StageState:
    """checkpoints: those not retired, newest first. completed: the fields of that entry."""

    status: Status = "new"
    token: Token = (0, 0)
    owner: dict[str, Any] | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    completed: dict[str, Any] | None = None
    failures: tuple[Failure, ...] = ()
    since_progress: tuple[ErrorClass, ...] = ()  # failures since the newest step so far grew, oldest first
    attempts: int = 0
    furthest: int = 0  # the largest step ever committed, retired or not

    @property
    def endings(self) -> Counter[str]:
        """How often attempts ended without a result, by Failure.ending."""
        return Counter(failure.ending for failure in self.failures)

    def owned_by(self, who: dict[str, Any]) -> bool:
        """Whether the newest claim is of this process. who: liveness.owner(), whose nonce is new at every call."""
        return self.owner is not None and all(self.owner.get(key) == who[key] for key in ("host", "namespace", "pid"))


def state(entries: Iterable[Entry]) -> StageState:
    """The fold. Void entries change nothing."""
    now = StageState()
    for entry in entries:
        now = _step(now, entry)
    return now


def _step(now: StageState, entry: Entry) -> StageState:
    fields, token = entry.fields, entry.token
    if token < now.token:
        return now
    now = replace(now, token=token)
    if entry.type == "unknown":
        return now
    status: Status = now.status
    if entry.type == "checkpoint":
        new = Checkpoint(fields["step"], fields["manifest"], token, entry.time, fields["train_s"])
        now = replace(now, checkpoints=(new, *(c for c in now.checkpoints if c.manifest != new.manifest)))
        if new.step > now.furthest:
            now = replace(now, furthest=new.step, since_progress=())
    elif entry.type == "retired":
        left = tuple(c for c in now.checkpoints if (c.step, c.manifest) != (fields["step"], fields["manifest"]))
        now = replace(now, checkpoints=left)
    elif entry.type == "claimed":
        now, status = replace(now, owner=fields["owner"]), "claimed"
    elif entry.type == "attempt":
        now, status = replace(now, attempts=now.attempts + 1), "running"
    elif entry.type == "started":
        pass  # for the accounts (accounts.py)
    elif entry.type == "completed":
        now, status = replace(now, completed=now.completed or dict(fields)), "completed"
    else:
        assert entry.type in ("failed", "preempted"), entry.type
        failed = entry.type == "failed"
        error_class = ErrorClass(fields["class"]) if failed else ErrorClass.preempted
        step = now.checkpoints[0].step if now.checkpoints else 0
        message = fields["message"] if failed else fields["reason"]
        origin = "" if failed else fields.get("origin", "notice")
        failure = Failure(error_class, message, token, entry.time, step, fields["step"], origin)
        status = "failed" if failed else "claimed"
        now = replace(now, failures=(*now.failures, failure), since_progress=(*now.since_progress, error_class))
    return replace(now, status="completed" if now.completed is not None else status)


class Ledger:
    """prefix: the stage's folder in the store. Reads only what is new. One object per thread."""

    def __init__(self, store: Store, prefix: str, clock: Callable[[], float] = time.time):
        self.store, self.prefix, self.clock = store, prefix, clock
        self._entries: list[Entry] = []
        self._state = StageState()  # of these entries

    def entries(self) -> list[Entry]:
        """All entries there are now, void ones included. UserError for one that cannot be read."""
        ahead = 1
        while True:
            first = len(self._entries)
            found = self.store.get_run([self._key(number) for number in range(first, first + ahead)])
            for number, data in enumerate(found, first):
                entry = _parse(data, number, f"{self.store.url}/{self._key(number)}")
                self._entries.append(entry)
                self._state = _step(self._state, entry)
            if len(found) < ahead:
                return list(self._entries)
            ahead = min(2 * ahead, AHEAD)

    @property
    def seen(self) -> list[Entry]:
        """What was read so far, without asking the store."""
        return list(self._entries)

    def beside(self) -> "Ledger":
        """One for another thread, which knows what this one has read."""
        other = Ledger(self.store, self.prefix, self.clock)
        other._entries, other._state = self.seen, self._state
        return other

    def state(self) -> StageState:
        self.entries()
        return self._state

    def check(self, token: Token) -> None:
        """Raises Fenced where a higher token is in the ledger."""
        self.entries()
        if self._state.token > token:
            raise Fenced(f"{self.prefix}: token {token} gave way to {self._state.token}")

    def claim(self, owner: dict[str, Any], after: int | None = None) -> Token:
        """Takes the stage over from whoever had it. Raises Fenced where another claim, or the result, came first.

        after: the epoch whose owner was found to be gone; None: whichever is the newest now.
        """
        self.entries()
        before = self._state.token[0] if after is None else after

        def next_token() -> Token:
            self._check_open()
            if self._state.token[0] > before:
                raise Fenced(f"{self.prefix}: another driver claimed it first")
            return before + 1, 0

        return self._put("claimed", next_token, {"owner": owner}).token

    def start_attempt(self, token: Token, workers: int) -> Token:
        """A new attempt under the claim of `token`. Raises Fenced where that claim is no longer the newest, or where a
        worker of an earlier attempt, given up too soon, completed the stage."""

        def next_token() -> Token:
            self._check_open()
            if self._state.token > token:
                raise Fenced(f"{self.prefix}: token {token} gave way to {self._state.token}")
            return token[0], token[1] + 1

        return self._put("attempt", next_token, {"workers": workers}).token

    def append(self, kind: str, token: Token, **fields: Any) -> Entry:
        """Adds an entry of a type in FIELDS ("failed" takes error_class=). Raises Fenced; nothing is written then."""
        if "error_class" in fields:
            fields["class"] = str(fields.pop("error_class"))
        fields |= {name: redact(fields[name]) for name in ("message", "reason") if name in fields}

        def same_token() -> Token:
            if self._state.token > token:
                raise Fenced(f"{self.prefix}: token {token} gave way to {self._state.token}")
            return token

        return self._put(kind, same_token, fields)

    def _check_open(self) -> None:
        if self._state.completed is not None:
            raise Fenced(f"{self.prefix}: it is completed")

    def _key(self, number: int) -> str:
        return f"{self.prefix}/ledger/{number:08d}.json"

    def _put(self, kind: str, token_now: Callable[[], Token], fields: dict[str, Any]) -> Entry:
        """Puts one entry at the first free number; token_now() is asked again after whatever came in between."""
        missing, more = set(FIELDS[kind]) - set(fields) - _OPTIONAL, set(fields) - set(FIELDS[kind])
        assert not missing and not more, f"a {kind} entry has the fields {FIELDS[kind]}, not {tuple(fields)}"
        nonce = uuid.uuid4().hex
        while True:
            self.entries()
            token, number = token_now(), len(self._entries)
            body = {
                "version": VERSION,
                "type": kind,
                "token": list(token),
                "nonce": nonce,
                "time": self.clock(),
                **fields,
            }
            with suppress(Exists):  # taken, perhaps by our own put: reading tells
                self._create(self._key(number), json.dumps(body, allow_nan=False).encode())
            self.entries()
            if self._entries[number].nonce == nonce:
                return self._entries[number]

    def _create(self, key: str, data: bytes) -> None:
        """A put that failed without an answer is tried again with the same bytes: it can only succeed once."""
        for tries_left in reversed(range(PUT_TRIES)):
            try:
                return self.store.put(key, data, create=True)
            except (ConnectionError, TimeoutError):
                if not tries_left:
                    raise


def _parse(data: bytes, number: int, where: str) -> Entry:
    """UserError where not even the token can be read. An entry that a newer Stageline wrote, of a type or with fields
    unknown here, counts with its token alone (`unknown`): it fences, and what it said is told as not understood."""
    damaged = "restore this file from a copy, or move the stage's folder away to start it anew"
    try:
        body = json.loads(data)
        version = body["version"]
        kind, (epoch, attempt) = body["type"], body["token"]
        if not (type(epoch) is type(attempt) is int and epoch >= 0 and attempt >= 0 and type(version) is int):
            raise ValueError("token")
        nonce, written = str(body["nonce"]), float(body["time"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"a damaged ledger entry ({error!r})", where=where, remedy=damaged) from None
    try:
        added = _ADDED if version < 2 else {}
        names = [name for name in FIELDS[kind] if name in body or name not in _OPTIONAL]
        fields = {name: body[name] if name in body else added[name] for name in names}
        if kind == "failed":
            ErrorClass(fields["class"])
        return Entry(number, kind, (epoch, attempt), nonce, written, fields)
    except (ValueError, TypeError, KeyError) as error:
        if version > VERSION:
            log.warning(
                "%s: a ledger entry of version %d, and this Stageline reads up to %d: what it says is left out; "
                "install the newer Stageline to use it", where, version, VERSION,
            )  # fmt: skip
            return Entry(number, "unknown", (epoch, attempt), nonce, written, {})
        raise UserError(f"a damaged ledger entry ({error!r})", where=where, remedy=damaged) from None
