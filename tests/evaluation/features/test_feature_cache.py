"""Features come from the cache only where they are those that the model would make of these very images."""

import copy
import os

import numpy as np
import pytest
import torch
from helpers import run_ranks
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.evaluation.data import read_task_folder
from focalclip.evaluation.features import cache as feature_cache
from focalclip.evaluation.features import images as features
from focalclip.evaluation.features.cache import FeatureCache, open_cache
from focalclip.evaluation.features.model import evaluating
from focalclip.evaluation.features.texts import class_matrix


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model())


@pytest.fixture
def data(tmp_path):
    return read_task_folder(write_folder(tmp_path / "t", [0, 1, 2, 0, 1, 2, 0]))


def images(model, data, cache, **options):
    """Features of a split's images; ``cache`` is a folder, an open cache or None."""
    opened = cache if isinstance(cache, FeatureCache) else open_cache(model, cache)
    with evaluating(model):
        return features.encode_images(
            model, data.entries, cache=opened, progress=False, **({"batch_size": 3} | options)
        )


def encodes_where_one_rank_fails_first(folder):
    model, data = copy.deepcopy(tiny_model()), read_task_folder(folder)
    if torch.distributed.get_rank() == 1:
        model.preprocess = {}.pop  # raises KeyError for any picture
    try:
        images(model, data, None)
    except UserError as error:
        return str(error)


def test_a_rank_that_fails_before_the_first_image_ends_all(tmp_path):
    folder = write_folder(tmp_path / "t", [0, 1, 2, 0, 1, 2, 0])
    for message in run_ranks(encodes_where_one_rank_fails_first, 2, folder, timeout=20):
        assert message.startswith("rank 1: KeyError: ")


def same(one, two):
    return (
        torch.equal(one.embeds, two.embeds)
        and np.array_equal(one.readable, two.readable)
        and (one.broken, one.sha256) == (two.broken, two.sha256)
    )


def test_features_from_the_cache_are_those_computed_bit_for_bit(model, data, tmp_path):
    plain, first, second = (
        images(model, data, None),
        images(model, data, tmp_path / "c"),
        images(model, data, tmp_path / "c"),
    )
    assert same(plain, first)
    assert same(plain, second)
    assert (plain.num_cached, first.num_cached, second.num_cached) == (0, 0, 7)
    assert first.embeds.dtype == torch.float32


@pytest.mark.trap("5.2 cache", "keyed by names: stale features")
def test_trap_feature_cache_keyed_by_a_name_gives_stale_features(model, tmp_path):
    """CLIP_benchmark keys features by model name and data set name; here each change of content is seen."""
    folder, cache = write_folder(tmp_path / "t", [0, 1, 2, 0]), tmp_path / "c"
    images(model, read_task_folder(folder), cache)

    def cached():
        data = read_task_folder(folder)
        found = images(model, data, cache)
        assert same(found, images(model, data, None))
        return found.num_cached

    assert cached() == 4
    with torch.no_grad():
        model.visual.proj[0, 0] += 1e-3  # trained on under the same name
    assert cached() == 0
    assert cached() == 4
    usual, model.preprocess = model.preprocess, type(model.preprocess)(model.preprocess.transforms[:-1])  # no mean, std
    assert cached() == 0
    model.preprocess = usual
    assert cached() == 4
    write_folder(folder, [0, 1, 2, 0], images=[picture(i) for i in (0, 1, 9, 3)])  # another picture in its place
    assert cached() == 1  # the other batch's
    assert cached() == 4


def test_each_change_of_one_batch_leaves_the_others_cached(model, tmp_path):
    folder = write_folder(tmp_path / "t", [0] * 7)
    images(model, read_task_folder(folder), tmp_path / "c")
    write_folder(folder, [0] * 7, images=[picture(i) for i in (0, 1, 2, 3, 99, 5, 6)])
    data = read_task_folder(folder)
    found = images(model, data, tmp_path / "c")
    assert found.num_cached == 4  # batches of 3, 3 and 1; the second has another picture
    assert same(found, images(model, data, None))


@pytest.mark.trap("5.2 cache", "no val split in the cache leads to a missing file")
def test_trap_each_split_has_its_own_features(model, tmp_path):
    """In CLIP_benchmark features cached before a val split was asked for lead to a missing file."""
    folder, cache = write_folder(tmp_path / "t", [0, 1, 2, 0]), tmp_path / "c"
    splits = {"test": read_task_folder(folder)}
    images(model, splits["test"], cache)
    for number, split in enumerate(("val", "train"), start=1):
        other = write_folder(tmp_path / split, [0, 1], images=[picture(10 * number), picture(0)])
        (other / "test").rename(folder / split)
        splits[split] = read_task_folder(folder, split)
    for data in splits.values():
        assert same(images(model, data, cache), images(model, data, None))
        assert images(model, data, cache).num_cached == len(data.entries)


