import pytest

from ldm.conditioners import Unconditional


def test_it_says_nothing_whatever_it_is_asked() -> None:
    conditioner = Unconditional()
    assert conditioner({"caption": ["a cat"]}).parts() == conditioner.null(3).parts() == {}
    cond, uncond = conditioner.prompt_pair(["", " "], ["", ""], image_size=(8, 8))
    assert cond.parts() == uncond.parts() == {}


@pytest.mark.parametrize(("prompt", "negative"), [("a cat", ""), ("", "bad")])
def test_a_prompt_that_could_have_no_effect_is_refused(prompt: str, negative: str) -> None:
    with pytest.raises(ValueError, match=r"^got the prompt '(a cat|bad)', expected none: this model is unconditional"):
        Unconditional().prompt_pair([prompt], [negative], image_size=(8, 8))
