"""The whole retrieval run on a real open_clip model, and the command."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from helpers import run_ranks
from test_retrieval_sources import write_wds
from wds_folder import picture, tiny_model, write_tar, write_tiny_run

from focalclip.base.errors import UserError
from focalclip.cli.retrieval import main
from focalclip.evaluation.data import decode
from focalclip.evaluation.features.model import weights_sha256
from focalclip.evaluation.retrieval.pairs import open_pairs
from focalclip.evaluation.retrieval.result import retrieval_table
from focalclip.evaluation.retrieval.run import evaluate

CAPTIONS = [[f"thing {i}", f"a photo of number {i % 7}"] for i in range(23)]


def run(data, *, model=None, **options):
    return evaluate(model or tiny_model(), data, progress=False, **options)


def naive_recalls(model, data, k):
    """CLIP_benchmark's two numbers, one image and one caption at a time, from the full matrix in float64."""
    with torch.no_grad():
        images = [model.encode_image(model.preprocess(decode(entry.read()))[None])[0] for entry in data.entries]
        texts = [model.encode_text(model.tokenizer([caption]))[0] for caption in data.captions]
    images, texts = (torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1) for rows in (images, texts))
    scores = (images @ texts.T).numpy().round(6)  # equal captions are equal to the towers up to float32
    own = {(int(i), int(t)) for i, t in data.pairs}
    to_text = [any((i, t) in own for t in np.argsort(-row, kind="stable")[:k]) for i, row in enumerate(scores)]
    to_image = [any((i, t) in own for i in np.argsort(-row, kind="stable")[:k]) for t, row in enumerate(scores.T)]
    return np.mean(to_text), np.mean(to_image)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "chunk": 4}])
def test_recalls_equal_the_naive_way(tmp_path, options):
    data = open_pairs(write_wds(tmp_path / "t", CAPTIONS))
    result = run(data, **options)
    for k in (1, 5, 10):
        to_text, to_image = naive_recalls(tiny_model(), data, k)
        assert result.image_to_text.recall[k].value == pytest.approx(to_text)
        assert result.text_to_image.recall[k].value == pytest.approx(to_image)
    first = result.image_to_text.recall[1]
    assert first.interval == pytest.approx(references.wilson_interval(round(first.value * 23), 23))
    assert result.score == pytest.approx((first.value + result.text_to_image.recall[1].value) / 2)
    assert result.score_interval[0] < result.score < result.score_interval[1]


def test_trap_one_text_forward_each(tmp_path):
    """Captions go through the text tower in batches, and equal ones once."""
    model, encoded = tiny_model(), []
    hook = model.transformer.register_forward_hook(lambda _, inputs, __: encoded.append(inputs[0]))
    run(open_pairs(write_wds(tmp_path / "t", CAPTIONS)), batch_size=16)
    hook.remove()
    real = [len(tokens) for tokens in encoded if not tokens.is_meta]  # those without values only count the cost
    assert real == [2, 16, 14]  # two of the check before all; 23 different things and 7 numbers, of 46 captions


def test_trap_directions_are_called_by_what_is_retrieved_elsewhere(tmp_path):
    """Here by who asks: image_to_text has one query an image, text_to_image one a caption."""
    result = run(open_pairs(write_wds(tmp_path / "t", CAPTIONS)))
    assert (result.image_to_text.queries, result.image_to_text.candidates) == (23, 46)
    assert (result.text_to_image.queries, result.text_to_image.candidates) == (46, 23)


def test_damaged_images_go_with_their_captions(tmp_path):
    folder = write_wds(tmp_path / "t", CAPTIONS[:6], shard_size=6)
    members = [(f"{i}.png", picture(i) if i != 2 else b"rubbish") for i in range(6)]
    write_tar(
        folder / "test" / "0.tar",
        [member for i in range(6) for member in (members[i], (f"{i}.txt", "\n".join(CAPTIONS[i]).encode()))],
    )
    result = run(open_pairs(folder))
    assert result.broken == ("test/0.tar:2 (not an image)",)
    assert len(result.data.captions) == 10
    assert result.to_json()["tasks"]["t"]["n"] == 5
    assert "damaged images, left out: 1 of 6: test/0.tar:2" in retrieval_table(result)
    whole = run(open_pairs(write_wds(tmp_path / "u", CAPTIONS[:2] + CAPTIONS[3:6])))
    assert result.image_to_text == run(result.data).image_to_text
    assert result.image_to_text.recall[1].chance == whole.image_to_text.recall[1].chance


def test_repeated_captions_are_counted_and_bound_the_recall(tmp_path):
    data = open_pairs(write_wds(tmp_path / "t", [["a cat"], ["a cat"], ["a dog"], ["a cat"]]))
    result = run(data)
    assert result.text_to_image.recall[1].ceiling == 0.5
    assert result.text_to_image.recall[1].value <= 0.5
    assert "3 of 4 captions also belong to another image" in retrieval_table(result)
    merged = run(data.merged())
    assert merged.to_json()["protocol"] == "merged_captions"
    assert merged.text_to_image.queries == 2
    assert "1 with several images" in retrieval_table(merged)


def numbers_of_process(folder):
    result = run(open_pairs(folder), batch_size=5, chunk=6)
    return [torch.from_numpy(ranks) for ranks in result.ranks] + [torch.tensor(result.score)]


