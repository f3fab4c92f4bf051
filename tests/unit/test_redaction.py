"""What leaves a process holds no secret of it: in every form, at every boundary."""

import base64
import json
import logging
import pickle
import re
import sys
import traceback
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.errors import DataError, UserError
from orchestrator.cli.main import main
from orchestrator.errors import ErrorClass, classify
from orchestrator.ledger import Ledger
from orchestrator.progress import Recorder, read_logs
from orchestrator.redaction import found_in, guarded, installed, redact, redact_all, remember, sanitize
from orchestrator.store import MemoryStore

SECRET = "s3cr3t'of\"this/test+=&%x"
NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN", "MY_DB_PASSWORD",
         "DB_PASS", "MYSQL_PASS", "PGPASSWORD", "GITHUB_PAT_TOKEN", "client_secret",
         "GOOGLE_APPLICATION_CREDENTIALS_JSON")  # fmt: skip


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("MY_DB_PASSWORD", SECRET)


@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_a_variable_with_such_a_name(name, monkeypatch):
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == "a *** b"
    assert found_in("value-of-it").endswith(name)


@pytest.mark.parametrize("name, value, text, found", [
    ("CACHE_KEY", "stageline", "storage of stageline", False),  # a word that is anywhere
    ("CACHE_KEY", "stageline", "stageline", False),
    ("SORT_KEY", "experiments/digits", "experiments/digits.yaml", False),
    ("MY_DB_PASSWORD", "stageline", "by stageline", False),
    ("MY_DB_PASSWORD", "stageline", "stageline", True),  # all of a setting
    ("MY_DB_PASSWORD", "hunter22", "by hunter22", True),
    ("ENCRYPTION_KEY", "correct-horse-battery", "# correct-horse-battery", True),
    ("DEPLOY_KEY", "abcdefgh01234567", "x/abcdefgh01234567", True),
    ("DEPLOY_TOKENS", "first-line-of-them-1\nsecond-line-of-them-2\n", "# second-line-of-them-2", True),
])  # fmt: skip
def test_what_is_refused_is_no_plain_word(name, value, text, found, monkeypatch):
    """Taking out may take too much; refusing a file that holds a word by chance leaves its user without a way."""
    monkeypatch.setenv(name, value)
    assert bool(found_in(text)) == found
    assert value.strip() not in redact(text)


@pytest.mark.parametrize("name, value", [
    ("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token"), ("TOKENIZERS_PARALLELISM", "disabled"), ("PWD", "/home/me"),
    ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000"), ("COMPASS", "north-east"),
    ("API_KEY", "short"), ("KEYBOARD_LAYOUT", "de-latin1"),
])  # fmt: skip
def test_what_is_no_secret_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}") == f"it is {value}"


@pytest.mark.parametrize("form", [
    str, quote, quote_plus, lambda s: quote(s, safe=""), lambda s: json.dumps({"a": s}), lambda s: repr([s]),
    lambda s: base64.b64encode(s.encode()).decode(), lambda s: base64.b64encode(b"u:" + s.encode()).decode(),
    lambda s: base64.b64encode(b"me:" + s.encode() + b"\n").decode(),
    lambda s: base64.urlsafe_b64encode(b"user:" + s.encode()).decode(),
])  # fmt: skip
def test_every_form_in_which_it_travels(form, planted):
    text = f"before {form(SECRET)} after"
    clean = redact(text)
    assert "***" in clean and clean.startswith("before ") and clean.endswith(" after")
    core = form(SECRET)[4:-4]  # of base64 the first and last letters hold parts of what stands beside it
    assert core[4:-4] not in clean


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=8, max_size=40), st.binary(max_size=9))
def test_any_secret_in_base64_after_any_bytes(secret, before):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_TOKEN", secret)
        assert "***" in redact(base64.b64encode(before + secret.encode() + b"after").decode())


