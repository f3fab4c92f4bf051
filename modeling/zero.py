"""What a `deepspeed:` setting says, without DeepSpeed: the ZeRO stage and whether the optimizer is offloaded."""

import json
from pathlib import Path
from typing import Any


def _zero(setting: int | Path) -> dict[str, Any]:
    if isinstance(setting, int):
        return {"stage": setting}
    try:
        zero = json.loads(setting.read_text()).get("zero_optimization")
    except (OSError, ValueError, AttributeError):  # the engine says what is wrong with it
        return {}
    return zero if isinstance(zero, dict) else {}


def zero_stage(setting: int | Path) -> int:
    """0 to 3. setting: a ZeRO stage, or the path of a DeepSpeed JSON."""
    stage = _zero(setting).get("stage", 0)
    return stage if isinstance(stage, int) else 0


def offloaded(setting: int | Path) -> bool:
    """Whether the optimizer's state lies in host memory."""
    device = _zero(setting).get("offload_optimizer")
    return isinstance(device, dict) and device.get("device", "none") != "none"
