"""What the outside asks of a running attempt, through storage: to save and stop before a deadline.

One object per token, `control/<token>.json`, so that a request never reaches a later attempt. It says seconds, not a
time of day: clocks of two machines are never compared; rank 0 counts from when it reads it, at most POLL_S later.
Nothing here is truth: what an attempt did about it is in the ledger.
"""

import json
from collections.abc import Iterable

from orchestrator.checkpoints import token_name
from orchestrator.ledger import Token
from orchestrator.redaction import redact
from orchestrator.store import Missing, Store

POLL_S = 1.0  # between two looks of rank 0


def ask_to_stop(store: Store, prefix: str, token: Token, in_s: float, reason: str, origin: str = "asked") -> None:
    """The attempt of `token` has to be over in `in_s` seconds: it saves last before that, and stops. origin: a key of
    ledger.ORIGINS."""
    body = {"in_s": in_s, "reason": redact(reason), "origin": origin}
    store.put(_key(prefix, token), json.dumps(body).encode())


def asked_to_stop(store: Store, prefix: str, token: Token) -> tuple[float, str] | None:
    """(seconds, reason) of the request to this attempt, or None."""
    try:
        body = json.loads(store.get(_key(prefix, token)))
        return float(body["in_s"]), str(body["reason"])
    except Missing:
        return None


def stopped_by(store: Store, prefix: str, token: Token, said: Iterable[str]) -> str:
    """Who stopped an attempt that saved and stopped, by what its ranks said: the origin of the request here where they
    name its reason, else "notice": the cluster told them."""
    try:
        body = json.loads(store.get(_key(prefix, token)))
    except Missing:
        return "notice"
    return str(body.get("origin", "asked")) if any(body["reason"] in text for text in said) else "notice"


def stacks_key(prefix: str, token: Token, rank: int) -> str:
    """Where a rank that hangs leaves its stacks: among the logs."""
    return f"{prefix}/logs/{token_name(token)}-stacks-rank{rank:05d}.log"


def hung(store: Store, prefix: str, token: Token) -> list[str]:
    """The stacks that ranks of this attempt left."""
    return store.list(f"{prefix}/logs/{token_name(token)}-stacks-")


def _key(prefix: str, token: Token) -> str:
    return f"{prefix}/control/{token_name(token)}.json"
