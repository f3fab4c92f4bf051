"""One rank of test_zero.py: the engine and its checkpoints, without Ray.

    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment; argument: the folder that the ranks share.

Trains the micro model under every ZeRO stage and precision for STEPS steps, a checkpoint in the middle, then goes on
from every such checkpoint under every ZeRO stage and precision; a group of one rank goes on from those of two. Trains
the projector alone under ZeRO 1 and 3, saving after every step. Losses go to <folder>/<world>.json.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.attention import Segments
from modeling.batches import Batch, Counts
from modeling.checkpoint import FragmentReader, Snapshot
from modeling.engine import Engine
from modeling.freeze import set_trainable
from modeling.internvl import TrainingLoss, build_model
from modeling.presets import resolve
from stages.params import ModelParams

STEPS, MIDDLE, ROWS = 20, 8, 4
MODULES = ("vit", "mlp", "language")
RUNS = ("0 fp32", "1 fp32", "2 fp32", "3 fp32", "2 bf16", "3 bf16")  # bf16 with ZeRO 0 or 1 is ZeRO 2


def row(model, step: int, number: int) -> Batch:
    """Two samples of random tokens, one of them with a picture in every second row."""
    rng = torch.Generator().manual_seed(1000 * (step % 2) + number)  # the same two steps again: the loss falls
    image, tokens = model.config.image_token_id, model.config.image_seq_length
    pictured = number % 2 == 0
    first = torch.randint(10, 90, (5 + number,), generator=rng)
    second = torch.randint(10, 90, (9,), generator=rng)
    ids = torch.cat([first, torch.full((tokens if pictured else 0,), image), second])
    lengths = [len(first), len(ids) - len(first)]
    places = torch.tensor([1, 3, len(ids) - 4, len(ids) - 3])
    return Batch(
        input_ids=ids[None], position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        segments=Segments.of(lengths), positions=places, targets=ids[places + 1],
        weights=torch.rand(len(places), generator=rng) + 0.5,
        pixels=torch.randn(1, 3, 32, 32, generator=rng) if pictured else None, uniforms=None, counts=Counts(),
    )  # fmt: skip


class Training:
    def __init__(self, run: str, train: tuple[str, ...] = MODULES):
        zero, precision = run.split()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        resolved = resolve(ModelParams(vision="micro-vit", language="micro-qwen2"))
        self.model = build_model(resolved, resolved.tokenizer(), 0)
        set_trainable(self.model, train)
        names = {p: name for name, p in self.model.named_parameters()}
        loss = TrainingLoss(self.model, train, always_vision=zero == "3")
        self.engine = Engine(
            loss, names, setting=int(zero), precision=precision,
            accumulation=ROWS // self.world, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0,
        )  # fmt: skip

    def train(self, first: int, last: int, spoil: str = "") -> list[float]:
        """The loss over the whole global batch of steps [first, last). spoil: each is to be left out, because of its
        "loss" (the caller's word) or its "gradient" (which the last rank alone sees to be NaN)."""
        losses = []
        for step in range(first, last):
            rows = [row(self.model, step, number) for number in range(ROWS)]
            weight = float(sum(one.weights.sum() for one in rows))
            total = torch.zeros(1, dtype=torch.float64)
            for one in rows[self.rank :: self.world]:
                loss = self.engine.engine(one) / weight
                total += float(loss.detach())
                self.engine.backward(loss * torch.nan if spoil == "gradient" and self.rank == self.world - 1 else loss)
                norm = self.engine.step(1e-3 * (1 + step / STEPS), skip=spoil == "loss")
            assert norm is not None and math.isfinite(norm) != bool(spoil), (norm, spoil)
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    def state(self) -> bytes:
        """All that a step may change, but for AdamW's step count: losses after it tell of that."""
        fragments = list(self.engine.owned())
        whole = self.engine.state_dict(self.model) if self.engine.zero == 3 else dict(self.model.named_parameters())
        weights = b"".join(p.detach().float().numpy().tobytes() for p in (whole or {}).values())
        return weights + bytes(Snapshot(fragments).take(fragments))

    def spoiled(self, first: int) -> list[bool]:
        """For a step that is left out for each reason: whether it changed nothing."""
        out = []
        for reason in ("loss", "gradient"):
            before = self.state()
            self.train(first, first + 1, reason)
            out.append(self.state() == before)
        return out

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        fragments = self.engine.to_write()
        (folder / f"{self.rank}.safetensors").write_bytes(Snapshot(fragments).take(fragments))
        dist.barrier()

    def same_weights_as_fragments(self) -> bool:
        """Whether the weights that a stage would store as its result are the masters, as far as the precision goes."""
        state = self.engine.state_dict(self.model)
        whole = {name: p.detach() for name, p in self.model.named_parameters()} if state is None else state
        if self.engine.zero == 3 and self.rank > 0:
            return True
        return all(
            torch.equal(
                whole[f.name].float().view(-1)[f.start : f.start + f.count], f.master.to(whole[f.name].dtype).float()
            )
            for f in self.engine.owned()
        )

    def load(self, folder: Path, step: int) -> None:
        FragmentReader(folder.glob("*.safetensors")).load(self.engine.owned())
        self.engine.loaded(step)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    out: dict[str, dict[str, list]] = {"whole": {}, "resumed": {}, "unchanged": {}, "frozen": {}, "weights": {}}
    if world == 2:
        for run in RUNS:
            training = Training(run)
            losses = training.train(0, MIDDLE)
            training.save(folder / run)
            out["unchanged"][run] = training.spoiled(MIDDLE)
            out["whole"][run] = losses + training.train(MIDDLE, STEPS)
            out["weights"][run] = [training.same_weights_as_fragments()]
    for saved in RUNS:
        for run in RUNS:
            training = Training(run)
            training.load(folder / saved, MIDDLE)
            out["resumed"][f"{saved}->{run}"] = training.train(MIDDLE, STEPS)
    for run in ("1 fp32", "3 fp32", "3 bf16"):
        training = Training(run, ("mlp",))
        out["frozen"][run] = []
        for step in range(STEPS):
            out["frozen"][run] += training.train(step, step + 1)
            training.save(folder / f"frozen {run}")
    if dist.get_rank() == 0:
        (folder / f"{world}.json").write_text(json.dumps(out))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # one process in ten aborts in DeepSpeed's communication op at exit (orchestrator/driver.py)
