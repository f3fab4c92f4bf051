"""The learning rate: a pure function of the step.

Cosine with linear warmup, as transformers' get_cosine_schedule_with_warmup (the official scripts' scheduler). The
horizon is where the cosine ends, apart from where a stage stops: the paper's stages 1 and 1.5 stop early on a
100,000-step cosine (shell/internvl2.5/stage1*).
"""

import math


def learning_rate(step: int, peak: float, warmup: int, horizon: int, floor: float = 0.0) -> float:
    """The rate used by optimizer step `step` (0-based). Past the horizon it stays at `floor`."""
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, horizon - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
