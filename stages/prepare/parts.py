"""A part being written: the verdict on every record, the kept samples with their bytes, and those for review.

Invariant: records = rows of verdicts.parquet = kept + rejected, and index.parquet has the kept ones in the same order.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modeling.images import ImageError
from modeling.meta import Dataset
from modeling.shards import ShardWriter
from modeling.sources import Rejected, Rejection, Sample
from modeling.video import VideoError
from stages.prepare.judge import Judge
from stages.prepare.measure import Measure, Measured, measure_sample

VERDICTS = pa.schema(
    [
        ("dataset", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("id", pa.string()),
        ("key", pa.string()),  # unique in the mixture
        ("digest", pa.string()),  # of what the sample says and shows; "" where it could not be read
        ("type", pa.string()),  # text | image | multi_image | video; "" where it could not be read
        ("verdict", pa.string()),  # kept | rejected
        ("step", pa.string()),  # what rejected it: structure, or a step of curation
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("tokens", pa.int32()),  # of a video with as many frames as fit
        ("mean_tokens", pa.int32()),  # of a use: a video's over the numbers of frames that it may show, rounded
        ("supervised", pa.int32()),
        ("tiles", pa.int16()),
        ("repeat", pa.float64()),
        ("domain", pa.string()),  # "" and null where it was not scored
        ("quality", pa.float32()),
        ("repetition", pa.float32()),
    ]
)
NOT_SCORED = {"domain": "", "quality": None, "repetition": None}
SIGNATURES = "signatures.npz"
FIRST = 5  # rejected samples that a part names itself


class PartWriter:
    """Writes one part to `folder`."""

    def __init__(self, folder: Path, dataset: Dataset, shard_bytes: int):
        self.dataset, self.folder = dataset, folder
        self.kept, self.review = ShardWriter(folder, shard_bytes), ShardWriter(folder / "review", shard_bytes)
        self.kept.__enter__()
        self.review.__enter__()
        self.counts: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []
        self.records = self.tokens = 0
        self._verdicts: list[dict[str, Any]] = []
        self._signatures: list[Any] = []

    def add(self, sample: Sample | Rejected, key: str, measure: Measure, judge: Judge) -> None:
        self.records += 1
        if isinstance(sample, Rejected):
            return self._reject(sample, "structure", key)
        try:
            measured = measure_sample(sample, self.dataset, measure, key)
        except Rejection as rejection:
            return self._reject(Rejected.of(sample, rejection), "structure", key, sample.type)
        found = judge.find(sample, measured)
        if found is not None:
            step, rejection = found
            self._reject(Rejected.of(sample, rejection), step, key, sample.type, measured)
            self.review.add(measured.blob, measured.row)
            return
        if judge.signs:
            try:
                self._signatures.append(judge.signature(sample, measured))
            except (ImageError, VideoError) as error:  # `verify: header` has not looked at the pixels
                reason = "unreadable_video" if sample.video else "unreadable_image"
                return self._reject(Rejected.of(sample, Rejection(reason, str(error))), "structure", key, sample.type)
        self.counts[""] += 1
        self.tokens += measured.row["tokens"]
        self._verdict(sample, key, sample.type, measured, verdict="kept", step="", reason="", detail="")
        self.kept.add(measured.blob, measured.row)

    def close(self) -> None:
        self.kept.__exit__(None)
        self.review.__exit__(None)
        pq.write_table(pa.Table.from_pylist(self._verdicts, schema=VERDICTS), self.folder / "verdicts.parquet")
        if self._signatures:
            from stages.prepare.signatures import Signatures

            Signatures.concat(self._signatures).save(self.folder / SIGNATURES)
        assert self.records == sum(self.counts.values()) == len(self._verdicts)

    def _reject(
        self, rejected: Rejected, step: str, key: str, type: str = "", measured: Measured | None = None
    ) -> None:
        self.counts[f"{step}:{rejected.reason}"] += 1
        if step == "structure" and len(self.first) < FIRST:
            self.first.append(asdict(rejected))
        self._verdict(
            rejected, key, type, measured, verdict="rejected", step=step, reason=rejected.reason, detail=rejected.detail
        )

    def _verdict(self, sample: Sample | Rejected, key: str, type: str, measured: Measured | None, **found: str) -> None:
        row = measured.row if measured else {"tokens": 0, "answers": [], "tiles": 0}
        choices = row.get("frame_tokens") or [row["tokens"]]
        self._verdicts.append(
            {
                "dataset": sample.dataset, "file": sample.file, "line": sample.line, "id": sample.id, "key": key,
                "digest": measured.digest if measured else "", "type": type, "tokens": row["tokens"],
                "mean_tokens": round(sum(choices) / len(choices)),
                "supervised": sum(row["answers"]), "tiles": row["tiles"], "repeat": self.dataset.repeat,
                **found, **NOT_SCORED,
            }
        )  # fmt: skip
