"""Which modules train, and the table that says so at the start of every training stage.

The three modules are the paper's: vit, mlp (the projector), language (with its embeddings and head).
Stage 1 trains mlp, stage 1.5 vit and mlp, stage 2 all (arXiv 2412.05271, §3.2). LLaMA-Factory freezes
silently and its users lose weeks: hence the table.
"""

from collections.abc import Iterable

from torch import nn

PREFIXES = {
    "vit": ("model.vision_tower.",),
    "mlp": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


def module_of(parameter: str) -> str:
    """'vit', 'mlp' or 'language' for a parameter name of InternVLForConditionalGeneration."""
    for module, prefixes in PREFIXES.items():
        if parameter.startswith(prefixes):
            return module
    raise KeyError(f"parameter {parameter} belongs to no module of InternVL")


def set_trainable(model: nn.Module, train: Iterable[str]) -> None:
    """requires_grad for the parameters of the modules in `train`, off for all others."""
    train = set(train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module_of(name) in train)


def freeze_table(model: nn.Module) -> str:
    """One row per module: parameters, how many train, their share."""
    counts = {module: [0, 0] for module in PREFIXES}
    for name, parameter in model.named_parameters():
        row = counts[module_of(name)]
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    total = [sum(row[i] for row in counts.values()) for i in (0, 1)]
    lines = [f"{'module':<10}{'parameters':>16}{'trained':>16}  state"]
    for module, (count, trained) in counts.items():
        state = "trains" if trained == count else "frozen" if not trained else "PARTLY FROZEN"
        lines.append(f"{module:<10}{count:>16,}{trained:>16,}  {state}")
    lines.append(f"{'all':<10}{total[0]:>16,}{total[1]:>16,}  {total[1] / total[0]:.1%} trains")
    return "\n".join(lines)
