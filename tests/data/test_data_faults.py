"""Broken samples: replaced by a fixed rule, counted once, named; the batches stay even and deterministic."""

import itertools
import json

import pytest
import torch
from tiny_shards import ByteTokenizer, good_sample, picture, write_shards, write_tar

from focalclip.base.errors import UserError
from focalclip.config import DataConfig
from focalclip.data.index import index_shards
from focalclip.data.loader import Dealing, TrainLoader
from focalclip.data.order import SampleOrder

IMAGE, TEXT = picture(0), b"a caption"
BROKEN = {
    "no-image": ([("txt", TEXT)], "no image"),
    "no-caption": ([("png", IMAGE)], "no caption"),
    "blank-caption": ([("png", IMAGE), ("txt", b" \n")], "no caption"),
    "only-metadata": ([("png", IMAGE), ("json", b'{"width": 3}')], "no caption"),
    "null-caption": ([("png", IMAGE), ("json", b'{"caption": null}')], "no caption"),
    "not-utf8": ([("png", IMAGE), ("txt", b"\xff\xfe")], "caption is not UTF-8"),
    "half-json": ([("png", IMAGE), ("txt", TEXT), ("json", b'{"captions": ["a')], "unreadable JSON"),
    "number-caption": ([("png", IMAGE), ("json", b'{"captions": [3]}')], "captions in its JSON are not text"),
    "text-captions": ([("png", IMAGE), ("json", b'{"captions": "abc"}')], "captions in its JSON are not text"),
    "text-keywords": (
        [("png", IMAGE), ("txt", TEXT), ("json", b'{"keywords": "a"}')],
        "keywords in its JSON are not text",
    ),
    "only-keywords": ([("png", IMAGE), ("json", b'{"keywords": ["a"]}')], "no caption"),
    "cut-png": ([("png", IMAGE[:200]), ("txt", TEXT)], "undecodable image"),
    "cut-jpeg": ([("jpg", picture(0, format="JPEG")[:400]), ("txt", TEXT)], "undecodable image"),
    "html": ([("jpg", b"<html>404</html>"), ("txt", TEXT)], "not an image"),
    "empty-image": ([("webp", b""), ("txt", TEXT)], "undecodable image"),
    "class-name": ([("png", IMAGE), ("txt", TEXT), ("cls", b"cat")], "class number b'cat' is not an integer"),
    "class-size": ([("png", IMAGE), ("txt", TEXT), ("cls", b"9223372036854775808")], "is not an integer of 64 bits"),
}


def broken_shards(folder, kinds=tuple(BROKEN)):
    """One shard with a good sample (label 1000 + i) after each broken one, and two shards of good samples."""
    members = []
    for i, kind in enumerate(kinds):
        members += [(f"{kind}.{extension}", data) for extension, data in BROKEN[kind][0]]
        members += [(name, str(1000 + i).encode() if name.endswith("cls") else data) for name, data in good_sample(i)]
    return [*write_shards(folder, [5, 6]), write_tar(folder / "broken.tar", members)]


def batches(shards, count, **options):
    data = DataConfig(batch_size=8, workers=options.pop("workers", 0), window_shards=2)
    loader = TrainLoader(shards, data, 16, ByteTokenizer(), seed=3, dealing=Dealing(**options))
    return list(itertools.islice(loader, count))


def test_every_broken_sample_is_named_once_per_epoch(tmp_path):
    shards = broken_shards(tmp_path)
    epoch = len(BROKEN) * 2 + 11
    taken = batches(shards, epoch)  # 8 epochs
    faults = [fault for batch in taken for fault in batch.faults]
    assert len(faults) == 8 * len(BROKEN)
    for kind, (_, reason) in BROKEN.items():
        named = [fault for fault in faults if fault.startswith(f"broken.tar: {kind}: ")]
        assert len(named) == 8
        assert all(reason in fault for fault in named)
    assert all(batch.images.shape == (8, 3, 16, 16) for batch in taken)


def test_replacement_is_the_next_whole_sample(tmp_path):
    shards = broken_shards(tmp_path)
    order = SampleOrder(index_shards(shards), seed=3, window_shards=2)

    def expected(position: int) -> int:
        shard, sample = order.locate(position)
        if shard < 2:
            return sample + 5 * shard
        return 1000 + sample // 2 if sample % 2 else expected(position + 1)

    taken = batches(shards, 10)
    labels = torch.cat([batch.labels for batch in taken]).tolist()
    assert labels == [expected(position) for position in range(80)]
    assert any(order.locate(p)[0] == 2 == order.locate(p + 1)[0] for p in range(80)), "two broken ones may meet"


