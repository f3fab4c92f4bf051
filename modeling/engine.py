"""The only file that knows DeepSpeed: one optimizer step over micro-batches, and the fragments this rank owns.

The engine averages gradients over ranks and micro-steps; the caller's loss is a sum divided by the weight of the whole
global batch, so it is multiplied by world × accumulation here to undo that: the same gradient at any world size.
ZeRO 0 to 3. bf16 with ZeRO 0 or 1 runs as ZeRO 2: with gradients accumulated in fp32 DeepSpeed (0.19) takes another
optimizer there, which cannot leave out a step that is not finite and fails on a gradient of zero. Under ZeRO 3 every
use of a module is a collective of all ranks: all run the same modules in the same order.
The learning rate is set from outside before every step: a pure function of the step, never state.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling.checkpoint import Fragment
from modeling.errors import UserError

# Ops that a user's JSON asks for are compiled with the first `ninja` on the path: always this environment's own.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# read by DeepSpeed when it is imported
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def deepspeed_config(setting: int | Path, precision: str) -> dict[str, Any]:
    """A ZeRO stage, or the user's own DeepSpeed JSON. Raises UserError for what Stageline itself has to decide."""
    if isinstance(setting, Path):
        config = json.loads(setting.read_text())
        ours = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer"}
        ours |= {"scheduler", "gradient_clipping", "fp16", "bf16", "zero_force_ds_cpu_optimizer"}
        clash = sorted(key for key in ours & set(config) if config[key] != "auto")
        if clash:
            raise UserError(
                f"the DeepSpeed JSON sets {', '.join(clash)}",
                where=str(setting), remedy="remove them: the stage's own YAML fields decide these",
            )  # fmt: skip
        config = {key: value for key, value in config.items() if key not in ours}
    else:
        config: dict[str, Any] = {"zero_optimization": {"stage": setting}}
    zero = config.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"zero_optimization is {zero!r}, not a mapping", where=str(setting), remedy='write {"stage": 1}'
        )
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"there is no ZeRO stage {stage}", where="deepspeed", remedy="use 0, 1, 2 or 3")
    if precision == "bf16":
        zero["stage"] = max(stage, 2)
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    if zero.get("offload_optimizer"):
        config["zero_force_ds_cpu_optimizer"] = False  # it is torch's own AdamW, there too
    # reduce in the order of the parameters, after the backward: the same sums in every run
    zero.setdefault("overlap_comm", False)
    return config


