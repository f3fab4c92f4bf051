"""The parts of an evaluation: those that storage has are read, the others made on the cluster, with progress."""

from collections.abc import Iterator, Sequence
from typing import Any

from stages.evaluate.generations import Evaluator, Model, Part, decode, parts_of
from stages.evaluate.questions import Asked
from stages.io import Folder, StageIO
from stages.plan_packs import parent

READ_AT_ONCE = 256  # parts


class Work:
    """Parts to make, those that are there, and how far it is. total: answers in all; known: that were there."""

    def __init__(self, io: StageIO):
        self.io, self.params = io, io.params
        data = parent(io, "prepare")
        self.data = None if data is None else data.lent
        self.total, self.done, self.known = 0, 0, 0
        self.rows: dict[str, list[Any]] = {}
        self.there: dict[Folder, set[str]] = {}

    def cache(self, model: Model) -> Folder:
        return self.io.shared_folder(f"generations/{model.fingerprint[:16]}")

    def parts(self, model: Model, asked: Sequence[Asked], settings: dict[str, Any]) -> list[Part]:
        do = "live" if "rule" in settings else "generate"
        return list(self._parts(do, model, asked, settings, len(settings["samples"])))

    def _parts(
        self, do: str, model: Model, asked: Sequence[Asked], settings: dict[str, Any], each: int,
        texts: Sequence[tuple[str, ...]] = (),
    ) -> Iterator[Part]:  # fmt: skip
        threads = max(1, int(self.params.resources.cpus))
        for system in dict.fromkeys(one.system for one in asked):
            places = [i for i, one in enumerate(asked) if one.system == system]
            whole = Part(
                do, model, tuple(asked[i] for i in places), settings, self.cache(model), self.params.batch, threads,
                int(self.params.resources.gpus), self.data, tuple(texts[i] for i in places) if texts else (),
            )  # fmt: skip
            yield from parts_of(whole, each)

    def loss_parts(self, model: Model, asked: Sequence[Asked]) -> list[Part]:
        return list(self._parts("loss", model, asked, {}, 1))

    def judge_parts(
        self, model: Model, asked: Sequence[Asked], settings: dict[str, Any], texts: Sequence[tuple[str, ...]]
    ) -> list[Part]:
        return list(self._parts("judge", model, asked, settings, len(texts[0]), texts)) if texts else []

    def make(self, parts: Sequence[Part]) -> None:
        """All of them: from storage where they are there, on the cluster where they are not."""
        pending = []
        for folder in dict.fromkeys(part.cache for part in parts):
            if folder not in self.there:
                self.there[folder] = set(folder.names())
            mine = {part.name: part for part in parts if part.cache == folder}
            found = [name for name in mine if name in self.there[folder]]
            for start in range(0, len(found), READ_AT_ONCE):
                names = found[start : start + READ_AT_ONCE]
                for name, data in zip(names, folder.get(names), strict=True):
                    self.rows[name] = decode(data)
            self.known += sum(part_rows(mine[name]) for name in found)
            self.done += sum(part_rows(mine[name]) for name in found)
            pending += [part for name, part in mine.items() if name not in self.there[folder]]
        sizes = {part.name: part_rows(part) for part in pending}
        self.io.tick(self.done, self.total, {"answers": self.done, "known": self.known})
        for made in self.io.stream(Evaluator, pending):
            self.rows[made.name] = made.rows
            self.done += sizes[made.name]
            if self.io.tick(self.done, self.total, {"answers": self.done, "known": self.known}).stop:
                self.io.log(f"stopped with {self.done} of {self.total} answers; a new run goes on from them")
                self.io.stopped(self.done)

    def rows_of(self, asked: Sequence[Asked], parts: Sequence[Part]) -> list[Any]:
        """In the order of the questions."""
        by_key = {one.key: row for part in parts for one, row in zip(part.questions, self.rows[part.name], strict=True)}
        return [by_key[one.key] for one in asked]


def part_rows(part: Part) -> int:
    if part.do == "judge":
        return sum(len(texts) for texts in part.texts)
    return len(part.questions) * len(part.settings.get("samples", [0]))
