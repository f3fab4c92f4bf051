"""The store on S3 against moto, through a proxy that fails as told: faults pass unseen, and a create happens once."""

import os
import random
import signal
import threading
from time import monotonic, sleep

import pytest
from s3_service import ENVIRONMENT, SYSTEMS, Proxy, Time, moto, s3_store

from modeling.errors import UserError
from orchestrator.address import S3Address
from orchestrator.errors import StorageTransient
from orchestrator.probe import probe, reach
from orchestrator.retry import Retries
from orchestrator.s3 import S3Store
from orchestrator.store import Exists, Missing

PART = 4096


@pytest.fixture(scope="module")
def shared_proxy():
    with Proxy() as one:
        yield one


@pytest.fixture
def proxy(shared_proxy):
    shared_proxy.strip = False
    shared_proxy.faults.clear()
    yield shared_proxy
    assert shared_proxy.faults == [], "a fault that no request met"


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store(monkeypatch, proxy, time) -> S3Store:
    store = s3_store(monkeypatch, proxy.endpoint, retries=time.retries(), part=PART)
    proxy.seen.clear()
    return store


def beside(store: S3Store) -> S3Store:
    """The same objects without the proxy."""
    other = S3Store(S3Address(store.address.bucket, store.address.prefix, moto()))
    other._systems = SYSTEMS.setdefault(other.endpoint, {})
    return other


def methods(proxy: Proxy) -> list[str]:
    return [method for method, _ in proxy.seen]


# Faults on the way.


@pytest.mark.parametrize("fault", ["drop", "mute", "503 SlowDown", "400 RequestTimeout"])
def test_every_call_outlives_a_fault(store, proxy, fault):
    proxy.faults = [("PUT", fault)]
    store.put("a/b", b"1")
    proxy.faults = [("GET", fault), ("GET", fault)]
    assert store.get("a/b") == b"1"
    proxy.faults = [("GET", fault), ("HEAD", fault.replace("400", "500"))]
    assert (store.list("a/"), store.size("a/b")) == (["a/b"], 1)
    proxy.faults = [("DELETE", fault)]
    store.delete("a/b")
    assert not store.exists("a/b")
    tries = [method for method in methods(proxy) if method in ("PUT", "DELETE")]
    assert tries == ["PUT", "PUT", "DELETE", "DELETE"], "tried again once, by us alone"


