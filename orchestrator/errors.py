"""The classes of error, and how to tell which one ended an attempt.

Invariant: classify() answers with the cause, not with what the cause did to others. Ray hands a failure over as
exceptions inside exceptions and as text (RayTaskError.cause, WorkerGroupError.worker_failures), and when
one rank fails, its peers report broken connections: so every rank's chain is read, and an error of our own or of
the user outranks a lost peer. What follows from each class is policy.py's business.
"""

import errno
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum

from modeling.errors import CheckpointError, DataError, UserError
from stages.errors import Diverged

__all__ = [
    "CheckpointError", "DataError", "Diverged", "ErrorClass", "Fenced", "Hang", "LostNode", "Preempted",
    "StorageTransient", "UserError", "causes", "classify", "one_line", "user_error",
]  # fmt: skip


class ErrorClass(StrEnum):
    user = "user"
    data = "data"
    out_of_memory = "out_of_memory"
    lost_node = "lost_node"
    preempted = "preempted"
    storage_transient = "storage_transient"
    diverged = "diverged"
    hang = "hang"
    fenced = "fenced"
    bug = "bug"


class Fenced(Exception):
    """A higher token is in the ledger: another driver, or a later attempt, owns the stage now. Stop at once."""


class Hang(Exception):
    """No rank made a step for longer than allowed."""


class Preempted(Exception):
    """The attempt stopped as asked, its work saved."""


class LostNode(Exception):
    """A worker, or the machine under it, went away."""


class StorageTransient(Exception):
    """The store did not answer, or asked for a slower pace."""


