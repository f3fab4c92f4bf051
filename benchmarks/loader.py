"""The loader beside bare Pillow, and how long a step waits for its row.

    python benchmarks/loader.py --folder /tmp/loader

Makes pictures like photographs (seeded; 1000 × 750 JPEG of quality 90), shards of them, and packs of 16,384 tokens and
48 tiles of 448 pixels, 12 and a thumbnail at most a picture, as in the 1B recipe. Then, all on one core each:

bare     Pillow alone, from bytes in memory: open, RGB, bicubic resize to the grid, crops, thumbnail.
row      the loader's whole row in a worker process: shard read and checked, decoded, tiled, templated, tokenised,
         weighed, sent to the training's process and received there; CPU seconds of both processes together.
float    the same and the pixels normalised to float32 on that core, which the training does on its own device.
augment  bare and row with a JPEG round trip of every tile.

Samples per CPU second, in alternating rounds, medians. Data wait: the share of its time that a loop waits for rows,
where a step is a sleep (it leaves the cores free, as a GPU's step does) of `--headroom` times what these workers take
for a row when nothing holds them up. Exit code 1 where row / bare is below 0.85 or a data wait above 2 %.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from PIL import Image

from modeling.batches import Batch, Batcher, Request, jpeg
from modeling.epochs import plan_steps
from modeling.loading import AHEAD, Rows
from modeling.presets import resolve
from modeling.shards import ShardReader, ShardWriter, pack_sample
from modeling.template import encode_conversation
from modeling.tiles import choose_grid, count_tiles
from stages.params import ModelParams

LEAST, MOST = 0.85, 0.02
IDLE_S = 0.3  # without any CPU time: a worker has nothing left to make
TILE, TILES, PER_TILE, TOKENS, PACK_TILES = 448, 12, 256, 16384, 48
SIZE, QUALITY = (1000, 750), 90
WORDS = ("the", "a", "of", "picture", "shows", "light", "water", "stone", "street", "green", "tall", "near", "wooden")


def photograph(rng: np.random.Generator) -> bytes:
    """Smooth forms with edges, structure at every scale and grain: a JPEG of about 150 KB."""
    width, height = SIZE
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60.0), (12, 40.0), (40, 22.0), (120, 12.0), (400, 6.0)):
        noise = rng.normal(0, 1, (cells * 3 // 4, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize(SIZE, Image.Resampling.BICUBIC) for c in range(3)]
        picture += strength * np.stack([np.asarray(layer) for layer in layers], axis=-1)
    picture += 40 * np.sign(picture[..., :1]) + rng.normal(0, 3, picture.shape)
    out = io.BytesIO()
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def make(folder: Path, tokenizer, samples: int, seed: int) -> ShardReader:
    """A folder as `prepare` leaves it."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, shard_bytes=64 * 10**6) as writer:
        for i in range(samples):
            text = " ".join(rng.choice(WORDS, int(rng.integers(40, 120))))
            turns = [("human", "<image>\nDescribe the image in detail."), ("gpt", text)]
            conversation = [{"from": role, "value": value} for role, value in turns]
            tiles = [count_tiles(*SIZE, TILES, tile_size=TILE)]
            encoded = encode_conversation(conversation, tokenizer, tiles, PER_TILE)
            blob, place = pack_sample(
                f"{i:06d}", {"id": f"p{i}", "conversations": conversation}, [("jpg", photograph(rng))]
            )
            writer.add(blob, place | {
                "id": f"p{i}", "task": "photographs", "dataset": "photographs", "key": f"{i:06d}",
                "tokens": len(encoded.input_ids), "answers": [b - a for a, b in encoded.answer_spans],
                "tiles": sum(tiles), "tiles_per_image": tiles, "widths": [SIZE[0]], "heights": [SIZE[1]],
                "max_tiles": TILES, "augment": False, "repeat": 1.0, "file": "photographs.jsonl", "line": i,
            })  # fmt: skip
    return ShardReader(folder)


def bare(pictures: list[bytes], quality: Callable[[], int] | None) -> int:
    """The tiles of some pictures with Pillow and nothing else; how many."""
    made = 0
    for data in pictures:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        columns, rows = choose_grid(*image.size, TILES, tile_size=TILE)
        grid = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
        boxes = [(x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE) for y in range(rows) for x in range(columns)]
        tiles = [grid.crop(box) for box in boxes]
        tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
        if quality:
            tiles = [jpeg(tile, quality()) for tile in tiles]
        made += len(tiles)
    return made


class Worker:
    """The loader with one worker process; CPU seconds of both processes, from idle to idle: it decodes ahead."""

    def __init__(self, builder, requests: Iterator[Request], then: Callable[[Batch], object]):
        before = set(psutil.Process().children(recursive=True))
        self.rows, self.then = Rows(builder, 1).ahead(requests), then
        for _ in range(4):
            next(self.rows)
        started = set(psutil.Process().children(recursive=True)) - before
        self.processes = [psutil.Process(), *started]

    def idle_cpu(self) -> float:
        """CPU seconds so far, once the worker has nothing left to make."""
        now, seen = self.cpu(), -1.0
        while now != seen:
            time.sleep(IDLE_S)
            seen, now = now, self.cpu()
        return now

    def cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def rate(self, rows: int) -> float:
        """Samples per CPU second."""
        before, samples = self.idle_cpu(), 0
        for row, _ in itertools.islice(self.rows, rows):
            self.then(row)
            samples += row.counts.samples
        return samples / (self.idle_cpu() - before)


