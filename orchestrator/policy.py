"""What follows a failed attempt: again after a delay, or the end.

Invariant: a pure function of the error's class and of the failures since the last progress, which are in the
ledger: so budgets survive the driver (design.md, "Preemption"; Ray keeps its own in memory and starts
again at zero). Progress is a checkpoint further on than any before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import ErrorClass


@dataclass(frozen=True)
class Limits:
    free_losses: int = 5  # preemptions and lost nodes in a row, without progress, before back-off sets in
    storage_retries: int = 6
    hang_retries: int = 2
    first_delay_s: float = 2.0  # doubled each time
    longest_delay_s: float = 300.0


@dataclass(frozen=True)
class Retry:
    delay_s: float


@dataclass(frozen=True)
class GiveUp:
    reason: str


_FINAL = {
    ErrorClass.user: "the experiment needs a change",
    ErrorClass.data: "the data needs a change",
    ErrorClass.out_of_memory: "the same attempt would need the same memory; lower packing.max_tokens or max_tiles, "
    "raise the ZeRO stage or use more workers",
    ErrorClass.diverged: "the loss is no longer finite; lower lr or lengthen the warmup",
    ErrorClass.fenced: "another driver runs this stage now",
    ErrorClass.bug: "an unexpected error, which trying again would only repeat",
}
_LOSSES = (ErrorClass.preempted, ErrorClass.lost_node)


def decide(error_class: ErrorClass, history: Sequence[ErrorClass], limits: Limits = Limits()) -> Retry | GiveUp:
    """history: the classes of the earlier failures since the last progress, oldest first, without this one."""
    if error_class in _FINAL:
        return GiveUp(_FINAL[error_class])
    if error_class in _LOSSES:
        losses = sum(past in _LOSSES for past in history) + 1
        return Retry(0.0 if losses <= limits.free_losses else _back_off(losses - limits.free_losses, limits))
    count = sum(past is error_class for past in history) + 1
    if error_class is ErrorClass.hang:
        if count > limits.hang_retries:
            return GiveUp(f"it hung {count} times without progress")
        return Retry(limits.first_delay_s)
    assert error_class is ErrorClass.storage_transient, f"{error_class} has no policy"
    if count > limits.storage_retries:
        return GiveUp(f"storage or a service failed {count} times without progress")
    return Retry(_back_off(count, limits))


def _back_off(nth: int, limits: Limits) -> float:
    return min(limits.first_delay_s * 2 ** min(nth - 1, 30), limits.longest_delay_s)
