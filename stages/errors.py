"""Errors of a running stage that are neither the user's typing nor the machine's loss."""

import math
from collections.abc import Sequence

from modeling.errors import UserError


class Diverged(UserError):
    """A loss that is not finite, seen by all ranks alike before the weights were touched."""

    def __init__(self, step: int, loss: float, ids: Sequence[str]):
        what = "NaN" if math.isnan(loss) else "infinite"
        shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
        super().__init__(
            f"the loss of step {step} is {what}; samples of this rank: {shown}",
            remedy="lower lr, lengthen schedule.warmup or look at these samples; the last checkpoint is kept",
        )
