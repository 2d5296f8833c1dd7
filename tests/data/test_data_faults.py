"""Broken samples: replaced by a fixed rule, counted once, named; the batches stay even and deterministic."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_shards import ByteTokenizer, good_sample, picture, write_shards, write_tar

from focalclip.base.errors import UserError
from focalclip.config import DataConfig
from focalclip.data.images import decode_array
from focalclip.data.index import index_shards
from focalclip.data.loader import Dealing, TrainLoader
from focalclip.data.order import SampleOrder
from focalclip.losses import contrastive_loss

IMAGE, TEXT = picture(0), b"a caption"
BROKEN = {
    "no-image": ([("txt", TEXT)], "no image"),
    "no-caption": ([("png", IMAGE)], "no caption"),
    "blank-caption": ([("png", IMAGE), ("txt", b" \n")], "no caption"),
    "only-metadata": ([("png", IMAGE), ("json", b'{"width": 3}')], "no caption"),
    "null-caption": ([("png", IMAGE), ("json", b'{"caption": null}')], "no caption"),
    "not-utf8": ([("png", IMAGE), ("txt", "café".encode("latin-1"))], "caption is not UTF-8"),
    "latin-json": ([("png", IMAGE), ("json", '{"caption": "café"}'.encode("latin-1"))], "its JSON is not UTF-8"),
    "half-json": ([("png", IMAGE), ("json", b'{"captions": ["a')], "unreadable JSON"),
    "deep-json": ([("png", IMAGE), ("json", b"[" * 100_000)], "its JSON is nested too deeply"),
    "number-caption": ([("png", IMAGE), ("json", b'{"captions": [3]}')], "captions in its JSON are not text"),
    "only-keywords": ([("png", IMAGE), ("json", b'{"keywords": ["a"]}')], "no caption"),
    "cut-png": ([("png", IMAGE[:200]), ("txt", TEXT)], "undecodable image"),
    "cut-jpeg": ([("jpg", picture(0, format="JPEG")[:400]), ("txt", TEXT)], "undecodable image"),
    "html": ([("jpg", b"<html>404</html>"), ("txt", TEXT)], "not an image"),
    "empty-image": ([("webp", b""), ("txt", TEXT)], "undecodable image"),
}

SOUND = {
    "keywords-one-text": ("json", b'{"keywords": "dog, cat"}', None),
    "caption-number": (
        "json",
        b'{"caption": 1984, "url": "u", "status": "success"}',
        "caption in its JSON are not text",
    ),
    "captions-null": ("json", b'{"captions": ["a dog", null]}', None),
    "caption-nan": ("json", b'{"caption": NaN}', None),
    "caption-list": ("json", b'{"caption": ["a dog", "a cat"]}', None),
    "captions-one-text": ("json", b'{"captions": "a dog"}', None),
    "captions-of-objects": ("json", b'{"captions": [{"text": "a dog"}]}', "captions in its JSON are not text"),
    "keywords-number": ("json", b'{"keywords": [3, "a"]}', "keywords in its JSON are not text"),
    "byte-order-mark": ("json", b'\xef\xbb\xbf{"width": 3}', None),
    "utf-16": ("json", '{"caption": "a dog"}'.encode("utf-16"), None),
    "latin-1": ("json", '{"caption": "café"}'.encode("latin-1"), "its JSON is not UTF-8"),
    "deep": ("json", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "its JSON is nested too deeply"),
    "half": ("json", b'{"captions": ["a', "unreadable JSON"),
    "empty": ("json", b"", "unreadable JSON"),
    "lone-surrogate": ("json", b'{"caption": "a dog \\ud83d"}', "a caption holds a lone surrogate"),
    "word": ("cls", b"cat", "cls is not an integer of 64 bits"),
    "underscore": ("cls", b"2023_05", "cls is not an integer of 64 bits"),
    "too-large": ("cls", b"9223372036854775808", "cls is not an integer of 64 bits"),
    "latin-1-class": ("cls", b"\xe9", "cls is not an integer of 64 bits"),
    "class-with-mark": ("cls", b"\xef\xbb\xbf3\r\n", None),
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
        assert torch.equal(batch.ids, torch.cat([part.ids for part in parts]))


@pytest.mark.parametrize(("samples", "broken"), [(512, 26), (512, 102), (65, 0), (100, 0)])
def test_a_perfect_model_has_no_loss_from_replacements_and_borders_of_epochs(tmp_path, samples, broken):
    bad = set(np.random.default_rng(0).permutation(samples)[:broken].tolist())
    members = [(f"{i:06d}.png", b"broken" if i in bad else IMAGE) for i in range(samples)]
    captions = [(f"{i:06d}.txt", b"caption %d" % i) for i in range(samples)]
    shard = write_tar(tmp_path / "0.tar", [member for pair in zip(members, captions, strict=True) for member in pair])
    size = 128 if broken else 64
    loader = TrainLoader([shard], DataConfig(batch_size=size, workers=0), 16, ByteTokenizer(), seed=0)
    copies = 0
    for batch in itertools.islice(loader, 2 * samples // size + 1):
        captions = [bytes(row).rstrip(b"\0").decode() for row in batch.tokens.tolist()]
        assert batch.ids.tolist() == [int(caption.removeprefix("caption ")) for caption in captions]
        copies += size - len(set(captions))
        perfect = F.one_hot(torch.unique(batch.ids, return_inverse=True)[1], size).float()
        for labels in (batch.labels, None):
            assert contrastive_loss(perfect, perfect, torch.tensor([100.0]), labels=labels, ids=batch.ids) == 0
    assert copies > 0


def test_resume_repeats_replacements(tmp_path):
    shards = broken_shards(tmp_path)
    whole, resumed = batches(shards, 6), batches(shards, 3, start=24)
    for a, b in zip(whole[3:], resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.ids, b.ids)
        assert a.faults == b.faults


@pytest.mark.parametrize("case", SOUND)
def test_an_optional_part_never_costs_a_sound_pair(tmp_path, case):
    """What is wrong with the metadata is counted, and named the first time; the pair is trained on."""
    extension, content, reason = SOUND[case]
    members = [m for i in range(8) for m in ((f"{i}.png", IMAGE), (f"{i}.txt", TEXT), (f"{i}.{extension}", content))]
    (batch,) = batches([write_tar(tmp_path / "a.tar", members)], 1)
    assert batch.faults == []
    rows = {bytes(row).rstrip(b"\0") for row in batch.tokens.tolist()}
    assert rows <= {TEXT, b"a dog", b"a cat"}
    assert [part.reason for part in batch.ignored] == [reason] * 8 * (reason is not None)
    assert all((part.where[:7] == "a.tar: ") == (i == 0) for i, part in enumerate(batch.ignored))
    assert set(batch.labels.tolist()) == ({3} if case == "class-with-mark" else {-1})


def test_text_with_a_byte_order_mark(tmp_path):
    texts = [b"\xef\xbb\xbfa caption", "a caption".encode("utf-16")] * 4
    members = [m for i, text in enumerate(texts) for m in ((f"{i}.png", IMAGE), (f"{i}.txt", text))]
    (batch,) = batches([write_tar(tmp_path / "a.tar", members)], 1)
    assert {bytes(row).rstrip(b"\0") for row in batch.tokens.tolist()} == {TEXT}


def test_json_makes_up_for_a_text_that_is_not_utf8(tmp_path):
    parts = [("png", IMAGE), ("txt", b"\xe9t\xe9"), ("json", b'{"caption": "a caption"}')]
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.{extension}", data) for i in range(8) for extension, data in parts])
    (batch,) = batches([shard], 1)
    assert batch.faults == []
    assert [part.reason for part in batch.ignored] == ["caption is not UTF-8"] * 8


def test_settings_choose_captions_keywords_and_labels(tmp_path):
    record = json.dumps({"captions": ["a"], "caption": "b", "recaption": ["c", "a"], "keywords": ["d"]}).encode()
    parts = [("png", IMAGE), ("txt", b"text"), ("json", record), ("cls", b"5")]
    shard = write_tar(tmp_path / "a.tar", [(f"a.{extension}", data) for extension, data in parts])

    def seen(**options) -> tuple[set[str], int]:
        data = DataConfig(batch_size=1, workers=0, **options)
        taken = list(itertools.islice(TrainLoader([shard], data, 16, ByteTokenizer(), seed=0), 60))
        rows = {bytes(row).rstrip(b"\0").decode() for batch in taken for row in batch.tokens.tolist()}
        return {word for row in rows for word in row.split(", ")}, taken[0].labels.item()

    assert seen() == ({"text", "a", "b"}, 5)
    assert seen(caption_keys=["recaption", "txt"], use_labels=False) == ({"c", "a", "text"}, -1)
    assert seen(joined_captions=1.0) == ({"text", "a", "b", "d"}, 5)
    assert seen(joined_captions=1.0, use_keywords=False) == ({"text", "a", "b"}, 5)


class Picky(ByteTokenizer):
    """Fails on one caption, with an error of its own kind, and with it on every list that holds it."""

    def __call__(self, captions):
        if any(caption.startswith("caption 3") for caption in captions):
            raise KeyError("a token that no table has")
        return super().__call__(captions)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_caption_that_cannot_be_tokenised_is_the_fault_of_its_sample(tmp_path, workers):
    members = [m for i in range(8) for m in ((f"{i}.png", IMAGE), (f"{i}.txt", f"caption {i}".encode()))]
    shard = write_tar(tmp_path / "a.tar", members)
    data = DataConfig(batch_size=8, workers=workers)
    batch = next(iter(TrainLoader([shard], data, 16, Picky(), seed=0)))
    assert batch.faults == ["a.tar: 3: caption cannot be tokenised ('a token that no table has')"]
    assert len({bytes(row) for row in batch.tokens.tolist()}) == 7


def test_a_tokenizer_that_fails_on_whole_lists_alone_is_named(tmp_path):
    def fails(captions):
        if len(captions) > 1:
            raise ValueError("ragged")
        return ByteTokenizer()(captions)

    loader = TrainLoader(write_shards(tmp_path, [8]), DataConfig(batch_size=8, workers=0), 16, fails, seed=0)
    with pytest.raises(UserError, match=r"model\.text\.name: its tokenizer fails .*\(ragged\); use another"):
        next(iter(loader))


def test_any_error_of_one_sample_is_its_own_fault(tmp_path, monkeypatch):
    """Whatever a decoder raises: here a picture for whose pixels there is no memory."""

    def decode(data, side):
        if data == b"giant":
            raise MemoryError
        return decode_array(data, side)

    monkeypatch.setattr("focalclip.data.samples.decode_array", decode)
    members = [("a.png", b"giant"), ("a.txt", TEXT), *good_sample(0), *good_sample(1)]
    shard = write_tar(tmp_path / "a.tar", members)
    batch = next(iter(TrainLoader([shard], DataConfig(batch_size=3, workers=0), 16, ByteTokenizer(), seed=0)))
    assert batch.faults == ["a.tar: a: MemoryError: MemoryError"]


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


def test_what_lies_between_the_members_of_a_sample_is_not_read(tmp_path, monkeypatch):
    """A large neighbour (features, a video) would cost many times the sample itself."""
    members = [m for i in range(8) for m in ((f"{i}.png", picture(i)), (f"{i}.npy", bytes(10**6)), (f"{i}.txt", TEXT))]
    shard = write_tar(tmp_path / "a.tar", members)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or pread(*args))
    (batch,) = batches([shard], 1)
    assert batch.faults == []
    fetched = 3  # batches: two more than were asked for
    assert sum(read) == fetched * sum(len(picture(i)) + len(TEXT) for i in range(8))
    read.clear()
    batches(write_shards(tmp_path, [8]), 1)
    assert len(read) == fetched * 8, "one read where nothing lies between"


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