def test_faults_are_the_same_on_ranks_and_workers(tmp_path):
    shards = broken_shards(tmp_path)
    alone = batches(shards, 6)
    ranks = [batches(shards, 6, rank=rank, world_size=2, workers=1) for rank in range(2)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert batch.faults == [fault for part in parts for fault in part.faults]
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))


def test_resume_repeats_replacements(tmp_path):
    shards = broken_shards(tmp_path)
    whole, resumed = batches(shards, 6), batches(shards, 3, start=24)
    for a, b in zip(whole[3:], resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)
        assert a.faults == b.faults


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_samples_is_an_error_of_one_sentence(tmp_path, workers):
    members = [(f"{i}.{extension}", data) for i in range(9) for extension, data in BROKEN["cut-png"][0]]
    with pytest.raises(UserError) as caught:
        batches([write_tar(tmp_path / "bad.tar", members)], 1, workers=workers)
    message = str(caught.value)
    assert message.startswith("data.train: 100 broken samples in a row, the first being bad.tar: ")
    assert "\n" not in message


def test_shard_that_changes_or_goes_during_training_is_a_counted_fault(tmp_path):
    shards = write_shards(tmp_path, [6, 6])
    loader = TrainLoader(shards, DataConfig(batch_size=6, workers=0), 16, ByteTokenizer(), seed=0)
    shards[1].unlink()
    taken = list(itertools.islice(loader, 2))
    faults = [fault for batch in taken for fault in batch.faults]
    assert len(faults) == 6
    assert all(fault.startswith("00001.tar: sample ") and "No such file" in fault for fault in faults)


def test_sources_of_captions(tmp_path):
    """Text, JSON ``captions`` and JSON ``caption`` all count, each distinct caption once."""
    samples = {
        "a": [("txt", b"one\n"), ("json", json.dumps({"captions": ["one", " two ", "three"]}).encode())],
        "b": [("json", json.dumps({"caption": "four"}).encode())],
        "c": [("txt", b"five"), ("json", b'["other", "metadata"]')],
    }
    members = [(f"{key}.{e}", data) for key, parts in samples.items() for e, data in [("png", IMAGE), *parts]]
    shard = write_tar(tmp_path / "0.tar", members)
    loader = TrainLoader([shard], DataConfig(batch_size=3, workers=0), 16, ByteTokenizer(), seed=0)
    taken = list(itertools.islice(loader, 300))
    assert not any(batch.faults for batch in taken)
    assert all((batch.labels == -1).all() for batch in taken)
    rows = [bytes(row).rstrip(b"\0").decode() for batch in taken for row in batch.tokens.tolist()]
    counts = {caption: rows.count(caption) for caption in sorted(set(rows))}
    assert counts.keys() == {"one", "two", "three", "four", "five"}
    assert counts["four"] == counts["five"] == 300
    assert all(75 < counts[caption] < 125 for caption in ("one", "two", "three"))  # 3 standard deviations


def test_keywords_are_joined_and_never_stand_alone(tmp_path):
    record = {"captions": ["jeans", "trousers"], "keywords": ["clothing", "jeans", "blue"]}
    shard = write_tar(tmp_path / "0.tar", [("a.png", IMAGE), ("a.json", json.dumps(record).encode())])

    def share(first: float, joined: float) -> dict[str, float]:
        data = DataConfig(batch_size=1, workers=0, first_caption=first, joined_captions=joined)
        taken = itertools.islice(TrainLoader([shard], data, 16, ByteTokenizer(), seed=0), 600)
        rows = [bytes(row).rstrip(b"\0").decode() for batch in taken for row in batch.tokens.tolist()]
        return {row: rows.count(row) / len(rows) for row in set(rows)}

    assert share(0.0, 0.0) == pytest.approx({"jeans": 0.5, "trousers": 0.5}, abs=0.07)  # 3.5 standard errors
    both = share(0.0, 1.0)
    words = {word for row in both for word in row.split(", ")}
    assert words == {"jeans", "trousers", "clothing", "blue"}
    assert all(row.split(", ").count("jeans") == 1 and len(row.split(", ")) in (2, 3) for row in both)
