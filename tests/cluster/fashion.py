"""Fashion-MNIST (MIT licence), 28 × 28 pictures of garments, from Debian's package dataset-fashion-mnist."""

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install -y --no-install-recommends dataset-fashion-mnist"
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@pytest.fixture(scope="session")
def fashion() -> tuple[np.ndarray, list[str]]:
    """uint8 [10000, 28, 28] and what each shows. Where it cannot be installed: skips, or fails with CI=true."""
    if not FOLDER.is_dir() and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in ("apt-get update", INSTALL):
            subprocess.run(command.split(), env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True)
    if not FOLDER.is_dir():
        reason = f"Fashion-MNIST is needed: as root on Debian, {INSTALL}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    pictures = np.frombuffer(gzip.decompress((FOLDER / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((FOLDER / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return pictures.reshape(-1, 28, 28), [f"a {GARMENTS[label]}" for label in labels]
