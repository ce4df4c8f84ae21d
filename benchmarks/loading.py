"""Time and memory of loading a model of SD3.5-medium's shape from disk, compared with diffusers.

    python -m benchmarks.loading                                    # tables on standard output
    python -m benchmarks.loading --out benchmarks/results/loading.md
    python -m benchmarks.loading --folder /tmp/loading --write          # write the weights, to be measured later
    python -m benchmarks.loading --folder /tmp/loading --case 0         # one case with these weights, which are kept

Random weights in bfloat16 (2.24 B parameters, 4.9 GB with the position table) are written in diffusers' layout and in
the original one, and removed at the end unless a folder is given. Each load is in a new process after all imports; the
two libraries alternate, and the file is in the page cache. "Until loaded" is the time of the call; "until read" adds a
read of every page of every weight, since both libraries map the file, and pages of mapped weights are read on first
use. CPU is the CPU time until then, which other work on the machine affects less. Memory is the peak resident memory,
mapped pages included, less that before the call, over the size of the weights.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.solvers import hardware
from mmdit import MMDiT, load, preset
from mmdit.files import DIFFUSERS_WEIGHTS, TRUNK_PREFIX
from mmdit.formats import config_to_diffusers, metadata_for_sd3
from mmdit.layouts import DIFFUSERS, SD3
from mmdit.weights_io import save_weights, write_json

CASES = {  # title: (path of the weights, dtype that they are loaded in)
    "diffusers' folder, as stored": ("folder", "bfloat16"),
    "original single file, as stored": ("sd3.safetensors", "bfloat16"),
    "diffusers' folder, to float16": ("folder", "float16"),
}


def write_random(folder: Path) -> None:
    """Write the checkpoints that are loaded."""
    config = preset("sd3.5-medium")
    with torch.device("meta"):
        model = MMDiT(config).state_dict()
    some = 0.02 * torch.randn(1 << 20, dtype=torch.bfloat16)  # repeated, as values do not matter
    ours = {name: some.repeat(-(-x.numel() // len(some)))[: x.numel()].view(x.shape) for name, x in model.items()}
    there = folder / "folder"
    write_json(there / "config.json", {"_class_name": "SD3Transformer2DModel", **config_to_diffusers(config)})
    save_weights(DIFFUSERS.from_ours(ours, config), there / f"{DIFFUSERS_WEIGHTS}.safetensors")
    theirs = {TRUNK_PREFIX + name: x for name, x in SD3.from_ours(ours, config).items()}
    save_weights(theirs, folder / "sd3.safetensors", metadata_for_sd3(config))


def resident(kind: str) -> int:
    """Resident bytes of this process now ("VmRSS") or at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def measure(library: str, path: str, dtype: str) -> dict[str, float]:
    """Load in this process: seconds of the call, seconds with all pages read, most memory over the weights' size."""
    from diffusers import SD3Transformer2DModel

    number = getattr(torch, dtype)
    before, start, work = resident("VmRSS"), time.perf_counter(), time.process_time()
    if library == "mmdit":
        model = load(path, dtype=number)
    elif path.endswith(".safetensors"):
        where = {"config": str(Path(path).parent), "subfolder": "folder"}
        model = SD3Transformer2DModel.from_single_file(path, torch_dtype=number, local_files_only=True, **where)
    else:
        model = SD3Transformer2DModel.from_pretrained(path, torch_dtype=number, local_files_only=True)
    loaded = time.perf_counter()
    state = model.state_dict().values()
    for tensor in state:
        tensor.view(-1).view(torch.uint8)[::4096].sum()
    seconds = {"loaded": loaded - start, "read": time.perf_counter() - start, "cpu": time.process_time() - work}
    return seconds | {"memory": (resident("VmHWM") - before) / sum(tensor.nbytes for tensor in state)}


def in_a_process(library: str, path: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", library, str(path), dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(folder: Path, repeats: int, cases: list[str]) -> list[str]:
    rows = ["| | | until loaded, s | until read, s | CPU, s | memory / weights |", "|---|---|---|---|---|---|"]
    for title in cases:
        name, dtype = CASES[title]
        runs: dict[str, list[dict[str, float]]] = {"mmdit": [], "diffusers": []}
        for _ in range(repeats):
            for library, results in runs.items():
                results.append(in_a_process(library, folder / name, dtype))
                print(title, library, results[-1], file=sys.stderr, flush=True)
        for library, results in runs.items():
            columns = ([result[key] for result in results] for key in ("loaded", "read", "cpu"))
            times = " | ".join(f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in columns)
            rows.append(f"| {title} | {library} | {times} | {max(result['memory'] for result in results):.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--folder", type=Path, help="folder for 9.8 GB of weights, kept (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="only write the weights")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp())
    cases = list(CASES) if arguments.case is None else [list(CASES)[arguments.case]]
    try:
        if not (folder / "sd3.safetensors").exists():
            write_random(folder)
        rows = [] if arguments.write else table(folder, arguments.repeats, cases)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    if arguments.write:
        return
    about = f"`python -m benchmarks.loading` on {hardware()}: medians (minimum to maximum) of {arguments.repeats} runs."
    text = "\n".join(["# Loading", "", about, "", str(__doc__).split("\n\n")[-1].strip(), "", *rows])
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
