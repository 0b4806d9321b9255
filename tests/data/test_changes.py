"""What changed about shards since a checkpoint is named, shard by shard, and refused unless it is wanted."""

from typing import Any

import pytest

from ldm.data.changes import differences, refuse


def told(shards: dict[str, str], **settings: Any) -> dict[str, Any]:
    return {"shards": shards, "settings": {name: str(value) for name, value in settings.items()}}


THEN = told({"0.tar": "10 aa", "1.tar": "10 bb"}, seed=1)


def test_no_change_is_none() -> None:
    assert differences(THEN, told({"0.tar": "10 aa", "1.tar": "10 bb"}, seed=1)) == ""
    refuse(THEN, THEN, allowed=False)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (told({"0.tar": "10 aa", "1.tar": "10 bb", "2.tar": "5 cc"}, seed=1), "1 shards added: 2.tar"),
        (told({"1.tar": "10 bb"}, seed=1), "1 shards removed: 0.tar"),
        (told({"0.tar": "9 dd", "1.tar": "10 bb"}, seed=1), "1 shards changed: 0.tar (10 -> 9 samples)"),
        (told({"1.tar": "10 bb", "0.tar": "10 aa"}, seed=1), "the same shards in another order"),
        (told({"0.tar": "10 aa", "1.tar": "10 bb"}, seed=2), "seed 1 -> 2"),
        (
            told({f"{i}.tar": "1 x" for i in range(2, 9)}, seed=1),
            "7 shards added: 2.tar, 3.tar, 4.tar, ...; 2 shards removed: 0.tar, 1.tar",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_change_is_named(now: dict[str, Any], words: str) -> None:
    assert differences(THEN, now) == words
    with pytest.raises(ValueError, match=r"data\.allow_change=true"):
        refuse(THEN, now, allowed=False)
    with pytest.warns(UserWarning, match="going on with them"):
        refuse(THEN, now, allowed=True)
