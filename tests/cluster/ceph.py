"""A real S3 service for tests and benchmarks: Ceph's gateway with one monitor and one OSD, on loopback.

Ceph checks keys and policies, honours If-None-Match, and keeps what it acknowledged through SIGKILL; moto does none
of these three. About 20 s for a first start, 0.3 GB of disk. As root on Debian the packages are installed where they
are missing; elsewhere `ceph` skips with one line that says what to install (with CI=true it fails).
"""

import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import debian
import pytest

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
_KEYRING = (
    ("mon.", ("mon", "allow *")),
    ("client.admin", ("mon", "allow *", "osd", "allow *", "mgr", "allow *")),
    ("osd.0", ("mon", "allow profile osd", "osd", "allow *")),
    ("client.rgw", ("mon", "allow rw", "osd", "allow rwx")),
)
_CONFIGURATION = """[global]
fsid = {fsid}
keyring = {folder}/keyring
mon_host = [v2:127.0.0.1:{monitor_port}]
mon_data = {folder}/mon
osd_data = {folder}/osd
osd_objectstore = bluestore
bluestore_block_size = 8589934592
osd_memory_target = 939524096
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
mon_allow_pool_size_one = true
public_addr = 127.0.0.1
ms_bind_ipv4 = true
run_dir = {folder}/run
log_file = {folder}/log/$name.log
admin_socket = {folder}/run/$name.asok
auth_allow_insecure_global_id_reclaim = false
[client.rgw]
rgw_data = {folder}/run
rgw_frontends = beast endpoint=127.0.0.1:{port}
"""


class Ceph:
    """One store in `folder`, kept over kill() and start(). A context manager: started inside, stopped after.

    Raises RuntimeError, with the tail of a log, where a daemon does not come up.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        self._port, self._monitor_port = _free_ports(2)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._users: dict[str, dict[str, str]] = {}

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables under which a client is the owner of every bucket made here."""
        return self._users["owner"]

    def __enter__(self) -> "Ceph":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts whatever does not run, and returns when requests are answered."""
        first = not (self.folder / "ceph.conf").exists()
        if first:
            self._format()
        self._daemon("mon", "ceph-mon", "-i", "a")
        if first:
            self._run("ceph", "osd", "create")
            self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
            self._run("ceph-osd", "-i", "0", "--mkfs")
        self._daemon("osd", "ceph-osd", "-i", "0")
        self._daemon("rgw", "radosgw", "-n", "client.rgw")
        self._until("rgw", self._answers, 90)
        if first:
            self._users["owner"] = self._user("owner")

    def kill(self, everything: bool = False) -> None:
        """SIGKILL of the gateway, or of all daemons; on return they are gone.

        start() takes 0.2 s after the first, 10 s after the second; then making a bucket may take another 30 s.
        """
        self._end(("rgw", "osd", "mon") if everything else ("rgw",), signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP of the gateway: requests go on arriving, none is read."""
        self._daemons["rgw"].send_signal(signal.SIGSTOP)

    def unread_bytes(self) -> int:
        """What has arrived at the gateway's port and was not read yet: of requests that are under way."""
        lines = [*Path("/proc/net/tcp").read_text().splitlines()[1:]]
        lines += Path("/proc/net/tcp6").read_text().splitlines()[1:]
        fields = [line.split() for line in lines]
        return sum(int(f[4].split(":")[1], 16) for f in fields if int(f[1].rsplit(":", 1)[1], 16) == self._port)

    def stop(self) -> None:
        self._end(("rgw", "osd", "mon"), signal.SIGTERM)

    def bucket(self) -> str:
        """The name of a fresh bucket."""
        name = f"bucket-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def reader(self, bucket: str) -> dict[str, str]:
        """The variables of a second user, who may list and read `bucket` and nothing else."""
        if "reader" not in self._users:
            self._users["reader"] = self._user("reader")
        resources = f'["arn:aws:s3:::{bucket}", "arn:aws:s3:::{bucket}/*"]'
        policy = (
            '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"],'
            f' "Principal": {{"AWS": ["arn:aws:iam:::user/reader"]}}, "Resource": {resources}}}]}}'
        )
        self.client().put_bucket_policy(Bucket=bucket, Policy=policy)
        return self._users["reader"]

    def client(self) -> Any:
        """botocore's own client, as the owner."""
        from botocore.session import get_session

        keys = {
            "aws_access_key_id": self.environment["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": self.environment["AWS_SECRET_ACCESS_KEY"],
        }
        return get_session().create_client("s3", "us-east-1", endpoint_url=self.endpoint_url, **keys)

    def _format(self) -> None:
        for name in ("mon", "osd", "run", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        fsid = str(uuid.uuid4())
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        for i, (name, caps) in enumerate(_KEYRING):
            allowed = [part for kind, cap in zip(caps[::2], caps[1::2]) for part in ("--cap", kind, cap)]
            create = ["--create-keyring"] if i == 0 else []
            _check("ceph-authtool", *create, keyring, "--gen-key", "-n", name, *allowed)
        address = f"[v2:127.0.0.1:{self._monitor_port}]"
        _check("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap)
        text = _CONFIGURATION.format(fsid=fsid, folder=self.folder, monitor_port=self._monitor_port, port=self._port)
        (self.folder / "ceph.conf").write_text(text)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)

    def _user(self, name: str) -> dict[str, str]:
        access, secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
        self._run("radosgw-admin", "user", "create", "--uid", name, "--display-name", name,
                  "--access-key", access, "--secret-key", secret)  # fmt: skip
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url, "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def _run(self, program: str, *arguments: str) -> str:
        return _check(program, "-c", str(self.folder / "ceph.conf"), *arguments)

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        if name in self._daemons and self._daemons[name].poll() is None:
            return
        command = [program, "-c", str(self.folder / "ceph.conf"), *arguments, "-f"]
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint_url, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _until(self, name: str, ready: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if self._daemons[name].poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "log" / f"{name}.out").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"Ceph's {name} does not answer on {self.endpoint_url}; its log ends:\n{tail}")
            time.sleep(0.1)

    def _end(self, names: tuple[str, ...], how: signal.Signals) -> None:
        for name in names:
            if name in self._daemons and self._daemons[name].poll() is None:
                self._daemons[name].send_signal(how)
                try:
                    self._daemons[name].wait(10)
                except subprocess.TimeoutExpired:
                    self._daemons[name].kill()
                    self._daemons[name].wait()


def missing() -> str:
    """Empty where Ceph is there, or was installed now; else the one line that says what to install."""
    return debian.missing(PROGRAMS, PACKAGES)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory) -> Iterator[Ceph]:
    debian.need(PROGRAMS, PACKAGES)
    with Ceph(tmp_path_factory.mktemp("ceph")) as store:
        yield store


def _check(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
