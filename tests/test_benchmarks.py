"""What benchmarks say of a run is so: the comparison with a model of text alone, and what faults do to it."""

import math
import re
from pathlib import Path

import pytest
import torch

import training
from benchmarks import caching, gpu, telemetry, text_only, timing, train_step
from benchmarks.faults import __main__ as faults
from benchmarks.faults import hostile, kills, runs
from benchmarks.faults.runs import Row
from mmdit import TextToImage
from training.checkpoint import save_checkpoint
from training.config import load_config
from training.run import RunFolder

TINY = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
MIXED = (*TINY, "transfusion.enabled=true", "model.positions=rope", "text.vocab_size=300", "training.precision=fp32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text-only")
    (folder / "words.txt").write_text("\n\n".join(f"a star and {i} more of them" for i in range(30)))
    text = (f"transfusion.text={folder / 'words.txt'}", "transfusion.text_fraction=0.25")
    return training.train(load_config("pixels-tiny", [*MIXED, *text, f"training.out={folder / 'run'}"]))


@pytest.fixture(scope="module")
def pipe(run):
    return TextToImage.load(run, "cpu")


def test_captions_cost_what_they_cost_before_their_pictures(run, pipe):
    """The words and what begins the picture, one caption at a time, each with a picture after it."""
    _, held_out = text_only.captions(load_config(run), pipe)
    assert len(held_out) > 1
    total, count = 0.0, 0
    for caption in held_out:
        ids, mask = (x[0] for x in pipe.model.conditioner.tokenize([caption]))
        batch = pipe.model.pack([[ids[mask][:-1], torch.zeros(3, 32, 32), ids[mask][-1:]]])
        with torch.no_grad():
            logits = pipe.model(batch).logits
        num = int(mask.sum()) - 1  # words; after the last comes the picture
        targets = [*ids[1:num].tolist(), pipe.model.transformer.config.boi]
        total -= sum(logits[i].log_softmax(-1)[target].item() for i, target in enumerate(targets))
        count += num
    found = text_only.nats(pipe.model, held_out, pipe.model.transformer.config.boi, size=3)
    assert found == pytest.approx(total / count, rel=1e-5)


def test_a_model_of_text_alone_learns_the_captions(run, pipe):
    """From the run's own config: more steps teach more, equal ones the same; the run's model stays as it was."""
    before = [p.clone() for p in pipe.model.parameters()]
    config = load_config(run, ["training.num_steps=40", "optimizer.lr=0.01"])
    captions, held_out = text_only.captions(config, pipe)
    eos = pipe.model.transformer.config.eos
    long = text_only.nats(text_only.train(config, pipe, captions), held_out, eos, 8)
    found = text_only.compare(run)
    assert long < 0.8 * found["text alone"] and found["text alone"] < math.log(300)
    assert text_only.compare(run) == found and found["captions"] == len(held_out)
    assert all(map(torch.equal, before, pipe.model.parameters()))


def test_a_step_has_the_captions_and_the_text_of_the_runs_config(run, pipe):
    config = load_config(run)
    captions, _ = text_only.captions(config, pipe)
    steps = list(text_only.batches(config, pipe, captions))
    assert len(steps) == 6 and {len(documents) for documents in steps} == {8}
    own = {tuple(ids.tolist()) for ids in text_only.rows(pipe.model.conditioner.tokenize(captions))}
    for documents in steps:
        assert all(tuple(ids.tolist()) in own for [ids] in documents[:6])
        written = [pipe.model.conditioner.tokenizer.decode(ids) for [ids] in documents[6:]]
        assert all(text.startswith("a star and") and text.endswith("more of them") for text in written)


def test_a_run_of_images_alone_is_refused(tmp_path):
    out = training.train(
        load_config("pixels-tiny", [*TINY, "training.num_steps=1", f"training.out={tmp_path / 'run'}"])
    )
    with pytest.raises(ValueError, match="is a model of images alone"):
        text_only.compare(out)


# --- faults done on purpose ---------------------------------------------------------------------------------------


def test_sections_of_the_table_of_faults_are_replaced_one_by_one(tmp_path, monkeypatch):
    """A part that is measured anew stands in its place, the others stay; what does not hold gives status 1."""
    out, found = tmp_path / "faults.md", [Row("first", 2, "a", "a", True)]
    names = ("kills", "disk", "signals")
    monkeypatch.setattr(faults, "parts", lambda *_: {name: lambda folder: iter(found) for name in names})
    assert faults.main(["--out", str(out), "--only", "signals", "kills"]) == 0
    found = [Row("second", 0, "needs root", "a", True), Row("third", 1, "b", "a", False)]
    assert faults.main(["--out", str(out), "--only", "disk", "signals"]) == 1
    text = out.read_text()
    assert re.findall(r"^## (\w+)", text, re.M) == list(names)
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.endswith((" yes |", "tried |", "no** |"))]
    assert rows == ["first", "second", "third", "second", "third"]