def test_resize_precision_and_batch_size_are_told_apart(model, data, tmp_path):
    images(model, data, tmp_path / "c")
    assert images(model, data, tmp_path / "c", resize="squash").num_cached == 0
    assert images(model, data, tmp_path / "c", batch_size=4).num_cached == 0
    assert images(model.bfloat16(), data, tmp_path / "c").num_cached == 0
    assert images(model, data, tmp_path / "c").num_cached == 7


class Plain:
    """A user's model that is no module, and whose code they change."""

    weights_sha256 = "a" * 64
    factor = 1.0

    def preprocess(self, picture):
        return torch.from_numpy(np.array(picture.resize((4, 4)))).permute(2, 0, 1) / 255

    def encode_image(self, images):
        return images.flatten(1) ** self.factor - 0.4


def test_changed_code_of_a_users_model_shows_in_its_probe(data, tmp_path, capsys):
    model = Plain()
    images(model, data, tmp_path / "c")
    assert images(model, data, tmp_path / "c").num_cached == 7
    model.factor = 2.0
    found = images(model, data, tmp_path / "c")
    assert "the model has these weights, but other features; those kept are dropped" in capsys.readouterr().err
    assert found.num_cached == 0
    assert same(found, images(model, data, None))
    model.weights_sha256 = None
    assert images(model, data, tmp_path / "c").num_cached == 0
    assert "Plain has no weights_sha256, so its features are not cached" in capsys.readouterr().err


def test_a_killed_run_goes_on_within_a_data_set(model, data, tmp_path, monkeypatch):
    encode, calls = model.encode_image, []

    def killed(batch):
        calls.append(len(batch))
        if len(calls) == 4:  # the probe, two batches, and then
            raise KeyboardInterrupt
        return encode(batch)

    monkeypatch.setattr(model, "encode_image", killed)
    with pytest.raises(KeyboardInterrupt):
        images(model, data, tmp_path / "c")
    monkeypatch.setattr(model, "encode_image", encode)
    found = images(model, data, tmp_path / "c")
    assert (calls, found.num_cached) == ([1, 3, 3, 1], 6)
    assert same(found, images(model, data, None))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "rubbish"])
def test_a_damaged_file_of_the_cache_is_computed_again_with_a_line(model, data, tmp_path, capsys, damage):
    images(model, data, tmp_path / "c")
    cache = open_cache(model, tmp_path / "c")
    path = max((p for p in cache.folder.glob("*.npz") if p.name != "probe.npz"), key=lambda p: p.stat().st_size)
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2 - 60] ^= 1
    path.write_bytes({"cut": whole[:100], "flipped": whole, "empty": b"", "rubbish": b"rubbish" * 9}[damage])
    capsys.readouterr()
    found = images(model, data, tmp_path / "c")
    told = capsys.readouterr().err
    assert f"{path}: damaged" in told
    assert told.count("\n") == 1
    assert 0 < found.num_cached < 7
    assert same(found, images(model, data, None))
    assert images(model, data, tmp_path / "c").num_cached == 7


def test_damaged_images_are_named_from_the_cache_too(model, tmp_path):
    pictures = [picture(0), b"rubbish", picture(2), picture(3)[:70]]
    data = read_task_folder(write_folder(tmp_path / "t", [0, 1, 2, 0], images=pictures))
    first, second = (images(model, data, tmp_path / "c", batch_size=2) for _ in range(2))
    assert same(first, second)
    assert second.num_cached == 4
    assert [name.split()[0] for name in second.broken] == ["test/0.tar:s0000001", "test/0.tar:s0000003"]


def test_images_are_not_read_again_while_their_files_stay_as_they_are(model, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "t", [0, 1, 2, 0, 1])
    entries = read_task_folder(folder).entries
    cache = open_cache(model, tmp_path / "c")
    cache.keep_digests(entries, [bytes(32)] * 5)
    assert cache.digests(entries) is None  # written a moment ago: within a clock's tick they could change unseen
    monkeypatch.setattr(feature_cache, "_FRESH_SECONDS", 0.0)
    first = images(model, read_task_folder(folder), tmp_path / "c")
    monkeypatch.setattr(type(entries[0]), "read", lambda self: pytest.fail("was read"))
    assert same(images(model, read_task_folder(folder), tmp_path / "c"), first)
    monkeypatch.undo()
    monkeypatch.setattr(feature_cache, "_FRESH_SECONDS", 0.0)
    write_folder(folder, [0, 1, 2, 0, 1], images=[picture(i) for i in (4, 3, 2, 1, 0)])  # of the same sizes, at once
    data = read_task_folder(folder)
    assert same(images(model, data, tmp_path / "c"), images(model, data, None))


