"""The pages of a prepared mixture: which samples the data card and the review list show.

Invariant: the same result gives the same pages. Beside what the steps of curation rejected stand a few kept samples of
every set and a few damaged records of every reason, so that both kinds of mistake can be seen.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from modeling.index import INDEX
from modeling.parquet import open_parquet
from modeling.shards import SHARDS, SampleReader
from stages.io import Folder, StageIO
from stages.prepare import card, review
from stages.prepare.assemble import Late, table_of
from stages.prepare.chunks import Part
from stages.prepare.page import Example

FIELDS = ("dataset", "id", "key", "digest", "type", "verdict", "step", "reason", "detail")


def write_pages(
    io: StageIO, parts: Sequence[Part], folder: Folder, verdicts: Path, late: dict[int, Late], reviewed: dict[str, Any]
) -> dict[str, Any]:
    """card.html and review.html, beside the stage; returns the card's figures."""
    title = f"{io.stage}: {io.params.data}"
    meta = hashlib.sha256(io.sources[io.params.data].meta.encode()).hexdigest()[:8]
    mixture = f"{io.stage}-{io.params.data}-{meta}"  # other experiments have a "mix" too
    shower = Shower(parts, folder, io.scratch / "shown", late)
    flagged = _flagged(verdicts)
    examples = list(shower.flagged(flagged, review.SHOWN))
    if flagged:
        path = io.scratch / "review.html"
        shown = review.write_review(path, title, examples, flagged.total(), mixture=mixture, earlier=reviewed)
        io.keep(path.name, path)
        io.log(f"{flagged.total()} samples rejected by curation, {shown} of them to look at in {path.name}")
    path = io.scratch / "card.html"
    settings = io.params.identity()
    provenance = {"stage": io.fingerprint, "stageline": version("stageline")}
    everything = [*shower.kept(), *_damaged(verdicts), *examples]
    figures = card.write_card(path, title, verdicts, everything, settings=settings, provenance=provenance)
    io.keep(path.name, path)
    shutil.rmtree(shower.scratch, ignore_errors=True)
    return figures


def _flagged(verdicts: Path) -> Counter[str]:
    """How many samples each reason of curation has rejected."""
    counts: Counter[str] = Counter()
    with open_parquet(verdicts, str(verdicts)) as file:
        for batch in file.iter_batches(columns=["step", "reason"]):
            table = pa.Table.from_batches([batch])
            table = table.filter((pc.field("step") != "") & (pc.field("step") != "structure"))
            for row in table.group_by("reason").aggregate([("step", "count")]).to_pylist():
                counts[row["reason"]] += row["step_count"]
    return counts


def _damaged(verdicts: Path) -> Iterator[Example]:
    """Some records of every reason that could not be read: there is nothing of them to show but what was found."""
    seen: Counter[str] = Counter()
    with open_parquet(verdicts, str(verdicts)) as file:
        for batch in file.iter_batches(columns=list(FIELDS)):
            table = pa.Table.from_batches([batch])
            for row in table.filter(pc.field("step") == "structure").to_pylist():
                seen[row["reason"]] += 1
                if seen[row["reason"]] <= card.REJECTED_SHOWN:
                    yield Example(**{name: row[name] for name in FIELDS}, conversation=[], pictures=[])


class Shower:
    """Reads samples of parts as they are to be shown."""

    def __init__(self, parts: Sequence[Part], folder: Folder, scratch: Path, late: dict[int, Late]):
        self.parts, self.folder, self.scratch, self.late = parts, folder, scratch, late

    def kept(self) -> Iterator[Example]:
        """Some of every dataset, from its first, middle and last part."""
        by_dataset: dict[str, list[Part]] = {}
        for part in self.parts:
            if part.kept:
                by_dataset.setdefault(part.dataset, []).append(part)
        for parts in by_dataset.values():
            chosen = {round(i * (len(parts) - 1) / max(1, card.KEPT_SHOWN - 1)) for i in range(card.KEPT_SHOWN)}
            each = -(-card.KEPT_SHOWN // len(chosen))
            for i in sorted(chosen):
                gone = set(self.late[parts[i].number].rows) if parts[i].number in self.late else set()
                rows = [row for row in range(parts[i].kept) if row not in gone][:each]
                yield from self._examples(parts[i], rows, "", None)

    def flagged(self, counts: Counter[str], most: int) -> Iterator[Example]:
        """What steps of curation rejected, of every reason as many as there is room for."""
        room = {reason: -(-most // max(1, len(counts))) for reason in counts}
        for part in self.parts:
            if not any(room.values()):
                return
            local = [name for name in part.counts if name and not name.startswith("structure:")]
            if any(room.get(name.partition(":")[2], 0) for name in local):
                table = table_of(part, f"review/{INDEX}", self.folder, self.scratch)
                yield from self._examples(part, list(range(len(table))), "review/", room)
            late = self.late.get(part.number)
            if late is not None and any(room.get(reason, 0) for reason in late.reason):
                yield from self._examples(part, late.rows, "", room)

    def _examples(self, part: Part, rows: Sequence[int], below: str, room: dict[str, int] | None) -> Iterator[Example]:
        """room: how many of each reason are still wanted; None: all, and they are kept ones."""
        index = table_of(part, f"{below}{INDEX}", self.folder, self.scratch)
        verdicts = table_of(part, "verdicts.parquet", self.folder, self.scratch)
        places = {key: place for place, key in enumerate(verdicts["key"].to_pylist())}
        late = self.late.get(part.number)
        why = {} if late is None or below else dict(zip(late.rows, zip(late.step, late.reason, late.detail)))
        for number in rows:
            row = index.slice(int(number), 1).to_pylist()[0]
            found = verdicts.slice(places[row["key"]], 1).to_pylist()[0]
            if number in why:
                step, reason, detail = why[number]
                found |= {"verdict": "rejected", "step": step, "reason": reason, "detail": detail}
            if room is not None:
                if not room.get(found["reason"], 0):
                    continue
                room[found["reason"]] -= 1
            record, contents = self._read(part, below, row)
            yield Example(
                **{name: found[name] for name in FIELDS}, conversation=record["conversations"],
                pictures=_pictures(record, contents),
            )  # fmt: skip

    def _read(self, part: Part, below: str, row: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        name = f"{part.folder}/{below}{SHARDS}/{row['shard']}"
        return SampleReader(self.folder.fetch(name, self.scratch).parent.parent).read(row)


def _pictures(record: dict[str, Any], contents: list[bytes]) -> list[bytes]:
    """Of a video its first frame, as a picture."""
    if record.get("video", {}).get("kind") != "file":
        return contents
    import io

    from modeling.video import VideoError, read_frames

    try:
        frame = read_frames(contents[0], [record["video"]["first"]])[0]
    except VideoError:  # `verify: header` has not looked at its frames
        return []
    out = io.BytesIO()
    frame.save(out, "PNG")
    return [out.getvalue()]
