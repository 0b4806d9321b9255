import pytest
import timm
import torch
import torchvision
from metric_helpers import images
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model

from ldm.metrics import DINOv2Features, TorchvisionFeatures, quantize
from ldm.metrics.vision_features import IMAGENET_MEAN, IMAGENET_STD, resample_positions, timm_names
from ldm.metrics.weights import sha256_of


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path_factory.mktemp("torchvision") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return network, path


def as_imagenet(pictures: torch.Tensor) -> torch.Tensor:
    return torchvision.transforms.functional.normalize(quantize(pictures) / 255, IMAGENET_MEAN, IMAGENET_STD)


@torch.no_grad()
@pytest.mark.parametrize(("layer", "size"), [("fc", 1000), ("flatten", 512), ("layer3", 256)])
def test_torchvision_layers_are_those_of_its_network(resnet, layer: str, size: int) -> None:
    network, path = resnet
    features = TorchvisionFeatures(path, model="resnet18", layer=layer, image_size=64)
    pictures = images(2, side=64)
    found = features(pictures)
    assert found.shape == (2, size) == (2, features.num_features)
    if layer == "fc":
        assert_close(found, network(as_imagenet(pictures)))


def test_torchvision_weights_are_known_by_their_hash(resnet) -> None:
    _, path = resnet
    described = TorchvisionFeatures(path, model="resnet18", layer="fc", image_size=64).describe()
    assert (described["sha256"], described["weights"]) == (sha256_of(path), "resnet18.pth")


@torch.no_grad()
def test_torchvisions_inception_takes_its_old_weights(tmp_path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    features = TorchvisionFeatures(tmp_path / "inception.pth", layer="fc")
    assert_close(features(images(1, side=299)), network(as_imagenet(images(1, side=299))), rtol=1e-4, atol=1e-5)


def test_weights_of_another_model_are_refused(resnet) -> None:
    with pytest.raises(ValueError, match=r"that differ in \d+ tensors, e.g. layer1.2"):
        TorchvisionFeatures(resnet[1], model="resnet34", layer="fc")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TorchvisionFeatures(), ("inception_v3_google-0cc3c7bd.pth", "download.pytorch.org", "weights_path")),
        (lambda: TorchvisionFeatures("no.pth", model="vgg16"), ("no.pth", "download.pytorch.org", "weights_path")),
        (lambda: DINOv2Features(), ("dinov2_vitl14_pretrain.pth", "facebookresearch/dinov2", "weights_path")),
        (lambda: DINOv2Features("no.pth"), ("no.pth", "huggingface.co/timm/vit_large", "weights_path")),
    ],
)
def test_missing_weights_name_file_source_and_option(build, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        build()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TorchvisionFeatures(model="resnet19"), "got model='resnet19'"),
        (lambda: TorchvisionFeatures(resize="area"), "got resize='area'"),
        (lambda: DINOv2Features(model="vit_tiny_patch14_dinov2"), "got model='vit_tiny_patch14_dinov2'"),
        (lambda: DINOv2Features(image_size=225), "got image_size=225, expected a multiple"),
        (lambda: DINOv2Features(resize="area"), "got resize='area'"),
    ],
)
def test_unknown_settings_are_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def published_names(network: Dinov2Model, depth: int) -> dict[str, torch.Tensor]:
    """The state of transformers' DINOv2 under the names of Meta's file."""
    state = network.state_dict()
    table = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    parts = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1"}
    parts |= {"mlp.fc2": "mlp.fc2"}
    published = {ours: state[theirs] for ours, theirs in table.items()}
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for ours, theirs in parts.items():
                published[f"blocks.{i}.{ours}.{kind}"] = state[f"{layer}.{theirs}.{kind}"]
            heads = [state[f"{layer}.attention.{name}_proj.{kind}"] for name in "qkv"]
            published[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(heads)
        for scale in (1, 2):
            published[f"blocks.{i}.ls{scale}.gamma"] = state[f"{layer}.layer_scale{scale}.lambda1"]
    return published


@torch.no_grad()
def test_dinov2_equals_transformers_on_one_file(tmp_path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=56, layerscale_value=0.5
    )
    oracle = Dinov2Model(config).eval()
    torch.save(published_names(oracle, 12), tmp_path / "dinov2.pth")
    features = DINOv2Features(tmp_path / "dinov2.pth", model="vit_small_patch14_dinov2", image_size=56)
    pictures = images(2, side=56)
    expected = oracle(as_imagenet(pictures)).pooler_output
    assert_close(features(pictures), expected, rtol=1e-3, atol=1e-4)
    assert features.num_features == 384


def test_the_giant_models_gated_layers_have_timms_names() -> None:
    with torch.device("meta"):
        wanted = timm.create_model("vit_giant_patch14_dinov2", num_classes=0, img_size=518).state_dict()
    # Meta's names for them, beside a mask that only training has.
    published = {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for name, value in wanted.items()
    }
    assert timm_names(published | {"mask_token": torch.zeros(1, 1536)}).keys() == wanted.keys()


def test_positions_are_resampled_with_the_published_offset() -> None:
    ramp = torch.arange(37.0).view(1, 37, 1).expand(37, 37, 2)
    embedding = torch.cat([torch.full((1, 1, 2), 99.0), ramp.reshape(1, 37 * 37, 2)], dim=1)
    resampled = resample_positions(embedding, 16)
    assert (resampled[:, 0] == 99).all()
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    found = resampled[0, 1:].view(16, 16, 2)
    # This cubic keeps a straight line to a twentieth; without the offset the far end would be a fifth away.
    assert_close(found[:, 1:-1, 0], places[1:-1].expand(16, -1), rtol=0, atol=0.06)


def test_positions_of_the_same_grid_stay() -> None:
    embedding = torch.randn(1, 1 + 16 * 16, 4)
    assert_close(resample_positions(embedding, 16), embedding, rtol=0, atol=0)