def rate_of_bare(packs: list[list[bytes]], augment: bool) -> float:
    rng = np.random.default_rng(0)
    before = time.process_time()
    for pack in packs:
        bare(pack, (lambda: int(rng.integers(75, 101))) if augment else None)
    return sum(map(len, packs)) / (time.process_time() - before)


def data_wait(builder, requests: Iterator[Request], workers: int, headroom: float, steps: int) -> dict[str, float]:
    rows = Rows(builder, workers).ahead(requests)
    for _ in range(4 * AHEAD * workers):
        next(rows)
    before = time.perf_counter()
    for _ in range(steps // 2):
        next(rows)
    row_s = (time.perf_counter() - before) / (steps // 2)
    time.sleep(2 * AHEAD * row_s * workers)
    began, waited, step_s = time.perf_counter(), [], headroom * row_s
    for _, wait in itertools.islice(rows, steps):
        waited.append(wait)
        time.sleep(step_s)
    seconds = time.perf_counter() - began
    rows.close()
    share = sum(waited) / seconds
    return {"workers": workers, "row_s": row_s, "step_s": step_s, "share": share, "longest_s": max(waited)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8, help="of each round and variant")
    parser.add_argument("--steps", type=int, default=60, help="of each data wait")
    parser.add_argument("--headroom", type=float, default=1.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = resolve(ModelParams(vision="micro-vit", language="micro-qwen2", tokenizer="tiny-bpe")).tokenizer()
    reader = make(options.folder, tokenizer, options.samples, options.seed)
    index = reader.index
    plan = plan_steps(
        index["tokens"], index["tiles"], index["repeat"], max_tokens=TOKENS, max_tiles=PACK_TILES, global_batch=1,
        seed=options.seed, epochs=1,
    )  # fmt: skip
    batcher = Batcher(
        reader, plan, tokenizer, tile_size=TILE, tokens_per_tile=PER_TILE, system=None, reduction="square",
        unit="conversation", seed=options.seed,
    )  # fmt: skip
    plain = [batcher.request(step, pack) for step in range(plan.steps) for pack in plan.step(step)]
    augmented = [
        replace(request, samples=tuple((o, {**row, "augment": True}) for o, row in request.samples))
        for request in plain
    ]
    pictures = [[p for _, row in request.samples for p in reader.samples.read(row)[1]] for request in plain]
    made = bare(pictures[0], None)
    assert made == batcher.builder.build(plain[0]).counts.tiles, "not the same tiles"
    same = Image.open(io.BytesIO(pictures[0][0])).convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(same), batcher.builder.build(plain[0]).pixels[TILES]), "not the same pixels"

    cpu = torch.device("cpu")
    workers = {
        "row": Worker(batcher.builder, itertools.cycle(plain), lambda row: row),
        "float": Worker(batcher.builder, itertools.cycle(plain), lambda row: row.to(cpu)),
        "augment row": Worker(batcher.builder, itertools.cycle(augmented), lambda row: row),
    }
    turn = itertools.cycle(range(len(pictures)))
    rates: dict[str, list[float]] = {}
    for number in range(options.rounds):
        packs = [pictures[next(turn)] for _ in range(options.rows)]
        variants = [
            ("bare", lambda packs=packs: rate_of_bare(packs, False)),
            *((name, lambda worker=worker: worker.rate(options.rows)) for name, worker in workers.items()),
            ("augment bare", lambda packs=packs: rate_of_bare(packs, True)),
        ]
        for name, measure in variants if number % 2 == 0 else variants[::-1]:
            rates.setdefault(name, []).append(measure())
    for worker in workers.values():
        worker.rows.close()
    per_cpu = {name: median(found) for name, found in rates.items()}
    samples = sum(len(request.samples) for request in plain) / len(plain)
    waits = [data_wait(batcher.builder, itertools.cycle(plain), n, options.headroom, options.steps) for n in (1, 2)]
    report = {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.processor() or platform.machine()}, "
        f"{multiprocessing.cpu_count()} cores", "load": os.getloadavg()[0], "seed": options.seed,
        "bytes_per_picture": int(np.mean([len(data) for pack in pictures for data in pack])),
        "samples_per_row": samples, "tiles_per_row": samples * index["tiles"][0],
        "samples_per_cpu_second": per_cpu, "row": per_cpu["row"] / per_cpu["bare"],
        "float": per_cpu["float"] / per_cpu["bare"], "augment": per_cpu["augment row"] / per_cpu["augment bare"],
        "data_wait": waits,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report | {"rounds": rates}, indent=1))
    holds = report["row"] >= LEAST and all(wait["share"] <= MOST for wait in waits)
    shares = ", ".join(f"{wait['share']:.2%} with {wait['workers']}" for wait in waits)
    print(f"{'holds' if holds else 'FAILS'}: {report['row']:.2f} of bare Pillow (at least {LEAST}); data wait {shares}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
