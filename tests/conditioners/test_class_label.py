import pytest
import torch
from torch.testing import assert_close

from ldm.conditioners import ClassIds, ClassLabel
from ldm.networks import DiT


def make() -> ClassLabel:
    torch.manual_seed(0)
    return ClassLabel(10, width=6, column="digit")


def test_each_class_is_one_learned_token() -> None:
    conditioner = make()
    cond = conditioner({"digit": torch.tensor([3, 0, 9])})
    assert set(cond.parts()) == {"context"}
    assert_close(cond.context, conditioner.embedding.weight[[3, 0, 9]][:, None])


def test_null_is_a_token_that_no_class_has() -> None:
    conditioner = make()
    null, classes = conditioner.null(2).context, conditioner({"digit": torch.arange(10)}).context
    assert null is not None and classes is not None and null.shape == (2, 1, 6)
    assert (classes - null[:1]).abs().amax((1, 2)).min() > 0.1


def test_null_is_learned() -> None:
    conditioner = make()
    context = conditioner.null(3).context
    assert context is not None
    context.sum().backward()
    assert conditioner.embedding.weight.grad is not None
    assert_close(conditioner.embedding.weight.grad.sum(1), torch.tensor([0.0] * 10 + [18.0]))


def test_a_batch_without_labels_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"^got a batch with \['caption'\], expected digit; set data\.columns"):
        make()({"caption": ["x"]})


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    """Label 10 of 10 classes would quietly train the null token."""
    with pytest.raises(ValueError, match=rf"^got digit={label}, expected labels from 0 to 9"):
        make()({"digit": torch.tensor([0, label])})


def test_prompts_are_classes_by_number_and_empty_ones_no_class() -> None:
    conditioner = make()
    cond, uncond = conditioner.prompt_pair(["3", " 9 ", ""], ["", "2", ""], image_size=(8, 8))
    weight = conditioner.embedding.weight
    assert_close(cond.context, weight[[3, 9, 10]][:, None])
    assert_close(uncond.context, weight[[10, 2, 10]][:, None])


def test_a_prompt_in_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^got the prompt 'a cat', expected a class by number, 0 to 9"):
        make().prompt_pair(["3", "a cat"], ["", ""], image_size=(8, 8))
    with pytest.raises(ValueError, match=r"^got digit=10, expected labels from 0 to 9"):
        make().prompt_pair(["10"], [""], image_size=(8, 8))


def test_ids_go_to_the_network_as_they_are_and_no_class_is_its_own_last_one() -> None:
    conditioner = ClassIds(10, column="digit")
    network = DiT(4, 4, patch_size=2, width=16, depth=1, num_heads=2, num_classes=10)
    cond = conditioner({"digit": torch.tensor([3, 0])})
    assert set(cond.parts()) == {"vector"}
    dropped = cond.select(torch.tensor([False, True]), conditioner.null(2))
    assert dropped.vector is not None
    assert dropped.vector.tolist() == [3, 10]
    assert network(torch.zeros(2, 4, 8, 8), torch.zeros(2), dropped).shape == (2, 4, 8, 8)
    known, unknown = conditioner.prompt_pair(["7", ""], ["", ""], image_size=(8, 8))
    assert known.vector is not None and unknown.vector is not None
    assert (known.vector.tolist(), unknown.vector.tolist()) == ([7, 10], [10, 10])
    assert not conditioner.state_dict()
    assert conditioner.arguments == {"num_classes": 10, "column": "digit"}
