"""Flow matching against the formula written out, its draws, and the objective that a config asks for."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdit.sequences import pack
from tests.training.batches import DOCUMENTS, Given, batch, generator, noise_of, picture, piece, trunk
from training.config import load_config
from training.objectives import (
    Batch,
    FlowMatching,
    TextAndImages,
    make_objective,
    next_token_loss,
    noise_for,
    seeds_for,
)
from training.share import WHOLE, Share
from training.time_density import LogitNormal, Shifted, Uniform


class Spy(nn.Module):
    """A model that answers a fixed field and keeps what it was asked."""

    def __init__(self, encoders: int = 1) -> None:
        super().__init__()
        self.conditioner = nn.Module()
        self.conditioner.num_encoders = encoders
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.calls: list[tuple] = []

    def forward(self, x_t, t, tokens, drop=None):
        self.calls.append((x_t.detach(), t, tokens, drop))
        return self.gain * x_t


def test_the_noise_of_a_batch_is_one_copy_to_the_device():
    """The host waits for the device at each copy. That the values are those of the CPU: tests/test_second_device.py."""
    latents = [torch.empty(3, 4, side, device="meta") for side in (4, 6, 4)]
    with Copies() as copies:
        noise = noise_for(3, latents, [1, 2, 3], WHOLE)
    assert copies.count == 1
    assert [(x.shape, x.device.type) for x in noise] == [(x.shape, "meta") for x in latents]


class Copies(TorchDispatchMode):
    """How many tensors are copied to another device or type."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._to_copy.default
        return op(*args, **(kwargs or {}))


