"""Which layers run again in the backward pass: `checkpointing: auto` recomputes only what memory asks for.

The estimate is `plan`'s (modeling/estimate.py), against the memory of this device. Every rank must come to the same
answer only under ZeRO 3, where recomputing is a collective: so all take the union.
"""

import socket
from typing import Any

import psutil
import torch
import torch.distributed as dist

from modeling.estimate import choose_checkpointing, measure, memory

BOTH = ("vit", "language")
SMALL = 50_000_000  # parameters of a model on a CPU that is not worth the second of estimating
SHARE = 0.9  # of a device's memory that is planned with


def device_bytes() -> float:
    """Memory that a rank may use: its GPU's, or its share of what is available on this host."""
    if torch.cuda.is_available():
        return SHARE * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return SHARE * psutil.virtual_memory().available / hosts.count(socket.gethostname())


def checkpointed(model: Any, params: Any, zero: int) -> tuple[str, ...]:
    """Modules to recompute, for a full row of the stage's packing. All ranks."""
    if params.checkpointing != "auto":
        return BOTH if params.checkpointing == "all" else ()
    sizes = measure(model)
    if not torch.cuda.is_available() and sizes.total < SMALL:
        return ()
    vision, language = model.config.vision_config.to_dict(), model.config.text_config.to_dict()

    def cost_of(modules: tuple[str, ...]) -> Any:
        return memory(
            sizes, vision, language, params.train, precision=params.precision, zero=zero, world=dist.get_world_size(),
            max_tokens=params.packing.max_tokens, max_tiles=params.packing.max_tiles, checkpointed=modules,
            fused=params.fused and torch.cuda.is_available(),
        )  # fmt: skip

    chosen = choose_checkpointing(device_bytes(), cost_of)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, BOTH if chosen is None else chosen)
    return tuple(module for module in BOTH if any(module in one for one in everyones))
