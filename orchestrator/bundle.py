"""What a submitted job takes along: the project's own code as it is here, and the experiment file.

Invariant: nothing else. Only files of the four packages that belong to them are copied, so neither data nor a `.env`
beside them travels, and no variable of this environment does: the cluster's nodes have keys of their own. The text of
the experiment is the very one that was looked through for secrets.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from orchestrator.redaction import check_file

PACKAGES = ("orchestrator", "stages", "modeling", "cluster")
KINDS = (".py", ".html", ".css", ".js", ".json", ".j2", ".txt", ".svg", ".yaml", ".yml")  # of their files
EXPERIMENT = "experiment.yaml"  # its name in the bundle


def make_bundle(experiment: Path | None, folder: Path) -> None:
    """Fills `folder`, which is to be the job's working directory; the experiment, if any, is EXPERIMENT in it.

    Raises UserError where the experiment's text holds a secret, comments included.
    """
    for package in PACKAGES:
        source = _source(package)
        for path in sorted(source.rglob("*")):
            inside = path.relative_to(source)
            hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
            if path.is_file() and not path.is_symlink() and path.suffix in KINDS and not hidden:
                target = folder / package / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    if experiment is not None:
        (folder / EXPERIMENT).write_text(check_file(experiment), encoding="utf-8")


def _source(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is one of ours"
    return Path(next(iter(spec.submodule_search_locations)))