def test_loss_is_the_formula():
    """x_t = (1 - t) x_0 + t eps, target eps - x_0, mean square over everything."""
    spy, data, times = Spy(), batch(), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.9, 1.0])
    loss = FlowMatching(Given(times), caption_dropout=0.0)(spy, data, generator())
    [(x_t, t, tokens, drop)] = spy.calls
    assert torch.equal(t, times) and torch.equal(tokens.ids, data.tokens.ids) and not drop.any()
    x_0 = data.latents
    assert torch.equal(x_t[0], x_0[0])
    eps = (x_t[1:] - (1 - times[1:, None, None, None]) * x_0[1:]) / times[1:, None, None, None]
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.15
    assert abs((eps * x_0[1:]).mean()) < 0.2  # drawn apart from the data
    without_t_0 = slice(1, None)
    squares = (0.7 * x_t[without_t_0] - (eps - x_0[without_t_0])).square()
    # At t = 0 the noise leaves no trace in x_t: what its sample adds to the mean is what a draw of that noise can add.
    rest = loss.total * 6 - squares.mean() * 5
    noise = noise_of(x_0, generator())  # a given density draws nothing, so noise is what comes first
    torch.testing.assert_close(rest, (0.7 * x_0[0] - (noise[0] - x_0[0])).square().mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_loss_at_a_fixed_time_is_the_formula(t):
    spy, data = Spy(), batch()
    loss = FlowMatching(Uniform())(spy, data, generator(), t)
    [(x_t, times, _, _)] = spy.calls
    assert torch.equal(times, torch.full((6,), t))
    eps = (x_t - (1 - t) * data.latents) / t
    expected = (0.7 * x_t - (eps - data.latents)).square().mean()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(loss.parts["loss"], loss.total.detach()) and not loss.parts["loss"].requires_grad
    assert torch.equal(loss.errors.mean(), loss.parts["loss"]) and not loss.errors.requires_grad
    loss.total.backward()
    slope = (2 * (0.7 * x_t - (eps - data.latents)) * x_t).mean()
    torch.testing.assert_close(spy.gain.grad, slope, rtol=1e-4, atol=1e-5)


def test_a_model_that_knows_the_velocity_has_no_loss():
    """Data of one single picture: v = (x_t - x_0) / t."""
    data = batch()
    spy = Spy()
    spy.forward = lambda x_t, t, tokens, drop=None: (x_t - data.latents) / t[:, None, None, None]
    assert FlowMatching(LogitNormal())(spy, data, generator()).total < 1e-8


def test_equal_generators_draw_equally_and_others_otherwise():
    objective, spy = FlowMatching(Uniform(), caption_dropout=0.5), Spy()
    losses = [objective(spy, batch(), generator(seed)).total.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.rand(3)  # the global generator has no part
    assert objective(spy, batch(), generator(1)).total.item() == losses[0]
    assert all(torch.equal(a, b) for a, b in zip(spy.calls[0][:2], spy.calls[3][:2], strict=True))


def test_times_are_those_of_the_density():
    density = Given(torch.linspace(0.1, 0.6, 6))
    FlowMatching(density, stratified=True)(Spy(), batch(), generator())
    FlowMatching(density, stratified=False)(Spy(), batch(), generator())
    assert density.asked == [(6, True), (6, False)]
    for stratified in (True, False):
        TextAndImages(density, stratified=stratified)(trunk(), pack(DOCUMENTS), generator())
        assert density.asked.pop() == (3, stratified)
    spy = Spy()
    FlowMatching(Uniform(), stratified=True)(spy, batch(64), generator())
    assert sorted((spy.calls[0][1] * 64).int().tolist()) == list(range(64))
    FlowMatching(Uniform(), stratified=False)(spy, batch(64), generator())
    assert len(set((spy.calls[1][1] * 64).int().tolist())) < 60


def test_times_are_not_rounded_to_the_precision_of_the_latents():
    spy, whole = Spy(), batch()
    for latents in (whole.latents, whole.latents.bfloat16()):
        FlowMatching(Uniform())(spy, whole._replace(latents=latents), generator())
    assert torch.equal(spy.calls[0][1], spy.calls[1][1])


@pytest.mark.parametrize("encoders", [1, 3])
def test_captions_are_dropped_one_by_one_for_each_encoder(encoders):
    spy, objective, n = Spy(encoders), FlowMatching(Uniform(), caption_dropout=0.3), 64
    for seed in range(20):
        objective(spy, batch(n), generator(seed))
    drops = torch.stack([drop for *_, drop in spy.calls])
    assert drops.shape == (20, n, encoders) and drops.dtype == torch.bool
    assert abs(drops.float().mean() - 0.3) < 0.04
    share = drops.float().mean(1)
    assert (share > 0).all() and (share < 1).all()  # never all or none of a batch
    assert len({tuple(row.flatten().tolist()) for row in drops}) == 20
    if encoders > 1:  # independent: both dropped as often as the product says
        both = (drops[..., 0] & drops[..., 1]).float().mean()
        assert abs(both - 0.09) < 0.03


def test_any_network_of_four_arguments_is_a_model():
    """Without a conditioner there is one coin a sample; in DistributedDataParallel's `module` it is found."""
    drops = []

    def network(x_t, t, tokens, drop):
        drops.append(drop)
        return 0 * x_t

    loss = FlowMatching(Uniform())(network, batch(4), generator())
    assert loss.total.isfinite() and drops[0].shape == (4, 1)
    wrapped = nn.Module()
    wrapped.module = Spy(3)
    wrapped.forward = wrapped.module.forward
    FlowMatching(Uniform())(wrapped, batch(4), generator())
    assert wrapped.module.calls[0][3].shape == (4, 3)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_none_and_of_all(dropout):
    spy = Spy()
    FlowMatching(Uniform(), dropout)(spy, batch(), generator())
    assert (spy.calls[0][3] == bool(dropout)).all()


def test_fixed_times_drop_no_caption_and_keep_the_noise():
    """Validation: the same noise at every time, with the captions."""
    spy, objective, data = Spy(), FlowMatching(Uniform(), caption_dropout=1.0), batch()
    for t in (0.25, 0.75):
        objective(spy, data, generator(), t)
    noise = [(x_t - (1 - t[0]) * data.latents) / t[0] for x_t, t, _, _ in spy.calls]
    torch.testing.assert_close(noise[0], noise[1], atol=1e-5, rtol=1e-5)
    assert not any(drop.any() for *_, drop in spy.calls)


def test_seeds_of_noise_stand_for_the_generator_at_fixed_times():
    """And those of some rows give these rows' losses: a sample's noise does not hang on the others."""
    objective, model, data = FlowMatching(Uniform()), Spy(), batch()
    seeds = seeds_for(9, generator())
    assert seeds[:6] == seeds_for(6, generator())
    whole, with_seeds = objective(model, data, generator(), 0.5).errors, objective(model, data, seeds[:6], 0.5).errors
    torch.testing.assert_close(whole, with_seeds, rtol=0, atol=0)
    some = Batch(data.latents[2:5], type(data.tokens)(*(x[2:5] for x in data.tokens)))
    torch.testing.assert_close(objective(model, some, seeds[2:5], 0.5).errors, whole[2:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_models_are_scored_in_float(dtype):
    spy, data = Spy(), batch()
    spy.forward = lambda x_t, t, tokens, drop=None: x_t.to(torch.bfloat16)
    loss = FlowMatching(Uniform())(spy, data._replace(latents=data.latents.to(dtype)), generator())
    assert loss.total.dtype == loss.errors.dtype == torch.float32
    some = pack([[picture().to(dtype), torch.tensor([5, 6])]])
    mixed = TextAndImages(Uniform())(trunk().bfloat16(), some, generator())
    assert mixed.total.dtype == mixed.errors.dtype == mixed.parts["text"].dtype == torch.float32


def test_logits_in_half_precision_are_scored_in_float():
    """In bf16 a sum of thousands is off by dozens."""
    data = pack([[torch.randint(4, 40, (3000,), generator=generator())]])
    states, head = torch.randn(3000, 8, generator=generator()).bfloat16(), nn.Linear(8, 40, bias=False).bfloat16()
    expected = nn.functional.cross_entropy(head(states)[:-1].float(), data.ids[1:])
    torch.testing.assert_close(next_token_loss(states, head, data), expected)


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_drawn_for_a_batch_is_the_same_in_pieces(world):
    """Times (one in each slice of the whole batch), noise, dropped captions."""
    data = batch(12)

    def asked(objective, part):
        spy = Spy(encoders=2)
        objective(spy, part, generator())
        return spy.calls[0]

    whole = asked(FlowMatching(Uniform(), 0.5), data)
    shares = [Share(rank, world) for rank in range(world)]
    parts = [asked(FlowMatching(Uniform(), 0.5, share=share), piece(data, share)) for share in shares]
    for i in (0, 1, 3):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    assert sorted((whole[1] * 12).int().tolist()) == list(range(12))


MIXED = ("transfusion.enabled=true", "model.positions=rope")


def test_the_objective_is_that_of_the_config():
    plain = LogitNormal()
    assert make_objective(load_config("pixels-tiny")) == FlowMatching(plain)
    assert make_objective(load_config("pixels-tiny", MIXED)) == TextAndImages(plain)
    how = [f"objective.{change}" for change in ("m=0.5", "s=0.6", "shift=3", "caption_dropout=0.2", "stratified=false")]
    density = Shifted(LogitNormal(0.5, 0.6), 3.0)
    assert make_objective(load_config("pixels-tiny", how)) == FlowMatching(density, 0.2, False)
    own = {"image_weight": 2.0, "image_first_cap": 0.7, "z_loss": 1e-4, "caption_first": 0.6}
    how += [*MIXED, *(f"transfusion.{name}={value}" for name, value in own.items())]
    expected = TextAndImages(density, **own, caption_dropout=0.2, stratified=False)
    assert make_objective(load_config("pixels-tiny", how)) == expected


@pytest.mark.parametrize("model", [(), MIXED], ids=["image", "mixed"])
def test_an_objective_has_the_share_of_its_process(model):
    share = Share(1, 2, 3)
    assert make_objective(load_config("pixels-tiny", model), share).share == share
