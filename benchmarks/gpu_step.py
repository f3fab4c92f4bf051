"""InternVL 2.5 1B on one GPU, random weights, full rows of the recipe: tokens per second, MFU, peak memory per stage.

    python benchmarks/gpu_step.py --output gpu_step.json

The product's own loss module and engine (DeepSpeed, bf16, one rank), without Ray and without decoding: rows of 16,384
tokens and up to 48 tiles as the packer makes them of the mixture stated in lengths.py, random text and pixels. FLOPs
are those of what a stage differentiates (modeling/estimate.py). The peak that torch saw is printed beside the estimate
that decides what is recomputed. Exit code 1 below the aims (tokens per second on an H100), 2 without a GPU.
"""

import argparse
import json
import os
import random
import socket
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lengths import sft

from modeling.attention import Segments
from modeling.batches import Batch, Counts
from modeling.engine import Engine
from modeling.estimate import measure, memory, peak_flops, skeleton, step_flops
from modeling.freeze import set_trainable
from modeling.internvl import TrainingLoss
from modeling.packing import plan_packs
from modeling.presets import language_fields, vision_fields
from stages.recompute import checkpointed

STAGES = {"mlp_warmup": ("mlp",), "vit_incremental": ("vit", "mlp"), "full_finetune": ("vit", "mlp", "language")}
AIMS = {"mlp_warmup": 100_000, "vit_incremental": 45_000, "full_finetune": 40_000}  # tokens per second on an H100
MAX_TOKENS, MAX_TILES = 16384, 48
WARM_UP = 4  # steps, one of each row
DROP_PATH = 0.1  # of the 1B's ViT incremental learning and full finetune
VISION, LANGUAGE = vision_fields("internvit-300m"), language_fields("qwen2.5-0.5b")


def packs(rows: int, seed: int) -> list[tuple[list[int], int]]:
    """(tokens of each sample, tiles) of some rows: the stated fine-tuning mixture, packed by the product's packer."""
    mixture = sft(20_000, seed)
    packed = plan_packs(mixture.tokens, mixture.tiles, MAX_TOKENS, MAX_TILES, seed)
    chosen = [packed[number] for number in random.Random(seed).sample(range(len(packed)), rows)]
    return [(mixture.tokens[pack].tolist(), int(mixture.tiles[pack].sum())) for pack in chosen]


def row(lengths: list[int], tiles: int, depth: int, device: torch.device) -> tuple[Batch, dict[str, float]]:
    total = sum(lengths)
    ids = torch.randint(10, 150_000, (1, total))
    ids[0, : tiles * 256] = 0
    places = torch.arange(total - total // 6, total - 1)
    batch = Batch(
        input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None], segments=Segments.of(lengths),
        positions=places, targets=ids[0, places + 1], weights=torch.ones(len(places)),
        pixels=torch.randn(tiles, 3, 448, 448), uniforms=torch.rand(tiles, depth, 2), counts=Counts(),
    )  # fmt: skip
    squares = float(sum(n * n for n in lengths))
    return batch.to(device), {"tokens": total, "squares": squares, "supervised": len(places), "tiles": tiles}


def run(stage: str, steps: int, seed: int, recompute: str, compiled: bool, profile: bool) -> dict[str, Any]:
    """One stage, in a model of its own."""
    train = STAGES[stage]
    torch.manual_seed(seed)
    torch.cuda.reset_peak_memory_stats()
    model = skeleton(VISION, LANGUAGE).to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                size = 2 * len(module.inv_freq)
                module.inv_freq.copy_(1e6 ** (-torch.arange(0, size, 2) / size))
    set_trainable(model, train)
    sizes = measure(model)
    params = SimpleNamespace(
        checkpointing=recompute, train=train, precision="bf16", fused=compiled,
        packing=SimpleNamespace(max_tokens=MAX_TOKENS, max_tiles=MAX_TILES),
    )  # fmt: skip
    chosen = checkpointed(model, params, 1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    loss = TrainingLoss(model, train, DROP_PATH if "vit" in train else 0.0, chosen, fused=compiled)
    engine = Engine(loss, names, setting=1, precision="bf16", accumulation=1, weight_decay=0.01, betas=(0.9, 0.999),
                    eps=1e-8, max_grad_norm=1.0)  # fmt: skip
    depth = model.config.vision_config.num_hidden_layers
    rows = [row(*pack, depth, engine.device) for pack in packs(WARM_UP, seed)]
    seconds, flops, tokens, losses = [], [], [], []

    def step_of(batch: Batch) -> torch.Tensor:
        value = engine.engine(batch) / len(batch.targets)
        engine.backward(value)
        engine.step(lr=1e-5)
        return value

    for step in range(steps + WARM_UP):
        batch, counts = rows[step % len(rows)]
        torch.cuda.synchronize()
        before = time.perf_counter()
        value = step_of(batch)
        torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - before)
            tokens.append(counts["tokens"])
            flops.append(step_flops(sizes, train, **counts))
            losses.append(float(value.detach()))
    if profile:
        with torch.profiler.profile() as seen:
            step_of(rows[0][0])
            torch.cuda.synchronize()
        print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70))
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    rate = sum(flops) / sum(seconds)
    estimate = memory(sizes, VISION, LANGUAGE, train, precision="bf16", zero=1, world=1, max_tokens=MAX_TOKENS,
                      max_tiles=MAX_TILES, checkpointed=chosen, fused=compiled)  # fmt: skip
    return {
        "tokens_per_second": sum(tokens) / sum(seconds), "step_s": median(seconds),
        "mfu": rate / peak if peak else None, "recomputed": chosen, "loss": losses[-1],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "estimated_gb": estimate.total / 1e9,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", choices=["auto", "none", "all"], default="auto")
    parser.add_argument("--plain", action="store_true", help="as with `compile: false`")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the time of one more step")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU on this machine", file=sys.stderr)
        return 2
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    dist.init_process_group("nccl")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {options.seed}")
    results, missed = {}, []
    for stage in options.stages:
        results[stage] = found = run(
            stage, options.steps, options.seed, options.checkpointing, not options.plain, options.profile
        )
        mfu = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
        print(f"{stage}: {found['tokens_per_second']:,.0f} tokens/s (aim {AIMS[stage]:,}){mfu}, recomputed "
              f"{', '.join(found['recomputed']) or 'nothing'}, peak {found['peak_gb']:.1f} GB, estimated "
              f"{found['estimated_gb']:.1f} GB", flush=True)  # fmt: skip
        if found["tokens_per_second"] < AIMS[stage]:
            missed.append(stage)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    print("holds" if not missed else f"MISSED: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
