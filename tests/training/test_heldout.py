"""Held-out pairs: never trained on, measured by all ranks as the retrieval command does, with no trace in training."""

import json
import re
import shutil

import helpers_run
import numpy as np
import pytest
import torch
from helpers import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_shards import ByteTokenizer, good_sample, picture, write_shards, write_tar

import focalclip
from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict, load_yaml
from focalclip.cli import settings
from focalclip.cli.report import main as report
from focalclip.config import RunConfig
from focalclip.data.loader import TrainLoader
from focalclip.data.order import HeldOut, SampleOrder
from focalclip.evaluation.retrieval.pairs import open_pairs
from focalclip.evaluation.retrieval.run import evaluate
from focalclip.losses import contrastive_loss
from focalclip.training.heldout import HeldOutMeasure, open_held_out, val_shards

WORDS = ["--data.val-every", "3", "--train.save-every", "4"]


def train(folder, shards, *words, ranks=0):
    done = helpers_run.run(folder, shards, *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny", done


def lines(run_dir, name):
    return [line for line in helpers_run.metrics(run_dir) if name in line]


def rounded(values, digits=5):
    """Nested numbers, rounded."""
    if isinstance(values, dict):
        return {name: rounded(value, digits) for name, value in values.items()}
    return round(values, digits)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    """A source of 21 pairs, two of which are broken: one has no caption, the other no picture that can be decoded."""
    folder = tmp_path_factory.mktemp("val")
    write_shards(folder, [9, 10])
    bad = [("a.png", picture(1)), ("b.png", b"rubbish"), ("b.txt", b"a caption")]
    write_tar(folder / "00002.tar", [*bad, *good_sample(77)])
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory, shards, val):
    return train(tmp_path_factory.mktemp("measured"), shards, "--data.val", str(val), *WORDS)


