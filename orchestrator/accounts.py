"""What a stage's time went into: goodput, steps lost, time to resume, the cause of every attempt's end.

Invariant: a fold over the ledger alone, so it says the same when the cluster is gone. Goodput is the time of the steps
in the surviving lineage, each counted once, over the wall time since the stage was first claimed (docs/design.md, "What
a user sees"). Times are those that the writers' clocks gave: compare them within a machine or with clocks in step.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from orchestrator.ledger import Entry, Token


@dataclass
class Attempt:
    """Times are wall clock seconds, None where the ledger does not say. Steps are optimizer steps."""

    token: Token
    workers: int
    began: float
    resumed_from: int | None = None  # None: it made no step
    first_step: float | None = None  # when its first step was made
    ended: float | None = None
    cause: str = ""  # completed, preempted, an error class; empty while it runs
    message: str = ""
    reached: int = 0  # the last step known to have been trained
    lost: int = 0  # steps it trained that the next attempt trained again
    heard: float = 0.0  # when it wrote its newest entry: its end, unless its driver was lost
    useful_s: float = 0.0  # of its steps that survive


@dataclass
class Account:
    began: float | None = None
    until: float | None = None  # of the newest entry
    useful_s: float = 0.0  # of the steps that survive
    completed: bool = False
    attempts: list[Attempt] = field(default_factory=list)

    def wall_s(self, now: float | None = None) -> float:
        """Since the first claim: to the end of a completed stage, else to `now` or the newest entry."""
        if self.began is None or self.until is None:
            return 0.0
        return (self.until if self.completed or now is None else max(now, self.until)) - self.began

    def goodput(self, now: float | None = None) -> float | None:
        """None where nothing was committed yet."""
        wall = self.wall_s(now)
        return self.useful_s / wall if wall > 0 and self.useful_s > 0 else None

    @property
    def steps_lost(self) -> int:
        return sum(attempt.lost for attempt in self.attempts)

    @property
    def resumes_s(self) -> list[float]:
        """From the end of each attempt to the first step of the next one that made a step."""
        out, ended = [], None
        for attempt in self.attempts:
            if ended is not None and attempt.first_step is not None:
                out.append(attempt.first_step - ended)
                ended = None
            if attempt.ended is not None and ended is None and attempt.cause != "completed":
                ended = attempt.ended
        return out

    @property
    def resume_s(self) -> float | None:
        """The median of resumes_s."""
        return median(self.resumes_s) if self.resumes_s else None

    @property
    def causes(self) -> Counter[str]:
        return Counter(attempt.cause for attempt in self.attempts if attempt.cause not in ("", "completed"))


def account(entries: Iterable[Entry]) -> Account:
    """The fold. Void entries, of a token lower than one before them, change nothing."""
    out, highest = Account(), (0, 0)
    segments: list[tuple[int, Token, float]] = []  # (last step, token, seconds) of what was committed
    for entry in entries:
        if entry.token < highest:
            continue
        highest = entry.token
        out.began = entry.time if out.began is None else out.began
        if not out.completed and entry.type != "retired":
            out.until = entry.time
        last = out.attempts[-1] if out.attempts else None
        if last is not None and entry.token == last.token and not out.completed and entry.type != "retired":
            last.heard = entry.time
        if entry.type == "attempt":
            out.attempts.append(Attempt(entry.token, entry.fields["workers"], entry.time, heard=entry.time))
        elif entry.type == "started" and last is not None:
            step = entry.fields["step"]
            last.resumed_from, last.first_step = step, entry.time
            last.reached = max(last.reached, step + 1)
            segments = [part for part in segments if part[0] <= step or part[1] == entry.token]
            _count_lost(out.attempts, step)
        elif entry.type == "checkpoint":
            segments.append((entry.fields["step"], entry.token, entry.fields["train_s"]))
            if last is not None:
                last.reached = max(last.reached, entry.fields["step"])
        elif entry.type in ("failed", "preempted") and last is not None and last.ended is None:
            last.ended = entry.time
            last.cause = entry.fields["class"] if entry.type == "failed" else "preempted"
            last.message = entry.fields["message"] if entry.type == "failed" else entry.fields["reason"]
            last.reached = max(last.reached, entry.fields["step"])
        elif entry.type == "completed" and not out.completed:
            out.completed = True
            segments.append((entry.fields["summary"].get("steps", 0), entry.token, entry.fields["train_s"]))
            if last is not None:
                last.ended, last.cause = entry.time, "completed"
    out.useful_s = sum(seconds for _, _, seconds in segments)
    for attempt in out.attempts:
        attempt.useful_s = sum(seconds for _, token, seconds in segments if token == attempt.token)
    return out


def _count_lost(attempts: list[Attempt], resumed_from: int) -> None:
    """The attempts before the newest trained again from `resumed_from` on."""
    for earlier in attempts[:-1]:
        if earlier.reached > resumed_from:
            earlier.lost += earlier.reached - resumed_from
            earlier.reached = resumed_from