class Engine:
    """Trains the parameters of `module` that require a gradient, on the default process group.

    names: parameter -> its name in checkpoints. Raises UserError when nothing trains or DeepSpeed refuses its JSON.
    """

    def __init__(
        self, module: nn.Module, names: dict[nn.Parameter, str], *, setting: int | Path, precision: str,
        accumulation: int, weight_decay: float, betas: tuple[float, float], eps: float, max_grad_norm: float,
    ):  # fmt: skip
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed.ops
        from deepspeed.runtime.config import DeepSpeedConfigError
        from pydantic import ValidationError

        # No op counts as compatible, so it compiles none by itself (a user's JSON may ask for some). On a CPU that is
        # one for the all-reduce of inference, under a lock file that a killed worker leaves: then all wait for ever.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
        self.world, self.accumulation, self.max_grad_norm = dist.get_world_size(), accumulation, max_grad_norm
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.names = names
        if not self.parameters:
            raise UserError("no parameter trains", where="train", remedy="name at least one module")
        config = deepspeed_config(setting, precision)
        self.zero = config["zero_optimization"]["stage"]
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            # ZeRO clips by the norm over all ranks; without it every rank has the whole gradient, clipped in step()
            "gradient_clipping": max_grad_norm if self.zero else 0.0,
            "steps_per_print": 10**9,
        }
        # official scripts: one group, decay on every parameter but biases and norms (HF Trainer's rule)
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # fused: one pass over memory; on a CPU a tenth of the time of the plain one, which allocates as it goes
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        try:
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        except (ValidationError, DeepSpeedConfigError) as error:
            if not isinstance(setting, Path):
                raise
            raise UserError(
                f"DeepSpeed refuses this configuration: {' '.join(str(error).split())}",
                where=str(setting), remedy="correct the DeepSpeed JSON",
            ) from error  # fmt: skip
        self.engine: Any = engine
        zero: Any = self.engine.optimizer
        if self.zero in (1, 2) and not zero.cpu_offload:
            # DeepSpeed looks for what is not finite, and takes norms, in some 15 kernels for every parameter: a tenth
            # of the step of a 1B model on an H200. One pass over all gradients tells both.
            zero.get_grad_norm_direct = self._norm
            zero.check_overflow = lambda *_, **__: None
        self.device: torch.device = self.engine.device
        self._create_state()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss that is already divided by the global batch's weight."""
        self.engine.backward(loss * (self.world * self.accumulation))

    def step(self, lr: float, skip: bool = False) -> float | None:
        """At every micro-step: to the next one; at the last update the weights and return the gradient norm.

        A norm that is not finite, or `skip` (on all ranks alike), changes no weight, moment or step count anywhere;
        the norm that is returned is then inf or NaN.
        """
        last = self.engine.is_gradient_accumulation_boundary()
        norm: Any = None
        if last:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.zero == 0:
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
                if skip or not norm.isfinite():
                    norm = norm if not norm.isfinite() else torch.tensor(math.nan)
                    for parameter in self.parameters:
                        parameter.grad = None  # AdamW leaves it as it is then
                else:
                    torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            elif skip:  # ZeRO leaves out a step whose gradient is not finite
                next(g for grads in self.engine.optimizer.averaged_gradients.values() for g in grads).fill_(math.nan)
        self.engine.step()
        if not last:
            return None
        return float(norm if norm is not None else self.engine.get_global_grad_norm())

    def _norm(self, gradients: Iterable[Tensor], *_: Any) -> Tensor:
        """ZeRO 1 and 2: of one group's gradients on all ranks; -1, as DeepSpeed has it, where it is not finite."""
        foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
        norms = foreach_norm(list(gradients), 2.0, torch.float32)
        squares = torch.stack(norms).square().sum()
        dist.all_reduce(squares)
        return torch.where(squares.isfinite(), squares.sqrt(), -1.0)

    def _create_state(self) -> None:
        """Optimizer state exists before the first step, so that there is something to load into."""
        for flat in self._flat_tensors():
            self.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def _flat_tensors(self) -> list[Tensor]:
        if self.zero == 0:
            return list(self.parameters)
        zero = self.engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.zero == 3 else zero.single_partition_of_fp32_groups)

    def owned(self) -> Iterator[Fragment]:
        """Views of all the fp32 masters and moments this rank updates."""
        if self.zero == 0:
            for parameter in self.parameters:
                state = self.optimizer.state[parameter]
                yield Fragment(
                    self.names[parameter], 0, parameter.data.view(-1),
                    state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1),
                )  # fmt: skip
            return
        if self.zero == 3:
            for parameter, start, views in self._partitions():
                yield Fragment(self.names[parameter], start, *views)
            return
        zero = self.engine.optimizer
        for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            state = self.optimizer.state[flat]
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # no part of it lies in this rank's partition
                    continue
                where, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                views = (flat.data, state["exp_avg"], state["exp_avg_sq"])
                yield Fragment(
                    self.names[parameter], where.start, *(v.view(-1).narrow(0, here.start, here.numel) for v in views)
                )

    def _partitions(self) -> Iterator[tuple[Any, int, list[Tensor]]]:
        """ZeRO 3: (parameter, start, [master, exp_avg, exp_avg_sq]) of what this rank owns, padding left out."""
        zero = self.engine.optimizer
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            state, offset = self.optimizer.state[flat], 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = dist.get_rank() * size
                count = min(size, parameter.ds_numel - start)  # the last rank's part is padded
                if count > 0:
                    whole = (flat.data, state["exp_avg"], state["exp_avg_sq"])
                    yield parameter, start, [tensor.view(-1).narrow(0, offset, count) for tensor in whole]
                offset += size

    def state_dict(self, module: nn.Module) -> dict[str, Tensor] | None:
        """All ranks: the whole weights of a part of the trained module on rank 0, in host memory. None on other ranks,
        and below ZeRO 3, where the module's own are whole."""
        if self.zero != 3:
            return None
        from deepspeed.runtime.zero import GatheredParameters

        out = {}
        for name, parameter in module.named_parameters():  # one at a time: all together may not fit
            with GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    out[name] = parameter.detach().cpu().clone()
        return {**module.state_dict(), **out} if dist.get_rank() == 0 else None

    def to_write(self) -> list[Fragment]:
        """The fragments this rank puts into a checkpoint: all it owns, or its share where every rank owns all."""
        owned = list(self.owned())
        return owned if self.zero else owned[dist.get_rank() :: self.world]

    def loaded(self, step: int) -> None:
        """After the owned fragments were filled: restore AdamW's step count and the weights the forward uses.

        step: of the updates made, so without the skipped ones.
        """
        for flat in self._flat_tensors():
            self.optimizer.state[flat]["step"].fill_(float(step))
        if self.zero == 3:
            for parameter, _, (master, _, _) in self._partitions():
                parameter.ds_tensor.data.view(-1)[: len(master)].copy_(master)
            if persistent := self.engine.optimizer.persistent_parameters:  # small ones that every rank holds whole
                persistent[0].all_gather(persistent)
        elif self.zero:
            self.engine.optimizer.update_lp_params()
