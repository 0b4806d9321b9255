"""Why pictures were left out of shards."""

from dataclasses import dataclass

# A line of json for each picture, beside the shards.
FILE = "dropped.jsonl"
# By the names that ldm.data.faults gives to the same faults.
REASONS = {
    "failed_to_download": "img2dataset could not fetch it",
    "failed_to_resize": "img2dataset could not decode it, or found it too small",
    "unfinished_shard": "a shard that img2dataset had not finished",
    "broken_shard": "a part of the source that cannot be read, or its end",
    "no_image": "the picture is not where the source says",
    "oversized_member": "a file too large to be read; it is not",
    "image_bomb": "more pixels than are ever decoded",
    "broken_image": "cannot be decoded to its end",
    "tiny_image": "the short side is below min_size",
    "broken_json": "json that cannot be read, or is no object",
    "not_utf8": "text or json that is not UTF-8",
    "missing_caption": "without a caption",
    "duplicate": "like a picture that was written before",
}


class DroppedError(ValueError):
    """A picture cannot be written, for one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Dropped:
    """A picture that was left out: its name in the source, one of REASONS, and the particulars."""

    source: str
    reason: str
    detail: str
