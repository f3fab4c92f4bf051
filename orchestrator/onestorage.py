"""Whether all nodes of a cluster reach one and the same storage.

Invariant: storage counts as one only where every node read what another had just written to it. A folder that each node
has on its own disk passes every test that a node can make alone, as do two stores that have a bucket of the same name.
"""

import time
import uuid
from collections.abc import Mapping, Sequence

from cluster import survey
from cluster.nodes import Place
from modeling.errors import UserError
from orchestrator.address import redact
from orchestrator.errors import StorageTransient
from orchestrator.probe import FOLDER, probe
from orchestrator.store import open_store

SEEN_S = 5.0  # for a network's file system


def storage_problem(storage: str) -> str:
    """On a node: why the storage cannot serve a run from here, or an empty text."""
    try:
        probe(open_store(storage))
        return ""
    except (UserError, StorageTransient) as error:
        return str(error)


def not_shared(nodes: Sequence[Place], hosts: Mapping[str, str], storage: str) -> dict[str, str]:
    """{node id: why} of the nodes that do not see what the first of them writes. hosts: by node id."""
    if len(nodes) < 2:
        return {}
    first, *others = nodes
    key = f"{FOLDER}mark-{uuid.uuid4().hex}"
    found: dict[str, str] = {}
    left = survey.each([first], lambda node: survey.on(node.id, leave, storage, key))[first.id]
    if isinstance(left, survey.Silent):
        found[first.id] = left.reason
    else:
        for node, seen in survey.each(others, lambda node: survey.on(node.id, sees, storage, key)).items():
            if isinstance(seen, survey.Silent):
                found[node] = seen.reason
            elif not seen:
                found[node] = _told(storage, hosts[first.id])
    gone = survey.each([first], lambda node: survey.on(node.id, remove, storage, key))[first.id]
    if isinstance(gone, survey.Silent):
        found.setdefault(first.id, gone.reason)
    return found


def leave(storage: str, key: str) -> None:
    """On a node."""
    open_store(storage).put(key, key.encode())


def sees(storage: str, key: str) -> bool:
    """On a node."""
    store, until = open_store(storage), time.monotonic() + SEEN_S
    while not store.exists(key):
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return store.get(key) == key.encode()


def remove(storage: str, key: str) -> None:
    """On a node."""
    open_store(storage).delete(key)


def _told(storage: str, writer: str) -> str:
    what = f"what {writer} wrote to {redact(storage)} is not there, "
    if "://" in storage:
        return what + (
            "so nodes reach different stores → name endpoint_url under 'storage:', or set the same AWS_ENDPOINT_URL on "
            "all nodes"
        )
    return what + (
        "so each node has a folder of its own → put 'storage:' on S3 (s3://bucket/prefix), or on a folder that all "
        "nodes mount alike, and submit with --shared-folders"
    )
