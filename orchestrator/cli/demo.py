"""`stageline demo`: a page on this machine that asks a trained stage, or a model folder."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modeling.errors import UserError
from orchestrator.cli.commands import reachable, recorded
from orchestrator.ledger import Ledger
from orchestrator.spec import Experiment, Stage, load_spec

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def demo(options: argparse.Namespace) -> int:
    """options: source, stage, host, port, max_tiles."""
    from orchestrator.demo.asking import FORMS
    from orchestrator.demo.page import check_library

    check_library()  # missing, it is told before a model is loaded
    source = Path(options.source)
    if source.is_dir():
        if options.stage:
            raise UserError("a folder has no stages", where=options.source, remedy=f"leave '{options.stage}' out")
        return _serve(options, source, source.resolve().name, FORMS)
    if not options.stage:
        raise UserError(
            "is no folder, and an experiment's stage is not named", where=options.source,
            remedy="stageline demo FOLDER, or stageline demo EXPERIMENT.yaml STAGE",
        )  # fmt: skip
    from orchestrator.checkpoints import fetch_folder

    experiment = load_spec(options.source)
    store = reachable(experiment)
    prefix = recorded(experiment, store, options.stage)
    stage, where = experiment.stages[options.stage], str(experiment.path)
    if not stage.kind.trains and (stage.kind.base != "export" or stage.params.layout != "hf"):
        raise UserError(f"stage '{stage.name}' leaves no model to ask", where=where, remedy="name a trained stage")
    completed = Ledger(store, prefix).state().completed
    if completed is None:
        raise UserError(f"stage '{stage.name}' is not completed", where=where, remedy="stageline run it first")
    system = (_system(experiment, stage),) if stage.kind.trains else ()
    with TemporaryDirectory() as scratch:
        folder = fetch_folder(store, completed["manifest"]["folder"], Path(scratch))
        return _serve(options, folder, f"{experiment.name}: {stage.name}", _forms(experiment, stage), *system)


def _serve(options: argparse.Namespace, folder: Path, title: str, forms: Mapping[str, Any], *system: str | None) -> int:
    """system: of the training data; where it is not given, the chat template's."""
    from modeling.chat import system_prompt
    from modeling.generate import device
    from modeling.internvl import load_model
    from orchestrator.demo.asking import Served
    from orchestrator.demo.page import serve

    model, tokenizer = load_model(folder)
    if tokenizer is None:
        raise UserError("the folder has no tokenizer", where=str(folder), remedy="import it again with --tokenizer")
    model.to(device())  # pyright: ignore[reportArgumentType]
    spoken = system[0] if system else system_prompt(tokenizer)
    if options.host not in LOOPBACK:
        print(f"stageline: warning: whoever reaches {options.host} can ask the model, without a password",
              file=sys.stderr)  # fmt: skip
    serve(Served(title, model, tokenizer, spoken, forms, options.max_tiles), options.host, options.port)
    return 0


def _system(experiment: Experiment, stage: Stage) -> str | None:
    data = next(parent for parent in experiment.parents(stage) if parent.kind.base == "prepare")
    return experiment.data[data.params.data].system


def _forms(experiment: Experiment, stage: Stage) -> Mapping[str, Any]:
    """The prompts of an evaluation of this stage, or of the one that an export takes; FORMS for what it has not."""
    from orchestrator.demo.asking import FORMS

    trained = {stage.name} | {parent.name for parent in experiment.parents(stage) if stage.kind.base == "export"}
    for other in experiment.stages.values():
        if other.kind.base == "evaluate" and trained & set(other.params.needs):
            return FORMS | {
                name: prompt for name, prompt in other.params.prompts.items() if name != "direct" or prompt.suffix
            }
    return FORMS
