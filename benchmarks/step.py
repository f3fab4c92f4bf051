"""The training step beside transformers' own, on the same samples: real tokens per second, peak memory, losses.

    python benchmarks/step.py --folder /tmp/step --output step.json

Four sides, each in a process of its own, on lengths drawn as a fine-tuning mixture's (arXiv 2412.05271 §4.1; see
`draw`), for each of the three stages of the recipe:
  stageline   packed rows: the product's own loss module and engine (DeepSpeed, one rank)
  padded      (a) transformers' Trainer, padded batches in random order, the best of --batches
  grouped     (a) the same with batches of like lengths (length grouping)
  packed      (b) transformers' model on the same packed rows: every layer recomputed, logits at every position
All at learning rate zero, so that every side must report the same mean loss over all supervised tokens. Decoding is not
part of it (loader.py measures that): pixels are made once. Prints seed, machine and figures; exit code 1 where an aim
(ratios AIMS of real tokens per second) is missed or a loss differs.
"""

import argparse
import json
import os
import platform
import random
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
STAGES = {"mlp_warmup": ("mlp",), "vit_incremental": ("vit", "mlp"), "full_finetune": ("vit", "mlp", "language")}
AIMS = {  # of stageline over the other, in real tokens per second
    "mlp_warmup": {"padded": 2.0, "packed": 1.3}, "vit_incremental": {"padded": 2.0, "packed": 1.3},
    "full_finetune": {"packed": 1.15},
}  # fmt: skip
CLOSE = 1e-4  # relative, between the losses
VISION = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=224,
              patch_size=14, attention_bias=True, layer_scale_init_value=1.0)  # fmt: skip
LANGUAGE = dict(model_type="qwen2", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                intermediate_size=1408, vocab_size=32768, max_position_embeddings=8192)  # fmt: skip
PER_TILE = 64
IMAGE = 0  # the id of an image token


def draw(seed: int, tokens: int) -> list[tuple[int, int]]:
    """(text tokens, tiles) of samples, about `tokens` tokens in all.

    By tokens about as the mixture of 2.5: single image 46 %, several images 9 %, video 40 %, text 5 %. At a quarter of
    the recipe's lengths, with 64 tokens a tile: 1 to 7 tiles, 2 to 8 frames; texts log-normal around 90 tokens.
    """
    rng, out, total = random.Random(seed), [], 0
    while total < tokens:
        kind = rng.choices(("single", "several", "video", "text"), (0.60, 0.06, 0.22, 0.12))[0]
        single, several, video = rng.choice((1, 1, 1, 3, 4, 5, 7)), rng.randint(4, 10), rng.randint(4, 16)
        tiles = {"single": single, "several": several, "video": video, "text": 0}[kind]
        text = min(1024, max(16, int(rng.lognormvariate(4.5, 0.9))))
        out.append((text, tiles))
        total += text + tiles * PER_TILE
    return out