def test_a_difference_between_runs_is_seen(tmp_path):
    """In one weight, in the losses alone, and in how far they came."""
    weights = {"model": {"w": torch.zeros(3)}, "optimizer": {"w/m": torch.ones(2)}}
    one, other = tmp_path / "one", tmp_path / "other"
    for path, loss in ((one, 0.5), (other, 0.5)):
        save_checkpoint(path, {"step": 4}, weights, keep=2)
        RunFolder(path).write_metrics(4, loss=loss)
    assert runs.difference(one, other) == 0
    (other / "metrics.jsonl").write_text('{"step": 4, "loss": 0.25}\n')
    assert runs.difference(one, other) == math.inf
    weights["optimizer"]["w/m"][1] = 1.25
    save_checkpoint(other, {"step": 4}, weights, keep=2)
    assert runs.difference(one, other) == 0.25
    save_checkpoint(other, {"step": 5}, weights, keep=2)
    assert runs.difference(one, other) == math.inf
    assert not runs.bad_checkpoints(other)
    (other / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    assert len(runs.bad_checkpoints(other)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setitem(kills.LENGTH, 1, (60, 3))
    row = kills.killed(tmp_path, 1, kills.Case("SIGKILL, one process"))
    assert row.times == 1 and row.holds and "the same bits" in row.seen


def test_files_that_a_command_touches_outside_of_its_run_are_found(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()

    def careless(log, *words):
        (own / "run").mkdir(exist_ok=True)
        for name in ("run/weights", "beside"):
            (own / name).write_text(str(words))
        return runs.Ended(2, "mmdit: error: no weights\n", 0.1)

    monkeypatch.setattr(hostile, "run", careless)
    watch = hostile.Watched(own)
    watch.run("train", out=own / "run")
    assert watch.touched == ["beside"] and not watch.row("careless").holds
    watch.run("train", out=own / "run")  # the same again
    assert watch.touched == ["beside"]


def test_the_gpu_benchmark_runs(monkeypatch):
    """On a CPU and small, all of it but torch's choice of kernels and its autotuning."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SHAPES", ((1, 4),))
    monkeypatch.setattr(gpu, "SAMPLED", (1, 4))
    monkeypatch.setattr(gpu, "TEXT", 20)
    monkeypatch.setattr(gpu, "seconds", lambda runs, *_, **__: timing.seconds(runs, repeats=1, warm=0))
    monkeypatch.setattr(gpu, "compiled", lambda model, blocks, **how: model)
    lines = gpu.training(1e12, memory=0, autotune=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows, kernels = rows[2:6], rows[9:]
    assert [cells[3] for cells in rows] == ["ours", "diffusers", "ours, packed", "ours, autotuned"]
    assert all(float(cell) > 0 for cells in rows for cell in cells[4:6])
    assert [cells[2] for cells in kernels] == [cells[3] for cells in rows]
    assert all(float(cell) > 0 for cells in kernels for cell in cells[4:7])  # so short an attention is of products
    assert all("e-0" in line and float(line.split("|")[-2]) < 0.05 for line in gpu.sampling()[2:])


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_backward_cat_transpose_view_21", "norms"),
        ("triton_poi_fused_addmm_gelu_view_3", "norms"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        (
            "void at::native::(anonymous)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<...>>",
            "optimizer",
        ),
    ],
)
def test_kinds_of_gpu_kernels_by_their_names(kernel, kind):
    assert gpu.kind_of(kernel).startswith(kind)


def test_flops_of_packed_pictures_count_no_padding():
    assert gpu.flops(1, 4, 20) < gpu.flops(1, 4, 40) < gpu.flops(1, 8, 40)


def test_seconds_of_a_training_step_by_kind_of_kernel():
    q, w = torch.randn(1, 2, 300, 16, requires_grad=True), torch.randn(32, 32, requires_grad=True)

    def step(_):
        heads = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.nn.functional.gelu(heads.transpose(1, 2).flatten(2)[0] @ w).sum().backward()

    times, work = train_step.parts(step, [None] * 2), train_step.flops(step, [None] * 2)
    names = ("ours", "diffusers")
    assert work == {"matrix products": 3 * 2 * 300 * 32 * 32, "attention": 3 * 4 * 300**2 * 32}
    assert all(times[kind] > 0 for kind in ("matrix products", "attention", "the rest"))
    lines = train_step.where(dict.fromkeys(names, times), dict.fromkeys(names, work), 1e9)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["matrix products", "attention", "the rest"]
    assert lines[2].count("%") == lines[3].count("%") == 4 and lines[4].count("%") == 2


def test_the_batch_size_fits_into_memory():
    """Of what was measured: 2.03 B parameters with 24 pictures of 256 tokens took 59.4 GB, so 85 GB take more."""
    assert gpu.pictures(24, 2_030_000_000, 589, 59.4e9 / 0.9) == 20
    assert gpu.pictures(24, 2_030_000_000, 589, 85e9) == 44 > gpu.pictures(24, 2_030_000_000, 1357, 85e9)
    assert gpu.pictures(24, 2_030_000_000, 589, 24e9) == 4  # will not fit, and says so


def test_the_telemetry_benchmark_runs():
    found = telemetry.measure("pixels-tiny", 5, ["data.num_samples=100", "training.log_every=1"])
    assert set(found) == {"step", "next", "add", "gradients", "line"} and min(found.values()) > 0
    assert sum(found.values()) < 2 * found["step"]


@pytest.mark.slow
def test_steps_from_a_cache_are_measured_beside_those_from_images(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SAMPLES", 33)
    found = caching.compare_steps("T5-small", 1, tmp_path)
    assert found["images"] > 0 and found["cache"] > 0 and found["bytes"] > 1000


def test_reading_from_a_late_server_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SAMPLES", 65)
    assert 0 < caching.read_from_server(1, tmp_path) < 65 / caching.LATE / 2  # two rounds of three answers at least
