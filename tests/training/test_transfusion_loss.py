"""The loss of text and images against the formula written out; documents, their orders, and text alone beside them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdit.sequences import pack
from mmdit.text import Tokens
from samplers import Cosine
from tests.training.batches import DOCUMENTS, Given, generator, noise_of, picture, piece, trunk
from training.objectives import Batch, FlowMatching, TextAndImages, documents, next_token_loss, opens_text
from training.share import Share
from training.time_density import Uniform


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


def test_logits_of_all_tokens_are_never_in_memory_at_once():
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


def test_larger_batches_wait_no_more_often_for_the_device():
    """To be made into documents, a batch has to be looked at, and on a GPU each look waits for it."""

    def looks(num):
        tokens = Tokens(torch.arange(5, 9).expand(num, 4), torch.arange(4) < torch.arange(2, 2 + num)[:, None])
        batch = Batch(torch.zeros(num, 3, 4, 4), tokens, tokens)
        with Looks() as looked:
            TextAndImages(Uniform()).prepared(trunk(), batch, generator())
        return looked.count

    assert looks(3) == looks(12)


class Looks(TorchDispatchMode):
    """How often the values of a tensor are looked at, or decide on a shape, and how often one is made of numbers."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "index.Tensor", "lift_fresh", "isin", "equal")
        self.count += any(name in str(op) for name in names)
        return op(*args, **(kwargs or {}))


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
def test_all_tensors_of_a_batch_are_moved_to_a_device(several):
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
