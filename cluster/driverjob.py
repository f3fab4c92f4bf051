"""What a driver that runs as a Ray job is given, whoever starts it: `stageline submit` or KubeRay's operator.

Invariant: a job's metadata says what it is about, so that its id alone is enough to list it and to ask for its end
through storage; its environment leaves it the time to save (read in Ray's dashboard/modules/job/job_supervisor.py).
"""

STOP_WAIT_S = 660  # between SIGTERM and SIGKILL: the driver saves; Ray's own default is 3


def environment(grace: float = 0.0) -> dict[str, str]:
    """env_vars of its runtime environment. grace: seconds that it needs after SIGTERM beyond STOP_WAIT_S."""
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(grace) + STOP_WAIT_S),
        "STAGELINE_FORK_SERVER": "0",  # SIGTERM reaches all that is below the driver, so nothing that trains may be
    }


def metadata(experiment: str, storage: str, grace: float = 0.0) -> dict[str, str]:
    """experiment: its name. storage: its address, which holds no secret."""
    return {"experiment": experiment, "storage": storage, "grace": f"{grace:g}"}
