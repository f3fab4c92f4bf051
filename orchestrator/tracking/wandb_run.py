"""Weights & Biases: one run a stage, whoever drives it and however often its driver dies.

Invariant: over all that wandb keeps of a run, on its server or in the folders for `wandb sync`, steps only grow, and
each is there once. What is recorded is asked of wandb itself: the server online; offline the newest folder, read by
wandb's own reader once the process that wrote it has surely ended (wandb writes its file some 15 s late, and what it
was only handed dies with the driver: the next one passes it on again). `<stage>/tracking/wandb.json` in storage,
written before rows go out, says which folder that is and how far it can be, so that also one that was synced and
removed in between repeats nothing: a mark beside the folders tells that from a disk that was lost. Folders are copied
to `experiments/<name>/wandb/` in storage when a driver ends, or by the next one: a head's disk goes with the head.

wandb's own collecting is off: it would send the command line, the git remote with what is in its address, the packages
and the output. An experiment that changes from offline to online in the middle has to sync its folders first.
"""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from orchestrator.redaction import remember
from orchestrator.store import Missing
from orchestrator.tracking.about import About
from orchestrator.tracking.params import WandbParams
from orchestrator.tracking.place import place
from orchestrator.tracking.rows import numbers

SETTLED_S = 3.0  # for which the file of another process has not changed: that process has ended
PATIENCE_S = 30.0  # with one that goes on changing
INIT_S = 30.0  # for the server to answer

# No collecting; nothing on the terminal: the driver shows its own lines.
QUIET = {
    "console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False,
    "disable_job_creation": True, "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True,
    "x_save_requirements": False, "use_dot_wandb": False, "init_timeout": INIT_S,
}  # fmt: skip


def check(params: WandbParams) -> None:
    """Raises UserError where runs cannot be begun: before any training, not after hours of it."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed", where="tracking.wandb", remedy="pip install 'stageline[tracking]'")
    if "wandb" not in sys.modules:  # a service of another process would go on when this one is killed
        os.environ.pop("WANDB_SERVICE", None)
    if params.mode == "online" and not _key():
        raise UserError("wandb has no key", where="tracking.wandb",
                        remedy="set WANDB_API_KEY, run `wandb login`, or write mode: offline")  # fmt: skip


def _key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.sdk.lib.wbauth import read_netrc_auth

    key = read_netrc_auth(host=os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    remember(key or "")
    return bool(key)


class WandbRun:
    """Implements about.Tracker."""

    name = "wandb"

    def __init__(self, params: WandbParams, about: About):
        self.params, self.about = params, about
        self.last, self.moved = 0, ""
        self._run: Any = None
        self._record: dict[str, Any] = {}

    def open(self) -> None:
        import wandb

        offline, about = self.params.mode == "offline", self.about
        record = self._read_record()
        if offline and record:
            self.last = self._recorded(record)
        settings = wandb.Settings(**QUIET)
        folder = place(self.params.folder or ".", about.experiment)
        if folder != Path(self.params.folder or "."):
            self.moved = f"wandb's folders are in {folder / 'wandb'}" + (", and in storage later" if offline else "")
        self._run = wandb.init(
            project=self.params.project, entity=self.params.entity, mode=self.params.mode, dir=str(folder),
            id=about.run, resume="allow", reinit="create_new", group=about.experiment, job_type=about.kind,
            name=about.stage, tags=list(self.params.tags), config=about.config, settings=settings,
        )  # fmt: skip
        if not offline:
            self.last = max(0, self._run.starting_step - 1)  # the next one, by the server
        for card in about.cards(Path(self._run.dir)):
            self._run.save(str(card), base_path=self._run.dir, policy="now")
        self._record = {
            "run": about.run, "mode": self.params.mode, "step": self.last,
            "folder": str(Path(self._run.settings.sync_dir)) if offline else "",
            "mark": self._mark(Path(self._run.settings.sync_dir).parent) if offline else "",
            "before": self.last,  # the last step of the folders before this one
            "stored": record.get("stored", 0),  # the last step of the folders that are copied to storage
        }  # fmt: skip
        self._write_record()

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        self._record["step"] = rows[-1]["step"]  # the last one that may be recorded from now on
        self._write_record()
        for row in rows:
            self._run.log(numbers(row), step=row["step"], commit=True)
            self.last = row["step"]

    def finish(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)
        if self.params.mode == "offline":
            self._store_folder(Path(self._record["folder"]))
            self._record["stored"] = self.last
            self._write_record()

    def _recorded(self, record: dict[str, Any]) -> int:
        """The last step that earlier drivers left in folders for `wandb sync`."""
        folder = Path(record["folder"])
        if record["mode"] == "offline" and folder.is_dir():
            files = list(folder.glob("run-*.wandb"))  # none, if it was killed before wandb made it
            for file in files:
                _wait_until_settled(file)
            self._store_folder(folder)
            record["stored"] = max([record["before"], *map(last_step, files)])
            return record["stored"]
        mark = self._mark_file(folder.parent)
        if record["mode"] == "offline" and mark.is_file() and mark.read_text() == record["mark"]:  # synced and removed
            return record["step"]
        return record["stored"]  # what another machine, or another disk, had beyond that went with it

    def _mark(self, folder: Path) -> str:
        """What tells a folder of folders from any other of its name; made where there is none."""
        file = self._mark_file(folder)
        if not file.is_file():
            file.write_text(secrets.token_hex(8))
        return file.read_text()

    def _mark_file(self, folder: Path) -> Path:
        return folder / f".stageline-{self.about.run}"

    def _store_folder(self, folder: Path) -> None:
        about = self.about
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder.parent).as_posix()
                about.store.put_file(f"experiments/{about.experiment}/wandb/{name}", path)

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.about.store.get(self._record_key))
        except Missing:
            return {}
        return record if record["run"] == self.about.run else {}

    def _write_record(self) -> None:
        self.about.store.put(self._record_key, json.dumps(self._record).encode())

    @property
    def _record_key(self) -> str:
        return f"{self.about.prefix}/tracking/wandb.json"


def _wait_until_settled(file: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.time() - file.stat().st_mtime < SETTLED_S and time.monotonic() < until:
        time.sleep(SETTLED_S / 4)


def last_step(file: Path) -> int:
    """The last step in a .wandb file, which may end in the middle of a record; 0 where there is none."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    quiet = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    last = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet) as reader:
        assert reader.stdout is not None and reader.stderr is not None
        for line in reader.stdout:
            record = json.loads(line)
            if record["type"] == "history":
                last = max(last, int(record["history"]["step"]["num"]))
        told = reader.stderr.read()
    if reader.returncode:
        raise RuntimeError(f"wandb cannot read {file}: {told.strip()}")
    return last
