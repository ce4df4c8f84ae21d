"""Networks that look at pictures: from the disk, the same as their libraries', and never from a pickle."""

import pytest
import torch
from PIL import Image

from tests.training.tiny_networks import pictures, save_clip, save_dino, save_open_clip, save_pictures
from training.image_networks import Clip, Inception, OpenClip, Vision, open_clip_model, open_features

CAPTIONS = ["a red star", "star", "red " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    save_clip(root / "clip")
    save_dino(root / "dino")
    save_open_clip(root / "open_clip")
    save_pictures(root / "pictures", 5)
    return root


@pytest.fixture(scope="module")
def images(folder):
    return pictures(folder / "pictures")


def test_clip_is_transformers_clip(folder, images):
    from transformers import CLIPModel, CLIPProcessor

    network = open_clip_model(str(folder / "clip"))
    assert isinstance(network, Clip) and network.num_features == 12
    model = CLIPModel.from_pretrained(folder / "clip")
    processor = CLIPProcessor.from_pretrained(folder / "clip")
    how = dict(return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        out = model(
            **processor(text=CAPTIONS, images=[Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], **how)
        )
        ours = [torch.nn.functional.normalize(x, dim=1) for x in (network(images), network.read(CAPTIONS))]
    torch.testing.assert_close(ours[0], out.image_embeds, atol=2e-2, rtol=0)  # of pixels in one byte, by two resizers
    torch.testing.assert_close(ours[1], out.text_embeds)


def test_a_vision_model_gives_its_pooled_output(folder, images):
    from transformers import AutoImageProcessor, AutoModel

    network = open_features(str(folder / "dino"))
    assert type(network) is Vision and network.num_features == 24
    processor = AutoImageProcessor.from_pretrained(folder / "dino")
    with torch.no_grad():
        pixels = processor(images=list(images), return_tensors="pt")
        expected = AutoModel.from_pretrained(folder / "dino")(**pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(network(images), expected)


def test_a_clip_of_open_clip_is_open_clips(folder, images):
    import open_clip

    network = open_clip_model(str(folder / "open_clip"))
    assert isinstance(network, OpenClip) and network.num_features == 12
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'open_clip'}")
    model.eval()
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(network(images), model.encode_image(pixels))
        torch.testing.assert_close(network.read(CAPTIONS), model.encode_text(open_clip.tokenize(CAPTIONS)))


def test_a_batch_is_its_pictures_one_by_one(folder, images):
    for name in ("clip", "dino", "open_clip"):
        network = open_features(str(folder / name))
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone, atol=1e-5, rtol=1e-4)


def test_the_digest_is_of_the_weights(folder, tmp_path):
    one = open_features(str(folder / "clip")).digest
    assert one == open_features(str(folder / "clip")).digest == open_features(str(save_clip(tmp_path / "same"))).digest
    others = {open_features(str(folder / name)).digest for name in ("dino", "open_clip")}
    assert len({one, open_features(str(save_clip(tmp_path / "other", seed=1))).digest, *others}) == 4


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """FID's Inception with random weights, in a file."""
    pytest.importorskip("torch_fidelity")
    from safetensors.torch import save_file
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.load", lambda path, **how: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], "none")
    save_file(network.state_dict(), path)
    return path, network


def test_inception_is_torchmetrics(inception, images):
    path, theirs = inception
    ours = open_features(str(path))
    assert isinstance(ours, Inception)
    with torch.no_grad():
        torch.testing.assert_close(ours(images[:2]), theirs.eval()(images[:2]))
    assert ours(images[:2]).shape == (2, 2048)


def test_weights_of_another_network_are_no_inception(folder):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(ValueError, match="is not FID's Inception, the one of weights-inception-2015-12-05"):
        open_features(str(folder / "open_clip" / "open_clip_model.safetensors"))


def test_a_pickle_is_refused_with_what_converts_it(tmp_path):
    path = tmp_path / "weights-inception.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is a pickle, .*weights_only=True.*weights-inception.safetensors"):
        open_features(str(path))


def test_what_is_not_there_is_named(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"no weights at .*nowhere: expected FID's Inception .*hf-hub:ORG/NAME"):
        open_features(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no model: expected config.json"):
        open_features(str(tmp_path))
    with pytest.raises(ValueError, match="which reads no captions: expected the folder of a CLIP"):
        open_clip_model(str(folder / "dino"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(
        ValueError, match=r"hf-hub:a/b is not in .* cannot be downloaded \(offline\): download it where"
    ):
        open_features("hf-hub:a/b")


def test_the_hub_gives_a_folder_without_pickles(folder, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(folder / "clip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_features("hf-hub:org/clip").digest == open_features(str(folder / "clip")).digest
    assert set(asked) == {"org/clip"} and not any(name.endswith(("bin", "pt", "pth")) for name in asked["org/clip"])


def test_weights_that_lack_something_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_clip(tmp_path / "clip") / "model.safetensors"
    state = load_file(path)
    del state["visual_projection.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: visual_projection.weight"):
        open_features(str(path.parent))
    path.unlink()
    torch.save(state, path.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="cannot read the model in"):
        open_features(str(path.parent))
