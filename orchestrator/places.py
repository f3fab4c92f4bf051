"""Where the workers of a training attempt ran: `places/<token>.json` beside the ledger, for who asks what it cost.

Invariant: none of it is truth. Rank 0 writes it once, at the start; without it the attempt's cost is unknown (cost.py).
It says what a worker occupied as well, for `resources:` may be another by the time that anyone asks.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cluster.shape import MARKET, NODE_TYPE
from orchestrator.checkpoints import token_name, token_of
from orchestrator.ledger import Token
from orchestrator.store import Store
from stages.params import ACCELERATOR

LABELS = (NODE_TYPE, MARKET, ACCELERATOR)


@dataclass(frozen=True)
class Places:
    """cpus, gpus: of each worker. nodes: by rank, the labels of its node that tell what type of machine it is."""

    cpus: float
    gpus: float
    nodes: tuple[dict[str, str], ...]


def telling(labels: Mapping[str, str]) -> dict[str, str]:
    """Of a node's labels those that Places has."""
    return {name: labels[name] for name in LABELS if name in labels}


def write_places(store: Store, prefix: str, token: Token, places: Places) -> None:
    store.put(f"{prefix}/places/{token_name(token)}.json", json.dumps(asdict(places)).encode())


def read_places(store: Store, prefix: str) -> dict[Token, Places]:
    """By the token of the attempt."""
    found = {}
    for key in store.list(f"{prefix}/places/"):
        body = json.loads(store.get(key))
        found[token_of(key.rsplit("/", 1)[1])] = Places(body["cpus"], body["gpus"], tuple(body["nodes"]))
    return found