def test_a_torn_body_is_read_again(store, proxy, tmp_path):
    data = random.Random(0).randbytes(3 * PART + 5)
    store.put("k", data)
    proxy.faults = [("GET", "tear")]
    assert store.get("k") == data
    proxy.faults = [("GET", "mute"), ("GET", "tear"), ("GET", "drop")]
    store.get_file("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == data and os.listdir(tmp_path) == ["k"]


def test_a_create_whose_answer_was_lost_is_ours(store, proxy):
    proxy.faults = [("PUT", "mute")]
    store.put("k", b"with a nonce", create=True)
    assert methods(proxy) == ["PUT", "PUT", "HEAD"] and beside(store).get("k") == b"with a nonce"


@pytest.mark.parametrize("theirs", [b"theirs", b"mine"])
def test_a_create_that_never_arrived_can_lose(store, proxy, time, theirs):
    other, sleep = beside(store), time.sleep

    def meanwhile(seconds: float) -> None:
        sleep(seconds)
        other.put("k", theirs, create=True)

    store._retries = Retries(sleep=meanwhile, clock=lambda: time.now)
    proxy.faults = [("PUT", "503 SlowDown")]
    with pytest.raises(Exists):
        store.put("k", b"mine", create=True)
    assert store.get("k") == theirs and time.slept


def test_equal_bytes_of_another_are_not_ours(store):
    store.put("k", b"same", create=True)
    with pytest.raises(Exists):
        store.put("k", b"same", create=True)


def test_a_conflict_between_creates_is_tried_again(store, proxy):
    proxy.faults = [("PUT", "409 ConditionalRequestConflict")]
    store.put("k", b"1", create=True)
    assert store.get("k") == b"1"


def test_a_refusal_without_a_condition_named_is_one_too(store, proxy):
    proxy.faults = [("PUT", "412 PreconditionFailed")]
    with pytest.raises(Exists):
        store.put("k", b"1", create=True)


# Large objects.


def test_large_objects_travel_in_parts(store, proxy, tmp_path):
    data = random.Random(1).randbytes(5 * PART + 7)
    store.put("k", memoryview(data))
    assert methods(proxy).count("PUT") == 6 and methods(proxy).count("POST") == 2
    (tmp_path / "source").write_bytes(data)
    store.put_file("l", tmp_path / "source")
    for key in "kl":
        store.get_file(key, tmp_path / "new" / key)
        assert (tmp_path / "new" / key).read_bytes() == data == store.get(key)
    proxy.seen.clear()
    store.put("m", data[:PART])
    assert methods(proxy) == ["PUT"]


def test_a_broken_part_alone_is_sent_again(store, proxy):
    data = random.Random(2).randbytes(5 * PART)
    proxy.faults = [("PUT", "503 SlowDown"), ("PUT", "mute")]
    store.put("k", data)
    assert methods(proxy).count("PUT") == 7 and store.get("k") == data


def test_the_end_of_an_upload_whose_answer_was_lost(store, proxy):
    store.put("k", bytes(2 * PART))
    proxy.faults = [("POST", "mute"), ("POST", "mute")]  # the start and the end
    data = random.Random(3).randbytes(2 * PART)
    store.put("k", data)
    assert store.get("k") == data


@pytest.mark.parametrize("fault", [("PUT partNumber=1", "404 NoSuchUpload"), ("POST uploadId=", "500 InternalError")])
def test_an_upload_that_the_store_will_not_finish_is_begun_anew(store, proxy, time, fault):
    """The second is a gateway of Ceph that died while it joined the parts: its lock on the upload stays."""
    real, begun = store._request, []

    def unlocked(method, *arguments, **settings):
        if method == "create_multipart_upload":
            begun.append(method)
            proxy.faults = [fault] * 40 if len(begun) == 1 else []
        return real(method, *arguments, **settings)

    store._request = unlocked
    data = random.Random(4).randbytes(3 * PART)
    store.put("k", data)
    assert len(begun) == 2 and store.get("k") == data and time.now <= 10
    assert fault[0].startswith("PUT") or not store._request("list_multipart_uploads").get("Uploads")


def test_a_store_that_finishes_no_upload_is_transient(store, proxy):
    store.put("k", b"old")
    proxy.faults = [("PUT partNumber=1", "404 NoSuchUpload")] * 3
    with pytest.raises(StorageTransient, match="finished none of 3 uploads to k"):
        store.put("k", bytes(2 * PART))
    assert store.get("k") == b"old"


def test_an_upload_that_fails_leaves_the_old_object_and_no_parts(store, proxy):
    store.put("k", b"old")
    proxy.faults = [("PUT", "403 AccessDenied")]
    with pytest.raises(UserError, match="may not write"):
        store.put("k", bytes(3 * PART))
    listed = store._request("list_multipart_uploads")
    assert store.get("k") == b"old" and not listed.get("Uploads")


def test_an_object_replaced_while_it_is_read_is_not_mixed(store, proxy, tmp_path, monkeypatch):
    store.put("k", b"a" * 3 * PART)
    (tmp_path / "k").write_bytes(b"before")
    read = store._read

    def and_replace(key, *arguments, **settings):
        answer = read(key, *arguments, **settings)
        beside(store).put("k", b"b" * 3 * PART)
        return answer

    monkeypatch.setattr(store, "_read", and_replace)
    with pytest.raises(StorageTransient, match="was replaced while it was read"):
        store.get_file("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == b"before" and os.listdir(tmp_path) == ["k"]


def test_a_list_of_many_pages(store):
    real = store._request

    def short_pages(method, *arguments, **settings):
        return real(method, *arguments, **settings, **({"MaxKeys": 2} if method == "list_objects_v2" else {}))

    store._request = short_pages
    for i in range(5):
        store.put(f"x/{i}", b"")
    assert store.list("x/") == [f"x/{i}" for i in range(5)]


def test_prefixes_keep_stores_apart(store):
    other = beside(store)
    other.address = S3Address(store.address.bucket, "some/prefix2", moto())
    other.put("k", b"other's")
    assert store.list() == [] and not store.exists("k")
    with pytest.raises(Missing):
        store.get("k")


# What a user can mend.


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("403 InvalidAccessKeyId", "does not know this access key → check AWS_ACCESS_KEY_ID"),
        ("403 SignatureDoesNotMatch", "secret key does not fit .* → check AWS_SECRET_ACCESS_KEY"),
        ("403 RequestTimeTooSkewed", "clock .* → set the clock"),
        ("400 ExpiredToken", "session token has expired → renew"),
        ("404 NoSuchBucket", "there is no bucket 'b-.*' at http://127.0.0.1:.* → make the bucket"),
        ("403 AccessDenied", r"may not {verb} the bucket \(AccessDenied, 403\) → the keys need s3:GetObject"),
        ("403 QuotaExceeded", "is full .* → free space"),
        ("507 InsufficientStorage", "is full .* → free space"),
        ("301 PermanentRedirect", "another region → set AWS_DEFAULT_REGION"),
        ("501 NotImplemented", "does not know a request .* → use a store with conditional writes"),
    ],
)
def test_refusals_say_what_to_do_and_repeat_no_key(store, proxy, time, answer, expected):
    for method, verb, call in (
        ("PUT", "write to", lambda: store.put("k", b"1", create=True)),
        ("GET", "list", lambda: store.list()),
    ):
        proxy.faults = [(method, answer)] * (2 if answer.startswith("301") else 1)
        with pytest.raises(UserError, match=expected.format(verb=verb)) as caught:
            call()
        proxy.faults.clear()  # botocore asks again where a redirect names a region
        text = str(caught.value)
        assert text.startswith(f"storage {store.address.short}: ")
        assert not any(ENVIRONMENT[name] in text for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    assert time.slept == []


def test_no_keys_at_all(store, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store._systems = {}
    with pytest.raises(UserError, match="no keys for the store were found → set AWS_ACCESS_KEY_ID"):
        store.list()


def test_a_profile_that_is_not_there(store, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    store._systems = {}
    with pytest.raises(UserError, match=r"nobody.* → check the AWS_\* variables"):
        store.list()


def test_an_unknown_refusal_stays_what_it_is(store, proxy):
    proxy.faults = [("PUT", "400 MalformedXML")]
    with pytest.raises(Exception, match=r"MalformedXML.*as told"):
        store.put("k", b"1")


# The probe.


def test_a_store_that_overwrites_silently_is_refused_by_name(store, proxy):
    proxy.strip = True
    with pytest.raises(UserError, match=r"accepted a second create-only put .* overwrote .* → use AWS S3") as caught:
        probe(store)
    assert proxy.endpoint in str(caught.value) and store.list() == []


def test_a_wrong_address_is_told_soon(monkeypatch, time):
    store = S3Store(S3Address("bucket", "x", "http://127.0.0.1:9"), time.retries())
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"storage s3://bucket/x: the store does not answer: .* → check endpoint_url"):
        reach(store)
    assert 5 < time.now <= 10


def test_a_store_that_never_answers_is_told_soon(store, proxy):
    store._retries = Retries()
    proxy.faults = [("GET", "hang")] * 20
    with pytest.raises(UserError, match=r"the store does not answer: .*Timeout"):
        reach(store, patience=0.2)
    proxy.faults.clear()


# Threads and processes.


def test_a_forked_child_uses_the_store_too(store):
    store.put("k", b"1")
    child = os.fork()
    if child == 0:
        try:
            store.put("from-child", store.get("k"))
        finally:
            os._exit(0)
    until = monotonic() + 60
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        sleep(0.01)
    assert store.get("from-child") == b"1" and store.get("k") == b"1"


def test_many_threads_share_a_store(store):
    def work(me: int) -> None:
        for i in range(2):
            store.put(f"{me}/{i}", bytes([me]) * 3 * PART)
            assert store.get(f"{me}/{i}") == bytes([me]) * 3 * PART

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list()) == 8


def test_nothing_beneath_us_tries_again(store, proxy):
    for method, call in (("PUT", lambda one: one.put("k", b"1")), ("GET", lambda one: one.get("k"))):
        proxy.faults = [(method, "503 SlowDown")]
        proxy.seen.clear()
        with pytest.raises(StorageTransient, match=r"SlowDown \(503\)"):
            call(store.patient(0))
        assert methods(proxy) == [method]
