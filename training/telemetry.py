"""Measurements of a run: speed, hardware utilisation, waiting for data, gradient norms, losses by time.

Nothing here waits for the device while steps run: tensors are stored, and read when a line of metrics is written. All
sums over processes are in one vector, so that a run on several needs one call (`reduce`).

Shape letters: I images of a part of a batch, B samples, L places of a caption.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.text_and_images import CaptionedTransfusion
from mmdit.weights_io import whole
from training.cache_files import is_cache
from training.config import TrainConfig
from training.flops import captioned, in_one_row, of_documents, peak_tflops, reads_padding, step_flops, text_places
from training.objectives import Batch, Loss
from training.remote import is_url
from training.stream import STREAM

TIME_BINS = 8  # equal parts of [0, 1]
WAIT_LIMIT = 0.1  # share of the time waiting for data above which the run warns
WAIT_WINDOW = 60.0  # seconds over which that share is measured


class Telemetry:
    """Collects measurements during steps; `line` returns them.

    samples_per_second, tokens_per_second (patches, and the text tokens that are real to the trunk, as if no caption
    were dropped), mfu, data_wait (share of the time that went into waiting for batches), loss_t0.0625 ... (mean loss of
    the images in each of 8 equal parts of [0, 1], by its middle), loss_text and loss_image, grad_norm_blocks, _text,
    _in and _out, memory_gib (peak).

    reduce: sums a float64 vector over all processes; with it all processes have to call `line`.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        device: torch.device,
        precision: torch.dtype,
        log: Callable[[str], None],
        reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.model, self.device, self.log = config, model, device, log
        self.reduce, self.clock = reduce, clock
        self.peak = peak_tflops(config.training.peak_tflops, device, precision)
        self._bins = torch.zeros(2, TIME_BINS, dtype=torch.float64)  # sums and numbers of losses
        self._watched = [0.0, 0.0]  # seconds of waiting, and in all, in the current window
        self._norms: dict[str, Tensor] = {}
        self._flops: dict[tuple[int, int, int], float] = {}
        self._forget()

    def _forget(self) -> None:
        self._began: float | None = None
        self._waited = 0.0
        self._batches: list[tuple[list[int], torch.Size, Tensor, Tensor | None]] = []
        self._timed: list[tuple[Tensor, Tensor]] = []
        self._parts: defaultdict[str, list[Tensor]] = defaultdict(list)

    # --- while steps run ----------------------------------------------------------------------------------------------

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; notes its size and the time that it took to come."""
        start = self.clock()
        self._began = start if self._began is None else self._began
        batch = next(batches)
        self._waited += self.clock() - start
        text = batch.text.mask.sum(1) if batch.text else None
        patch = self.model.transformer.config.patch_size**2
        patches = [x[0].numel() // patch for x in batch.latents]
        self._batches.append((patches, batch.tokens.mask.shape, batch.tokens.mask.sum(1), text))
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count as training."""
        start = self.clock()
        yield
        if self._began is not None:
            self._began += self.clock() - start

    def add(self, loss: Loss) -> None:
        """Note the loss of a batch, or of a part of one."""
        for name, value in loss.parts.items():
            if name != "loss":  # the total, which the trainer writes
                self._parts[name].append(torch.as_tensor(value).detach())
        if loss.t is not None and loss.errors is not None:
            self._timed.append((loss.t, loss.errors))

    def gradients(self, model: nn.Module) -> None:
        """Note the gradient norm of each part of the model. To be called before gradients are clipped or cleared."""
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parts[part_of(name)].append(parameter.grad)
        norms = {part: torch.nn.utils.get_total_norm(gradients) for part, gradients in parts.items()}
        self._norms = {f"grad_norm_{part}": whole(norm) for part, norm in norms.items()}

    # --- when a line is written ---------------------------------------------------------------------------------------

    def line(self) -> dict[str, float]:
        """All measurements since the last line, by name; those without data are left out."""
        self._fill_bins()
        samples, tokens, flops = self._work()
        names = list(self._parts)
        values = [torch.stack(self._parts[name]).cpu().double().mean().item() for name in names]
        norms = {name: float(norm) for name, norm in self._norms.items()}
        # Reading these numbers has waited for the device to finish, so the time is read now.
        wall = 0.0 if self._began is None else self.clock() - self._began
        totals = torch.tensor([1.0, samples, tokens, flops, self._waited, *values], dtype=torch.float64)
        totals = self.reduce(torch.cat([totals, self._bins.flatten()]))
        processes, samples, tokens, flops, waited, *values = totals[: len(totals) - 2 * TIME_BINS].tolist()
        sums, counts = totals[len(totals) - 2 * TIME_BINS :].view(2, TIME_BINS)
        out = {f"loss_{name}": value / processes for name, value in zip(names, values, strict=True)}
        out |= {name: (sums[i] / counts[i]).item() for i, name in enumerate(bin_names()) if counts[i]}
        out |= norms | memory(self.device)
        if wall:
            out |= {"samples_per_second": samples / wall, "tokens_per_second": tokens / wall}
            out["data_wait"] = waited / processes / wall
            if self.peak:
                out["mfu"] = flops / wall / processes / (1e12 * self.peak)
            self._watch(waited / processes, wall)
        self._bins.zero_()
        self._norms = {}
        self._forget()
        return out

    def state(self) -> dict[str, Any]:
        """The losses since the last line, for a checkpoint; measurements of speed are not kept."""
        self._fill_bins()
        return {"bins": self._bins.tolist(), "parts": {k: [x.item() for x in v] for k, v in self._parts.items()}}

    def load(self, state: dict[str, Any], processes: int = 1) -> None:
        """Restore a `state`; where there are several processes, a `shared_state` of any number of them."""
        self._bins = torch.tensor(state["bins"], dtype=torch.float64) / processes
        for name, values in state["parts"].items():
            self._parts[name] = [torch.tensor(value, device=self.device) for value in values]

    def _fill_bins(self) -> None:
        if self._timed:
            t, errors = (torch.cat(parts).cpu().double() for parts in zip(*self._timed, strict=True))
            bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
            self._bins[0] += torch.bincount(bins, errors, TIME_BINS)
            self._bins[1] += torch.bincount(bins, minlength=TIME_BINS)
            self._timed.clear()

    def _work(self) -> tuple[float, float, float]:
        """Samples, tokens and FLOPs of the batches since the last line."""
        samples = tokens = flops = 0.0
        mixed = isinstance(self.model, CaptionedTransfusion)
        for patches, places, captions, documents in self._batches:
            images = len(patches)
            length = text_places(self.model.conditioner, places[1])
            if reads_padding(self.model.conditioner):
                captions = torch.full_like(captions, length)
            samples += images + (0 if documents is None else len(documents))
            text = (captions if documents is None else torch.cat([captions, documents])).cpu()
            tokens += sum(patches) + text.sum().item()
            if not self.peak:
                continue
            if mixed:
                one_each = torch.zeros_like(text)
                one_each[:images] = torch.tensor(patches)
                lead = 2 if self.model.transformer.config.size_tokens else 0
                flops += step_flops(self.model, of_documents(one_each, text, lead))
            elif self.model.packed:
                flops += step_flops(self.model, in_one_row(torch.tensor(patches), text, int(text.max())))
            else:
                flops += self._padded((images, patches[0], length))
        return samples, tokens, flops

    def _padded(self, sizes: tuple[int, int, int]) -> float:
        if sizes not in self._flops:
            self._flops[sizes] = step_flops(self.model, captioned(*sizes))
        return self._flops[sizes]

    def _watch(self, waited: float, wall: float) -> None:
        """Warn where the run has waited too long for its data in the current window."""
        self._watched = [self._watched[0] + waited, self._watched[1] + wall]
        if self._watched[1] < WAIT_WINDOW:
            return
        share, self._watched = self._watched[0] / self._watched[1], [0.0, 0.0]
        if share > WAIT_LIMIT:
            self.log(f"warning: {share:.0%} of the last minute went into waiting for data: {_remedy(self.config)}")


