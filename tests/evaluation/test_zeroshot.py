"""The whole zero-shot run on a real open_clip model and real task folders, against naive code and scikit-learn."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from open_clip import build_zero_shot_classifier
from PIL import Image
from sklearn import metrics as sk
from wds_folder import picture, png, tiny_model, write_folder, write_tiny_run, zero_shot

from focalclip.base.errors import UserError
from focalclip.cli.settings import with_overrides
from focalclip.cli.zeroshot import main
from focalclip.config import RunConfig
from focalclip.evaluation import scoring
from focalclip.evaluation.data import decode, read_task_folder
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.model import to_precision, weights_sha256
from focalclip.evaluation.features.texts import class_matrix, encode_prompts
from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.task import Benchmark, Task
from focalclip.reports.tables import result_table

NAMES = ("cat", "dog", "ankle boot", "fire engine", "owl", "bus", "tree")
TEMPLATES = ("a photo of a {c}.", "art of the {c}, {c}.")
KITTI = (
    "a photo i took of a car on my left or right side.", "a photo i took with a car nearby.",
    "a photo i took with a car in the distance.", "a photo i took with no car.",
)  # fmt: skip
FLOAT32_NOISE = 2e-6


def run(folder, *, model=None, **options):
    return zero_shot(model or tiny_model(), folder, **options)


def naive_cosines(model, folder):
    """One image and one prompt at a time, in float64 after the towers."""
    data = read_task_folder(folder)
    with torch.no_grad():
        rows = []
        for name in data.class_names:
            embeds = []
            for template in data.templates:
                text = model.encode_text(model.tokenizer([template.replace("{c}", name)]))[0].double().numpy()
                embeds.append(text / np.linalg.norm(text))
            mean = np.mean(embeds, axis=0)
            rows.append(mean / np.linalg.norm(mean))
        images = []
        for entry in data.entries:
            image = model.encode_image(model.preprocess(decode(entry.read()))[None])[0].double().numpy()
            images.append(image / np.linalg.norm(image))
    return np.array(images) @ np.array(rows).T, data.labels


def test_class_matrix_equals_open_clips_and_encodes_equal_prompts_once():
    model = tiny_model()
    names, templates = ["cat", "dog", "cat"], ["a {c}", "no name but {c}", "a {c}"]
    theirs = build_zero_shot_classifier(
        model, model.tokenizer, names, [lambda c, t=t: t.replace("{c}", c) for t in templates]
    )
    encoded = []
    with torch.no_grad():
        hook = model.transformer.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
        ours = class_matrix(model, names, templates, batch_size=3)
        hook.remove()
    assert encoded == [3, 1]  # 4 different prompts of 9
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.T, atol=FLOAT32_NOISE, rtol=0)
    torch.testing.assert_close(ours[0], ours[2], atol=0, rtol=0)


def test_accuracy_top5_and_mean_per_class_equal_the_naive_way(tmp_path):
    labels = [0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 1, 1, 2, 5, 6, 6, 6, 3]
    folder = write_folder(tmp_path / "t", labels, names=NAMES, templates=TEMPLATES)
    cosines, _ = naive_cosines(tiny_model(), folder)
    result = run(folder, batch_size=5).tasks["t"]
    assert result.value == pytest.approx(sk.accuracy_score(labels, cosines.argmax(1)), abs=1e-12)
    assert result.extras["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, cosines, k=5), abs=1e-12)
    assert result.interval == pytest.approx(references.wilson_interval(round(result.value * 18), 18))
    assert (result.n, result.classes, result.templates, result.chance) == (18, 7, 2, pytest.approx(1 / 7))

    task = Task(id="t", metric="mean_per_class")
    balanced = run(Benchmark("b", "wds", (task,), tmp_path)).tasks["t"]
    assert balanced.value == pytest.approx(sk.balanced_accuracy_score(labels, cosines.argmax(1)), abs=1e-12)
    assert balanced.interval[0] <= balanced.value <= balanced.interval[1]


def test_class_prompts_take_the_place_of_templates():
    """As CuPL's: each class has its own, of any number."""
    model = tiny_model()
    prompts = {"dog": ["It barks."], "cat": ["A cat is small.", "A cat has whiskers.", "It barks."], "cow": ["Moo."]}
    with torch.no_grad():
        classes = class_matrix(model, ["cat", "dog"], ["not used {c}"], class_prompts=prompts)
        cat = torch.nn.functional.normalize(model.encode_text(model.tokenizer(prompts["cat"])), dim=-1).mean(0)
        torch.testing.assert_close(classes[0], cat / cat.norm(), atol=FLOAT32_NOISE, rtol=0)
        torch.testing.assert_close(classes[1], encode_prompts(model, prompts["dog"])[0], atol=FLOAT32_NOISE, rtol=0)
        with pytest.raises(UserError, match=r"class prompts: none for 1 of 2 classes \('owl' ...\)"):
            class_matrix(model, ["cat", "owl"], ["{c}"], class_prompts=prompts)


