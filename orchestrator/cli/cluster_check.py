"""`stageline cluster check`: are the nodes of a running cluster fit for an experiment?

From outside it is a Ray job on the head, which prints what it finds; with --here it runs on a machine of the cluster.
"""

import argparse
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import survey
from cluster.allreduce import measure
from cluster.facts import Facts, clock, facts
from cluster.nodes import Place, places
from cluster.survey import Silent
from modeling.errors import UserError
from orchestrator.bundle import EXPERIMENT
from orchestrator.capacity import Capacity
from orchestrator.checkup import measurable, problems, remarks
from orchestrator.cli.jobs import follow
from orchestrator.cli.watch import console_for_output
from orchestrator.jobs import Jobs, address_of
from orchestrator.onestorage import not_shared, storage_problem
from orchestrator.redaction import check_file, check_overrides
from orchestrator.scheduler import check_demand
from orchestrator.spec import Experiment, load_spec

CLOCK_LOOKS = 3
NETWORK_REMEDY = "open all ports between them; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network card"


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("experiment", nargs="?", help="its storage and its stages' resources are checked, too")
    sub.add_argument("overrides", nargs="*", help="settings on top of the file")
    sub.add_argument("--address", metavar="URL", help="the dashboard of the cluster's head, as for submit")
    sub.add_argument("--here", action="store_true", help="this machine is one of the cluster: look from here")
    sub.add_argument("--megabytes", type=int, default=64, help="of the all-reduce that is timed (default 64)")
    sub.add_argument("--base", metavar="DIR", help="that relative paths in the file count from (default: its folder)")
    text = "every node mounts the folders that the file names, under the same paths"
    sub.add_argument("--shared-folders", action="store_true", help=text)
    sub.add_argument("--python", default="python", help="the cluster's, with Ray in it (default: python of its PATH)")


def run(options: argparse.Namespace) -> int:
    """Exit code 2 where there is a problem, 0 where there are remarks at most."""
    experiment = load_spec(options.experiment, options.overrides, options.base) if options.experiment else None
    if options.here:
        return _look(experiment, options.megabytes)
    if experiment is not None:
        check_file(experiment.path)  # it travels whole, as for submit
        check_overrides(options.overrides)
    jobs = Jobs(address_of(options.address))
    if jobs.open_to_anyone():
        print("remark: this cluster answers without a token → start it with RAY_AUTH_MODE=token", flush=True)
    command = [options.python, "-m", "orchestrator.cli.main", "cluster", "check"]
    command += [EXPERIMENT, *options.overrides] if experiment else []
    if experiment is not None and (options.base or options.shared_folders or jobs.here()):
        command += ["--base", str(Path(options.base or experiment.path.parent).absolute())]
    command += ["--here", "--megabytes", str(options.megabytes)]
    job = jobs.start(f"check-{secrets.token_hex(4)}", command, experiment.path if experiment else None, {})
    return 0 if follow(jobs, job) == 0 else 2


def _look(experiment: Experiment | None, megabytes: int) -> int:
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError("no Ray cluster runs on this machine", where="--here",
                        remedy="leave --here out and give --address of the head's dashboard") from error  # fmt: skip
    try:
        there = places()
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        return _report(there, names, experiment, megabytes, console_for_output())
    finally:
        ray.shutdown()


def _report(
    there: Sequence[Place], names: Mapping[str, str], experiment: Experiment | None, megabytes: int, console: Console
) -> int:
    """Prints what is found, node by node and of all together. names: hosts by node id. The exit code."""
    answers = _facts(there, names, experiment)
    told, found = [], []
    for place in there:
        its = answers[place.id]
        if isinstance(its, Silent):
            name = names.get(place.id, place.address)
            told.append(f"{name} does not answer: {its.reason} → look at raylet.log there")
        else:
            found.append((place, its))
    console.print(_table(there, answers, names, experiment is not None))
    all_facts = [its for _, its in found]
    told += problems(all_facts)
    lines, failed, noted = _bandwidth(found, megabytes)
    told += failed
    for line in lines:
        console.print(line, markup=False)
    if experiment is not None:
        try:
            check_demand(experiment, experiment.stages, Capacity(experiment.cluster).machines())
        except UserError as error:
            told.append(str(error))
        if len(there) == 1 and "://" not in experiment.storage:
            noted.append("one node is there: whether others would see the folder of 'storage:' is not known")
    for text in told:
        console.print(f"problem: {text}", markup=False)
    for text in remarks(all_facts) + noted:
        console.print(f"remark: {text}", markup=False)
    console.print(f"{len(there)} nodes, {len(told)} problems")
    return 2 if told else 0


