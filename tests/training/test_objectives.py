"""Flow matching against the formula written out, and its draws: one coin a sample, none at fixed times."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdit.config import TransfusionConfig
from mmdit.sequences import pack
from mmdit.text import Tokens
from mmdit.transfusion import Transfusion
from samplers import Cosine
from training.config import load_config
from training.objectives import (
    Batch,
    FlowMatching,
    TextAndImages,
    documents,
    make_objective,
    next_token_loss,
    opens_text,
    seeds_for,
)
from training.share import Share
from training.time_density import LogitNormal, Shifted, TimeDensity, Uniform


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


class Given(TimeDensity):
    """A density that gives the times it was told to, and says how it was asked."""

    def __init__(self, times):
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "asked", [])

    def quantile(self, u):
        raise NotImplementedError

    def _density(self, t):
        raise NotImplementedError

    def sample(self, n, generator=None, stratified=False, device=None, dtype=torch.float32):
        self.asked.append((n, stratified))
        return self.times[:n]


def batch(n: int = 6) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(2 * n).view(n, 2)
    return Batch(torch.randn(n, 4, 3, 5, generator=g), Tokens(ids, ids > 0))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_of(like, g: torch.Generator) -> list[torch.Tensor]:
    """Each sample's noise is drawn from its own seed."""
    seeds = torch.randint(2**63 - 1, (len(like),), generator=g).tolist()
    return [torch.randn(x.shape, generator=generator(seed)) for x, seed in zip(like, seeds, strict=True)]


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


# --- text and images ----------------------------------------------------------------------------------------------

TINY = TransfusionConfig(vocab_size=40, in_channels=3, patch_size=2, depth=2, num_heads=2, head_dim=16)


def trunk(seed=0):
    model, g = Transfusion(TINY), generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def picture(height=4, width=4, seed=0):
    return torch.randn(3, height, width, generator=generator(seed))


DOCUMENTS = [
    [torch.tensor([5, 6, 7]), picture(seed=1), torch.tensor([8, 9])],
    [picture(2, 6, seed=2), torch.tensor([10, 11])],
    [torch.tensor([12, 13])],
    [picture(seed=3)],
]


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_mixed_loss_is_the_formula(drawn, z_loss):
    model, data = trunk(), pack(DOCUMENTS)
    times = torch.tensor([0.3, 0.8, 0.6])
    objective = TextAndImages(Given(times), image_weight=3.0, image_first_cap=0.5, z_loss=z_loss)
    loss = objective(model, data, generator(), None if drawn else times)
    g, t = generator(), torch.tensor([0.3, 0.4, 0.6]) if drawn else times  # the second opens a document with text
    noise = noise_of(data.latents, g)
    noised = [(1 - s) * x + s * e for x, e, s in zip(data.latents, noise, t, strict=True)]
    out = model(data.with_latents(noised), t)
    image = torch.stack([(v - (e - x)).square().mean() for v, x, e in zip(out.v, data.latents, noise, strict=True)])
    # 5 6 7 BOI EOI 8 9 | BOI EOI 10 11 | 12 13 | BOI EOI: from 5, 6, 7, EOI, 8; EOI, 10; 12; none
    rows, targets = [0, 1, 2, 4, 5, 8, 9, 11], [6, 7, 2, 8, 9, 10, 11, 13]
    assert data.predicting.tolist() == rows
    text = nn.functional.cross_entropy(out.logits[rows], torch.tensor(targets))
    text = text + z_loss * out.logits[rows].logsumexp(-1).square().mean()
    torch.testing.assert_close(loss.parts["text"], text)
    torch.testing.assert_close(loss.parts["image"], image.mean())
    torch.testing.assert_close(loss.total, text + 3 * image.mean())
    torch.testing.assert_close((loss.t, loss.errors), (t, image.detach()))
    assert not loss.errors.requires_grad


def test_the_papers_own_loss_is_of_the_noise_on_the_cosine_schedule():
    model, data, schedule = trunk(), pack(DOCUMENTS[:1]), Cosine()
    loss = TextAndImages(Uniform(), schedule=schedule, prediction="noise")(model, data, generator(), 0.7)
    [eps] = noise_of(data.latents, generator())
    t = torch.tensor([0.7])
    v = model(data.with_latents([schedule.mix(data.latents[0], eps, 0.7)]), t).v[0]
    torch.testing.assert_close(loss.parts["image"], (v - eps).square().mean(), rtol=1e-4, atol=1e-5)


def test_images_alone_cost_what_the_flow_objective_says():
    model, latents = trunk(), torch.stack([picture(seed=i) for i in range(3)])

    class AsImageModel(nn.Module):
        conditioner = SimpleNamespace(num_encoders=1)

        def forward(self, x_t, t, tokens, drop):
            return torch.stack(model(model.pack([[x] for x in x_t]), t).v)

    expected = FlowMatching(Uniform())(AsImageModel(), Batch(latents, None), generator(), 0.4)
    mixed = TextAndImages(Uniform(), image_weight=3.0)(model, pack([[x] for x in latents]), generator(), 0.4)
    torch.testing.assert_close(mixed.total, 3.0 * expected.total)
    assert expected.total > 0.1 and mixed.parts["text"] == 0