@pytest.mark.trap("5.2 speed", "one text forward per class")
def test_trap_one_text_forward_per_class():
    """CLIP_benchmark encodes class by class: 1,000 small batches for ImageNet, equal prompts again and again."""
    model, rows = tiny_model(), []
    names, templates = [f"thing {i % 40}" for i in range(50)], ["a {c}", "the {c}", "{c}"]
    with torch.no_grad(), model.transformer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]))):
        class_matrix(model, names, templates, batch_size=64)
    assert rows == [64, 56]  # 40 x 3 different prompts


def test_trap_class_names_that_occur_twice_are_two_classes():
    """ImageNet's list names missile and sunglasses twice; a class matrix keyed by name would lose two rows."""
    with torch.no_grad():
        classes = class_matrix(tiny_model(), ["missile", "owl", "missile"], TEMPLATES)
    assert torch.equal(classes[0], classes[2])
    assert len(classes) == 3


@pytest.mark.trap("5.2 amp", "mixed precision by default")
def test_trap_mixed_precision_is_off_unless_asked_for_and_recorded(tmp_path):
    """CLIP_benchmark runs the towers under autocast unless told otherwise; here precision is asked for, and told."""
    folder, model = write_folder(tmp_path / "t", [0, 1, 2, 0, 1]), tiny_model()
    seen = []

    def note(_, __, out):
        seen.append((out.dtype, torch.is_autocast_enabled("cpu")))

    with model.visual.conv1.register_forward_hook(note):
        result = run(folder)
    assert set(seen) == {(torch.float32, False)}
    assert result.model["precision"] == "float32"
    low = to_precision(copy.deepcopy(model), "bf16")
    assert run(folder, model=low).model["precision"] == "bfloat16"
    entries = read_task_folder(folder).entries
    with torch.no_grad():
        full, half = (encode_images(m, entries, batch_size=8, progress=False).embeds for m in (model, low))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(5))  # normalised after the tower, in float32
    assert 1e-4 < (full - half).abs().max() < 0.1


@pytest.mark.trap("5.2 amp", "the batch size moves numbers")
def test_trap_batch_size_moves_no_number(tmp_path):
    """It can move a logit's last bits, so batches are cut at the same places, whatever rank or cache they come from."""
    model, sizes = tiny_model(), []
    images = [picture(i) if i != 2 else b"damaged" for i in range(13)]
    folder = write_folder(tmp_path / "t", [i % 3 for i in range(13)], images=images)
    with torch.no_grad(), model.visual.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0]))):
        encode_images(model, read_task_folder(folder).entries, batch_size=5, progress=False)
    assert sizes == [4, 5, 3]  # a damaged image moves none of those behind it into another batch
    whole = run(folder).tasks["t"]
    for size in (1, 4, 13):
        part = run(folder, batch_size=size).tasks["t"]
        assert (part.value, part.interval, part.extras) == (whole.value, whole.interval, whole.extras)


@pytest.mark.trap("5.2 speed", "all logits are kept")
def test_trap_all_logits_are_kept(monkeypatch):
    """CLIP_benchmark keeps the scores of all images; here a block of them is held at a time."""
    rows, ranks = [], metrics.true_class_ranks

    def noted(scores, labels):
        rows.append(len(scores))
        return ranks(scores, labels)

    monkeypatch.setattr(metrics, "true_class_ranks", noted)
    rng = np.random.default_rng(0)
    images = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(20_000, 4)).astype(np.float32)))
    labels = rng.integers(0, 6, 20_000)
    result = scoring.score(Task(id="t"), images, images[:6], labels)
    assert max(rows) <= 8192
    assert sum(rows) >= 20_000
    assert result.value == pytest.approx(sk.accuracy_score(labels, (images @ images[:6].T).argmax(1)), abs=1e-12)


