"""Pages on text and images, the pipeline and weights: their examples run, the picture of the mask is the mask."""

import json
import re
import zipfile
from contextlib import closing
from pathlib import Path

import torch

import mmdit
import training
from mmdit import pack
from mmdit.autoencoder import PixelSpace
from mmdit.text_to_image import TextToImage
from tests.mmdit.test_edit import LEFT, picture
from tests.mmdit.test_sd3_file import save_folder_and_tensors, save_one_file
from tests.mmdit.test_text_to_image import make_model
from tests.mmdit.tiny_sd3 import save_pipeline

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "transfusion.md").read_text()


def examples_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_images").mkdir()
    for i in range(16):
        picture(64, 64).save(f"my_images/{i}.png")
        Path(f"my_images/{i}.txt").write_text(f"number {i}")
    picture(64, 64).save("old.png")
    names: dict = {}
    first, written, asked, loop = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(loop, names | {"mmdit": mmdit, "torch": torch})
    for block in (first, written, asked.replace("runs/transfusion-demo", "my_model")):
        exec(block, names)
    assert names["described"].stopped in ("end", "length")
    assert names["first"].logits.shape == (8, 512) and names["first"].v[0].shape == (16, 8, 8)
    assert names["written"].parts[0].shape == (16, 8, 8)


def test_the_picture_is_the_mask():
    [picture] = re.findall(r"```\n(  t.*?)\n```", PAGE, re.DOTALL)
    batch = pack([[torch.tensor([7, 8]), torch.zeros(1, 2, 2), torch.tensor([9])]])
    assert batch.layout(1).picture() == picture


def test_the_examples_of_the_pipeline_run(tmp_path, monkeypatch):
    """On models and pictures in miniature, in the places that the page names."""
    monkeypatch.chdir(tmp_path)
    TextToImage(make_model(3, 4), PixelSpace(), (16, 24)).save("runs/demo/pipeline")
    save_pipeline(Path("sd3.5-medium"), num_layers=10)
    folder = Path("stabilityai/stable-diffusion-3-medium-diffusers")
    tensors = save_folder_and_tensors(folder)
    folder.rename("my_pipeline")
    folder.symlink_to(Path("my_pipeline").absolute())
    save_one_file(tensors, "sd3_medium_incl_clips_t5xxlfp16.safetensors")
    save_one_file(tensors, "sd3.5_medium.safetensors")
    picture(16, 24).save("old.png")
    LEFT.save("left.png")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "pipeline.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(block.replace('"cuda"', '"cpu"').replace("pipe.compile()", "pipe"), names)  # compiling takes a minute
    assert (names["latents"].shape, names["off_by"]) == ((2, 3, 16, 24), 0)
    assert [image.size for image in names["images"]] == [(24, 16)] * 2
    assert {path.name for path in Path("for-diffusers").iterdir()} >= {"model_index.json", "transformer", "text"}


def test_the_example_of_the_model_runs():
    names: dict = {}
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "model.md").read_text(), re.DOTALL)
    exec(block, names)
    assert names["x_0"].shape == (2, 16, 8, 8)


def test_the_example_on_weights_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "formats.md").read_text(), re.DOTALL)
    exec(block, names)
    assert names["half"].dtype == torch.bfloat16 and names["half"].config == names["model"].config


def test_the_data_set_in_ones_own_code_is_read(capsys):
    names: dict = {"__name__": "__main__"}
    exec(examples_of("data.md")[0], names)
    batch = names["batch"]
    assert batch.captions == [f"grey number {image[0, 0, 0]}" for image in batch.images]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_data_set_in_a_zip_file_is_read_by_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "zipped"}
    exec(examples_of("data.md")[1], names)
    texts = {f"{i}.png": [f"picture {i}", f"number {i}"] for i in range(8)} | {"8.png": ["not there"]}
    with zipfile.ZipFile("photos.zip", "w") as opened:
        opened.writestr("captions.json", json.dumps(texts))
        for i in range(8):
            with opened.open(f"{i}.png", "w") as file:
                picture(80, 40).save(file, "png")
    seen = []
    for name in ("Zipped", "Mirrored"):
        with closing(training.loader(names[name](), range(9), 18, seed=0, num_workers=2)) as batches:
            batch = next(batches)
        assert {words.split()[0] for words in batch.captions} == {"picture", "number"}
        assert all(words in texts[key] for words, key in zip(batch.captions, batch.keys, strict=True))
        assert {key for key, _ in batch.skipped} == {"8.png"}
        seen.append(batch.flipped.sum())
    assert seen[0] == 0 < seen[1] < 18


def test_the_loop_of_ones_own_runs_with_both_losses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_images").mkdir()
    for i in range(8):
        picture(64, 64).save(f"my_images/{i}.png")
        Path(f"my_images/{i}.txt").write_text(f"picture {i}")
    names: dict = {}
    loop, huber, min_snr = examples_of("training.md")
    exec(huber, names)
    exec(min_snr, names)
    for cls in ("training.FlowMatching", "Huber", "MinSNR"):
        exec(loop.replace("training.FlowMatching", cls), names)
        assert names["step"] == 9 and names["loss"].total.isfinite() and names["picture"].size == (64, 64)
