"""Secrets, taken out of any text before it leaves this process.

Invariant: a text that passed redact() holds no secret that this process knows by value (environment variables with a
name as secrets have, passwords in addresses that the environment holds, what remember() was told), be it plain,
URL-quoted, escaped or in base64 at any offset; nor anything with the shape of one (user and password of an address, a
signed query, an Authorization header, tokens of well-known services). It may take out too much, never too little.

Applied where text leaves: logs and ledger (progress.py, ledger.py), what the command prints and every log record
(installed(), guarded()), exceptions before they cross processes (sanitize()), trackers and the report.
"""

import base64
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from modeling.errors import UserError
from orchestrator.keys import given_key

HIDDEN = "***"
LEAST = 8  # characters of a value that is taken for a secret: a shorter one is a switch or a word
LEAST_LINE = 16  # of one line of a secret that has several, such as a PEM key
OPAQUE = 16  # characters of a value that is no word of a text, whatever it is made of

_NAME = re.compile(
    r"KEY(?!BOARD|RING)|SECRET|TOKEN(?!IZ)|PASSW|PASSPHRASE|CREDENTIAL|(^|_)(PWD|PASS|AUTH|COOKIE|SIGNATURE)$", re.I
)
# of those the names that say so beyond doubt: CACHE_KEY is none
_CLEAR = re.compile(
    r"SECRET|TOKEN|PASSW|PASSPHRASE|(^|_)PASS$|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH|ENCRYPTION)_?KEY", re.I
)
# variables named like that which hold no secret but where one lies, or how it is used
_NO_SECRET = re.compile(r"^PWD$|(PATH|FILE|DIR|DIRECTORY|URL|URI|HOST|MODE|NAME|METHOD|TYPE|ENV|TIMEOUT|TTL)S?$", re.I)
_USER = re.compile(r"(://)(?:[^/\s'\"<>?#]{1,512}|[^/\s:@'\"<>]{1,256}:(?!\d{1,5}/)[^\s@'\"<>]{1,512})@")
_PASSWORD = re.compile(r"(?=://[^/\s:@]*:(?!\d{1,5}/)(\S+))")  # and what follows it: which @ ends it is not said
_QUERY = re.compile(
    r"([?&;][\w.-]{0,40}(?:signature|token|secret|passw\w{0,8}|credential|api_?key|access_?key(?:_?id)?|auth|sig)=)"
    r"[^&\s#'\"<>]+", re.I,
)  # fmt: skip
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*)[\w+/=.~-]{8,}", re.I)
_TOKENS = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{24,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{40,}"
    r"|glpat-[\w-]{20,}|xox[abp]-[\w-]{20,}|AIza[\w-]{35}|sk-[\w-]{32,}|wandb_v\d_\w{32,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.{0,10000}?-----END [A-Z ]*PRIVATE KEY-----)?", re.S,
)  # fmt: skip

_remembered: set[str] = set()


def remember(value: str) -> None:
    """A secret of this process that is not in its environment, a token from a file."""
    if len(value) >= LEAST:
        _remembered.add(value)


def remember_ray_token() -> None:
    """The one that a file holds, where there is one."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if token.is_file() and os.access(token, os.R_OK):
        remember(token.read_text(errors="replace").strip())


def redact(text: str) -> str:
    """`text` with *** for every secret in it."""
    known = _known(tuple(sorted(os.environ.items())), frozenset(_remembered))
    if known is not None:
        text = known.sub(HIDDEN, text)
    return redact_shapes(text)


def redact_shapes(text: str) -> str:
    """Without what this process knows by value."""
    if "://" in text:
        text = _USER.sub(rf"\1{HIDDEN}@", text)
    for pattern in (_QUERY, _HEADER):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def redact_all(value: Any) -> Any:
    """A copy of nested lists and mappings with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def found_in(text: str) -> str:
    """What kind of secret a text holds, in words that do not repeat it; "" where there is none.

    Asked before something is refused, so the value of a variable counts only where it is no plain word, which may stand
    anywhere by chance, or where it is all of the text and the variable's name leaves no doubt.
    """
    if redact_shapes(text) != text:
        return "a user name, password or key"
    for name, value in os.environ.items():
        if name.upper().endswith("ID") or not _is_secret(name, value):  # an id may be a plain word
            continue
        for part in {value.strip()} | _parts(value):
            if part in text and (_no_word(name, part) or (part == text and _CLEAR.search(name))):
                return f"the value of the environment variable {name}"
    return ""


def _no_word(name: str, value: str) -> bool:
    long, mixed = len(value) >= OPAQUE, bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value))
    return long or mixed if _CLEAR.search(name) else long and mixed


def check_text(text: str, where: str) -> None:
    """Raises UserError where a text that is to be written elsewhere as it is, comments and commands included, holds a
    secret; the message does not repeat it."""
    what = found_in(text) or given_key(text)
    if what:
        raise UserError(
            f"holds {what}, and the file goes to the cluster as it is", where=where,
            remedy="take it out, also of comments: nodes find such things in their environment",
        )  # fmt: skip


def check_overrides(overrides: Iterable[str]) -> None:
    """As check_text, of settings that stand in a job's command."""
    for setting in overrides:
        check_text(setting, f"override '{setting.partition('=')[0]}=...'")


