"""Secrets in the environment, in addresses and in what libraries raise, print and log: searched for in every file that
a run, its trackers, its reports and Ray leave behind; and found there where redaction is switched off."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from harness import COMMAND, SMALL, Experiment

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/0123456789abcdefghijk",
    "AWS_SESSION_TOKEN": "planted-session-token==0123456789",
    "WANDB_API_KEY": "p1a47ed0wa4db0123456789abcdef0123456789a",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789-0123456789-0123456789",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "MY_DB_PASSWORD": "planted'db\"pass/w0rd&x=7",
}
IN_AN_ADDRESS = "planted-in-an-address"

EXPERIMENT = (
    """
name: cluster
storage: storage
model: {{vision: micro-vit, language: micro-qwen2}}
tracking:
  wandb: {{mode: offline}}
  tensorboard: {{}}
eval:
  asked: {{format: "leaky:items", path: {data}/heldout.json}}
"""
    + SMALL.strip("\n")
    + """
stages:
  mix_data: {{kind: prepare, data: mix}}
  warm: {{kind: mlp_warmup, needs: [mix_data], steps: 6, lr: 1e-3}}
  broken: {{kind: full_finetune, needs: [mix_data, warm], steps: 6, lr: 1e-3}}
  asked: {{kind: evaluate, needs: [warm], sets: [asked], prompts: {{direct: {{}}}}}}
"""
)

# a reader of the user's own that fails where the driver reads, not where it plans
LEAKY = """
import base64, os, threading
from urllib.parse import quote
from stages.evaluate.items import Item

def items(path):
    secret = os.environ["MY_DB_PASSWORD"]
    if threading.current_thread() is not threading.main_thread():
        print("reading with", secret)
        raise RuntimeError(f"postgres://me:{quote(secret, safe='')}@db/x refused {secret!r}")
    yield Item("a", "asked", "question?", "text", "exact", ("answer",))
"""

# Into every Python process of the run: the training of `broken` fails with secrets in its text.
PATCH = """
import base64, importlib.abc, importlib.util, json, os, sys
from urllib.parse import quote

def tick(original):
    def tick(self, step, total, row):
        if self.stage == "broken" and step == 3:
            import logging
            secrets = [os.environ[name] for name in json.loads(os.environ["PLANTED_NAMES"])]
            text = " ".join([*secrets, *map(quote, secrets), *(repr(s) for s in secrets)])
            text += " " + base64.b64encode(f"me:{secrets[-1]}".encode()).decode()
            text += " https://me:ADDRESS@host/x https://host/x?X-Amz-Signature=ADDRESS"
            print(text)
            print(text, file=sys.stderr)
            logging.getLogger("library").error("told: %s", text)
            self.log(text)
            try:
                raise OSError(5, text)
            except OSError as error:
                raise KeyError(text) from error
        return original(self, step, total, row)
    return tick

def patched(module):
    if module.__name__ == "orchestrator.redaction" and os.environ.get("PLANTED_OFF"):
        module.redact = lambda text: text
        module.sanitize = lambda error: error
    if module.__name__ == "orchestrator.stageio":
        module.StoreIO.tick = tick(module.StoreIO.tick)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("orchestrator.redaction", "orchestrator.stageio"):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), patched(module))
        return spec

sys.meta_path.insert(0, Finder())
""".replace("ADDRESS", IN_AN_ADDRESS)


def forms(secret: str) -> set[bytes]:
    """As it may lie in a file; of base64 what does not depend on what stands around it."""
    texts = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}
    texts.add(json.dumps(secret)[1:-1])
    texts |= {base64.b64encode(b"x" * n + secret.encode()).decode()[4:-4] for n in range(3)}
    return {text.encode() for text in texts}


def contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())


def leaks(*folders: Path) -> dict[str, list[str]]:
    """Which secrets lie in which files, by the end of their path."""
    wanted = {name: forms(secret) for name, secret in {**PLANTED, "address": IN_AN_ADDRESS}.items()}
    found: dict[str, list[str]] = {}
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 50, "where is it all?"
    for path in files:
        for data in contents(path):
            names = [name for name, texts in wanted.items() if any(text in data for text in texts)]
            if names:
                found.setdefault(str(path), []).extend(names)
    return found


class Planted:
    """The experiment in a world of its own: home, temporary files, Ray's session; all of it searched afterwards."""

    def __init__(self, folder: Path, data: Path, redacted: bool):
        self.experiment = Experiment(folder / "experiment", data, EXPERIMENT)
        self.short = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # paths of Unix sockets end at 107 characters
        self.code = folder / "code"  # not searched: what leaks there is what the test wrote
        for path in (self.code, folder / "home", folder / "tmp"):
            path.mkdir()
        (self.code / "sitecustomize.py").write_text(PATCH)
        (self.code / "leaky.py").write_text(LEAKY)
        self.environment = os.environ | PLANTED | {
            "PLANTED_NAMES": json.dumps(list(PLANTED)), "PLANTED_OFF": "" if redacted else "1",
            "PYTHONPATH": f"{self.code}:{os.environ.get('PYTHONPATH', '')}", "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(self.short), "RAY_AUTH_MODE": "token",
            "DATABASE_URL": f"postgres://me:{IN_AN_ADDRESS}@db/x", "STAGELINE_CACHE": str(folder / "cache"),
        }  # fmt: skip
        self.folders = [self.experiment.folder, folder / "home", folder / "tmp", folder / "cache", self.short]

    def command(self, verb: str, *arguments: str) -> tuple[int, str]:
        """Its exit code and output, which is kept to be searched."""
        command = [*COMMAND, verb, str(self.experiment.path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=self.environment,
                              cwd=self.experiment.folder)  # fmt: skip
        text = done.stdout + done.stderr
        (self.experiment.folder / f"output-{verb}-{len(list(self.experiment.folder.iterdir()))}.txt").write_text(text)
        return done.returncode, text

    def run(self) -> None:
        code, text = self.command("run")
        assert code == 1, text
        assert "stage broken failed" in text and "stage asked failed" in text and "Traceback" in text, text
        assert self.command("status")[0] == 0
        for stage in ("warm", "broken", "asked"):
            assert self.command("logs", stage)[0] == 0
        assert self.command("report", "--output", str(self.experiment.folder / "report.html"))[0] == 0
        assert list(self.experiment.folder.glob("wandb/offline-run-*/*.wandb"))
        assert list(self.experiment.folder.glob("tensorboard/*/*/events*"))


@pytest.fixture
def planted(data, tmp_path, request):
    world = Planted(tmp_path, data, request.param)
    yield world
    shutil.rmtree(world.short, ignore_errors=True)


@pytest.mark.parametrize("planted", [True], indirect=True)
def test_no_secret_is_in_any_file(planted):
    planted.run()
    assert leaks(*planted.folders) == {}
    logs = "".join(planted.experiment.logs("broken").values())
    assert "***" in logs and "KeyError" in logs and "https://***@host/x" in logs
    (failure, *_) = planted.experiment.state("asked").failures
    assert failure.message.startswith("postgres://***@db/x refused")


@pytest.mark.parametrize("planted", [False], indirect=True)
def test_the_search_finds_them_where_nothing_is_redacted(planted):
    planted.run()
    found = leaks(*planted.folders)
    where = {re.sub(r".*/(ledger|logs|session_[^/]*|output)\b.*", r"\1", path) for path in found}
    assert {"ledger", "logs", "output"} <= where and "report.html" in "".join(found), found
    assert any("/session_" in path for path in found), "Ray's own logs"
    assert {name for names in found.values() for name in names} == {*PLANTED, "address"}
