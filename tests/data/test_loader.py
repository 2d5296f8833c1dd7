"""Batches: the same samples on any number of ranks and workers, and bit for bit the same after a resume."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_shards
import torch
from tiny_shards import ByteTokenizer, picture, write_shards, write_tar

from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict
from focalclip.config import AugmentConfig, DataConfig, RunConfig
from focalclip.data.loader import Batch, Dealing, TrainLoader
from focalclip.data.prepared import training_shards
from focalclip.data.samples import label_of

AUGMENT = AugmentConfig(scale=(0.5, 1.0), flip=0.5, grey=0.3, invert=0.5, recolour=0.5)
NUM_SAMPLES = 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [7, 4, 9, 1, 6, 3])


def loader(shards, *, batch_size=12, workers=0, seed=0, captions=(0.0, 0.0), **options) -> TrainLoader:
    data = DataConfig(
        batch_size=batch_size,
        workers=workers,
        window_shards=2,
        augment=AUGMENT,
        first_caption=captions[0],
        joined_captions=captions[1],
    )
    return TrainLoader(shards, data, 16, ByteTokenizer(), seed, Dealing(**options))


def take(source: TrainLoader, count: int) -> list[Batch]:
    return list(itertools.islice(source, count))


def joined(batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """Images, tokens, labels and positions of all, in the order of positions."""
    order = torch.cat([batch.positions for batch in batches]).argsort()
    return tuple(
        torch.cat([getattr(batch, name) for batch in batches])[order]
        for name in ("images", "tokens", "labels", "positions")
    )


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for a, b in zip(joined(first), joined(second), strict=True):
        assert torch.equal(a, b)


def captions(batches: list[Batch]) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode() for row in joined(batches)[1].tolist()]


def test_batch_holds_matching_images_captions_and_labels(shards):
    batches = take(loader(shards), 5)
    first = batches[0]
    assert first.images.shape == (12, 3, 16, 16)
    assert first.images.dtype == torch.uint8
    assert first.tokens.shape == (12, 32)
    assert (first.tokens.dtype, first.labels.dtype, first.positions.dtype) == (torch.int64,) * 3
    assert first.ids.dtype == torch.int64
    assert first.faults == []
    assert joined(batches)[3].tolist() == list(range(60))
    labels = joined(batches)[2].tolist()
    assert torch.equal(torch.cat([batch.ids for batch in batches]), torch.cat([batch.labels for batch in batches]))
    assert sorted(labels[:NUM_SAMPLES]) == list(range(NUM_SAMPLES)), "each sample once in the first epoch"
    assert sorted(labels[NUM_SAMPLES:]) == list(range(NUM_SAMPLES)), "and once in the second"
    assert labels[:NUM_SAMPLES] != labels[NUM_SAMPLES:]
    for caption, label in zip(captions(batches), labels, strict=True):
        assert caption in (f"caption {label}", f"keyword {label}")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    for a, b in zip(take(loader(shards, workers=workers), 6), take(loader(shards), 6), strict=True):
        assert_same([a], [b])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (4, 3)])
def test_ranks_and_micro_batches_share_out_the_global_batch(shards, world_size, accumulation):
    whole = take(loader(shards), 3)
    ranks = [
        take(loader(shards, rank=rank, world_size=world_size, accumulation=accumulation), 3 * accumulation)
        for rank in range(world_size)
    ]
    for step in range(3):
        parts = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert_same([whole[step]], parts)


def test_gathered_micro_batch_is_the_same_on_any_number_of_ranks(shards):
    alone = take(loader(shards, accumulation=2), 2)
    ranks = [take(loader(shards, rank=rank, world_size=3, accumulation=2), 2) for rank in range(3)]
    for micro_batch in range(2):
        gathered = torch.cat([rank[micro_batch].images for rank in ranks])
        assert torch.equal(gathered, alone[micro_batch].images)


@pytest.mark.parametrize("start", [0, 5, 12, 29, 47])
def test_resume_at_any_position_repeats_the_same_samples(shards, start):
    """Also at a position that is no multiple of the batch, and with other ranks than before."""
    everything = joined(take(loader(shards), 8))
    batches = [batch for rank in (0, 1) for batch in take(loader(shards, rank=rank, world_size=2, start=start), 3)]
    for resumed, whole in zip(joined(batches), everything, strict=True):
        assert torch.equal(resumed, whole[start : start + 36])


def test_resume_with_another_batch_size_continues_the_same_sequence(shards):
    everything = joined(take(loader(shards), 6))
    for resumed, whole in zip(joined(take(loader(shards, batch_size=8, start=24), 4)), everything, strict=True):
        assert torch.equal(resumed, whole[24:56])


def two_sources(folder) -> tuple[str, str]:
    """Eight dogs and eight trucks, both with class numbers 0 to 7; one more of each has no class."""
    for source, what in (("animals", "dog"), ("cars", "truck")):
        parts = {
            i: [("png", picture(i)), ("txt", f"{what} {i}".encode()), ("cls", b"%d" % i)][: 3 - i // 8]
            for i in range(9)
        }
        write_tar(folder / f"{source}.tar", [(f"{source}{i}.{e}", x) for i, part in parts.items() for e, x in part])
    return str(folder / "animals.tar"), str(folder / "cars.tar")


def by_label(train, **options) -> dict[int, list[str]]:
    """The captions of each label in the first epoch."""
    data = DataConfig(train=train, batch_size=2, workers=0, **options)
    batches = take(TrainLoader(training_shards(data.train), data, 16, ByteTokenizer(), 0), 9)
    found = {}
    for caption, label in zip(captions(batches), joined(batches)[2].tolist(), strict=True):
        found.setdefault(label, []).append(caption)
    return {label: sorted(texts) for label, texts in sorted(found.items())}


def test_class_numbers_belong_to_their_source(tmp_path):
    animals, cars = two_sources(tmp_path)
    apart = by_label([animals, cars])
    assert apart.pop(-1) == ["dog 8", "truck 8"]
    assert sorted(apart.values()) == sorted([f"{what} {i}"] for what in ("dog", "truck") for i in range(8))
    assert by_label(f"{animals}::{cars}") == by_label([animals, cars])
    shared = {i: [f"dog {i}", f"truck {i}"] for i in (*range(8),)} | {-1: ["dog 8", "truck 8"]}
    assert by_label([animals, cars], label_space="number") == shared
    assert by_label(f"{tmp_path}/{{animals,cars}}.tar") == by_label(str(tmp_path)) == shared


def test_classes_of_sources_are_told_apart():
    numbers = [0, 1, 7, 2**61 - 1]
    assert [label_of(number, 0, 1) for number in [*numbers, 2**63 - 1, -1]] == [*numbers, 2**63 - 1, -1]
    assert len({label_of(number, source, 3) for number in numbers for source in range(3)}) == 12
    assert {label_of(-1, source, 3) for source in range(3)} == {-1}
    assert all(0 <= label_of(2**63 - 1 - i, 2, 3) < 2**63 for i in range(9))


def test_each_epoch_and_seed_augments_anew(shards):
    images, _, labels, _ = joined(take(loader(shards), 5))
    for label in range(5):
        first, second = images[labels == label]
        assert not torch.equal(first, second)
    assert not torch.equal(images, joined(take(loader(shards, seed=1), 5))[0])


def test_caption_choice(shards):
    def share_of_first(probability: float) -> float:
        chosen = captions(take(loader(shards, captions=(probability, 0.0)), 25))
        return sum(caption.startswith("caption") for caption in chosen) / len(chosen)

    assert 0.4 < share_of_first(0.0) < 0.6  # 300 draws: 3.5 standard errors
    assert 0.65 < share_of_first(0.5) < 0.85
    assert share_of_first(1.0) == 1


def test_captions_are_joined_on_either_side_of_the_first(shards):
    chosen = captions(take(loader(shards, captions=(0.25, 0.75)), 25))
    kinds = [" ".join(part.split()[0] for part in caption.split(", ")) for caption in chosen]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    expected = {"caption": 0.25, "caption keyword": 0.375, "keyword caption": 0.375}
    assert shares == pytest.approx(expected, abs=0.1)  # 300 draws: 3.5 standard errors


@pytest.mark.parametrize(
    "ranges",
    [{"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}, {"scale": (0.5, 1.5)}, {"ratio": (0, 1)}, {"ratio": (2, 1)}],
)
def test_impossible_crops_are_refused(ranges):
    with pytest.raises(
        UserError, match=rf"test: data\.augment: {next(iter(ranges))}=.* is no range of .*; use 0 < low"
    ):
        from_dict(RunConfig, {"data": {"augment": ranges}}, "test")


def test_loader_travels_to_processes_that_are_not_forked(shards):
    source = loader(shards)
    before = take(source, 2)  # opens files, which must not be pickled
    source._batches = pickle.loads(pickle.dumps(source._batches))
    assert_same(before, take(source, 2))


def test_uneven_batch_names_the_setting_and_the_remedy(shards):
    with pytest.raises(UserError, match=r"data\.batch_size=12 is not divisible by 5 ranks .*; use a multiple of 5"):
        loader(shards, world_size=5)
    with pytest.raises(UserError, match=r"2 ranks times train\.accumulation=4; use a multiple of 8"):
        loader(shards, world_size=2, accumulation=4)


def test_batch_larger_than_the_data(shards):
    with pytest.raises(UserError, match=r"data\.batch_size=31 is larger than the 30 samples of data\.train"):
        loader(shards, batch_size=31)


LOOP = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_shards import ByteTokenizer
from focalclip.config import DataConfig
from focalclip.data.loader import TrainLoader

stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stop.append(1))
data = DataConfig(batch_size=4, workers=2)
after = 0
for step, batch in enumerate(TrainLoader(sorted(Path(sys.argv[1]).glob("*.tar")), data, 16, ByteTokenizer(), 0)):
    if step == 3:
        print("running", flush=True)
    after += bool(stop)
    if after == 20:
        break
    time.sleep(0.01)
print("left after", step > 20, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_all_processes(shards, number):
    """What Ctrl-C and launchers do: the training process must get its batches until it has saved."""
    command = [sys.executable, "-c", LOOP, str(shards[0].parent), str(Path(tiny_shards.__file__).parent)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "running\n"
        os.killpg(run.pid, number)
        started = time.monotonic()
        output, _ = run.communicate(timeout=60)
    assert output == "left after True\n"
    assert run.returncode == 0
    assert time.monotonic() - started < 20, "workers leave with the training process"