def _facts(
    there: Sequence[Place], names: Mapping[str, str], experiment: Experiment | None
) -> dict[str, Facts | Silent]:
    """By node id. `time` is what a clock shows beyond this machine's."""
    answers = survey.each(there, _facts_of)
    if experiment is None:
        return answers
    reasons: dict[str, str] = {}
    answered = [node for node in there if isinstance(answers[node.id], Facts)]
    stores = survey.each(answered, lambda node: survey.on(node.id, storage_problem, experiment.storage))
    for node, its in stores.items():
        reasons[node] = its.reason if isinstance(its, Silent) else its
    reasons |= not_shared([node for node in answered if not reasons[node.id]], names, experiment.storage)
    return {
        node: replace(its, storage=reasons[node]) if isinstance(its, Facts) else its for node, its in answers.items()
    }


def _facts_of(place: Place) -> Facts:
    its = survey.on(place.id, facts, place.address)
    looks = []
    for _ in range(CLOCK_LOOKS):
        before = time.time()
        then, after = survey.on(place.id, clock), time.time()
        looks.append((after - before, then - (before + after) / 2))
    return replace(its, time=min(looks)[1], labels=place.labels)  # of the quickest answer


def _table(
    there: Sequence[Place], answers: Mapping[str, Facts | Silent], names: Mapping[str, str], storage: bool
) -> Table:
    table = Table(box=None, pad_edge=False)
    titles = ("node", "address", "CPUs", "GPUs", "python", "ray", "torch", "code", "/dev/shm", "clock", "storage")
    for title in titles:
        table.add_column(title, overflow="fold")
    for place in there:
        its = answers[place.id]
        host = names.get(place.id, place.address) + (" (head)" if place.head else "")
        if isinstance(its, Silent):
            table.add_row(host, place.address, f"{place.total['CPU']:g}", f"{place.total['GPU']:g}", "no answer")
            continue
        gpus = f"{place.total['GPU']:g}" + (f" {its.gpus[0]}" if its.gpus else "")
        fit = "" if not storage else "fit" if not its.storage else "see below"
        table.add_row(
            host, its.address, f"{place.total['CPU']:g}", gpus,
            *(its.versions[name] for name in ("python", "ray", "torch", "stageline")),
            f"{its.shared / 1e9:.1f} GB", f"{its.time:+.2f} s", fit,
        )  # fmt: skip
    return table


def _bandwidth(found: Sequence[tuple[Place, Facts]], megabytes: int) -> tuple[list[str], list[str], list[str]]:
    """(lines, problems, remarks) of an all-reduce between the nodes of each kind."""
    groups, noted = measurable(found)
    hosts = {place.id: its.host for place, its in found}
    lines, failed = [], []
    for backend, nodes in groups.items():
        result = measure(nodes, backend == "NCCL", megabytes)
        noted += [f"not measured on {hosts[node]}: {reason}" for node, reason in result.late.items()]
        if result.error:
            between = ", ".join(hosts[node.id] for node in nodes if node.id not in result.late)
            failed.append(f"an all-reduce ({backend}) between {between} fails: {result.error} → {NETWORK_REMEDY}")
        elif result.speed is None:
            those = "1 node" if result.nodes == 1 else f"{result.nodes} nodes"
            lines.append(f"all-reduce: {backend}, {those} to measure on: it takes two")
        else:
            speed = f"{result.speed / 1e9:.2f} GB/s bus bandwidth"
            lines.append(f"all-reduce: {backend}, {result.nodes} nodes, {megabytes} MiB: {speed}")
    return lines, failed, noted
