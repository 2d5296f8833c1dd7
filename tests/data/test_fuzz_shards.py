"""Shards that were damaged at random: whatever they hold, the outcome is samples or one sentence."""

import io
import itertools
import tarfile

import numpy as np
import pytest
from tiny_shards import ByteTokenizer, good_sample, picture

from focalclip.base.errors import UserError
from focalclip.config import DataConfig
from focalclip.data.index import read_captions, read_pairs
from focalclip.data.loader import TrainLoader

pytestmark = pytest.mark.faults

BLOCK = 512
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FIELDS = [
    (0, 100),
    (100, 108),
    *[(124, 136)] * 4,
    (136, 148),
    (148, 156),
    (156, 157),
    (157, 257),
    (257, 265),
    (345, 500),
]


def whole_shard(number: int) -> bytes:
    """A small sound tar in one of the formats, with long names, pax headers and all kinds of members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[number % 3]) as tar:
        for i in range(6):
            members = good_sample(i, format=("PNG", "JPEG", "WEBP")[i % 3])
            members[0] = (f"{i:06d}.{('png', 'jpg', 'webp')[i % 3]}", members[0][1])
            if number % 3:
                folder = "é" * 70 if i == 2 else "a"
                members = [(f"{folder}/{name}", data) for name, data in members]
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.5 if number % 3 == 2 else 1
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One or two mutations: flipped bits, cut, blanked, doubled and exchanged blocks, edited headers."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 3)):
        blocks = max(1, len(data) // BLOCK)
        at, other = (int(block) * BLOCK for block in rng.integers(blocks, size=2))
        match rng.integers(11):
            case 0 | 8 | 9:
                for place in rng.integers(max(1, len(data)), size=rng.integers(1, 5)):
                    data[place : place + 1] = bytes([data[place] ^ 1 << int(rng.integers(8))]) if data else b""
            case 1:
                del data[int(rng.integers(len(data) + 1)) :]
            case 2:
                data[at : at + BLOCK] = bytes(len(data[at : at + BLOCK]))
            case 3:
                data[at:at] = data[other : other + BLOCK * int(rng.integers(1, 5))]
            case 4:
                del data[at : at + BLOCK]
            case 5:
                data[at : at + BLOCK], data[other : other + BLOCK] = data[other : other + BLOCK], data[at : at + BLOCK]
            case 6:
                data[at : at + BLOCK] = rng.bytes(BLOCK)
            case 7 | 10:
                edit_header(data, rng)
    return bytes(data)


def edit_header(data: bytearray, rng: np.random.Generator) -> None:
    """Overwrite a part of one header's field and put its checksum right, so that it is believed."""
    headers = [at for at in range(0, len(data) - BLOCK + 1, BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return
    at = int(rng.choice(headers))
    header = data[at : at + BLOCK]
    start, stop = FIELDS[rng.integers(len(FIELDS))]
    values = [
        rng.bytes(stop - start),
        b"7" * (stop - start),
        b"\xff" * (stop - start),
        b"\x80" + rng.bytes(stop - start),
    ]
    values += [b"-1\0", b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"\0" * (stop - start), b"__a__/b.png\0"]
    value = values[rng.integers(len(values))][: stop - start]
    header[start : start + len(value)] = value
    if start != 148:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + BLOCK] = header


def outcomes(folder, numbers) -> tuple[int, list[str]]:
    """How many shards gave samples, and what was said of the others."""
    samples, sentences = 0, []
    for number in numbers:
        path = folder / f"{number:05d}.tar"
        path.write_bytes(damaged(whole_shard(number), np.random.default_rng(number)))
        try:
            data = DataConfig(batch_size=2, workers=0, max_faults=10**6)
            for batch in itertools.islice(TrainLoader([path], data, 16, ByteTokenizer(), number), 6):
                assert batch.images.shape == (2, 3, 16, 16)
                assert not any("\n" in fault for fault in batch.faults)
            read_pairs(folder, [path], read_captions)
            samples += 1
        except UserError as error:
            sentences.append(str(error))
        finally:
            path.unlink()
    assert not [sentence for sentence in sentences if "\n" in sentence or "Traceback" in sentence]
    return samples, sentences


@pytest.mark.timeout(100)
def test_damaged_shards_give_samples_or_one_sentence(tmp_path, capfd):
    samples, sentences = outcomes(tmp_path, range(40))
    assert min(samples, len(sentences)) >= 5
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(600)
def test_500_damaged_shards_give_samples_or_one_sentence(tmp_path, capfd):
    samples, sentences = outcomes(tmp_path, range(1000, 1500))
    assert min(samples, len(sentences)) >= 100
    assert "Traceback" not in capfd.readouterr().err


def test_the_shards_are_sound_before(tmp_path):
    for number in range(3):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(whole_shard(number))
        pairs = read_pairs(tmp_path, [path], read_captions)
        assert len(pairs.entries) == 6
        assert not pairs.faults
        assert pairs.entries[0].read() == picture(0)
        assert pairs.captions[5] == ("caption 5", "keyword 5")
