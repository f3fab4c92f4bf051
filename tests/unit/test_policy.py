"""From an exception as Ray hands it over to what happens next."""

import pytest

from modeling.errors import CheckpointError, UserError
from orchestrator.errors import (
    DataError,
    Diverged,
    ErrorClass,
    Fenced,
    Hang,
    LostNode,
    Preempted,
    StorageTransient,
    classify,
    one_line,
)
from orchestrator.policy import GiveUp, Limits, Retry, decide

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.1]:41232")
GLOO_START = RuntimeError(
    "Gloo connectFullMesh failed with [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:152] timed out "
    "connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:28058$0"
)
ACTOR_DIED = (
    "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task. Worker unexpectedly exits "
    "with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM "
    "killer due to high memory usage, (2) ray stop --force was called."
)
IN_THE_SOURCE = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\n    raise UserError("x")\nKeyError: 3'


class WorkerGroupError(Exception):
    """As ray.train's: what failed is an attribute, its text repeats all of it."""

    def __init__(self, **failures):
        super().__init__("Training failed due to worker errors:\n" + "\n".join(map(str, failures.values())))
        self.worker_failures = dict(enumerate(failures.values()))


class RayTaskError(Exception):
    def __init__(self, cause):
        super().__init__(f"ray::f() (pid=1)\nTraceback (most recent call last):\n{type(cause).__name__}: {cause}")
        self.cause = cause


class OutOfMemoryError(RuntimeError):
    pass


def caused(outer: Exception, by: Exception) -> Exception:
    outer.__cause__ = by
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x"), "user"),
        (CheckpointError("x"), "user"),
        (DataError("x"), "data"),
        (Diverged(3, "loss", float("nan"), ["a"]), "diverged"),
        (Fenced("x"), "fenced"),
        (Hang("x"), "hang"),
        (Preempted("x"), "preempted"),
        (LostNode("x"), "lost_node"),
        (StorageTransient("x"), "storage_transient"),
        (KeyError("lr"), "bug"),
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out_of_memory"),
        ("Task was killed due to the node running low on memory.", "out_of_memory"),
        (GLOO, "lost_node"),
        (GLOO_START, "lost_node"),
        (ACTOR_DIED, "lost_node"),
        ("NodeDiedError", "lost_node"),
        ("ray.train.ControllerError: x\nWorkerGroupStartupTimeoutError: no room in 20 s", "lost_node"),
        ("Worker exit type: SYSTEM_ERROR; killed by SIGKILL", "lost_node"),
        ("ray.train.PreemptionError: Training was interrupted by node preemption", "preempted"),
        ("botocore.exceptions.ClientError: An error occurred (SlowDown) when calling PutObject", "storage_transient"),
        (ConnectionResetError(104, "Connection reset by peer"), "storage_transient"),
        (OSError(28, "No space left on device"), "user"),
        (IN_THE_SOURCE, "bug"),
        (RayTaskError(DataError("x")), "data"),
        (RayTaskError(KeyError("x")), "bug"),
        (caused(RuntimeError("upload failed"), ConnectionResetError(104, "reset")), "storage_transient"),
        (WorkerGroupError(a=RayTaskError(Diverged(1, "gradient norm", float("inf"), [])), b=GLOO), "diverged"),
        (WorkerGroupError(a=GLOO, b=RayTaskError(KeyError("x"))), "bug"),
        (WorkerGroupError(a=GLOO, b=GLOO), "lost_node"),
        (caused(RuntimeError("attempt failed"), WorkerGroupError(a=GLOO, b=DataError("x"))), "data"),
        ([GLOO, "torch.OutOfMemoryError: CUDA out of memory"], "out_of_memory"),
        (ExceptionGroup("two", [GLOO, UserError("x")]), "user"),
        ([], "bug"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_cause_is_found(error, expected):
    assert classify(error) == ErrorClass(expected)


def test_a_context_that_was_handled_counts_unless_suppressed():
    try:
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError:
            raise KeyError("x") from None
    except KeyError as error:
        assert classify(error) is ErrorClass.bug


def outcomes(error_class: ErrorClass, tries: int) -> list[Retry | GiveUp]:
    return [decide(error_class, [error_class] * n) for n in range(tries)]


def test_one_line_says_what_ended_it_not_what_that_did_to_others():
    lost = WorkerGroupError(a=RayTaskError(GLOO), b=RuntimeError(ACTOR_DIED))
    assert one_line(lost, classify(lost)) == str(GLOO)
    stopped = WorkerGroupError(a=RayTaskError(Preempted("")), b=RayTaskError(Preempted("SIGTERM: saved")))
    assert one_line(stopped, classify(stopped)) == "SIGTERM: saved"
    spoilt = WorkerGroupError(a=RayTaskError(GLOO), b=RayTaskError(Diverged(3, "loss", float("nan"), ["s7"])))
    assert "s7" in one_line(spoilt, classify(spoilt))
    assert one_line(KeyError(), ErrorClass.bug) == "KeyError"


@pytest.mark.parametrize("name", ["user", "data", "out_of_memory", "diverged", "bug", "fenced"])
def test_what_trying_again_would_repeat_is_given_up_with_a_reason(name):
    decision = decide(ErrorClass(name), [])
    assert isinstance(decision, GiveUp) and decision.reason


@pytest.mark.parametrize("name", ["preempted", "lost_node"])
def test_losses_are_retried_at_once_and_for_ever(name):
    delays = [d.delay_s for d in outcomes(ErrorClass(name), 200) if isinstance(d, Retry)]
    assert len(delays) == 200
    assert delays[:5] == [0.0] * 5 and 0 < delays[5] < delays[6]
    assert max(delays) == Limits().longest_delay_s


def test_losses_of_both_kinds_count_together():
    mixed = [ErrorClass.preempted, ErrorClass.lost_node] * 3
    assert decide(ErrorClass.lost_node, mixed) == Retry(4.0)
    assert decide(ErrorClass.lost_node, [ErrorClass.hang, ErrorClass.storage_transient] * 9) == Retry(0.0)


def test_storage_and_hangs_have_budgets():
    storage = outcomes(ErrorClass.storage_transient, 7)
    assert [d.delay_s for d in storage[:6] if isinstance(d, Retry)] == [2, 4, 8, 16, 32, 64]
    assert isinstance(storage[6], GiveUp)
    assert [type(d) for d in outcomes(ErrorClass.hang, 3)] == [Retry, Retry, GiveUp]


def test_every_class_has_a_policy():
    assert all(isinstance(decide(error_class, []), Retry | GiveUp) for error_class in ErrorClass)
