"""The store against a real S3 service that checks keys, honours policies, and is killed in the middle of puts."""

import os
import threading
import time

import pytest

from modeling.errors import UserError
from orchestrator.address import parse_s3
from orchestrator.probe import probe, reach
from orchestrator.retry import Retries
from orchestrator.s3 import S3Store
from orchestrator.store import Exists


@pytest.fixture
def environment(ceph, monkeypatch):
    """use(variables): this process is the owner of the buckets, or who `variables` say."""

    def use(variables: dict[str, str]) -> None:
        for name, value in (ceph.environment | variables).items():
            monkeypatch.setenv(name, value)

    use({})
    return use


@pytest.fixture
def store(ceph, environment) -> S3Store:
    return S3Store(parse_s3(f"s3://{ceph.bucket()}/a/prefix"))


def in_threads(count: int, work) -> None:
    """work(i) in each; the first failure fails the test."""
    failures = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    if failures:
        raise failures[0]


def test_the_probe_passes_and_leaves_nothing(store):
    in_threads(3, lambda _: probe(store))
    assert store.list() == []


def test_of_racing_creates_one_wins(store):
    won, start = [], threading.Barrier(16)

    def race(me: int) -> None:
        for number in range(10):
            start.wait(60)
            try:
                store.put(f"race/{number}", bytes([me]) * 1000, create=True)
                won.append((number, me))
            except Exists:
                seen = store.get(f"race/{number}")
                assert len(seen) == 1000 and len(set(seen)) == 1

    in_threads(16, race)
    assert sorted(number for number, _ in won) == list(range(10))
    assert all(store.get(f"race/{number}")[0] == me for number, me in won)


def test_large_objects_travel_in_parts(ceph, environment, tmp_path):
    store = S3Store(parse_s3(f"s3://{ceph.bucket()}"), part=5 * 2**20)
    data = os.urandom(23 * 2**20)
    store.put("k", memoryview(data))
    store.get_file("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == data == store.get("k")
    store.put_file("k", tmp_path / "k")
    assert store.size("k") == len(data) and store.list() == ["k"]


@pytest.mark.parametrize("everything", [False, True])
def test_a_service_killed_in_the_middle_of_puts_loses_nothing(ceph, environment, everything):
    """Puts, creates and uploads in parts under way at each kill: all return, each object is whole, each create ours."""
    store = S3Store(parse_s3(f"s3://{ceph.bucket()}/a"), Retries(cap=0.5), part=5 * 2**20)
    done, end, acknowledged = threading.Event(), time.monotonic() + 240, []

    def content(key: str, size: int) -> bytes:
        return (key.encode() + b"|") * (size // (len(key) + 1))

    def work(me: int) -> None:
        number = 0
        while not done.is_set():
            assert time.monotonic() < end
            key, number = f"{me}/{number}", number + 1
            if me == 0:
                store.put(key, content(key, 12 * 2**20))
            else:
                store.put(key, content(key, 20_000), create=me > 2)  # Exists would be a create mistaken for another's
            acknowledged.append(key)

    def kill() -> None:
        for _ in range(1 if everything else 4):
            before = len(acknowledged)
            while len(acknowledged) < before + 20 and time.monotonic() < end:
                time.sleep(0.01)
            ceph.kill(everything)
            time.sleep(0.3)
            ceph.start()
        done.set()

    in_threads(7, lambda i: kill() if i == 6 else work(i))
    assert sorted(store.list()) == sorted(acknowledged)
    assert {key.split("/")[0] for key in acknowledged} == set("012345")
    for key in acknowledged:
        assert store.get(key) == content(key, 12 * 2**20 if key[0] == "0" else 20_000)


def refused(url: str, action) -> str:
    store = S3Store(parse_s3(url))
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        action(store)
    assert time.monotonic() - began < 5
    text = str(caught.value)
    assert text.startswith(f"storage {url}: ") and os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    return text


@pytest.mark.parametrize("action", [reach, probe])
def test_wrong_keys_and_a_missing_bucket(ceph, environment, action):
    bucket = ceph.bucket()
    environment({"AWS_SECRET_ACCESS_KEY": "not-the-secret"})
    assert "secret key does not fit" in refused(f"s3://{bucket}/x", action)
    environment({"AWS_ACCESS_KEY_ID": "NOBODYSKEY"})
    assert "does not know this access key" in refused(f"s3://{bucket}/x", action)
    environment({})
    text = refused("s3://no-such-bucket/x", action)
    assert f"there is no bucket 'no-such-bucket' at {ceph.endpoint_url} → make the bucket" in text


def test_a_bucket_that_may_only_be_read(ceph, environment, store):
    store.put("k", b"1")
    environment(ceph.reader(store.address.bucket))
    text = refused(store.url, probe)
    assert (
        "these keys may not write to the bucket (AccessDenied, 403) → the keys need s3:GetObject, s3:PutObject" in text
    )
    reader = S3Store(store.address)
    reach(reader)
    assert reader.get("k") == b"1" and reader.list() == ["k"]
    with pytest.raises(UserError, match="may not delete from the bucket"):
        reader.delete("k")


def test_a_bucket_of_someone_else(ceph, environment, store):
    environment(ceph.reader(ceph.bucket()))
    assert "these keys may not list the bucket" in refused(store.url, reach)