def test_packed_documents_cost_what_they_cost_alone():
    """The text of clean images: its loss is a mean over all tokens, with the gradients of the documents' own."""
    model, objective = trunk(), TextAndImages(Uniform(), image_weight=0.0)

    def cost(documents):
        model.zero_grad()
        loss = objective(model, pack(documents), generator(), 0.0).total
        loss.backward()
        num = len(pack(documents).predicting)
        gradients = [torch.zeros_like(p) if p.grad is None else num * p.grad for p in model.parameters()]
        return num * loss.detach(), gradients, num

    alone, together = [cost([document]) for document in DOCUMENTS], cost(DOCUMENTS)
    assert together[2] == sum(num for *_, num in alone)
    torch.testing.assert_close(together[0], sum(loss for loss, *_ in alone))
    summed = [sum(parts) for parts in zip(*(gradients for _, gradients, _ in alone), strict=True)]
    for a, b in zip(together[1], summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunks_change_neither_the_loss_nor_the_gradients(z_loss):
    data, head = pack([[torch.arange(4, 34)]]), nn.Linear(8, 40, bias=False)
    states = torch.randn(30, 8, generator=generator()).requires_grad_()
    found = []
    for chunk in (7, 1000):
        states.grad = head.weight.grad = None
        loss = next_token_loss(states, head, data, z_loss, chunk)
        loss.backward()
        found.append((loss.detach(), states.grad, head.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    logits = head(states[:-1])
    expected = nn.functional.cross_entropy(logits, data.ids[1:]) + z_loss * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(found[0][0], expected.detach())


def test_logits_are_never_whole():
    """With a vocabulary of 50,000 and 4,096 tokens they would be 800 MB; no tensor that autograd keeps is near that."""
    data = pack([[torch.randint(4, 50_000, (4096,), generator=generator())]])
    states, head, kept = torch.randn(4096, 16).requires_grad_(), nn.Linear(16, 50_000, bias=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        next_token_loss(states, head, data, chunk=256)
    assert max(kept) < 1e6


def test_where_no_token_is_to_be_predicted_all_weights_have_a_gradient_still():
    """Processes exchange the gradients of the same weights, and of several only one may have pictures alone."""
    data = pack([[picture()]])
    states, head = torch.randn(len(data.ids), 6, generator=generator()).requires_grad_(), nn.Linear(6, 40, bias=False)
    loss = next_token_loss(states, head, data)
    loss.backward()
    assert loss == 0 and not states.grad.any() and not head.weight.grad.any()


def test_which_images_open_text():
    assert opens_text(pack(DOCUMENTS)).tolist() == [False, True, False]
    assert opens_text(pack([[picture(), torch.tensor([1])]])).tolist() == [False]  # the end alone is none
    alone, first = [picture()], [picture(), torch.tensor([5, 1])]
    assert opens_text(pack([alone, first], sizes=range(20, 30))).tolist() == [
        False,
        True,
    ]  # after the words of its size


@pytest.mark.parametrize(
    "wrong",
    [
        dict(prediction="data"),
        dict(image_first_cap=0.0),
        dict(image_weight=-1.0),
        dict(z_loss=-1.0),
        dict(caption_first=1.1),
        dict(caption_dropout=-0.1),
    ],
)
def test_settings_of_the_mixed_loss_are_checked(wrong):
    with pytest.raises(ValueError, match="expected"):
        TextAndImages(Uniform(), **wrong)


def captions():
    ids = torch.tensor([[5, 6, 7, 1, 0], [8, 1, 0, 0, 0], [9, 10, 1, 0, 0]])
    return Batch(torch.stack([picture(seed=i) for i in range(3)]), Tokens(ids, ids != 0))


def test_captioned_images_become_documents():
    data = documents(captions(), torch.tensor([False, True, False]), torch.tensor([False, False, True]))
    ids = data.ids.split(torch.bincount(data.document).tolist())
    assert [row.tolist() for row in ids] == [[5, 6, 7, 2, 3, 1], [2, 3, 8, 1], [2, 3]]
    assert opens_text(data).tolist() == [False, True, False]  # an image alone is learnt at all times, for guidance
    assert data.predicting.tolist() == [0, 1, 2, 4, 7, 8]  # after an image alone nothing is said, least of all the end
    plain = documents(captions())
    assert [int(x) for x in plain.document.diff().nonzero()[:, 0]] == [5, 9]


def test_orders_are_drawn_as_asked():
    seen = []

    class Keep(nn.Module):
        pack = staticmethod(pack)

        def forward(self, batch, t):
            seen.append((batch, t))
            return trunk()(batch, t)

    data = captions()
    for first, dropout, expected in (
        (1.0, 0.0, [5, 6, 7, 2, 3, 1]),
        (0.0, 1.0, [2, 3, 5, 6, 7, 1]),
        (1.0, 1.0, [2, 3, 2, 3]),
    ):
        objective = TextAndImages(Uniform(), caption_first=first, caption_dropout=dropout, image_first_cap=0.5)
        objective(Keep(), data, generator())
        assert seen[-1][0].ids[: len(expected)].tolist() == expected
        assert (seen[-1][1] <= 0.5).all() or first == 1.0
    image_first, dropped = TextAndImages(Uniform())._orders(10_000, generator())
    assert image_first.float().mean() == pytest.approx(0.2, abs=0.02)
    assert dropped.float().mean() == pytest.approx(0.08, abs=0.01) and not (image_first & dropped).any()


def with_text():
    ids = torch.tensor([[11, 12, 13, 1], [14, 1, 0, 0], [15, 16, 1, 0]])
    return captions()._replace(text=Tokens(ids, ids != 0))


def test_text_alone_stands_after_the_pictures():
    data = documents(with_text(), torch.tensor([False, True, False]))
    ids = data.ids.split(torch.bincount(data.document).tolist())
    assert [row.tolist() for row in ids[3:]] == [[11, 12, 13, 1], [14, 1], [15, 16, 1]]
    assert torch.equal(torch.cat(ids[:3]), documents(captions(), torch.tensor([False, True, False])).ids)


def test_text_alone_joins_the_mean_of_the_next_token_and_leaves_the_images_loss():
    model, objective = trunk(), TextAndImages(Uniform())
    alone, both = (objective(model, batch, generator()).parts for batch in (captions(), with_text()))
    text = pack([[row[mask]] for row, mask in zip(*with_text().text, strict=True)])
    own = objective(model, text, generator()).parts
    assert own["image"] == 0
    rows, num = len(documents(captions()).predicting), len(text.predicting)
    torch.testing.assert_close(alone["image"], both["image"])  # and the same draws
    assert num == 6
    objective = TextAndImages(Uniform(), caption_first=1.0, caption_dropout=0.0)  # tokens that are known
    alone, both = (objective(model, batch, generator()).parts["text"] for batch in (captions(), with_text()))
    torch.testing.assert_close(both, (alone * rows + own["text"] * num) / (rows + num))


@pytest.mark.parametrize("several", [False, True])
def test_all_of_a_batch_moves(several):
    batch = with_text()._replace(latents=list(captions().latents)) if several else with_text()
    moved = batch.to("meta")
    assert {x.device.type for x in (*moved.latents, *moved.tokens, *moved.text)} == {"meta"}
    assert captions().to("meta").text is None


@pytest.mark.parametrize("make", [captions, with_text])
def test_a_batch_is_split_into_equal_parts(make):
    whole, parts = make(), make().split(3)
    assert [len(part.latents) for part in parts] == [1, 1, 1]
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    for name in ("tokens", "text"):
        assert all((getattr(part, name) is None) == (getattr(whole, name) is None) for part in parts)
        for k in range(2 if getattr(whole, name) else 0):
            assert torch.equal(torch.cat([getattr(part, name)[k] for part in parts]), getattr(whole, name)[k])


# --- pieces of a batch --------------------------------------------------------------------------------------------


def piece(data: Batch, share: Share) -> Batch:
    rows = share.rows(len(data.latents))
    return Batch(data.latents[rows], Tokens(*(x[rows] for x in data.tokens)))


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


def test_the_mean_of_the_pieces_losses_is_the_loss_of_the_batch():
    """Of text and images, whose captions are of many lengths: with counts of the whole batch, as the trainer gives."""
    model, g = trunk(), generator()
    ids = torch.where(
        torch.arange(6) < torch.tensor([[2], [6], [3], [4]]), torch.randint(4, 30, (4, 6), generator=g), 0
    )
    data = Batch(torch.stack([picture(seed=i) for i in range(4)]), Tokens(ids, ids != 0))
    whole = TextAndImages(Uniform(), 2.0, caption_dropout=0.3)(model, data, generator()).total
    prepared = []
    for rank in range(2):
        objective, g = TextAndImages(Uniform(), 2.0, caption_dropout=0.3, share=Share(rank, 2)), generator()
        prepared.append((objective, g, *objective.prepared(model, piece(data, Share(rank, 2)), g)))
    counts = torch.stack([own for *_, own in prepared])
    assert counts[0, 0] != counts[1, 0]
    losses = [objective(model, part, g, counts=counts.mean(0)).total for objective, g, part, _ in prepared]
    torch.testing.assert_close(torch.stack(losses).mean(), whole)
    alone = [objective(model, piece(data, objective.share), generator()).total for objective, *_ in prepared]
    assert abs(torch.stack(alone).mean() - whole) > 1e-3  # what means over each piece would say


MIXED = ("transfusion.enabled=true", "model.positions=rope")


def test_a_run_learns_what_its_config_says():
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
def test_a_run_learns_its_share_of_each_batch(model):
    share = Share(1, 2, 3)
    assert make_objective(load_config("pixels-tiny", model), share).share == share