def test_training_is_bit_for_bit_the_same_with_a_source_of_held_out_pairs(measured, tmp_path, shards):
    run_dir, _ = measured
    plain, _ = train(tmp_path, shards)
    assert [line["loss"] for line in lines(run_dir, "loss")] == helpers_run.losses(plain)
    ours, theirs = (focalclip.load(folder).state_dict() for folder in (run_dir, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_numbers_are_those_of_the_retrieval_command_on_the_exported_model(measured, val):
    run_dir, done = measured
    found = lines(run_dir, "heldout")
    assert [line["step"] for line in found] == [3, 6, 8]  # the last step is measured, too
    model = focalclip.load(run_dir)
    result = evaluate(model, open_pairs(val), progress=False)
    last = found[-1]["heldout"]
    for name, way in (("image_to_text", result.image_to_text), ("text_to_image", result.text_to_image)):
        assert {k: last[name][f"recall@{k}"] for k in (1, 5, 10)} == {k: way.recall[k].value for k in (1, 5, 10)}
        assert last[name]["chance@1"] == pytest.approx(way.recall[1].chance)
    assert (last["n"], last["captions"], last["left_out"], last["loss_batch"]) == (20, 40, 2, 16)
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("heldout/loss")] == [3, 6, 8]
    assert board.Scalars("heldout/image_to_text/recall@5")[-1].value == pytest.approx(last["image_to_text"]["recall@5"])
    assert f"step 8: held-out loss {last['loss']:.3f}, recall@1/5/10 of 20, image to text " in done.stderr
    assert "held out   22 pairs, " in done.stdout
    assert "1 left out: 00002.tar: a (no caption)" in done.stdout
    assert done.stderr.count("held-out pairs without 00002.tar: b (") == 1  # of three measurements


def test_two_ranks_measure_what_one_measures(measured, val, tmp_path, shards):
    """The same weights by one and by two processes: 20 readable pairs over two ranks, also of broken ones."""
    run_dir, _ = measured
    two = run_ranks(_measure, 2, str(run_dir), str(val), str(shards), 16)
    assert rounded(two[0]) == rounded(two[1]) == rounded(_measure(str(run_dir), str(val), str(shards), 16))
    uneven = run_ranks(_measure, 2, str(run_dir), str(val), str(shards), 64)  # one batch of fewer pairs than 64
    assert rounded(uneven[0]) == rounded(_measure(str(run_dir), str(val), str(shards), 64))


def test_fewer_pairs_than_a_batch_that_ranks_cannot_share_evenly(measured, tmp_path, shards):
    source = tmp_path / "odd"
    write_shards(source, [4, 3])
    run_dir, _ = measured
    three = run_ranks(_measure, 2, str(run_dir), str(source), str(shards), 16)
    one = _measure(str(run_dir), str(source), str(shards), 16)
    assert rounded(three[0]) == rounded(one)
    assert (one["n"], one["loss_batch"]) == (7, 7)
    model, pairs = focalclip.load(run_dir), open_pairs(source, captions_per_image=1)
    images = torch.stack([model.preprocess(_image(entry)) for entry in pairs.entries])
    with torch.no_grad():
        outputs = model(images, model.tokenizer(list(pairs.captions)))
    labels = torch.arange(7)
    assert one["loss"] == pytest.approx(contrastive_loss(**outputs, labels=labels).item(), rel=1e-5)


def _image(entry):
    from focalclip.evaluation.data import decode

    return decode(entry.read())


def _config(run_dir, val, shards, batch):
    config = load_yaml(RunConfig, f"{run_dir}/config.yaml")
    data = config.data.model_copy(update={"val": val, "train": shards, "batch_size": batch})
    return config.model_copy(update={"data": data})


def _loader(config, shards):
    return TrainLoader(shards, config.data, 32, ByteTokenizer(), config.seed)


def _measure(run_dir, val, shards, batch):
    from focalclip.data.prepared import training_shards

    config, model = _config(run_dir, val, shards, batch), focalclip.load(run_dir)
    train = training_shards(config.data.train)
    pairs = open_held_out(config.data, val_shards(config.data, train), _loader(config, train))
    return HeldOutMeasure(config, pairs)(model)[0]


@pytest.mark.parametrize(
    "words", [["--train.zero-stage", "3", "--train.accumulation", "2"], ["--train.precision", "bf16"]]
)
def test_every_engine_can_measure(tmp_path, shards, val, words):
    ranks = 2 if "3" in words else 0
    run_dir, _ = train(tmp_path, shards, "--data.val", str(val), *WORDS, *words, "--train.steps", "4", ranks=ranks)
    found = lines(run_dir, "heldout")
    assert [line["step"] for line in found] == [3, 4]
    assert found[1]["heldout"]["loss_batch"] == (8 if ranks else 16)
    assert rounded(found[1]["heldout"], 3) == rounded(_measure(run_dir, str(val), str(shards), 16), 3)


def test_a_resumed_run_measures_each_step_once_and_what_a_kill_kept_from_it(tmp_path, shards, val):
    words = ["--data.val", str(val), "--data.val-every", "4"]
    run_dir, _ = train(tmp_path, shards, *words)
    first = lines(run_dir, "heldout")
    shutil.rmtree(run_dir / "checkpoints" / "step-8")
    train(tmp_path, shards, *words, "--resume")
    again = lines(run_dir, "heldout")
    assert [line["step"] for line in again] == [4, 8]
    assert [line["heldout"] for line in again] == [line["heldout"] for line in first]
    metrics = run_dir / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"heldout"' not in line]
    metrics.write_text("\n".join(kept) + "\n")
    train(tmp_path, shards, *words, "--resume")  # as if it had been killed before the measurement after the last step
    assert [line["heldout"] for line in lines(run_dir, "heldout")] == [first[-1]["heldout"]]


def test_a_fraction_divides_the_pairs_in_two(tmp_path):
    shards = write_shards(tmp_path, [40, 60, 3])
    data = from_dict(RunConfig, {"data": {"train": str(tmp_path), "val": 0.2, "batch_size": 8, "workers": 0}}, "x").data
    seen = []
    for seed in (0, 7):
        loader = TrainLoader(shards, data, 8, ByteTokenizer(), seed)
        order = SampleOrder(loader.counts, seed, 2, held_out=HeldOut([shard.name for shard in shards], 0.2))
        assert loader.num_samples == order.num_samples
        first = [order.locate(p) for p in range(order.num_samples)]
        second = [order.locate(order.num_samples + p) for p in range(order.num_samples)]
        assert sorted(first) == sorted(second)
        assert len(set(first)) == order.num_samples
        seen.append(set(first))
        pairs = open_held_out(data, [], loader)
        held = {entry.key for entry in pairs.data.entries}
        trained = {f"{[0, 40, 100][shard] + number:06d}" for shard, number in first}
        assert held.isdisjoint(trained)
        assert held | trained == {f"{i:06d}" for i in range(103)}
        assert 10 < len(held) < 35
    assert seen[0] == seen[1]


def test_batches_hold_no_held_out_pair(tmp_path):
    shards = write_shards(tmp_path, [20, 20])
    data = from_dict(RunConfig, {"data": {"val": 0.3, "batch_size": 4, "workers": 0}}, "x").data
    loader = TrainLoader(shards, data, 8, ByteTokenizer(), 0)
    held = {int(entry.key) for entry in open_held_out(data, [], loader).data.entries}
    batches = iter(loader)
    labels = [label for _ in range(20) for label in next(batches).labels.tolist()]  # the class is the sample's number
    batches.close()
    assert set(labels) == set(range(40)) - held


def test_a_fraction_of_each_of_several_weighted_sources_is_held_out_with_its_own_captions(tmp_path):
    from focalclip.data.prepared import training_shards

    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, first in zip(folders, (0, 500), strict=True):
        folder.mkdir()
        write_tar(folder / f"{first}.tar", [member for i in range(40) for member in good_sample(first + i)])
    sources = [
        {"source": str(folders[0]), "weight": 1, "caption_keys": ["txt"]},
        {"source": str(folders[1]), "weight": 3},
    ]
    values = {"train": sources, "label_space": "number", "val": 0.3, "batch_size": 8, "workers": 0}
    data = from_dict(RunConfig, {"data": values}, "x").data
    shards = training_shards(data.train)
    loader = TrainLoader(shards, data, 8, ByteTokenizer(), 0)
    pairs = open_held_out(data, [], loader)
    held = {int(entry.key) for entry in pairs.data.entries}
    batches = iter(loader)
    seen = {label for _ in range(40) for label in next(batches).labels.tolist()}
    batches.close()
    assert seen == {*range(40), *range(500, 540)} - held
    assert all(2 < len([key for key in held if first <= key < first + 40]) < 22 for first in (0, 500))
    assert len(held) + loader.num_samples == 80
    captions = [sum(1 for image, _ in pairs.data.pairs if image == i) for i in range(len(held))]
    assert captions == [1 if int(entry.key) < 500 else 2 for entry in pairs.data.entries]


def test_the_choice_depends_on_name_and_number_alone():
    a = HeldOut(["00000.tar", "00001.tar"], 0.1)
    more = HeldOut(["new.tar", "00001.tar", "00000.tar"], 0.1)
    assert np.array_equal(a.mask(0, 1000), more.mask(2, 1000))
    assert np.array_equal(a.mask(0, 1000)[:500], a.mask(0, 500))  # longer shards keep what they held out
    assert not np.array_equal(a.mask(0, 1000), a.mask(1, 1000))
    assert 70 < a.mask(0, 1000).sum() < 130
    assert not (a.mask(0, 1000) & ~HeldOut(a.names, 0.2).mask(0, 1000)).any()  # a larger fraction holds out more
    assert np.flatnonzero(HeldOut(["00000.tar"], 0.01).mask(0, 300)).tolist() == [85, 228, 269]  # for ever


def test_val_max_measures_the_same_pairs_whatever_their_number(tmp_path, measured):
    shards = write_shards(tmp_path / "train", [30])
    source = tmp_path / "val"
    write_shards(source, [30, 10])
    data = from_dict(RunConfig, {"data": {"val": str(source), "val_max": 7, "batch_size": 4}}, "x").data
    loader = TrainLoader(shards, data, 8, ByteTokenizer(), 0)
    pairs = open_held_out(data, val_shards(data, shards), loader)
    assert (len(pairs.data.entries), pairs.held_out) == (7, 40)
    assert pairs.introduction(data) == f"40 pairs, {source}; 7 (data.val_max) measured every 500 steps"
    keys = [entry.key for entry in pairs.data.entries]
    assert keys == sorted(keys)
    again = open_held_out(data.model_copy(update={"val_max": 8}), val_shards(data, shards), loader)
    assert set(keys) < {entry.key for entry in again.data.entries}


def test_a_run_with_a_fraction_is_resumed_with_that_fraction_only(tmp_path, shards):
    words = [*WORDS, "--data.val", "0.2"]
    run_dir, done = train(tmp_path, shards, *words, "--train.steps", "4")
    found = re.search(r"data {7}(\d+) pairs;.*\nheld out   (\d+) pairs, 0.2 of data.train by hash, never", done.stdout)
    assert int(found[1]) + int(found[2]) == 128
    assert lines(run_dir, "heldout")[-1]["heldout"]["n"] == int(found[2])
    done = helpers_run.run(tmp_path, shards, *WORDS, "--data.val", "0.3", "--resume")
    assert done.returncode == 2
    assert "another data.val (0.2 " in done.stderr


@pytest.mark.parametrize("value", ["1", "0", "-0.5", "1.5"])
def test_a_fraction_is_between_0_and_1(value):
    with pytest.raises(UserError, match=r"data.val.*a fraction of the training pairs between 0 and 1, such as 0.01"):
        settings.with_overrides(RunConfig(), ["--data.val", value])


def test_a_fraction_may_come_from_the_command_line():
    assert settings.with_overrides(RunConfig(), ["--data.val", "0.01"]).data.val == 0.01
    assert settings.with_overrides(RunConfig(), ["--data.val", "null"]).data.val is None
    assert settings.with_overrides(RunConfig(), ["--data.val", "a.tar", "b.tar"]).data.val == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val": 0.0001}, r"data.val: 0.0001 holds out 0 of 128 pairs, of which 0 can be measured; two or more are"),
        ({"val": 0.9999}, r"data.batch_size=16 is larger than the 0 samples of data.train without data.val=0.9999"),
        ({"val": "SHARDS"}, r"data.val: 2 of its 2 shards are in data.train, too \(.*00000.tar\); name other data, or"),
        ({"val": "ONE"}, r"data.val: .*one has 1 pairs, of which 1 can be measured; two or more are needed: name more"),
        ({"val": "nowhere.tar"}, r"data.val: 1 of 1 shards do not exist \(nowhere.tar\)"),
        ({"val": "nowhere.csv"}, r"data.val"),
    ],
)
def test_what_cannot_be_held_out_is_refused(tmp_path, shards, values, message):
    from focalclip.data.prepared import training_shards

    write_shards(tmp_path / "one", [1])
    known = {"SHARDS": str(shards), "ONE": str(tmp_path / "one")}
    values = {"batch_size": 16, "train": str(shards)} | {
        name: known.get(value, value) for name, value in values.items()
    }
    data = from_dict(RunConfig, {"data": values}, "x").data
    train = training_shards(data.train)

    def open_both():
        return open_held_out(data, val_shards(data, train), TrainLoader(train, data, 8, ByteTokenizer(), 0))

    with pytest.raises(UserError, match=message):
        open_both()


def test_curves_of_a_run_are_drawn_at_its_end_and_by_report(measured, capsys):
    run_dir, _ = measured
    curves = run_dir / "curves.svg"
    drawn = curves.read_text()
    for label in ("training", "held-out", "(batches of 16)", "recall@10 text to image", "(20 pairs: 5%)"):
        assert f"<!-- {label} -->" in drawn
    curves.unlink()
    assert report([str(run_dir)]) == 0  # a run without a result: its curves alone
    assert capsys.readouterr().out == f"written to {curves}\n"
    assert curves.read_text() == drawn


def test_curves_take_what_a_killed_run_has_left(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert report([str(tmp_path)]) == 0
    assert "held-out" not in (tmp_path / "curves.svg").read_text()
    (tmp_path / "metrics.jsonl").write_text("")
    assert report([str(tmp_path)]) == 2
    assert "no step of training is logged yet, so there are no curves to draw" in capsys.readouterr().err


def test_a_record_of_a_measurement_is_json(measured):
    run_dir, _ = measured
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]["n"] == 20