def test_labels_that_are_the_models_answers_score_one_and_shifted_ones_zero(tmp_path):
    answers = naive_cosines(tiny_model(), write_folder(tmp_path / "t", [0] * 20, names=NAMES))[0].argmax(1)
    assert len(set(answers.tolist())) > 1
    assert run(write_folder(tmp_path / "right", answers.tolist(), names=NAMES)).score == 1.0
    wrong = ((answers + 1) % len(NAMES)).tolist()
    assert run(write_folder(tmp_path / "wrong", wrong, names=NAMES)).score == 0.0


def test_multilabel_is_11_point_map_on_the_softmax_of_100_cosines(tmp_path):
    vectors = (np.random.default_rng(0).random((40, 7)) < 0.3).astype(int)
    folder = write_folder(tmp_path / "t", vectors, names=NAMES, templates=TEMPLATES, kind="multilabel")
    cosines, labels = naive_cosines(tiny_model(), folder)
    result = run(folder).tasks["t"]
    expected = references.map_11point(references.softmax(100 * cosines), labels)
    assert result.metric == "map_11point"
    assert result.value == pytest.approx(expected, abs=1e-9)
    assert result.value != pytest.approx(references.map_11point(cosines, labels), abs=1e-3)  # raw cosines differ
    assert result.chance > vectors.mean() + 0.03  # far above the share of positives: the artificial end point
    assert result.interval[0] < result.value < result.interval[1]


def test_roc_auc_ranks_by_the_probability_of_class_one(tmp_path):
    labels = [0, 1] * 15
    folder = write_folder(tmp_path / "memes", labels, names=("meme", "hatespeech meme"))
    cosines, _ = naive_cosines(tiny_model(), folder)
    result = run(Benchmark("b", "wds", (Task(id="memes", metric="roc_auc"),), tmp_path)).tasks["memes"]
    assert result.value == pytest.approx(sk.roc_auc_score(labels, references.softmax(cosines)[:, 1]), abs=1e-12)
    assert (result.chance, result.n) == (0.5, 30)


def test_features_do_not_depend_on_the_batch_size(tmp_path):
    data = read_task_folder(write_folder(tmp_path / "t", [0] * 13))
    model = tiny_model()
    with torch.no_grad():
        one, many = (encode_images(model, data.entries, batch_size=b, progress=False) for b in (1, 256))
        torch.testing.assert_close(one.embeds, many.embeds, atol=FLOAT32_NOISE, rtol=0)
        torch.testing.assert_close(encode_prompts(model, NAMES, 1), encode_prompts(model, NAMES), atol=1e-6, rtol=0)
    assert one.sha256 == many.sha256


def test_trap_squash_shows_the_model_the_whole_picture(tmp_path):
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, :10] = 255  # white at the left edge, which a centre crop removes
    folder = write_folder(tmp_path / "t", [0], images=[png(wide)])
    data, model = read_task_folder(folder), tiny_model()
    with torch.no_grad():
        crop, squash = (
            encode_images(model, data.entries, batch_size=1, resize=resize, progress=False).embeds
            for resize in ("model", "squash")
        )
        whole = model.encode_image(
            model.preprocess(Image.fromarray(wide).resize((16, 16), Image.Resampling.BICUBIC))[None]
        )
        black = model.encode_image(model.preprocess(Image.new("RGB", (16, 16)))[None])
    torch.testing.assert_close(squash, torch.nn.functional.normalize(whole), atol=FLOAT32_NOISE, rtol=0)
    torch.testing.assert_close(crop, torch.nn.functional.normalize(black), atol=FLOAT32_NOISE, rtol=0)


def test_damaged_images_are_counted_and_named_and_n_says_so(tmp_path):
    labels = [0, 1, 2, 0, 1, 2, 0]
    images = [picture(i) for i in range(7)]
    images[1], images[5] = b"rubbish", images[5][:60]
    result = run(write_folder(tmp_path / "t", labels, images=images), batch_size=2)
    task = result.tasks["t"]
    assert task.n == 5
    assert [name.split(" ")[0] for name in task.broken] == ["test/0.tar:s0000001", "test/1.tar:s0000005"]
    cosines, _ = naive_cosines(
        tiny_model(), write_folder(tmp_path / "good", [0, 2, 0, 1, 0], images=[images[i] for i in (0, 2, 3, 4, 6)])
    )
    assert task.value == pytest.approx(np.mean(cosines.argmax(1) == [0, 2, 0, 1, 0]))
    assert "2 of 7: test/0.tar:s0000001 (not an image), test/1.tar:s0000005" in result_table(result)


