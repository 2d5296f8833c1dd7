"""The contrastive loss against a naive double loop, against open_clip, and on real processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks

from focalclip.losses import contrastive_loss

BATCH, DIM, SCALE = 8, 16, 9.0
LABELS = {
    "none": None,
    "all different": list(range(8)),
    "repeated": [3, 0, 3, 1, 0, 3, 2, 1],
    "some unlabelled": [3, -1, 3, -1, 0, 3, -2, 0],
}


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, BATCH, DIM, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def naive(image, text, scale, labels):
    """The definition, one pair at a time in float64."""
    image, text, n = image.double(), text.double(), len(image)
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns in ((image, text), (text, image)):
        for i in range(n):
            logits = [scale.double().squeeze() * torch.dot(rows[i], columns[j]) for j in range(n)]
            log_sum = torch.logsumexp(torch.stack(logits), 0)
            positives = [
                j for j in range(n) if j == i or (labels is not None and labels[i] >= 0 and labels[i] == labels[j])
            ]
            total = total - sum(logits[j] - log_sum for j in positives) / len(positives) / n / 2
    return total


def value_and_gradients(loss_function, *args, **kwargs):
    image, text = (x.clone().requires_grad_() for x in embeddings())
    scale = torch.tensor([SCALE], requires_grad=True)
    loss = loss_function(image, text, scale, *args, **kwargs)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_loss_equals_a_naive_double_loop(labels):
    ours = value_and_gradients(contrastive_loss, labels=None if labels is None else torch.tensor(labels))
    theirs = value_and_gradients(naive, labels)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.float(), rtol=1e-5, atol=1e-6, msg=name)


def test_loss_without_labels_equals_open_clip():
    import open_clip  # here, so that the ranks below need not import it

    ours = value_and_gradients(contrastive_loss)
    theirs = value_and_gradients(open_clip.ClipLoss())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_half_precision_embeddings_are_compared_in_float32():
    image, text = (x.bfloat16() for x in embeddings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(image, text, torch.tensor(SCALE))
    torch.testing.assert_close(loss, contrastive_loss(image.float(), text.float(), torch.tensor(SCALE)))


def test_uniform_similarities_cost_log_batch():
    ones = F.normalize(torch.ones(BATCH, DIM), dim=1)
    assert contrastive_loss(ones, ones, torch.tensor(1.0)).item() == pytest.approx(math.log(BATCH), rel=1e-6)


def test_shapes_that_do_not_fit_are_named():
    image, text = embeddings()
    with pytest.raises(ValueError, match=r"image \(8, 16\) and text \(4, 16\)"):
        contrastive_loss(image, text[:4], torch.tensor(1.0))
    for name in ("labels", "ids"):
        with pytest.raises(ValueError, match=rf"{name} \(3,\)"):
            contrastive_loss(image, text, torch.tensor(1.0), **{name: torch.zeros(3, dtype=torch.long)})


# A pair that stands in the batch more than once

COPIES = [4, 9, 4, 9, -1, 4, -1, 2]  # the ranks of a batch hold copies of each other's pairs; -1 is like no other
FIRST = [0, 1, 4, 6, 7]
LABELS_OF_COPIES = {"none": None, "all unlabelled": [-1] * 8, "repeated": [3, 0, 3, 0, 0, 3, -1, 3]}


def only_first(labels):
    """The loss of the batch without copies, by the definition; gradients in the shape of the whole batch."""
    kept = None if labels is None else [labels[i] for i in FIRST]
    return value_and_gradients(lambda image, text, scale: naive(image[FIRST], text[FIRST], scale, kept))


@pytest.mark.parametrize("labels", LABELS_OF_COPIES.values(), ids=LABELS_OF_COPIES.keys())
def test_a_copy_of_a_pair_is_no_negative_of_it(labels):
    tensor = None if labels is None else torch.tensor(labels)
    ours = value_and_gradients(contrastive_loss, labels=tensor, ids=torch.tensor(COPIES))
    for name, value in only_first(labels).items():
        torch.testing.assert_close(ours[name], value.float(), rtol=1e-5, atol=1e-6, msg=name)
    copies = [i for i in range(BATCH) if i not in FIRST]
    assert not ours["image"][copies].any()
    assert not ours["text"][copies].any()


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_without_copies_nothing_changes_bit_for_bit(labels):
    tensor = None if labels is None else torch.tensor(labels)
    without = value_and_gradients(contrastive_loss, labels=tensor)
    ours = value_and_gradients(contrastive_loss, labels=tensor, ids=torch.tensor([7, 3, 0, -1, 5, 1, -1, 2**62]))
    for name, value in without.items():
        assert torch.equal(ours[name], value), name


def test_copies_of_one_pair_alone_cost_nothing():
    ours = value_and_gradients(contrastive_loss, ids=torch.full((BATCH,), 5))
    assert ours["loss"] == 0
    assert not ours["image"].any()


def _on_rank(all_labels, ids=None):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {}
    for name, labels in all_labels.items():
        own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        image, text = (x[own].clone().requires_grad_() for x in embeddings())
        scale = torch.tensor([SCALE], requires_grad=True)
        own_labels = None if labels is None else torch.tensor(labels)[own]
        own_ids = None if ids is None else torch.tensor(ids)[own]
        loss = contrastive_loss(image, text, scale, labels=own_labels, ids=own_ids)
        loss.backward()
        results[name] = {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_give_the_one_process_loss_and_gradients(world_size):
    ranks = run_ranks(_on_rank, world_size, LABELS)
    for name, labels in LABELS.items():
        tensor = None if labels is None else torch.tensor(labels)
        _assert_together([result[name] for result in ranks], value_and_gradients(contrastive_loss, labels=tensor))
    for with_ids, without in zip(
        run_ranks(_on_rank, world_size, LABELS, [5, 3, 0, -1, 4, 1, -1, 7]), ranks, strict=True
    ):
        for name, result in without.items():
            assert all(torch.equal(with_ids[name][part], value) for part, value in result.items()), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_count_each_pair_once(world_size):
    ranks = run_ranks(_on_rank, world_size, LABELS_OF_COPIES, COPIES)
    for name, labels in LABELS_OF_COPIES.items():
        assert len({result[name]["loss"].item() for result in ranks}) == 1
        _assert_together([result[name] for result in ranks], only_first(labels))


def _assert_together(ranks, expected):
    for result in ranks:
        torch.testing.assert_close(result["loss"], expected["loss"].float())
    # The engine averages parameter gradients over ranks: features are summed into parameters, hence / their number.
    for side in ("image", "text"):
        gathered = torch.cat([result[side] for result in ranks]) / len(ranks)
        torch.testing.assert_close(gathered, expected[side].float(), rtol=1e-5, atol=1e-7)
    mean_scale = torch.stack([result["scale"] for result in ranks]).mean(0)
    torch.testing.assert_close(mean_scale, expected["scale"].float(), rtol=1e-5, atol=1e-6)