@pytest.mark.parametrize("text, clean", [
    ("s3://AKIA:abc@bucket/x", "s3://***@bucket/x"),
    ("s3://AK:se/cr+et@bucket/x?a=1", "s3://***@bucket/x?a=1"),
    ("https://me:p%40ss@h:443/x, then", "https://***@h:443/x, then"),
    ("https://token@github.com/a/b.git", "https://***@github.com/a/b.git"),
    ("http://h:8080/picture@2x.png", "http://h:8080/picture@2x.png"),
    ("via http://joe:p@ssw0rd1234@proxy:8080 now", "via http://***@proxy:8080 now"),
    ("git clone https://me:p@ss@word@h/a me@h", "git clone https://***@h/a me@h"),
    ("https://b/k?X-Amz-Credential=a%2Fb&X-Amz-Signature=0f0f&x=1",
     "https://b/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
    ("http://h/x?endpoint_url=http://h:1&token=abc", "http://h/x?endpoint_url=http://h:1&token=***"),
    ("{'Authorization': 'Bearer abcdefgh.ijk'}", "{'Authorization': 'Bearer ***'}"),
    ("user AKIAIOSFODNN7EXAMPLE is unknown", "user *** is unknown"),
    ("max_tokens=16384 key=stage", "max_tokens=16384 key=stage"),
])  # fmt: skip
def test_what_looks_like_one(text, clean):
    assert redact(text) == clean
    assert bool(found_in(text)) == (text != clean)


@pytest.mark.parametrize("address, forms", [
    ("http://me:p%2Fassword@proxy:3128", ["p/assword", "p%2Fassword"]),
    ("http://joe:p@ssw0rd1234@proxy:8080", ["p@ssw0rd1234"]),
    ("postgres://me:pass/w@rd1234@db/x?mail=a@b", ["pass/w@rd1234"]),
    ("redis://:hunter2hunter2@a:1,redis://:hunter3hunter3@b:1", ["hunter2hunter2", "hunter3hunter3"]),
])  # fmt: skip
def test_a_password_in_an_address_of_the_environment(address, forms, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", address)
    for form in forms:
        assert redact(f"it is {form}.") == "it is ***."


def test_parts_of_a_secret_that_has_several(monkeypatch):
    monkeypatch.setenv("PRIVATE_KEY", "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nAQEFAASC\n-----END KEY-----")
    monkeypatch.setenv("ACCOUNT_CREDENTIALS", json.dumps({"type": "account", "private_key": "one-of-it-is-secret"}))
    assert redact("a line: MIIEvQIBADANBgkqhkiG9w0.") == "a line: ***."
    assert redact("account one-of-it-is-secret") == "account ***"


def test_one_that_was_remembered():
    remember("token-from-a-file")
    assert redact("Bearer token-from-a-file") == "Bearer ***"


def test_rays_token_in_its_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "token").write_text("token-of-a-cluster\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with installed():
        print("it is token-of-a-cluster")
    assert capsys.readouterr().out == "it is ***\n"


def test_nested_values(planted):
    assert redact_all({"a": [SECRET, 1, None], "b": {"c": f"x{SECRET}"}}) == {"a": ["***", 1, None], "b": {"c": "x***"}}


def test_an_error_keeps_its_class_and_loses_the_secret(planted):
    class Foreign(Exception):
        def __str__(self):
            return f"computed {SECRET}"

    cause = FileNotFoundError(2, "no such file", f"/x/{SECRET}")
    try:
        raise DataError(f"with {SECRET}", where="eval.x", remedy=f"not {SECRET}") from cause
    except DataError as caught:
        clean = sanitize(caught)
        assert clean is caught and "***" in str(clean) and SECRET not in f"{clean!r}{clean}{vars(clean)}"
        assert clean.__cause__ is cause and cause.filename == "/x/***" and cause.errno == 2
        crossed = pickle.loads(pickle.dumps(clean))
        assert isinstance(crossed, UserError) and crossed.where == "eval.x" and SECRET not in str(crossed)
    other = sanitize(Foreign())
    assert str(other) == "RuntimeError: computed ***".replace("RuntimeError", "Foreign")
    assert classify(sanitize(KeyError(SECRET))) is ErrorClass.bug
    assert classify(sanitize(ConnectionError(f"{SECRET}"))) is ErrorClass.storage_transient


def test_notes_of_an_error(planted):
    error = ValueError("plain")
    error.add_note(f"while {SECRET}")
    error.__cause__ = KeyError("x")
    error.__cause__.add_note(SECRET)
    assert sanitize(error) is error
    text = "".join(traceback.format_exception(error))
    assert "while ***" in text and SECRET not in text


def test_what_is_printed_and_logged(planted, capsys):
    logger = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)  # made before, as a library does on import
    logger.addHandler(handler)
    try:
        with installed():
            print("printed", SECRET)
            logger.error("logged %s", SECRET)
            logger.error("does not fit %d", SECRET)
            try:
                raise ValueError(SECRET)
            except ValueError:
                logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    out, err = capsys.readouterr()
    assert out == "printed ***\n" and "logged ***" in err and "ValueError: ***" in err and "does not fit" in err
    assert SECRET not in out + err
    print("afterwards", SECRET)
    assert SECRET in capsys.readouterr().out, "for the block alone"


def test_what_leaves_a_worker(planted, capsys, monkeypatch):
    for name in ("stdout", "stderr"):  # restored afterwards
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before = logging.getLogRecordFactory()
    try:
        with pytest.raises(OSError, match=re.escape("[Errno 5] ***")), guarded():
            print(SECRET)
            raise OSError(5, SECRET)
    finally:
        logging.setLogRecordFactory(before)
    assert capsys.readouterr().out == "***\n"


def test_ledger_and_logs(planted):
    store = MemoryStore()
    ledger = Ledger(store, "s")
    token = ledger.start_attempt(ledger.claim({"host": "h"}), 1)
    ledger.append("preempted", token, step=1, reason=f"by {SECRET}")
    ledger.append("failed", token, error_class="bug", message=f"in https://me:{SECRET}@h", step=1)
    recorder = Recorder(store, "s", token)
    recorder.log(f"one\ntwo {SECRET}")
    assert "two ***" in read_logs(store, "s")["e0001a0001.log"]
    assert all(SECRET not in store.get(key).decode() for key in store.list())
    assert [entry.fields.get("reason", entry.fields.get("message")) for entry in ledger.entries()[2:]] == [
        "by ***", "in https://***@h",
    ]  # fmt: skip


REFUSED = {
    "a key": ("tracking:\n  wandb: {mode: offline, api_key: planted-in-yaml}\n", "'api_key' does not belong"),
    "a number": ("db_password: 1234567890\n", "'db_password' does not belong"),
    "an address": ("data:\n  mix: {meta: 'https://me:planted-in-yaml@host/mix.json'}\n", "name, password or key"),
    "a signed one": ("eval:\n  e: {path: 'https://h/x?X-Amz-Signature=planted-in-yaml'}\n", "password or key"),
    "a token": (f"data:\n  mix: {{meta: /x/hf_{'planted' * 4}/mix.json}}\n", "password or key"),
    "a variable's": (f"stages:\n  s: {{kind: {json.dumps(SECRET)}}}\n", "variable MY_DB_PASSWORD"),
    "in a list": ("stages:\n  s: {needs: [a, 's3://me:planted-in-yaml@b']}\n", "stages.s.needs.1: holds a user name"),
    "as a key": ("data:\n  'https://me:planted-in-yaml@host': {meta: x}\n", "a key of it holds a user name"),
    "in storage": ("storage: s3://me:planted-in-yaml@bucket/x\n", "keys do not belong"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("verb", ["plan", "run", "status"])
def test_a_secret_in_the_file_is_refused_with_its_line_and_not_repeated(verb, case, planted, tmp_path, capsys):
    text, expected = REFUSED[case]
    path = tmp_path / "experiment.yaml"
    path.write_text(f"name: x\nseed: 0\n{text}")
    assert main([verb, str(path)]) == 2
    told = "".join(capsys.readouterr())
    assert expected in told and re.search(rf"{re.escape(str(path))}:[345]: ", told), told
    assert "planted" not in told.replace(str(tmp_path), "") and SECRET not in told and "1234567890" not in told


@pytest.mark.parametrize("override", [
    "name=https://me:planted-override@h", "db_password=planted-override", "seed=AKIAPLANTEDOVERRIDE1",
    "data.none.meta=s3://AK:planted-override@b", "data.mix={a: 'http://h?token=planted-override'",
])  # fmt: skip
def test_nor_is_one_in_an_override(override, tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_text("name: x\nseed: 0\n")
    assert main(["plan", str(path), override]) == 2
    told = "".join(capsys.readouterr())
    assert f"override '{override.partition('=')[0]}=" in told and "planted" not in told.lower(), told


def test_the_name_of_a_clusters_secret_is_none(tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_text("name: x\ncluster: {secret: my-keys, nodes: {}}\n")
    assert main(["plan", str(path)]) == 2
    assert "does not belong" not in "".join(capsys.readouterr())