def check_file(path: Path) -> str:
    """The text of an experiment file that holds no secret anywhere. Raises UserError with the line of the first one."""
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        check_text(line, f"{path}:{number}")
    check_text(text, str(path))  # one of several lines
    return text


def sanitize(error: BaseException) -> BaseException:
    """The error, its texts and those of its causes redacted in place; another one where that cannot be done.

    It is a RuntimeError then that begins with the name of the first, by which errors.classify() knows it.
    """
    todo, seen = [error], set[int]()
    while todo:
        link = todo.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        for name in [*vars(link), *(("filename", "filename2", "strerror") if isinstance(link, OSError) else ())]:
            value = getattr(link, name)
            if isinstance(value, str) and (clean := redact(value)) != value:
                setattr(link, name, clean)
        link.args = tuple(_clean(value) for value in link.args)
        if notes := getattr(link, "__notes__", None):
            link.__notes__ = [_clean(note) for note in notes]
        failures = getattr(link, "worker_failures", None)
        others = [link.__cause__, link.__context__, getattr(link, "cause", None), *getattr(link, "exceptions", ())]
        others += list(failures.values()) if isinstance(failures, dict) else []
        todo += [other for other in others if isinstance(other, BaseException)]
    if (text := redact(str(error))) != str(error):  # whatever a foreign class makes of itself
        return RuntimeError(f"{type(error).__name__}: {text}")
    return error


def _clean(value: Any) -> Any:
    """An argument of an exception; one that is no text is left, unless what it prints as holds a secret."""
    if isinstance(value, str):
        return redact(value)
    if value is None or isinstance(value, int | float | BaseException):
        return value
    shown = repr(value)
    return value if (clean := redact(shown)) == shown else clean


@contextmanager
def guarded() -> Iterator[None]:
    """In a process of the cluster, around our work: what it prints, logs and raises holds no secret."""
    install()
    try:
        yield
    except Exception as error:
        clean = sanitize(error)
        if clean is error:
            raise
        raise clean from None


def install() -> None:
    """From now on all that this process prints and logs is redacted; Ray's token is known where a file holds it."""
    remember_ray_token()
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Stream):
            setattr(sys, name, _Stream(getattr(sys, name)))
    if not isinstance(logging.getLogRecordFactory(), _Records):
        logging.setLogRecordFactory(_Records(logging.getLogRecordFactory()))


@contextmanager
def installed() -> Iterator[None]:
    """install() for the block alone."""
    before = sys.stdout, sys.stderr, logging.getLogRecordFactory()
    install()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before[:2]
        logging.setLogRecordFactory(before[2])


class _Stream:
    """A text stream that redacts each text that is written to it."""

    def __init__(self, inner: Any):
        self._inner = inner

    def write(self, text: str) -> int:
        self._inner.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Records:
    """A factory of log records whose text, and whose exception's, is redacted."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __call__(self, *args: Any, **named: Any) -> logging.LogRecord:
        record = self._inner(*args, **named)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit; logging itself says so, with all of them
            text = f"{record.msg} {record.args}"
            record.msg, record.args = "%s", (text,)
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, ()
        if record.exc_info and isinstance(record.exc_info[1], BaseException):
            clean_error = sanitize(record.exc_info[1])
            record.exc_info = (type(clean_error), clean_error, record.exc_info[2])
        return record


def _is_secret(name: str, value: str) -> bool:
    return len(value) >= LEAST and bool(_NAME.search(name)) and not _NO_SECRET.search(name)


@lru_cache(maxsize=4)
def _known(environment: tuple[tuple[str, str], ...], remembered: frozenset[str]) -> re.Pattern[str] | None:
    """Matches every form of every secret known by value, the longest first."""
    secrets = set(remembered)
    for name, value in environment:
        if _is_secret(name, value):
            secrets |= {value, value.strip()} | _parts(value)
        for rest in _PASSWORD.findall(value):  # of a proxy, a database
            for password in [rest[:i] for i, letter in enumerate(rest) if letter == "@"]:
                secrets |= {password, unquote(password)}
    forms = {form for secret in secrets if len(secret) >= LEAST for form in _forms(secret)}
    if not forms:
        return None
    return re.compile("|".join(re.escape(form) for form in sorted(forms, key=lambda form: (-len(form), form))))


def _parts(value: str) -> set[str]:
    """What of a secret may stand alone: its lines, and the secrets in it where it is JSON (a cloud's account file)."""
    parts = {line.strip() for line in value.splitlines() if len(line.strip()) >= LEAST_LINE}
    if value.lstrip().startswith("{"):
        try:
            body = json.loads(value)
        except ValueError:
            return parts
        parts = {inner for key, inner in body.items() if isinstance(inner, str) and _is_secret(key, inner)}
        parts |= {line for part in parts for line in part.splitlines() if len(line) >= LEAST_LINE}
    return parts


def _forms(secret: str) -> set[str]:
    """The secret as it may stand in a text."""
    forms = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret)}
    forms |= {json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    raw = secret.encode()
    for offset in range(3):  # after so many other bytes: what their letters do not share with it
        text = base64.b64encode(b"\0" * offset + raw).decode()
        text = text[(0, 2, 3)[offset] : (offset + len(raw)) * 8 // 6]
        forms |= {text, text.replace("+", "-").replace("/", "_")}
    return forms
