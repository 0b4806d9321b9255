import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion import Conditioning


def make(seed: int, n: int = 4) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        context=torch.randn(n, 5, 3, generator=generator),
        mask=torch.rand(n, 5, generator=generator) < 0.5,
        vector=torch.randn(n, 6, generator=generator),
        concat=torch.randn(n, 2, 4, 4, generator=generator),
    )


def test_dropping_every_sample_gives_exactly_the_null_condition() -> None:
    null = make(1)
    assert_close(make(0).select(torch.ones(4, dtype=torch.bool), null).parts(), null.parts(), rtol=0, atol=0)


def test_dropping_none_gives_exactly_the_condition() -> None:
    cond = make(0)
    assert_close(cond.select(torch.zeros(4, dtype=torch.bool), make(1)).parts(), cond.parts(), rtol=0, atol=0)


def test_a_dropped_sample_loses_all_of_its_parts_and_no_other_does() -> None:
    cond, null = make(0), make(1)
    mixed = cond.select(torch.tensor([True, False, False, True]), null)
    for row, source in enumerate([null, cond, cond, null]):
        chosen = slice(row, row + 1)
        assert_close(mixed[chosen].parts(), source[chosen].parts(), rtol=0, atol=0)


def test_class_ids_are_dropped_as_integers() -> None:
    ids, null = Conditioning(vector=torch.tensor([3, 4])), Conditioning(vector=torch.tensor([10, 10]))
    dropped = ids.select(torch.tensor([False, True]), null).vector
    assert_close(dropped, torch.tensor([3, 10]))


def test_joining_and_slicing_are_inverse() -> None:
    first, second = make(0, 3), make(1, 2)
    both = Conditioning.cat([first, second])
    assert len(both) == 5
    assert_close(both[:3].parts(), first.parts())
    assert_close(both[3:].parts(), second.parts())


def test_one_condition_expands_to_many() -> None:
    one = make(0, 1)
    assert_close(one.expand(3).parts(), Conditioning.cat([one, one, one]).parts(), rtol=0, atol=0)


def test_conditions_with_different_parts_do_not_mix() -> None:
    text, image = Conditioning(context=torch.zeros(2, 1, 3)), Conditioning(concat=torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"^got null conditions with parts \['concat'\], expected \['context'\]"):
        text.select(torch.ones(2, dtype=torch.bool), image)
    with pytest.raises(ValueError, match=r"^got conditions with different parts, expected"):
        Conditioning.cat([text, image])


def test_an_empty_condition_has_no_size() -> None:
    with pytest.raises(ValueError, match="no batch size"):
        len(Conditioning())
