"""The token of a Ray that this driver starts: whoever reads it runs code as the user who started it.

Invariant: the file that holds it is for its owner alone, from its first byte on. Ray would make it, in ~/.ray, with the
rights that the process's umask leaves, for all to read as a rule; so it is made here, before Ray looks for one.
"""

import contextlib
import logging
import os
import secrets
import tempfile
from pathlib import Path

from orchestrator.redaction import remember_ray_token

BYTES = 32  # of a new one: as many as of Ray's own

log = logging.getLogger(__name__)


def keep_token() -> None:
    """Before a local Ray starts: its token is there, private, and known to redact().

    Nothing is made or changed where another place than ~/.ray/auth_token is named, or RAY_AUTH_MODE wants no token.
    Where the file cannot be made or closed to others, that is told, and Ray does what it can.
    """
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if path.exists():
            _close(path)
        else:
            _make(path)
    except OSError as error:
        log.warning("Ray's token cannot be kept to its owner: %s", error)
    remember_ray_token()


def _close(path: Path) -> None:
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & 0o077:
        path.chmod(0o600)


def _make(path: Path) -> None:
    """Whole, or not at all: another driver may be looking for it, or making it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="auth_token-") as file:  # 0600
        file.write(secrets.token_hex(BYTES))
        file.flush()
        with contextlib.suppress(FileExistsError):  # another driver's, whole too
            os.link(file.name, path)
