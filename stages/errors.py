"""Errors of a running stage that are neither the user's typing nor the machine's loss."""

import math
from collections.abc import Sequence

from modeling.errors import UserError


class Diverged(UserError):
    """A loss or a gradient norm that is not finite, seen by all ranks alike and before anything of it is saved."""

    def __init__(self, step: int, what: str, value: float, ids: Sequence[str]):
        kind = "NaN" if math.isnan(value) else "infinite"
        shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
        super().__init__(
            f"the {what} of step {step} is {kind}; samples of this rank: {shown}",
            remedy="lower lr, lengthen schedule.warmup or look at these samples; the last checkpoint is kept",
        )