def build():
    """The model of both sides: its weights depend on the seed alone. fp32."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    torch.manual_seed(0)
    text = {key: value for key, value in LANGUAGE.items() if key != "model_type"}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION, use_mean_pooling=True),
        text_config=Qwen2Config(**text, tie_word_embeddings=False),
        image_token_id=IMAGE, image_seq_length=PER_TILE, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def samples(lengths: list[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    """input_ids, labels (the last third is supervised), pixels of each sample."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    out = []
    for text, tiles in lengths:
        ids = torch.randint(1, LANGUAGE["vocab_size"], (text,), generator=generator)
        ids = torch.cat([ids[:4], torch.full((tiles * PER_TILE,), IMAGE), ids[4:]])
        labels = ids.clone()
        labels[: len(ids) - max(4, text // 3)] = -100
        out.append({"ids": ids, "labels": labels, "pixels": torch.randn(tiles, 3, 224, 224, generator=generator)})
    return out


def packs_of(lengths: list[tuple[int, int]], max_tokens: int, max_tiles: int) -> list[list[int]]:
    from modeling.packing import plan_packs

    tokens, tiles = [text + n * PER_TILE for text, n in lengths], [n for _, n in lengths]
    return [pack.tolist() for pack in plan_packs(tokens, tiles, max_tokens, max_tiles, seed=0)]


def stageline(data, packs, train) -> tuple[float, float]:
    """(seconds, mean loss) of one pass, a step per row."""
    import torch
    import torch.distributed as dist

    from modeling.attention import Segments
    from modeling.batches import Batch, Counts
    from modeling.engine import Engine
    from modeling.freeze import set_trainable
    from modeling.internvl import TrainingLoss

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    dist.init_process_group("gloo")
    model = build()
    set_trainable(model, train)
    names = {parameter: name for name, parameter in model.named_parameters()}
    loss = TrainingLoss(model, train)
    engine = Engine(loss, names, setting=0, precision="fp32", accumulation=1, weight_decay=0.0, betas=(0.9, 0.999),
                    eps=1e-8, max_grad_norm=1.0)  # fmt: skip

    def row(pack: list[int]) -> Batch:
        chosen = [data[i] for i in pack]
        sizes = [len(sample["ids"]) for sample in chosen]
        labels = torch.cat([sample["labels"] for sample in chosen])
        places = (labels != -100).nonzero().flatten()
        pixels = torch.cat([sample["pixels"] for sample in chosen])
        return Batch(
            input_ids=torch.cat([sample["ids"] for sample in chosen])[None],
            position_ids=torch.cat([torch.arange(size) for size in sizes])[None], segments=Segments.of(sizes),
            positions=places - 1, targets=labels[places], weights=torch.ones(len(places)),
            pixels=pixels if len(pixels) else None, uniforms=None, counts=Counts(),
        )  # fmt: skip

    total = weight = 0.0

    def step(pack: list[int]) -> None:
        nonlocal total, weight
        batch = row(pack)
        value = loss(batch)
        engine.backward(value / len(batch.targets))
        engine.step(lr=0.0)
        total, weight = total + float(value.detach()), weight + len(batch.targets)

    step(packs[0][:2])  # the first step allocates and compiles
    total = weight = 0.0
    before = time.perf_counter()
    for pack in packs:
        step(pack)
    return time.perf_counter() - before, total / weight


def packed(data, packs, train) -> tuple[float, float]:
    """transformers alone on packed rows: samples apart by restarting positions, recomputation, all logits."""
    import torch
    from torch.nn import functional as F

    from modeling.freeze import set_trainable

    model = build()
    set_trainable(model, train)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "language" not in train:
        model.enable_input_require_grads()  # as its Trainer and PEFT do, or nothing would reach the projector
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    total = weight = 0.0

    def step(pack: list[int]) -> None:
        nonlocal total, weight
        chosen = [data[i] for i in pack]
        labels = torch.cat([sample["labels"] for sample in chosen])
        pixels = torch.cat([sample["pixels"] for sample in chosen])
        positions = torch.cat([torch.arange(len(sample["ids"])) for sample in chosen])[None]
        ids = torch.cat([sample["ids"] for sample in chosen])[None]
        out = model(
            input_ids=ids, position_ids=positions, pixel_values=pixels if len(pixels) else None, use_cache=False
        )
        value = F.cross_entropy(out.logits[0, :-1].float(), labels[1:], ignore_index=-100)
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count = int((labels[1:] != -100).sum())
        total, weight = total + float(value.detach()) * count, weight + count

    step(packs[0][:2])
    total = weight = 0.0
    before = time.perf_counter()
    for pack in packs:
        step(pack)
    return time.perf_counter() - before, total / weight


def padded(data, train, size: int, grouped: bool, folder: Path) -> tuple[float, float]:
    """transformers' Trainer on padded batches of `size` samples."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from modeling.freeze import set_trainable

    model = build()
    set_trainable(model, train)
    seen: list[tuple[float, int]] = []

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(sample["ids"]) for sample in chosen)
        ids = torch.ones(len(chosen), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, sample in enumerate(chosen):
            size = len(sample["ids"])
            ids[row, :size], labels[row, :size], mask[row, :size] = sample["ids"], sample["labels"], 1
        pixels = torch.cat([sample["pixels"] for sample in chosen])
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return batch | ({"pixel_values": pixels} if len(pixels) else {})

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return data[index]

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args, state, control, **_) -> None:
            if state.global_step == 0:
                self.began = time.perf_counter()

    class Counting(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            value = super().compute_loss(model, inputs, *args, **kwargs)
            if not isinstance(value, tuple) and not value.requires_grad:  # only text, and only the projector trains
                value = value + 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
            count = int((inputs["labels"][:, 1:] != -100).sum())
            seen.append((float((value[0] if isinstance(value, tuple) else value).detach()), count))
            return value

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=size, num_train_epochs=1, learning_rate=0.0,
        weight_decay=0.0, save_strategy="no", report_to=[], logging_strategy="no", use_cpu=True, seed=0,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = Counting(model=model, args=arguments, train_dataset=Data(), data_collator=collate, callbacks=[clock])
    if grouped:
        trainer._get_train_sampler = lambda *_: _grouped_sampler(data, size)
    trainer.train()
    seconds = time.perf_counter() - clock.began
    return seconds, sum(value * count for value, count in seen) / sum(count for _, count in seen)


def _grouped_sampler(data, size: int):
    from transformers.trainer_pt_utils import LengthGroupedSampler

    return LengthGroupedSampler(size, lengths=[len(sample["ids"]) for sample in data])


def side(options: argparse.Namespace) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    lengths = draw(options.seed, options.tokens)
    data, train = samples(lengths, options.seed), STAGES[options.stage]
    packs = packs_of(lengths, options.max_tokens, options.max_tiles)
    if options.side == "stageline":
        seconds, loss = stageline(data, packs, train)
    elif options.side == "packed":
        seconds, loss = packed(data, packs, train)
    else:
        seconds, loss = padded(data, train, options.batch, options.side == "grouped", options.folder)
    tokens = sum(len(sample["ids"]) for sample in data)
    return {
        "seconds": seconds, "tokens_per_second": tokens / seconds, "loss": loss, "rows": len(packs),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip


def measure(options: argparse.Namespace, name: str, stage: str, batch: int = 0) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(options.folder), "--side", name, "--stage", stage]
    command += ["--batch", str(batch), "--seed", str(options.seed), "--tokens", str(options.tokens)]
    command += ["--max-tokens", str(options.max_tokens), "--max-tiles", str(options.max_tiles)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> int:
    count = sum(parameter.numel() for parameter in build().parameters())
    lengths = draw(options.seed, options.tokens)
    tokens = [text + tiles * PER_TILE for text, tiles in lengths]
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seed {options.seed}")
    print(f"{count / 1e6:.1f} M parameters, {len(tokens)} samples of {min(tokens)} to {max(tokens)} tokens")
    print(f"{sum(tokens)} tokens in all; rows of {options.max_tokens} tokens and {options.max_tiles} tiles")
    batches, results, misses = options.batches, {}, []
    for stage in options.stages:
        found: dict[str, list[dict[str, float]]] = {}
        best = {}
        for name in ("padded", "grouped"):
            tried = {size: measure(options, name, stage, size) for size in batches}
            best[name] = max(tried, key=lambda size: tried[size]["tokens_per_second"])
            found[name] = [tried[best[name]]]
            told = ", ".join(f"{size}: {run['tokens_per_second']:.0f}" for size, run in tried.items())
            print(f"{stage} {name}: tokens/s by batch size {told}", flush=True)
        for number in range(options.rounds):
            for name in ("stageline", "packed", *(() if number == 0 else ("padded", "grouped"))):
                found.setdefault(name, []).append(measure(options, name, stage, best.get(name, 0)))
        rates = {name: median(run["tokens_per_second"] for run in runs) for name, runs in found.items()}
        for name, runs in found.items():
            ratio, aim = rates["stageline"] / rates[name], AIMS[stage].get(name)
            difference = abs(runs[0]["loss"] / found["stageline"][0]["loss"] - 1)
            print(f"{stage:16} {name:10} {rates[name]:8.0f} tokens/s  stageline is {ratio:5.2f}×"
                  f"{f' (aim {aim})' if aim else ''}  peak {max(run['peak_memory_gb'] for run in runs):5.2f} GB  "
                  f"loss {runs[0]['loss']:.6f}"
                  f"{f'  batch {best[name]}' if name in best else ''}", flush=True)  # fmt: skip
            if aim and ratio < aim:
                misses.append(f"{stage}: {ratio:.2f} of {name}, aim {aim}")
            if difference > CLOSE:
                misses.append(f"{stage}: the loss of {name} differs by {difference:.1e}")
        results[stage] = {"runs": found, "rates": rates, "batches": best}
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    print("holds" if not misses else "MISSED: " + "; ".join(misses))
    return int(bool(misses))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=16000, help="of all samples together")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--max-tiles", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.side:
        return compare(options)
    print("\n" + json.dumps(side(options)), flush=True)
    os._exit(0)  # DeepSpeed's op may abort at exit


if __name__ == "__main__":
    sys.exit(main())
