"""A folder of the store, as the tasks of a stage see it: it crosses processes, and opens its store where it is used.

What lies in it is no result until the ledger says so (stageio.py): tasks leave here what a later attempt need not do
again, and the files of a result that are too many to pass through the driver.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.cache import Held, held_result
from orchestrator.checkpoints import sha256_of
from orchestrator.store import Exists, Missing, Store, open_store

AT_ONCE = 32  # objects that are removed


@lru_cache(maxsize=4)
def _open(url: str) -> Store:
    return open_store(url)


@lru_cache(maxsize=8)
def _held(url: str, prefix: str) -> Held:
    return held_result(_open(url), prefix)


@dataclass(frozen=True)
class StoredResult:
    """The result of a completed stage: called, it gives its local folder, which stays for as long as the process."""

    url: str
    prefix: str

    def __call__(self) -> Path:
        return _held(self.url, self.prefix).folder


@dataclass(frozen=True)
class StoreFolder:
    """Implements stages.io.Folder."""

    url: str
    prefix: str

    @property
    def _store(self) -> Store:
        return _open(self.url)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._store.put(f"{self.prefix}/{name}", data, create=True)
            return True
        except Exists:
            return False

    def put_file(self, name: str, path: Path) -> dict[str, Any]:
        self._store.put_file(f"{self.prefix}/{name}", path)
        return {"name": name, "size": path.stat().st_size, "sha256": sha256_of(path)}

    def get(self, names: Sequence[str]) -> list[bytes]:
        found = self._store.get_run([f"{self.prefix}/{name}" for name in names])
        if len(found) < len(names):
            raise Missing(f"{self.prefix}/{names[len(found)]}")
        return found

    def fetch(self, name: str, folder: Path) -> Path:
        key = f"{self.prefix}/{name}"
        local = self._store.local_path(key)
        if local is not None:
            return local
        path = folder / name
        if not path.exists():  # what lies here is never changed
            self._store.get_file(key, path)
        return path

    def names(self) -> list[str]:
        start = len(self.prefix) + 1
        return [key[start:] for key in self._store.list(self.prefix + "/")]

    def copy_to(self, other: Any, name: str, new: str) -> None:
        assert self.url == other.url, "two stores"
        self._store.copy(f"{self.prefix}/{name}", f"{other.prefix}/{new}")

    def drop(self, names: Sequence[str]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: self._store.delete(f"{self.prefix}/{name}"), names))

    def clear(self) -> None:
        local = self._store.local_path(self.prefix)
        if local is not None:
            shutil.rmtree(local)
        else:
            self.drop(self.names())
