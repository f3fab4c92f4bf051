"""Answers of an OpenAI-compatible endpoint: `POST {base_url}/chat/completions`.

Invariants. `answers` answers every prompt or raises: a UserError for what a person has to change, EndpointUnavailable
where the endpoint has answered nobody for `patience_s`. An endpoint that is down is no property of a sample: a prompt
stays without an answer ("") only where the endpoint answered another one after it had failed all its tries, or was
refused (a content filter, a context that is too short). Answers that came before a failure, or were under way, are
given. The key is in this process's memory and in the header of requests, nowhere else.

An outage is when as many requests in a row fail as may be in flight. Then one thread asks whether the endpoint is back,
ever more seldom, and the others wait for it: a service that starts again is not met by all of them at once.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from modeling.errors import UserError
from stages.curation import Endpoint
from stages.prepare.scoring import CUT, Scorer

log = logging.getLogger(__name__)

BASE_S, CAP_S = 0.5, 30.0  # a wait is drawn from [0, min(CAP_S, BASE_S · 2^n)], as in orchestrator/retry.py
PROBE = "Answer with the word: yes"
_PASSING = (408, 409, 425, 429)  # and every 5xx
_PERHAPS_THE_PROMPT = (400, 403, 413, 422)  # filters and lengths are told by these, wrong settings too
_REMEDIES = {
    401: "put a valid key into the environment variable that api_key_env names, on every worker",
    403: "give a key that may use this model, or the name of another model",
    404: "check base_url (up to and with /v1) and the model's name",
}
_REMEDY = "check model, body, max_new_tokens and max_characters against what the endpoint allows"


class EndpointUnavailable(ConnectionError):
    """The endpoint answers nobody. A ConnectionError: the driver tries the stage again later, as for storage."""


class _Refused(Exception):
    """Of this prompt alone, or of every one: then `error` is what to tell."""

    def __init__(self, error: UserError):
        super().__init__(error.message)
        self.error = error


class _Passing(Exception):
    """A fault that may be gone at the next try. after: seconds that the endpoint asks to wait."""

    def __init__(self, what: str, after: float = 0.0):
        super().__init__(what)
        self.after = after


class EndpointScorer(Scorer):
    """Answers of an OpenAI-compatible endpoint, `concurrency` requests at a time."""

    def __init__(self, params: Endpoint):
        import requests
        from requests.adapters import HTTPAdapter

        self.params = params
        self.identity = {"endpoint": params.identity()}
        self.url = f"{params.base_url.rstrip('/')}/chat/completions"
        self._key = _read_key(params.api_key_env)
        self._session = requests.Session()
        # set even without a key: requests would otherwise send what .netrc holds for the host
        self._session.auth = self._authorize
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=params.concurrency))
        self._lock = threading.Lock()  # of the four below, which are of all requests
        self._faults = 0  # in a row
        self._answers = 0
        self._last = 0.0  # when the last answer came, or the asking began, on the monotonic clock
        self._not_before = 0.0  # on the same clock
        self._probing = threading.Lock()  # whoever holds it finds out whether the endpoint is back

    def answers(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        if not prompts:
            return
        with self._lock:
            self._faults, self._last = 0, time.monotonic()
        stop, failure = threading.Event(), None
        with ThreadPoolExecutor(min(self.params.concurrency, len(prompts))) as pool:
            futures = {pool.submit(self._answer, prompt, stop): index for index, prompt in enumerate(prompts)}
            try:
                for future in as_completed(futures):
                    try:
                        yield futures[future], future.result()
                    except CancelledError:
                        continue
                    except (UserError, EndpointUnavailable) as error:
                        failure = failure or error
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _answer(self, prompt: str, stop: threading.Event) -> str:
        try:
            return self._persist(prompt, stop)
        except BaseException:
            stop.set()  # here, so that no thread starts another request
            raise

    def _persist(self, prompt: str, stop: threading.Event) -> str:
        fault: Exception | None = None
        for attempt in range(self.params.retries + 1):
            self._wait(stop)
            try:
                return self._request(prompt)
            except _Refused as error:
                fault = error
                break
            except _Passing as error:
                fault = error
            if self._faults >= self.params.concurrency:
                self._until_it_answers(stop)
            _pause(attempt, stop)
        self._until_it_answers(stop)
        log.warning("%s: a prompt has no answer: %s", self.url, fault)
        return ""

    def _until_it_answers(self, stop: threading.Event) -> None:
        """Returns once anybody was answered. Raises EndpointUnavailable, and UserError where nothing is accepted."""
        before, attempt = self._answers, 0
        with self._probing:
            while self._answers == before:
                self._wait(stop)
                try:
                    self._request(PROBE)
                except _Refused as refused:
                    raise refused.error from None
                except _Passing as fault:
                    silent = time.monotonic() - self._last
                    if silent >= self.params.patience_s:
                        raise self._unavailable(f"has given no answer for {silent:.0f} s", fault) from None
                    _pause(attempt, stop)
                    attempt += 1

    def _wait(self, stop: threading.Event) -> None:
        """Until no Retry-After holds; raises where the others have given up."""
        while not stop.is_set() and (delay := self._not_before - time.monotonic()) > 0:
            stop.wait(delay + random.uniform(0, BASE_S))
        if stop.is_set():
            raise CancelledError

    def _request(self, prompt: str) -> str:
        try:
            answer = self._post(prompt)
        except _Passing as fault:
            if fault.after > self.params.patience_s:
                raise self._unavailable(f"asks to wait for {fault.after:.0f} s", fault) from None
            with self._lock:
                self._faults += 1
                self._not_before = max(self._not_before, time.monotonic() + fault.after)
            raise
        with self._lock:
            self._faults, self._last = 0, time.monotonic()
            self._answers += 1
        return answer

    def _post(self, prompt: str) -> str:
        from requests import exceptions

        body = {
            "model": self.params.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": self.params.max_new_tokens, **self.params.body,
        }  # fmt: skip
        body = {name: value for name, value in body.items() if value is not None}
        try:
            response = self._session.post(self.url, json=body, timeout=self.params.timeout_s, allow_redirects=False)
        except (
            exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError,
            exceptions.ContentDecodingError,
        ) as error:  # fmt: skip
            raise _Passing(f"{type(error).__name__}: {self._shown(str(error))}") from None
        except exceptions.RequestException as error:  # a URL or a proxy that is none
            message = f"the request cannot be sent: {self._shown(str(error))}"
            raise UserError(message, where=self._where, remedy="correct base_url") from None
        status = response.status_code
        if status in _PASSING or status >= 500:
            after = _retry_after(response.headers.get("Retry-After"))
            raise _Passing(f"status {status}: {self._shown(response.text)}", after)
        if 300 <= status < 400:
            target = self._shown(response.headers.get("Location", ""))
            raise UserError(f"it has moved to {target}", where=self._where, remedy="give that as base_url")
        if status != 200:
            told = "" if status in (401, 403) else f": {self._shown(response.text)}"  # which may show parts of the key
            message = f"the endpoint refuses the request with status {status}{told}"
            error = UserError(message, where=self._where, remedy=_REMEDIES.get(status, _REMEDY))
            raise _Refused(error) if status in _PERHAPS_THE_PROMPT else error
        try:
            choice = response.json()["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Passing(f"what came is no completion: {self._shown(response.text)}") from None
        if content is not None and not isinstance(content, str):
            raise _Passing(f"what came is no text: {self._shown(response.text)}")
        return (content or "") + (CUT if reason == "length" else "")

    def _authorize(self, request: Any) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _shown(self, text: str) -> str:
        """What a message may repeat of what came from outside: an echo of the key is left out before it is cut."""
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= 200 else f"{text[:200]} ..."

    def _unavailable(self, what: str, fault: _Passing) -> EndpointUnavailable:
        return EndpointUnavailable(f"{self._where}: the endpoint {what} (last: {fault}); scores so far are kept")

    @property
    def _where(self) -> str:
        return f"curate.scores.endpoint: {self.url}"


def _pause(attempt: int, stop: threading.Event) -> None:
    stop.wait(random.uniform(0, min(CAP_S, BASE_S * 2 ** min(attempt, 20))))


def _read_key(name: str | None) -> str:
    if name is None:
        return ""
    key, where = os.environ.get(name, "").strip(), "curate.scores.endpoint.api_key_env"
    if not key:
        raise UserError(f"the environment variable {name} is not set", where=where, remedy="set it on every worker")
    if not key.isascii() or not key.isprintable() or " " in key:
        remedy = "set it to the key alone"
        raise UserError(f"{name} holds characters that no key has (not shown)", where=where, remedy=remedy)
    return key


def _retry_after(value: str | None) -> float:
    """Seconds, of a number or a date; 0 where there is neither."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value or "")
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
