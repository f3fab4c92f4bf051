"""Where the files of a tracker lie while its driver runs.

Invariant: it is a folder that can be written and that outlives the driver on this machine, so that the next one finds
what is there. The folder that was asked for is neither in a driver of KubeRay's, whose experiment lies in a read-only
mount, nor in a submitted one, whose bundle Ray removes with the job.
"""

import os
import tempfile
from pathlib import Path

from modeling.errors import UserError

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job (ray/_private/runtime_env/constants.py)
BUNDLES = "working_dir_files"  # where Ray unpacks what jobs bring (ray/_private/runtime_env/working_dir.py)


def place(wanted: str, experiment: str) -> Path:
    """The wanted folder, or else one of the experiment below the folder for temporary files. It exists.

    Raises UserError where that one is not this user's.
    """
    folder = Path(wanted)
    if not _of_a_bundle(folder) and _can_be_written(folder):
        return folder
    own = Path(tempfile.gettempdir()) / f"stageline-tracking-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():
        raise UserError("it belongs to another user", where=str(own), remedy="remove it, or set TMPDIR")
    folder = own / experiment
    folder.mkdir(exist_ok=True)
    return folder


def _of_a_bundle(folder: Path) -> bool:
    return JOB in os.environ and BUNDLES in folder.parts and folder.is_relative_to(Path.cwd())


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
