import pytest

from ldm.networks.edm_layout import BlockPlan, UNetPlan, attending_levels


def plan(*, only_last_attends: bool) -> UNetPlan:
    return UNetPlan(stem=8, widths=[16, 24], num_blocks=2, attends=[True, False], only_last_attends=only_last_attends)


def test_the_way_down_opens_each_level_but_the_first_by_halving() -> None:
    assert plan(only_last_attends=True).encoder() == [
        BlockPlan(8, 16, attends=True),
        BlockPlan(16, 16, attends=True),
        BlockPlan(16, 16, resample="down"),
        BlockPlan(16, 24),
        BlockPlan(24, 24),
    ]


@pytest.mark.parametrize("only_last_attends", [True, False])
def test_the_way_up_takes_every_skip_once_the_last_first(only_last_attends: bool) -> None:
    first = not only_last_attends
    assert plan(only_last_attends=only_last_attends).decoder() == [
        BlockPlan(24, 24, attends=True),
        BlockPlan(24, 24),
        BlockPlan(24 + 24, 24, skip_channels=24),
        BlockPlan(24 + 24, 24, skip_channels=24),
        BlockPlan(24 + 16, 24, skip_channels=16),
        BlockPlan(24, 24, resample="up"),
        BlockPlan(24 + 16, 16, attends=first, skip_channels=16),
        BlockPlan(16 + 16, 16, attends=first, skip_channels=16),
        BlockPlan(16 + 8, 16, attends=True, skip_channels=8),
    ]


def test_levels_attend_by_their_downsampling_factor() -> None:
    assert attending_levels(4, [8, 2]) == [False, True, False, True]


def test_a_factor_that_no_level_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got attention_resolutions with \[16\], expected .* \[1, 2, 4\]"):
        attending_levels(3, [16, 2])


def test_a_network_without_levels_or_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="got an empty channel_mult"):
        UNetPlan(stem=8, widths=[], num_blocks=1, attends=[], only_last_attends=True)
    with pytest.raises(ValueError, match="got num_res_blocks 0"):
        UNetPlan(stem=8, widths=[8], num_blocks=0, attends=[True], only_last_attends=True)
