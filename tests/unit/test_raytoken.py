"""Ray's token: made for its owner alone before Ray would make it, and never shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import redaction
from orchestrator.raytoken import keep_token
from orchestrator.redaction import redact


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(redaction, "_remembered", set())
    before = os.umask(0o022)
    yield tmp_path / ".ray"
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("named", [None, "token", "Token"])
def test_it_is_made_and_private(home, monkeypatch, named):
    if named:
        monkeypatch.setenv("RAY_AUTH_MODE", named)
    keep_token()
    assert mode(home / "auth_token") == 0o600 and mode(home) == 0o700
    token = (home / "auth_token").read_text()
    assert len(bytes.fromhex(token)) == 32 and [path.name for path in home.iterdir()] == ["auth_token"]
    assert redact(f"it is {token}") == "it is ***", "the one of a first run, too"
    keep_token()
    assert (home / "auth_token").read_text() == token


def test_one_that_others_can_read_is_closed_to_them(home):
    home.mkdir(mode=0o755)
    (home / "auth_token").write_text("made-by-ray-for-all-to-read")
    assert mode(home / "auth_token") == 0o644
    keep_token()
    assert mode(home / "auth_token") == 0o600 and (home / "auth_token").read_text() == "made-by-ray-for-all-to-read"
    assert redact("made-by-ray-for-all-to-read") == "***"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away")
def test_that_of_another_user_is_left(home):
    home.mkdir()
    (home / "auth_token").write_text("of-somebody-else")
    os.chown(home / "auth_token", 12345, 12345)
    keep_token()
    assert mode(home / "auth_token") == 0o644


@pytest.mark.parametrize("name, value", [
    ("RAY_AUTH_TOKEN", "some-token"), ("RAY_AUTH_TOKEN_PATH", "/x/token"), ("RAY_AUTH_MODE", "disabled"),
])  # fmt: skip
def test_nothing_is_made_where_ray_takes_it_from_elsewhere_or_wants_none(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_token()
    assert not home.exists()


def test_a_home_that_cannot_be_written_is_rays_to_tell(home):
    home.write_text("no folder")
    keep_token()


def test_of_two_that_make_it_at_once_one_has_made_it(home, monkeypatch):
    link = os.link

    def late(source, target):
        Path(target).write_text("that-of-the-other-driver")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    keep_token()
    assert (home / "auth_token").read_text() == "that-of-the-other-driver"
    assert redact("that-of-the-other-driver") == "***" and len(list(home.iterdir())) == 1


def test_ray_takes_it(home):
    """Ray's own loader finds it, so it makes none."""
    keep_token()
    code = (
        "from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default, "
        "ensure_token_if_auth_enabled; assert enable_token_auth_by_default(); ensure_token_if_auth_enabled()"
    )
    before = (home / "auth_token").read_text()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home)
    assert (home / "auth_token").read_text() == before and mode(home / "auth_token") == 0o600


def test_a_local_ray_starts_after_it(home, monkeypatch):
    import ray

    from orchestrator import raystart

    seen = []
    monkeypatch.setattr(raystart.warmup, "start", dict)
    monkeypatch.setattr(raystart, "dashboard_url", lambda: None)
    monkeypatch.setattr(raystart, "import_module", lambda name: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(mode(home / "auth_token")))
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_preload_python_modules",
                 "RAY_worker_maximum_startup_concurrency"):  # fmt: skip
        monkeypatch.setenv(name, "0")
    raystart.start_ray(None)
    assert seen == [0o600]


def test_a_token_that_cannot_be_kept_is_told(home, caplog):
    home.write_text("a file where the folder should be")
    keep_token()
    assert "Ray's token cannot be kept to its owner" in caplog.text and ".ray" in caplog.text
