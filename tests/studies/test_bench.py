"""What the comparisons with peers are made of: folders and models from seeds, rows of times, and clear refusals."""

import json
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest

from focalclip.base.errors import UserError
from focalclip.cli.bench import main
from focalclip.evaluation.data import decode, read_task_folder
from focalclip.studies.bench import BenchResult, BenchRow
from focalclip.studies.bench.clip_benchmark_clock import clocked
from focalclip.studies.bench.parity import MODEL
from focalclip.studies.bench.peers import run_clip_benchmark
from focalclip.studies.bench.synthetic import SyntheticPairs, SyntheticTask, write_model

LABELS = np.array([0, 1, 1, 0, 1, 0, 0])
MULTILABEL = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=bool)


@pytest.mark.parametrize("labels", [LABELS, MULTILABEL])
def test_a_task_folder_holds_what_its_seed_says(tmp_path, labels):
    task = SyntheticTask(("cat", "dog", "owl"), ("a {c}", "{c}"), labels, 3, ((20, 30), (12, 12)), ("png", "webp"), 2)
    assert task.write(tmp_path / "a") == task.write(tmp_path / "b")
    data = read_task_folder(tmp_path / "a")
    assert (data.class_names, data.templates) == (task.names, task.templates)
    np.testing.assert_array_equal(data.labels, labels)
    for entry, pixels in zip(data.entries, task.pictures(), strict=True):
        np.testing.assert_array_equal(np.asarray(decode(entry.read())), pixels)


def test_the_digest_follows_labels_names_and_pixels(tmp_path):
    def digest(names=("cat", "dog"), labels=LABELS, seed=0):
        return SyntheticTask(names, ("{c}",), labels, seed).write(tmp_path / "t")

    assert len({digest(), digest(names=("cat", "cow")), digest(labels=1 - LABELS), digest(seed=1)}) == 4


def test_pictures_of_one_class_are_alike(tmp_path):
    pictures = list(SyntheticTask(("cat", "dog"), ("{c}",), LABELS, 0, ((16, 16),)).pictures())
    apart = np.array([[np.abs(a.astype(int) - b).mean() for a in pictures] for b in pictures])
    same = LABELS[:, None] == LABELS[None]
    assert apart[same].max() < apart[~same].min()


def test_nshards_says_how_many_there_are(tmp_path):
    SyntheticTask(("cat", "dog"), ("{c}",), np.zeros(9, np.int64), 0, shards=4).write(tmp_path)
    assert (
        (tmp_path / "test" / "nshards.txt").read_text() == f"{len(list((tmp_path / 'test').glob('*.tar')))}\n" == "3\n"
    )


def test_a_retrieval_folder_has_one_caption_a_line(tmp_path):
    SyntheticPairs((("a cat", "one cat"), ("a dog",)), seed=0).write(tmp_path)
    with tarfile.open(tmp_path / "test" / "0.tar") as tar:
        assert tar.extractfile("s0000000.txt").read() == b"a cat\none cat"
    assert (tmp_path / "dataset_type.txt").read_text() == "retrieval\n"


def test_a_random_model_is_its_seed_s_and_open_clip_reads_it(tmp_path):
    first, second = write_model(tmp_path / "a", MODEL, seed=1), write_model(tmp_path / "b", MODEL, seed=1)
    assert first == second != write_model(tmp_path / "c", MODEL, seed=2)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'a'}")
    assert all(
        parameter.std() > 0.1 for parameter in model.parameters() if parameter.numel() > 1 and parameter.ndim == 1
    )


def test_a_row_gives_medians_and_the_spread_of_the_rounds_own_ratios(tmp_path):
    row = BenchRow("text side", ours=[1.0, 2.0, 4.0], peer=[8.0, 10.0, 12.0])
    values = row.to_json()
    assert (values["ours"], values["peer"]) == (2.0, 10.0)
    assert (values["ratio"], values["ratio_min"], values["ratio_max"]) == (5.0, 3.0, 8.0)
    content = json.loads(BenchResult("eval", (row,), {"model": "m"}).write(tmp_path / "x" / "r.json").read_text())
    assert content["what"] == "eval"
    assert {"case", "ours", "peer", "ratio", "ratio_min", "ratio_max", "unit"} <= content["rows"][0].keys()
    assert content["machine"]["cores"] >= 1


def test_the_clock_adds_up_calls_and_passes_on_what_they_return():
    spent = {"f": 0.0}
    function = clocked(lambda x: time.sleep(0.01) or x + 1, "f", spent)
    assert [function(1), function(2)] == [2, 3]
    assert spent["f"] >= 0.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--tasks", "imagenet"], "--tasks: no task 'imagenet'; known: caltech-101"),
        (["eval", "--model", "ViT-B-33"], "--model ViT-B-33: open_clip has no such architecture"),
    ],
)
def test_a_mistake_is_told_before_anything_is_installed(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_fails_is_told_by_its_last_line(tmp_path):
    with pytest.raises(UserError, match="clip_benchmark failed with status 1: "):
        run_clip_benchmark(Path(sys.executable), tmp_path, tmp_path, ["t"])  # there is no model
