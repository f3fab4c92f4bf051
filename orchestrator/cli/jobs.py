"""`stageline submit`, `list`, `cancel`, and the parts of `status` and `logs` that take a job: drivers on a cluster.

Invariant: a submitted experiment needs nothing of this machine any more; submitting it again goes on where it was, and
one that runs already, with the same settings, is not started twice.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from cluster.driverjob import STOP_WAIT_S
from modeling.errors import UserError
from orchestrator.cli.watch import console_for_output, duration
from orchestrator.drivernote import ask_job_to_stop, job_is_asked_to_stop, read_note
from orchestrator.errors import StorageTransient
from orchestrator.jobs import RUNNING, Jobs, address_of, settings
from orchestrator.portable import local_paths
from orchestrator.redaction import check_file, check_overrides
from orchestrator.s3 import with_patience
from orchestrator.spec import Experiment, load_spec
from orchestrator.store import Store, open_store

KILL_S = 30.0  # for Ray to end by force what does not end
CANCEL_S = 120.0  # beyond the grace, for the last save of all stages before the driver is told by SIGTERM too
REACH_S = 10.0  # for a store to answer: it may be one that the cluster alone reaches


def is_job(name: str) -> bool:
    """Whether an argument names a job rather than an experiment file."""
    path = Path(name)
    return path.suffix not in (".yaml", ".yml") and not path.exists()


def submit(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment, options.overrides)
    check_file(experiment.path)  # it travels whole, comments too; settings stand in the job's command
    check_overrides(options.overrides)
    address = address_of(options.address)
    jobs = Jobs(address)
    shared = options.shared_folders or jobs.here()
    if not shared:
        _check_portable(experiment)
    console = console_for_output()
    if jobs.open_to_anyone():
        console.print(f"warning: {address} answers without a token, so whoever reaches it runs code there; "
                      "start the cluster with RAY_AUTH_MODE=token", markup=False)  # fmt: skip
    given = f" --address {address}" if options.address else ""
    job = _running(jobs, experiment, given)
    if job is not None:
        console.print(f"{experiment.name} runs already as {job}", markup=False)
    else:
        base = Path(options.experiment).absolute().parent if shared else None
        job = jobs.submit(experiment, options.overrides, base, options.grace, options.python)
        console.print(f"submitted {job}", markup=False)
    for verb in ("logs -f", "status", "cancel"):
        console.print(f"  stageline {verb} {job}{given}", markup=False)
    if not options.follow:
        return 0
    return follow(jobs, job)


def _running(jobs: Jobs, experiment: Experiment, given: str) -> str | None:
    """The job that runs this experiment as it is here. Raises UserError for one that does not, or is about to end."""
    job = jobs.running(experiment)
    known = jobs.info(job) if job is not None else None
    if known is None or known.status not in RUNNING:  # it may have ended in the meantime
        return None
    try:
        stopping = job_is_asked_to_stop(
            with_patience(open_store(experiment.storage), REACH_S), experiment.name, known.submission_id
        )
    except (UserError, StorageTransient, OSError):  # out of reach from here
        stopping = False
    if stopping:
        raise UserError(f"{experiment.name} is stopping as {job}", where=str(experiment.path),
                        remedy=f"submit it again when it has ended; stageline logs -f {job}{given} waits")  # fmt: skip
    if known.metadata.get("settings", settings(experiment)) != settings(experiment):  # older ones have none
        raise UserError(f"{experiment.name} runs with other settings as {job}", where=str(experiment.path),
                        remedy=f"`stageline cancel {job}{given}` first, or give it another `name:`")  # fmt: skip
    return job


def follow(jobs: Jobs, job: str) -> int:
    """Its output until it ends. Exit code 0 only where the job succeeded."""
    try:
        jobs.follow(job)
    except KeyboardInterrupt:
        print(f"\n{job} runs on; stageline cancel {job} ends it", file=sys.stderr)
        return 130
    status = jobs.wait(job, 10.0)
    if status != "SUCCEEDED":
        said = (jobs.info(job).message or "").strip().splitlines()
        print(f"stageline: {job}: {status.lower()}" + (f": {said[0]}" if said else ""))
    return 0 if status == "SUCCEEDED" else 1


def list_jobs(options: argparse.Namespace) -> int:
    found = Jobs(address_of(options.address)).list()
    table = Table(box=None, pad_edge=False)
    for title in ("job", "experiment", "storage", "status", "started", "took"):
        table.add_column(title, overflow="fold")
    for job in found:
        about, end = job.metadata or {}, (job.end_time or time.time() * 1000) / 1000
        began = (job.start_time or 0) / 1000
        table.add_row(
            job.submission_id, about["experiment"], about.get("storage", ""), str(job.status.value).lower(),
            datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if began else "",
            duration(end - began) if began else "",
        )  # fmt: skip
    console = console_for_output()
    if found:
        console.print(table)
    else:
        console.print("no experiment was submitted to this cluster")
    return 0


def status(options: argparse.Namespace) -> int:
    jobs = Jobs(address_of(options.address))
    job = jobs.info(options.experiment)
    about, began = job.metadata or {}, (job.start_time or 0) / 1000
    end = (job.end_time or time.time() * 1000) / 1000
    console = console_for_output()
    rows = {
        "job": job.submission_id,
        "status": str(job.status.value).lower(),
        "experiment": about.get("experiment", ""),
        "storage": about.get("storage", ""),
        "message": (job.message or "").strip().splitlines()[-1] if (job.message or "").strip() else "",
        "ran": duration(end - began) if began else "",
        "dashboard": f"{jobs.address}/#/jobs/{job.submission_id}",
    }
    for name, value in rows.items():
        if value:
            console.print(f"{name + ':':12}{value}", markup=False)
    console.print("stages:     stageline status EXPERIMENT.yaml, from storage", markup=False)
    return 0


def logs(options: argparse.Namespace) -> int:
    jobs = Jobs(address_of(options.address))
    jobs.info(options.experiment)
    if options.follow:
        return follow(jobs, options.experiment)
    print(jobs.logs(options.experiment), end="")
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Through storage first: all stages save, also where the cluster would not wait for it; then the job is stopped."""
    jobs = Jobs(address_of(options.address))
    job = jobs.info(options.job)
    if job.status not in RUNNING:
        print(f"{options.job} is over: {str(job.status.value).lower()}")
        return 0
    about = job.metadata or {}
    try:
        if "storage" not in about or "experiment" not in about:
            raise UserError("it is no experiment that stageline submitted")
        store = open_store(about["storage"])
        reachable = with_patience(store, REACH_S)
        ask_job_to_stop(reachable, about["experiment"], options.job, options.grace, "cancelled by stageline cancel")
        print(f"asked all stages to save and stop within {options.grace:g} s", flush=True)
        _wait_until_stopped(store, about["experiment"], jobs, options.job, options.grace + CANCEL_S)
    except (UserError, StorageTransient) as error:
        print(f"no stage can be asked through storage ({error}); telling the driver alone", flush=True)
    jobs.stop(options.job)
    status = jobs.wait(options.job, float(about.get("grace", 0)) + STOP_WAIT_S + KILL_S)
    if status in RUNNING:
        raise UserError(f"{options.job} still runs", where=jobs.address, remedy="cancel it again, or `ray job stop` it")
    print(f"{options.job}: {status.lower()}; stageline submit goes on from the last checkpoints")
    return 0


def _wait_until_stopped(store: Store, experiment: str, jobs: Jobs, job: str, patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until and jobs.info(job).status in RUNNING:
        note = read_note(store, experiment)
        if note is not None and note["job"] == job and note["stopped"]:
            return
        time.sleep(1.0)


def _check_portable(experiment: Experiment) -> None:
    found = local_paths(experiment)
    if found:
        fields = "; ".join(f"{field}: {path}" for field, path in found)
        raise UserError(
            f"folders of this machine, which the cluster's nodes do not see: {fields}",
            where=str(experiment.path),
            remedy="put them on S3 (s3://bucket/prefix), or add --shared-folders where every node mounts them alike",
        )