def shared_state(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of several processes as one, for any number of processes to restore: sums of bins, means of parts."""
    if len(states) == 1:
        return states[0]
    bins = torch.tensor([state["bins"] for state in states], dtype=torch.float64).sum(0)
    parts = {name: torch.tensor([state["parts"][name] for state in states]).mean(0) for name in states[0]["parts"]}
    return {"bins": bins.tolist(), "parts": {name: values.tolist() for name, values in parts.items()}}


def part_of(parameter: str) -> str:
    """The part of a captioned model that a parameter belongs to, by its name: "blocks", "text", "in" or "out"."""
    where, _, rest = parameter.partition(".")
    name = rest.partition(".")[0]
    if where == "conditioner":
        return "text"
    return "blocks" if name == "blocks" else "in" if name.endswith("_in") or name == "embed" else "out"


def bin_names() -> list[str]:
    """The names of the losses by time, each with the middle of its bin."""
    return [f"loss_t{(2 * i + 1) / (2 * TIME_BINS):.4f}" for i in range(TIME_BINS)]


def memory(device: torch.device) -> dict[str, float]:
    """The peak memory since the start, in GiB: of torch's tensors on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def _remedy(config: TrainConfig) -> str:
    data = config.data
    if is_cache(data.source):
        return f"put {data.source} on a {'faster ' * (not is_url(data.source))}disk, or lower the load beside it"
    if data.cache_latents:
        return "the latents are in memory, so give the process more of a core, or lower the load beside it"
    more = f"raise data.num_workers (it is {data.num_workers})"
    if data.source.startswith(STREAM):
        return f"{more}, or train from a copy of the data (hf:NAME)"
    return f"{more}, or keep the latents, in memory (data.cache_latents=true) or on disk (mmdit cache)"


class Profiler:
    """Records the steps that `training.profile` names, and writes a trace for chrome://tracing into the run's folder.

    done: steps made before a resume. It warns where the first step to record is among these and no trace is there.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, log: Callable[[str], None], done: int = 0) -> None:
        self.steps, self.folder, self.log = steps, folder, log
        self._running: Any = None
        if steps is not None and steps[0] <= done and not self._file.exists():
            first, last = steps
            log(f'warning: training.profile = "{first}:{last}" takes no effect: the run goes on with step {done + 1}')

    @property
    def _file(self) -> Path:
        first, last = self.steps or (0, 0)
        return self.folder / f"steps-{first}-{last}.json.gz"

    def before(self, step: int) -> None:
        """Called before each step, with its number from 1."""
        if self.steps is not None and self._running is None and step == self.steps[0]:
            from torch.profiler import ProfilerActivity, profile

            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._running.start()

    def after(self, step: int) -> None:
        """Called after each step; writes the trace after the last one to record."""
        if self._running is not None and self.steps is not None and step == self.steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if steps were recorded; where that fails, as on a full disk, warn."""
        if self._running is None or self.steps is None:
            return
        running, self._running = self._running, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        running.stop()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=40)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.with_name(self._file.name.replace(".json.gz", ".txt")).write_text(table)
            running.export_chrome_trace(str(self._file))
        except OSError as error:  # training goes on without its profile
            with suppress(OSError):
                self._file.unlink()
            self.log(f"warning: the profile is not written: {error}")
        else:
            self.log(f"profile: {self._file} (open it in chrome://tracing or ui.perfetto.dev)")
