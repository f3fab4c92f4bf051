"""The steps of curation that look at one sample alone, in their order: review, pictures, text; and what the later steps
need to know of it.

A person's verdict (`review`) stands above every step; a set that is exempt from a step passes it unseen.
"""

from typing import Any

from modeling.images import decode_rgb
from modeling.sources import Rejection, Sample
from modeling.video import read_frames
from stages.curation import Curation
from stages.prepare.measure import Measured

FRAMES_SIGNED = 3  # of a video


class Judge:
    """Of one dataset. reviewed: digest of a sample -> keep | drop."""

    def __init__(self, curation: Curation, dataset: str, reviewed: dict[str, str]):
        self.curation, self.reviewed = curation, reviewed
        exempt = curation.exempt
        self.images = None if dataset in exempt.images else curation.images
        self.text = None if dataset in exempt.text else curation.text
        self.signs = bool(curation.duplicates or curation.contamination)

    def find(self, sample: Sample, measured: Measured) -> tuple[str, Rejection] | None:
        """(step, rejection) of the first step that rejects it."""
        known = self.reviewed.get(measured.digest)
        if known == "keep":
            return None
        if known == "drop":
            return "review", Rejection("review", "dropped in the review")
        if self.images and (rejection := self._shape(measured)):
            return "images", rejection
        if self.text:
            from stages.prepare.text_checks import check_text

            if rejection := check_text(sample.conversation, self.text):
                return "text", rejection
        return None

    def signature(self, sample: Sample, measured: Measured) -> Any:
        """What copies are found by."""
        from stages.prepare.signatures import signature

        return signature(sample.conversation, pictures(sample, measured), measured.contents, sample.clip)

    def _shape(self, measured: Measured) -> Rejection | None:
        assert self.images is not None, "asked only where the step runs"
        for number, (width, height) in enumerate(zip(measured.row["widths"], measured.row["heights"]), 1):
            short, long = sorted((width, height))
            if short < self.images.min_side:
                limit = f"the shorter side must have {self.images.min_side} at least"
                return Rejection("odd_shape", f"picture {number} has {width}×{height} pixels: {limit}")
            if long > short * self.images.max_ratio:
                limit = f"sides may differ by a factor of {self.images.max_ratio:g}"
                return Rejection("odd_shape", f"picture {number} has {width}×{height} pixels: {limit}")
        return None


def pictures(sample: Sample, measured: Measured) -> list[Any]:
    """Decoded: the images, or a few frames of a video."""
    if sample.video and not sample.video.path.endswith("/"):
        frames = measured.row["frames"]
        chosen = [frames * (2 * i + 1) // (2 * FRAMES_SIGNED) for i in range(FRAMES_SIGNED)]
        return read_frames(measured.contents[0], [measured.first + i for i in chosen])
    contents = measured.contents
    if sample.video:
        contents = [contents[len(contents) * (2 * i + 1) // (2 * FRAMES_SIGNED)] for i in range(FRAMES_SIGNED)]
    return [decode_rgb(data) for data in contents]
