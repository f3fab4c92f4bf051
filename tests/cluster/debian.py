"""Programs that tests need and pip does not have: installed by apt where that may be, else asked for in one line."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def missing(programs: tuple[str, ...], packages: str) -> str:
    """Empty where all are on the path, or were installed now; else one line that says what to install.

    packages: of Debian, with spaces between them; installed where we are root on Debian.
    """
    install = f"apt-get install -y --no-install-recommends {packages}"
    reason = _absent(programs)
    if reason and os.geteuid() == 0 and shutil.which("apt-get") and Path("/etc/debian_version").exists():
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in ("apt-get update", install):
            done = subprocess.run(command.split(), env=environment, capture_output=True, text=True)
            if done.returncode:
                return f"{reason}, and '{command}' failed: {done.stderr.strip().splitlines()[-1:]}"
        reason = _absent(programs)
    return reason and f"{reason}: as root, {install}"


def need(programs: tuple[str, ...], packages: str) -> None:
    """As missing(); without them the test is skipped, and fails with CI=true."""
    if reason := missing(programs, packages):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def chromium() -> str:
    """The path of a Chromium or Chrome that playwright can drive."""
    if chrome := shutil.which("google-chrome"):
        return chrome
    need(("chromium",), "chromium")
    path = shutil.which("chromium")
    assert path is not None, "needed above"
    return path


def _absent(programs: tuple[str, ...]) -> str:
    absent = [program for program in programs if shutil.which(program) is None]
    return f"not found: {', '.join(absent)}" if absent else ""