# In order of precedence within one worker's failure. Names are those of exception types, ours, Ray's and torch's.
_NAMES: tuple[tuple[ErrorClass, tuple[str, ...]], ...] = (
    (ErrorClass.fenced, ("Fenced",)),
    (ErrorClass.data, ("DataError",)),
    (ErrorClass.diverged, ("Diverged",)),
    (ErrorClass.user, ("UserError", "CheckpointError")),
    (ErrorClass.out_of_memory, ("OutOfMemoryError", "MemoryError")),
    (ErrorClass.hang, ("Hang", "NCCLHangError", "BroadcastCollectiveTimeoutError", "CollectiveTimeoutError")),
    (ErrorClass.preempted, ("Preempted", "PreemptionError")),
    (ErrorClass.storage_transient, (
        "StorageTransient", "SlowDown", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError",
        "ConnectionError", "TimeoutError",
    )),
    (ErrorClass.lost_node, (
        "LostNode", "ActorDiedError", "ActorUnavailableError", "RayActorError", "NodeDiedError", "WorkerCrashedError",
        "LocalRayletDiedError", "OwnerDiedError", "ObjectLostError", "ObjectReconstructionFailedError",
        "ActorPlacementGroupRemoved", "TaskPlacementGroupRemoved", "WorkerHealthCheckTimeoutError",
        "WorkerHealthCheckFailedError", "WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError",
        "DistNetworkError", "DistBackendError", "BrokenProcessPool",
    )),
)  # fmt: skip
_TEXTS: tuple[tuple[ErrorClass, re.Pattern[str]], ...] = (
    (ErrorClass.out_of_memory, re.compile(
        r"CUDA out of memory|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
        r"|running low on memory",  # not "OOM killer": Ray guesses at it whenever a worker dies
        re.I)),
    (ErrorClass.user, re.compile(r"No space left on device|Read-only file system|Disk quota exceeded")),
    (ErrorClass.hang, re.compile(r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for", re.I)),
    (ErrorClass.preempted, re.compile(r"interrupted by node preemption|node (was|is being) preempted", re.I)),
    (ErrorClass.lost_node, re.compile(
        r"(gloo|nccl|c10d|tcpstore|processgroup).*(Connection (reset|closed)|Broken pipe|time(d )?out"
        r"|remote process exited)"
        r"|Connection closed by peer|NCCL.*(remote error|system error)|SIGKILL|exit code 137|signal 9\b"
        r"|Worker exit type: SYSTEM_ERROR|The actor died|node .*(died|was terminated)", re.I)),
    (ErrorClass.storage_transient, re.compile(
        r"SlowDown|Connection reset by peer|ServiceUnavailable|InternalError|RequestTimeout|reduce your request rate"
        r"|Could not connect to the endpoint|\b50[0234] (Server Error|Service Unavailable|Bad Gateway)", re.I)),
)  # fmt: skip
_USER_ERRNOS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)
# Between the ranks of one attempt: a cause comes before what it does to its peers.
_PRECEDENCE = (
    ErrorClass.fenced, ErrorClass.data, ErrorClass.diverged, ErrorClass.user, ErrorClass.out_of_memory,
    ErrorClass.preempted, ErrorClass.bug, ErrorClass.hang, ErrorClass.storage_transient, ErrorClass.lost_node,
)  # fmt: skip
_TYPE_AT_LINE_START = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w+)(?=:|\(|$)", re.M)


def classify(error: BaseException | str | Iterable[BaseException | str]) -> ErrorClass:
    """The class of what ended an attempt.

    error: an exception with its causes, a traceback or type name as text, or several of them, one per worker.
    `bug` is what nothing else explains.
    """
    if isinstance(error, BaseException | str):
        workers = list(_workers(error))
    else:
        workers = [worker for one in error for worker in _workers(one)]
    return min((_classify_one(worker) for worker in workers), key=_PRECEDENCE.index, default=ErrorClass.bug)


def causes(error: BaseException) -> Iterator[BaseException | str]:
    """The error and all that it names as its causes, of every rank."""
    return (link for worker in _workers(error) for link in _chain(worker))


def one_line(error: BaseException, error_class: ErrorClass) -> str:
    """What ended an attempt, for people: the innermost cause of a rank whose failure has that class and says anything.
    Ray's own text begins with "Training failed due to worker errors"."""
    for worker in _workers(error):
        *_, innermost = _chain(worker)
        if str(innermost).strip() and _classify_one(worker) is error_class:
            return str(innermost).strip().splitlines()[0][:500]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def user_error(error: BaseException) -> UserError | None:
    """The user's mistake that ended an attempt, whichever rank met it; None where there is none."""
    return next((link for link in causes(error) if isinstance(link, UserError)), None)


def _workers(error: BaseException | str, seen: frozenset[int] = frozenset()) -> Iterator[BaseException | str]:
    """One failure per rank, where the error or something inside it is a group of them.

    seen: the groups that this error lies in; one may name the group as its cause.
    """
    for link in _chain(error):
        if id(link) in seen:
            continue
        failures = getattr(link, "worker_failures", None)
        if failures and type(link).__name__ != "NCCLHangError":
            for failure in failures.values():
                yield from _workers(failure, seen | {id(link)})
            return
        if isinstance(link, BaseExceptionGroup):
            for failure in link.exceptions:
                yield from _workers(failure, seen | {id(link)})
            return
    yield error


def _chain(error: BaseException | str) -> Iterator[BaseException | str]:
    """The error and everything that it names as its cause, outermost first."""
    seen: set[int] = set()
    todo: list[BaseException | str] = [error]
    while todo:
        link = todo.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseException):
            context = None if link.__suppress_context__ else link.__context__
            causes = (getattr(link, "cause", None), getattr(link, "controller_failure", None), link.__cause__, context)
            todo += [cause for cause in causes if isinstance(cause, BaseException)]


def _classify_one(error: BaseException | str) -> ErrorClass:
    names: set[str] = set()
    texts: list[str] = []
    for link in _chain(error):
        if isinstance(link, BaseException):
            names |= {base.__name__ for base in type(link).__mro__}
            if isinstance(link, OSError) and link.errno in _USER_ERRNOS:
                return ErrorClass.user
        texts.append(str(link))
    for text in texts:
        names |= set(_TYPE_AT_LINE_START.findall(text))
    for error_class, known in _NAMES[:-1]:
        if not names.isdisjoint(known):
            return error_class
    for error_class, pattern in _TEXTS:
        if any(pattern.search(text) for text in texts):
            return error_class
    last, known = _NAMES[-1]
    return last if not names.isdisjoint(known) else ErrorClass.bug
