"""`stageline cluster manifests`: the files that start a cluster of the experiment's `cluster:` section.

Invariant: a cluster that a file describes can run every stage, alone at least, and sees all that the experiment names;
where that does not hold nothing is written.
"""

import argparse
from pathlib import Path

from cluster.manifests import kuberay, ray_up, skypilot
from cluster.manifests.common import Launch, check
from modeling.errors import UserError
from orchestrator.cli.outputs import writing
from orchestrator.placement import Machine, allows, asked, fits, may_come, shown
from orchestrator.portable import local_paths
from orchestrator.redaction import check_file, check_overrides
from orchestrator.spec import Experiment, Stage, load_spec

TARGETS = ("kuberay", "ray-up", "skypilot")


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("experiment", help="the experiment's YAML file")
    sub.add_argument("overrides", nargs="*", help="settings on top of the file")
    text = "only this one; once for each (default: all that the section allows, ray-up where there is a 'provider')"
    sub.add_argument("--target", action="append", choices=TARGETS, help=text)
    sub.add_argument("--output", default="manifests", metavar="DIR", help="where to write (default: manifests)")
    text = "every node has the absolute folders that the experiment names, in its image or mounted"
    sub.add_argument("--shared-folders", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment, options.overrides)
    launch = _launch(experiment, options.overrides, options.shared_folders)
    check(launch)
    _check_stages(experiment)
    _check_paths(experiment, launch, options.shared_folders)
    targets = options.target or [
        target for target in TARGETS if target != "ray-up" or launch.cluster.provider is not None
    ]
    files: dict[str, str] = {}
    left_out: list[str] = []
    for target in targets:
        try:
            files |= _write(target, experiment, launch)
        except UserError as error:
            if options.target:
                raise
            left_out.append(f"{target} left out: {error}")
    folder = Path(options.output)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
            print(folder / name)
    for line in left_out:
        print(line)
    return 0


def _launch(experiment: Experiment, overrides: list[str], shared: bool) -> Launch:
    if experiment.cluster is None:
        remedy = "add 'cluster:' with 'nodes:', the types of machine"
        raise UserError("no 'cluster:' section", where=str(experiment.path), remedy=remedy)
    path = experiment.path
    text = check_file(path)
    check_overrides(overrides)
    return Launch(experiment.name, experiment.storage, path.name, text, tuple(overrides), experiment.cluster, shared)


def _write(target: str, experiment: Experiment, launch: Launch) -> dict[str, str]:
    if target == "kuberay":
        return kuberay.write(launch)
    if target == "ray-up":
        return ray_up.write(launch)
    return skypilot.write(launch, *_equal_machines(experiment, launch))


def _check_stages(experiment: Experiment) -> None:
    """Ray would wait for ever for a worker that fits nowhere."""
    machines = may_come(experiment.cluster, [])
    for name, stage in experiment.stages.items():
        if not fits(stage.params.resources, [], machines):
            raise UserError(
                f"asks for {asked(stage.params.resources)}, and the cluster has at most {_listed(machines)}",
                where=f"{experiment.path}: stages.{name}",
                remedy="change its 'resources:', or 'cluster.nodes:'",
            )


def _listed(machines: list[Machine]) -> str:
    return shown(Machine(machine.room, machine.labels) for machine in machines)


def _check_paths(experiment: Experiment, launch: Launch, shared: bool) -> None:
    found = local_paths(experiment)
    if not shared and found:
        raise UserError(
            "names folders of this machine, which the cluster's nodes do not see: "
            + "; ".join(f"{field}: {path}" for field, path in found),
            where=str(experiment.path),
            remedy="put them on S3 (s3://bucket/prefix), or add --shared-folders where every node has them",
        )
    written = (launch.text, *launch.overrides)
    relative = [(field, path) for field, path in found if not any(path in text for text in written)]
    if relative:
        raise UserError(
            "names folders relative to its own place, which on a cluster is another: "
            + "; ".join(f"{field}: {path}" for field, path in relative),
            where=str(experiment.path),
            remedy="write the absolute path that every node has",
        )


def _equal_machines(experiment: Experiment, launch: Launch) -> tuple[list[str], int]:
    """The node types on which, each alone, all stages fit, cheapest first; and how many machines. Raises UserError."""
    stages = list(experiment.stages.values())
    able = [name for name in launch.nodes if _serves(stages, launch, name)]
    if not able:
        kinds = {asked(stage.params.resources): name for name, stage in reversed(experiment.stages.items())}
        lines = "; ".join(f"{name} asks for {what}" for what, name in reversed(kinds.items()))
        raise UserError(
            f"SkyPilot gives a job equal machines, and no type serves all stages: {lines}",
            where=f"{launch.file}: cluster.nodes",
            remedy="use --target kuberay or ray-up, or let one type serve all stages",
        )
    able.sort(key=lambda name: (launch.nodes[name].price is None, launch.nodes[name].price or 0.0))
    common = skypilot.common_labels(launch, able)
    if not all(allows(common, stage.params.resources.selector) for stage in stages):
        able = able[:1]  # a stage asks for what only the types' own labels tell
    return able, min(launch.nodes[name].max for name in able)


def _serves(stages: list[Stage], launch: Launch, name: str) -> bool:
    only = launch.cluster.model_copy(update={"nodes": {name: launch.nodes[name]}})
    machines = may_come(only, [])
    return all(fits(stage.params.resources, [], machines) for stage in stages)