def test_two_processes_share_the_work_and_get_what_one_gets(tmp_path):
    folder = write_wds(tmp_path / "t", CAPTIONS)
    alone = numbers_of_process(folder)
    for shared in run_ranks(numbers_of_process, 2, folder):
        assert all(torch.equal(one, two) for one, two in zip(alone, shared, strict=True))


def test_features_come_from_the_cache_and_give_the_same_ranks(tmp_path):
    data = open_pairs(write_wds(tmp_path / "t", CAPTIONS))
    first = run(data, cache_dir=tmp_path / "cache")
    images = []
    hook = tiny_model().visual.register_forward_hook(lambda _, inputs, __: images.append(inputs[0]))
    again = run(data, cache_dir=tmp_path / "cache")
    hook.remove()
    # the check before all, and the probe that the cache asks the model by
    assert [len(batch) for batch in images if not batch.is_meta] == [2, 1]
    assert all((one == two).all() for one, two in zip(first.ranks, again.ranks, strict=True))
    assert again.data_sha256 == first.data_sha256


def test_features_that_diverged_are_refused(tmp_path):
    model = copy.deepcopy(tiny_model())
    torch.nn.init.constant_(model.text_projection, float("nan"))
    with pytest.raises(UserError, match="text features hold NaN"):
        run(open_pairs(write_wds(tmp_path / "t", CAPTIONS)), model=model)


def test_trap_no_interval_hash_or_version_in_the_result(tmp_path):
    data = open_pairs(write_wds(tmp_path / "t", CAPTIONS))
    result = run(data)
    content = json.loads(result.write(tmp_path / "out" / "r.json").read_text())
    assert {"benchmark", "protocol", "score", "n_tasks", "missing", "tasks", "versions"} <= content.keys()
    task = content["tasks"]["t"]
    assert {"metric", "value", "interval", "n", "chance", "captions", "task_sha256"} <= task.keys()
    recall = task["text_to_image"]["recall@5"]
    assert 0 <= recall["interval"][0] <= recall["value"] <= recall["interval"][1] <= 1
    assert recall["chance"] == pytest.approx(5 / 23)
    assert content["model"]["sha256"] == weights_sha256(tiny_model())
    assert content["seconds_of"]["ranking"] > 0
    assert content["model"]["peak_memory"] > 100 * 2**20
    assert run(data).data_sha256 == task["task_sha256"]
    assert run(data, chunk=5).score == content["score"]
    fewer = open_pairs(tmp_path / "t", captions_per_image=1)
    assert run(fewer).data_sha256 != task["task_sha256"]


def test_ranks_are_kept_for_every_query(tmp_path):
    result = run(open_pairs(write_wds(tmp_path / "t", CAPTIONS)))
    with np.load(result.write_ranks(tmp_path / "ranks.npz")) as file:
        assert file["images"][22] == "test/7.tar:s0000022"
        assert file["captions"][:2].tolist() == ["thing 0", "a photo of number 0"]
        assert (file["image_to_text"] <= 5).mean() == result.image_to_text.recall[5].value
        assert (file["text_to_image"] <= 1).mean() == result.text_to_image.recall[1].value
        assert file["pairs"].shape == (46, 2)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run in runs/tiny and a set in pets/."""
    root = tmp_path_factory.mktemp("cli")
    write_wds(root / "pets", CAPTIONS)
    write_tiny_run(root)
    return root


def test_command_measures_the_newest_run_and_writes_all_files(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert (
        main(["--data", "pets", "--output", "out.json", "--ranks", "ranks.npz", "--device", "cpu", "--no-cache"]) == 0
    )
    printed = capsys.readouterr().out
    assert "23 images, 46 captions (2 per image)" in printed
    assert printed.count("recall@10") == 2
    assert json.loads(Path("out.json").read_text()) == json.loads(
        Path("runs/tiny/eval/retrieval-pets.json").read_text()
    )
    assert Path("ranks.npz").is_file()
    assert main(["--data", "pets", "--limit", "5", "--merge-captions", "--device", "cpu", "--no-cache"]) == 0
    part = json.loads(Path("runs/tiny/eval/retrieval-pets-first5-merged.json").read_text())
    assert part["tasks"]["pets-first5-merged"]["n"] == 5
    assert json.loads(Path("runs/tiny/eval/retrieval-pets.json").read_text())["tasks"]["pets"]["n"] == 23


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "cats"], "error: --data cats: no such file or folder"),
        (["--data", "pets", "--split", "train"], "error: pets/train/nshards.txt: missing, or not a number of shards"),
        (["--data", "pets", "--model", "runs/none"], "error: runs/none: no such folder"),
        (["--data", "pets", "--output", "pets"], "error: --output pets: is a folder"),
        (["--data", "pets", "--ranks", "pets"], "error: --ranks pets: is a folder"),
        (["--data", "pets", "--device", "gpu"], "error: --device gpu: cannot be used"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(workplace, monkeypatch, capsys, words, message):
    monkeypatch.chdir(workplace)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_script_in_a_process_of_its_own(workplace):
    script = Path(__file__).parents[3] / "eval" / "retrieval.py"
    command = [
        sys.executable,
        str(script),
        "--data",
        "pets",
        "--model",
        "runs/tiny/model",
        "--device",
        "cpu",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean of both recall@1" in done.stdout
    assert "Traceback" not in done.stderr