def test_nothing_but_damaged_images_fails_the_task(tmp_path):
    result = run(write_folder(tmp_path / "t", [0, 1], images=[b"x", b"y"]))
    assert not result.tasks
    assert "none of the 2 images can be read" in result.failed["t"]


def test_elevater_lists_missing_and_failed_tasks_and_scores_the_rest(tmp_path):
    write_folder(
        tmp_path / "wds_vtab-kitti_closest_vehicle_distance",
        [i % 4 for i in range(711)],
        names=KITTI[::-1],
        images=[picture(0, (8, 24))] * 711,
        shard_size=400,
    )
    memes = [picture(i % 9) for i in range(500)]
    write_folder(tmp_path / "hateful_memes", [0, 1] * 250, names=("meme", "hatespeech meme"), images=memes)
    textures = [f"texture {i}" for i in range(47)]
    write_folder(tmp_path / "dtd", [0] * 1880, names=textures, images=[b""] * 1880, shard_size=1880)
    write_folder(tmp_path / "wds_renderedsst2", [0, 1] * 5, names=NAMES[:2])  # too few images
    write_folder(tmp_path / "wds_vtab-pcam", [0, 1], names=NAMES[:3])  # too many classes
    write_folder(tmp_path / "wds_fer2013", [[1, 0, 0]], kind="multilabel")
    write_folder(tmp_path / "wds_gtsrb", [0])
    (tmp_path / "wds_gtsrb" / "classnames.txt").unlink()
    result = run("elevater", data_root=tmp_path)
    assert set(result.tasks) == {"kitti-distance", "hateful-memes"}
    assert set(result.failed) == {"rendered-sst2", "patch-camelyon", "fer-2013", "gtsrb", "dtd"}
    assert "class names do not fit dtd: 'texture 0', 'texture 1'," in result.failed["dtd"]
    assert "10 test images, expected 1,821 (elevater) or 1,821 (wds)" in result.failed["rendered-sst2"]
    assert "3 class names, the task has 2" in result.failed["patch-camelyon"]
    assert len(result.missing) == 14
    assert "imagenet-1k" in result.missing
    assert result.score == pytest.approx(np.mean([task.value for task in result.tasks.values()]))
    assert "mean of 2 of 20 tasks" in result_table(result)
    kitti = result.tasks["kitti-distance"]
    assert kitti.test_set == "elevater, wds"
    assert kitti.templates == 1  # the protocol's, not the folder's
    assert "the data numbers 4 of 4 classes otherwise: joined by name" in kitti.differences
    assert result.tasks["hateful-memes"].test_set == "elevater"


@pytest.mark.trap("0.2", "ImageNet-1K is beside the mean")
def test_trap_imagenet_stands_beside_the_score(tmp_path):
    write_folder(tmp_path / "a", [0, 1, 2])
    write_folder(tmp_path / "b", [1, 1, 1])
    tasks = (Task(id="a"), Task(id="b", in_score=False))
    result = run(Benchmark("x", "elevater", tasks, tmp_path))
    assert result.score == result.tasks["a"].value
    assert "mean of 1 of 1 tasks" in result_table(result)
    assert "(b)" in result_table(result)