def test_a_wrong_bit_in_the_hashes_of_images_is_noticed(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "_FRESH_SECONDS", 0.0)
    first = images(model, data, tmp_path / "c")
    (path,) = (tmp_path / "c" / "digests").iterdir()
    whole = path.read_bytes()
    for place in range(start(whole), start(whole) + 7 * 32, 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        again = images(model, data, tmp_path / "c")
        assert f"{path}: damaged" in capsys.readouterr().err
        assert same(again, first)
        assert again.num_cached == 7
        assert open_cache(model, tmp_path / "c").digests(data.entries) == [
            whole[i : i + 32] for i in range(start(whole), start(whole) + 7 * 32, 32)
        ]


def start(content: bytes) -> int:
    """Where the only array of an ``.npz`` file begins: behind the first line of its header."""
    return content.index(b"\n", content.index(b"NUMPY")) + 1


def test_class_vectors_are_cached_by_prompts(model, tmp_path):
    cache = open_cache(model, tmp_path / "c")
    with torch.no_grad():
        first = class_matrix(model, ["cat", "dog"], ["a {c}", "the {c}"], cache=cache)
        encode, model.encode_text = model.encode_text, None
        assert torch.equal(class_matrix(model, ["cat", "dog"], ["a {c}", "the {c}"], cache=cache), first)
        model.encode_text = encode
        assert not torch.equal(class_matrix(model, ["dog", "cat"], ["a {c}", "the {c}"], cache=cache), first)


def test_new_prompts_reuse_the_images(model, tmp_path):
    folder = write_folder(tmp_path / "t", [0, 1, 2, 0])
    options = {"cache_dir": tmp_path / "c", "progress": False}
    before = zero_shot(model, folder, **options).tasks["t"]
    other = {"red": ["a red thing"], "green": ["grass", "leaves"], "blue": ["the sea", "the sky", "a blue thing"]}
    result = zero_shot(model, folder, class_prompts=other, **options)
    task = result.tasks["t"]
    assert (task.cached_images, task.images_per_second, task.prompts, task.templates) == (4, None, 6, 0)
    assert result.protocol == "wds, class prompts"
    assert task.task_sha256 == before.task_sha256
    assert task.settings_sha256 != before.settings_sha256


def test_a_folder_that_cannot_be_written_costs_a_line_not_the_run(model, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = images(model, data, tmp_path / "file" / "c")
    assert same(found, images(model, data, None))
    assert "features are not kept" in capsys.readouterr().err
    cache = open_cache(model, tmp_path / "c")
    cache.folder.rename(tmp_path / "away")
    cache.folder.parent.joinpath(cache.folder.name).write_text("in its place")
    cache.put("x", a=np.zeros(1))
    cache.put("y", a=np.zeros(1))
    assert capsys.readouterr().err.count("features are not kept from here on") == 1


def test_the_models_used_longest_ago_are_dropped_first(model, data, tmp_path, monkeypatch):
    root = tmp_path / "c"
    for i, name in enumerate(("oldest", "older")):
        (root / name).mkdir(parents=True)
        (root / name / "x.npz").write_bytes(bytes(1000))
        os.utime(root / name, (1000 + i, 1000 + i))
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 4000)
    images(model, data, root)
    assert sorted(path.name for path in root.iterdir() if path.name in ("oldest", "older")) == ["older", "oldest"]
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 4500)
    found = images(model, data, root)
    assert found.num_cached == 7  # its own folder stays, however large
    assert not (root / "oldest").exists()


def test_trap_half_precision_in_the_cache_would_change_results(model, data, tmp_path):
    """float16 would move cosines by more than float32 rounds, so cached and computed results could differ."""
    found = images(model, data, tmp_path / "c")
    rounded = torch.from_numpy(found.embeds.numpy().astype(np.float16).astype(np.float32))
    assert (rounded - found.embeds).abs().max() > 1e-5
    assert same(images(model, data, tmp_path / "c"), found)


def test_opened_once_the_weights_are_not_hashed_again(model, data, tmp_path, monkeypatch):
    cache = open_cache(model, tmp_path / "c")
    assert isinstance(cache, FeatureCache)
    monkeypatch.setattr(feature_cache, "known_weights", lambda model: pytest.fail("hashed"))
    monkeypatch.setattr(feature_cache, "_FRESH_SECONDS", 0.0)
    assert images(model, data, cache).num_cached == 0
    assert images(model, data, cache).num_cached == 7  # in the run that made them, too
    assert features.images_sha256(data.entries, cache) == images(model, data, cache).sha256
