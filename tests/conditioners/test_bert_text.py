"""LDM's text transformer against diffusers."""

from pathlib import Path

import pytest
import torch
from clip_oracles import randomized, relative_error
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor
from torch.testing import assert_close
from transformers import BertTokenizer

from ldm.conditioners import BERTText, WordPieceTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "fox", "##es", ",", "cafe"]
CAPTIONS = ["A red Fox", "", "foxes, café zebra", "fox " * 100]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return path


def make(vocabulary: Path) -> BERTText:
    tokenizer = WordPieceTokenizer(vocabulary, length=20)
    encoder = BERTText(32, 2, tokenizer=tokenizer, vocabulary_size=10, length=20, heads=2, head_dim=8)
    return randomized(encoder)


def as_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    names = {"token_emb": "model.embed_tokens", "pos_emb.emb": "model.embed_positions", "norm": "model.layer_norm"}
    names["to_logits"] = "to_logits"
    for i in range(depth):
        attention, forward = f"attn_layers.layers.{2 * i}.", f"attn_layers.layers.{2 * i + 1}."
        theirs = f"model.layers.{i}."
        names |= {
            f"{attention}0": f"{theirs}self_attn_layer_norm",
            f"{attention}1.to_out": f"{theirs}self_attn.out_proj",
        }
        names |= {f"{attention}1.to_{x}": f"{theirs}self_attn.{x}_proj" for x in "qkv"}
        names |= {f"{forward}0": f"{theirs}final_layer_norm"}
        names |= {f"{forward}1.net.0.0": f"{theirs}fc1", f"{forward}1.net.2": f"{theirs}fc2"}
    split = {name: name.rsplit(".", 1) for name in state}
    return {f"{names[place]}.{kind}": state[name] for name, (place, kind) in split.items()}


@torch.no_grad()
def test_the_context_is_that_of_diffusers(vocabulary: Path) -> None:
    """Also the names: those of CompVis files, each with its twin in diffusers and none left over."""
    encoder = make(vocabulary)
    state = {name.removeprefix("transformer."): tensor for name, tensor in encoder.state_dict().items()}
    config = LDMBertConfig(
        vocab_size=10,
        max_position_embeddings=20,
        encoder_layers=2,
        encoder_ffn_dim=128,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=32,
    )
    theirs = LDMBertModel(config).eval()
    theirs.load_state_dict(as_diffusers(state, 2))
    ids, _ = WordPieceTokenizer(vocabulary, length=20)(CAPTIONS)
    cond = encoder({"caption": CAPTIONS})
    assert cond.mask is None
    assert relative_error(cond.context, theirs(ids, return_dict=True).last_hidden_state) < 1e-5


def test_word_pieces_are_those_of_transformers(vocabulary: Path) -> None:
    theirs = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    ids, mask = WordPieceTokenizer(vocabulary.parent, length=20)(CAPTIONS)
    assert_close(ids, expected["input_ids"])
    assert_close(mask, expected["attention_mask"].bool())
    assert ids[2, :7].tolist() == [2, 6, 7, 8, 9, 1, 3]


def test_null_is_the_empty_caption(vocabulary: Path) -> None:
    encoder = make(vocabulary)
    assert_close(encoder.null(2).parts(), encoder({"caption": ["", ""]}).parts())


def test_every_weight_is_trained_but_the_unused_ones(vocabulary: Path) -> None:
    encoder = make(vocabulary).train()
    context = encoder({"caption": ["a red foxes , cafe zebra", ""]}).context
    assert context is not None
    (context * torch.linspace(0, 1, 32)).square().sum().backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {name for name, _ in encoder.named_parameters()} - trained == {
        "transformer.to_logits.weight",
        "transformer.to_logits.bias",
    }


@pytest.mark.parametrize(
    ("width", "depth", "settings", "count"),
    [
        (1280, 32, {}, 581.99),
        (640, 32, {}, 186.15),
        (512, 16, {"vocabulary_size": 8192, "length": 92}, 58.86),
    ],
    ids=["txt2img", "text2img256", "layout"],
)
def test_parameter_counts_are_the_published_ones(
    width: int, depth: int, settings: dict[str, int], count: float
) -> None:
    with torch.device("meta"):
        encoder = BERTText(width, depth, **settings)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == count


def test_a_caption_without_a_vocabulary_is_refused_with_the_remedy() -> None:
    encoder = BERTText(16, 1, vocabulary_size=10)
    with pytest.raises(ValueError, match=r"expected vocab\.txt of bert-base-uncased; set conditioner\.tokenizer"):
        encoder.null(1)
    assert encoder.encode_ids(torch.tensor([[1, 2]])).parts()["context"].shape == (1, 2, 16)


def test_a_missing_or_foreign_vocabulary_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which cannot be read .*expected vocab\.txt.*google-bert/bert-base-uncased"):
        WordPieceTokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb")
    with pytest.raises(ValueError, match=r"which cannot be read \('\[CLS\]'\)"):
        WordPieceTokenizer(tmp_path)


def test_a_tokenizer_that_does_not_fit_is_refused(vocabulary: Path) -> None:
    with pytest.raises(ValueError, match=r"got a tokenizer of 20 tokens and 10 ids, expected at most .*length=8"):
        BERTText(16, 1, tokenizer=WordPieceTokenizer(vocabulary, length=20), length=8)