def test_result_json_has_the_contract_and_the_provenance(tmp_path):
    folder = write_folder(tmp_path / "t", [0, 1, 2, 3, 4, 5, 6], names=NAMES)
    result = run(folder)
    content = json.loads(result.write(tmp_path / "out" / "r.json").read_text())
    assert {"benchmark", "protocol", "score", "n_tasks", "missing", "tasks"} <= content.keys()
    task = content["tasks"]["t"]
    assert {"metric", "value", "interval", "n", "chance", "top5", "task_sha256", "images_per_second"} <= task.keys()
    assert 0 <= task["interval"][0] <= task["value"] <= task["interval"][1] <= 1
    assert (content["n_tasks"], content["n_tasks_expected"], content["missing"]) == (1, 1, {})
    assert content["model"]["sha256"] == weights_sha256(tiny_model())
    assert content["model"]["precision"] == "float32"
    assert content["versions"].keys() == {"focalclip", "torch", "open_clip", "python"}
    facts = content["model"]
    assert facts["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert facts["image_parameters"] == sum(p.numel() for p in tiny_model().visual.parameters())
    attention = 3 * 5 * 32 * 32 + 2 * 2 * 5 * 5 * 16 + 5 * 32 * 32  # 4 patches and the class token, 2 heads of 16
    assert facts["image_multiply_adds"] == 4 * 192 * 32 + attention + 2 * 5 * 32 * 128 + 32 * 16
    assert facts["peak_memory"] > 50e6
    assert (facts["threads"], facts["ranks"], facts["device"]) == (torch.get_num_threads(), 1, "cpu")
    assert task["seconds"] >= task["text_seconds"] + task["image_seconds"] - 0.002
    assert (task["prompts"], task["cached_images"]) == (7, 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"r.json", "r.predictions"}
    again = run(folder)
    assert again.tasks["t"].task_sha256 == task["task_sha256"]
    assert again.score == content["score"]


def test_weights_hash_follows_the_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    before = weights_sha256(layer)
    assert before == weights_sha256(layer)
    assert before != weights_sha256(torch.nn.Linear(3, 2))
    assert before != weights_sha256(layer.to(torch.bfloat16))


def test_modes_and_gradients_are_as_before_afterwards(tmp_path):
    model = copy.deepcopy(tiny_model()).train()
    model.visual.eval()  # a locked tower must stay so
    modes = [module.training for module in model.modules()]
    run(write_folder(tmp_path / "t", [0, 1, 2]), model=model)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_low_precision_stays_inside_the_towers(tmp_path):
    model = copy.deepcopy(tiny_model()).to(torch.bfloat16)
    folder = write_folder(tmp_path / "t", [0, 1, 2])
    with torch.no_grad():
        assert class_matrix(model, NAMES, TEMPLATES).dtype == torch.float32
    assert run(folder, model=model).model["precision"] == "bfloat16"


def test_weights_that_diverged_are_refused(tmp_path):
    model = copy.deepcopy(tiny_model())
    torch.nn.init.constant_(model.visual.proj, float("nan"))
    result = run(write_folder(tmp_path / "t", [0, 1, 2]), model=model)
    assert "NaN" in result.failed["t"]


def test_unknown_task_is_an_error_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="no task 'x'"):
        run(write_folder(tmp_path / "t", [0, 1, 2]), tasks=["x"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Features of the command's tests are kept out of the user's cache."""
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run in runs/tiny and two tasks in tasks/."""
    root = tmp_path_factory.mktemp("cli")
    write_folder(root / "tasks" / "a", [0, 1, 2, 0, 1])
    write_folder(root / "tasks" / "b", [0, 1, 2, 3, 4, 5, 6], names=NAMES)
    write_tiny_run(root)
    (root / "list.json").write_text('{"cat": "no list"}')
    return root


def test_command_evaluates_the_newest_run_and_writes_both_files(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(["--benchmark", "tasks", "--output", "out.json", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "mean of 2 of 2 tasks" in printed
    content = json.loads(Path("out.json").read_text())
    assert content == json.loads(Path("runs/tiny/eval/tasks.json").read_text())
    assert content["model"]["source"] == str(Path("runs/tiny"))
    assert main(["--benchmark", "tasks", "--tasks", "b", "--device", "cpu"]) == 0
    assert json.loads(Path("runs/tiny/eval/tasks-b.json").read_text())["n_tasks"] == 1
    assert json.loads(Path("runs/tiny/eval/tasks.json").read_text())["n_tasks"] == 2  # not overwritten by the part


def test_command_takes_over_finished_tasks_and_cached_features(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = ["--benchmark", "tasks", "--device", "cpu", "--model", "runs/tiny/model", "--output", "again.json"]
    assert main([*words, "--cache-dir", "c"]) == 0
    assert "images/s)" in capsys.readouterr().err
    assert main([*words, "--cache-dir", "c"]) == 0
    assert capsys.readouterr().err.count("% (measured before; --fresh measures it again)") == 2
    assert main([*words, "--cache-dir", "c", "--fresh"]) == 0
    assert capsys.readouterr().err.count("all from the cache") == 2
    assert main([*words, "--no-cache", "--fresh"]) == 0
    assert "cache" not in capsys.readouterr().err
    assert not list(Path(os.environ["FOCALCLIP_CACHE"]).iterdir())


def test_what_is_not_the_whole_benchmark_gets_a_file_of_its_own(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    Path("mine.json").write_text(json.dumps({name: [f"this is {name}"] for name in (*NAMES, "red", "green", "blue")}))
    shutil.rmtree("runs/tiny/eval", ignore_errors=True)
    words = ["--benchmark", "tasks", "--device", "cpu"]
    assert main([*words, "--precision", "bf16", "--max-images", "3", "--class-prompts", "mine.json"]) == 0
    assert {path.stem for path in Path("runs/tiny/eval").iterdir()} == {"tasks-bf16-3-images-mine"}
    content = json.loads(Path("runs/tiny/eval/tasks-bf16-3-images-mine.json").read_text())
    assert content["model"]["precision"] == "bfloat16"
    assert content["protocol"] == "wds, class prompts"
    assert [task["n"] for task in content["tasks"].values()] == [3, 3]
    assert "3 images only, evenly spaced" in capsys.readouterr().out
    assert main([*words, "--precision", "fp32", "--protocol", "wds"]) == 0  # the folder's own
    assert Path("runs/tiny/eval/tasks.json").is_file()
    assert main([*words, "--protocol", "clip_benchmark"]) == 0
    assert Path("runs/tiny/eval/tasks-clip_benchmark.json").is_file()


def test_command_exits_1_only_where_nothing_could_be_evaluated(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (workplace / "empty").mkdir(exist_ok=True)
    assert main(["--benchmark", "elevater", "--data-root", "empty", "--model", "runs/tiny"]) == 1
    captured = capsys.readouterr()
    assert "no score: 0 of 20 tasks" in captured.out
    assert captured.out.count("clip-benchmark/wds_") == 20
    assert captured.err.strip().splitlines()[-1].startswith("error: nothing could be evaluated")
    assert not Path("runs/tiny/eval/elevater.json").exists()  # an empty result never replaces an earlier one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "elevator"], "error: --benchmark elevator: not one of elevater, demo"),
        (["--benchmark", "tasks", "--tasks", "c"], "error: --tasks: tasks has no task 'c'"),
        (["--benchmark", "tasks", "--model", "runs/none"], "error: runs/none: no such folder"),
        (["--benchmark", "tasks", "--device", "gpu"], "error: --device gpu: cannot be used"),
        (["--benchmark", "tasks", "--output", "tasks"], "error: --output tasks: is a folder"),
        (
            ["--benchmark", "tasks", "--output", "runs/tiny/config.yaml/x"],
            "error: --output runs/tiny/config.yaml/x: its",
        ),
        (["--benchmark", "elevater", "--data-root", "nowhere"], "error: --data-root nowhere: no such folder"),
        (["--benchmark", "tasks", "--class-prompts", "nowhere"], "error: --class-prompts nowhere: no such file"),
        (["--benchmark", "tasks", "--class-prompts", "list.json"], "error: --class-prompts list.json: expected {"),
        (["--benchmark", "tasks", "--class-prompts", "runs/tiny/config.yaml"], "error: --class-prompts runs/tiny/c"),
        (["--benchmark", "tasks", "--model", "nothing.here:load"], "error: nothing.here:load: no module nothing.here"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(workplace, monkeypatch, capsys, words, message):
    monkeypatch.chdir(workplace)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.trap("5.2 flags", "a truth value parsed from text cannot be switched off")
def test_trap_flags_can_be_switched_off(workplace, monkeypatch, capsys):
    """CLIP_benchmark reads --normalize from text, and any text is true; here a flag takes no text."""
    monkeypatch.chdir(workplace)
    for flag in ("--fresh", "--no-cache"):
        with pytest.raises(SystemExit) as left:
            main(["--benchmark", "tasks", flag, "false"])
        assert left.value.code == 2
    assert "unrecognized arguments: false" in capsys.readouterr().err
    for word in ("false", "False", "no"):
        assert with_overrides(RunConfig(), ["--model.text.causal", word]).model.text.causal is False
    assert with_overrides(RunConfig(), ["--model.text.no-causal"]).model.text.causal is False


def test_script_in_a_process_of_its_own(workplace):
    script = Path(__file__).parents[2] / "eval" / "zeroshot.py"
    command = [sys.executable, str(script), "--benchmark", "tasks", "--model", "runs/tiny", "--device", "cpu"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean of 2 of 2 tasks" in done.stdout
    assert "Traceback" not in done.stderr


def test_trap_scores_under_reduced_float32_products():
    """Where the processor has them, "medium" makes bfloat16 products of float32 ones; autocast does it anywhere."""
    images = torch.nn.functional.normalize(torch.randn(500, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = np.arange(500) % 50
    close = images[:50] + 1e-4 * torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    classes = torch.nn.functional.normalize(torch.cat([images[:50], close]), dim=1)
    task = Task(id="t")
    expected = scoring.score(task, images, classes, labels)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (images @ classes.T).dtype == torch.bfloat16  # the trap is set
            assert scoring.score(task, images, classes, labels) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
