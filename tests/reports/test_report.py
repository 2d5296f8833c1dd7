"""Reports of a real result: read back with other parsers, and the page with an HTML parser and Pillow."""

import base64
import csv
import io
import json
import re
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import references
import torch
from PIL import Image
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.cli.report import main
from focalclip.cli.zeroshot import main as zeroshot
from focalclip.evaluation.data import read_task_folder
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.model import weights_sha256
from focalclip.evaluation.features.texts import class_matrix
from focalclip.evaluation.result import Result
from focalclip.evaluation.task import Benchmark, Task, registered_tasks
from focalclip.reports import write_report
from focalclip.reports.published import SCORE, published
from focalclip.reports.submission import SubmissionRecord, notes, write_records
from focalclip.reports.tables import result_table

NAMES = ("cat", "dog", "a <b>bold</b> & 50% _bird_")
SIZES = {"alpha": 40, "beta_1": 30, "many": 24}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A result of three tasks in the score and one beside it, all scores kept, under the protocol elevater."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for name in ("alpha", "beta_1", "imagenet"):
        n = SIZES.get(name, 20)
        images = [picture(i) for i in range(n)]
        write_folder(root / name, rng.integers(3, size=n).tolist(), names=NAMES, images=images, shard_size=50)
    vectors = (rng.random((24, 3)) < 0.4).astype(int)
    write_folder(root / "many", vectors, names=NAMES, shard_size=50, kind="multilabel")
    tasks = (
        Task(id="alpha", sizes={"test": {"elevater": 40}}),
        Task(
            id="beta_1",
            metric="mean_per_class",
            sizes={"test": {"elevater": 30, "wds": 30}},
            differences=("other 1 | 2",),
        ),
        Task(id="many", metric="map_11point", sizes={"test": {"elevater": 24}}),
        Task(id="gone", obtain="ask the authors"),
        Task(id="imagenet", in_score=False, sizes={"test": {"elevater": 20}}),
    )
    benchmark = Benchmark("four", "elevater", tasks, root)
    result = zero_shot(tiny_model(), benchmark, keep_all=True).with_source("runs/x_1 & co")
    result.write(root / "r.json")
    return root


@pytest.fixture(scope="module")
def result(root):
    return Result.read(root / "r.json")


def test_a_result_read_back_is_written_the_same(root, result):
    result.write(root / "copy.json")
    assert (root / "copy.json").read_bytes() == (root / "r.json").read_bytes()


@pytest.mark.trap("5.2 result", "no intervals, sizes, versions, timings, hashes")
def test_trap_a_result_without_intervals_sizes_versions_timings_or_hashes(result):
    content = result.to_json()
    for task in content["tasks"].values():
        assert 0 <= task["interval"][0] <= task["value"] <= task["interval"][1] <= 1
        assert task["above_chance"] == pytest.approx(task["value"] - task["chance"])
        assert task["n"] > 0
        assert task["seconds"] > 0
        assert task["images_per_second"] > 0
        assert len(task["task_sha256"]) == 64
    assert content["score_interval"][0] < content["score"] < content["score_interval"][1]
    above = [task.above_chance for task in result.tasks.values() if task.in_score]
    assert content["score_above_chance"] == pytest.approx(np.mean(above))
    assert {"parameters", "image_parameters", "image_multiply_adds", "precision", "sha256"} <= content["model"].keys()
    assert content["model"]["peak_memory"] > 50e6  # a process with torch in it
    assert {"torch", "python", "focalclip"} <= content["versions"].keys()
    assert content["tasks"]["alpha"]["calibration"]["own_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert content["tasks"]["many"]["calibration"] == {}


def test_page_tells_model_and_machine(result, tmp_path):
    text = " ".join(" ".join(Page(write_report(result, tmp_path / "r.html").read_text()).text).split())
    model = tiny_model()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e3:.3g} k" in text
    assert f"image {sum(p.numel() for p in model.visual.parameters()) / 1e3:.3g} k" in text
    assert weights_sha256(model)[:16] in text
    assert "peak memory" in text
    assert "images/s" in text


def test_csv_is_read_back_in_full_precision(result, tmp_path):
    path = write_report(result, tmp_path / "r.csv")
    with path.open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["alpha", "beta_1", "many", "imagenet", "mean"]
    for name, task in result.tasks.items():
        assert float(rows[name]["value"]) == task.value
        assert (float(rows[name]["low"]), float(rows[name]["high"])) == task.interval
        assert int(rows[name]["n"]) == task.n
    assert float(rows["alpha"]["ece"]) == result.tasks["alpha"].calibration["ece"]
    assert rows["many"]["ece"] == ""
    assert float(rows["mean"]["value"]) == result.score
    assert rows["alpha"]["model"] == "runs/x_1 & co"


def cells(line):
    return [cell.strip().replace("\\", "").strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_table_has_one_width_and_the_numbers(result, tmp_path):
    text = write_report(result, tmp_path / "r.md").read_text()
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in table} == {7}
    rows = {row[0]: row for row in table}
    assert rows["alpha"][3] == f"{100 * result.tasks['alpha'].value:.1f}"
    assert rows["mean of 3 of 4"][3] == f"{100 * result.score:.1f}"
    assert r"beta\_1" in text
    assert "- beta_1: other 1 | 2" in text
    assert "not evaluated: gone" in text


def test_latex_table_escapes_and_aligns(result, tmp_path):
    text = write_report(result, tmp_path / "r.tex").read_text()
    assert text.startswith("% zero-shot four")
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {6}
    assert r"beta\_1 & mean per class & 30 &" in text
    assert r"value \% & 95\% interval" in text
    assert r"\textbf{mean of 3 of 4}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert not re.findall(r"(?<!\\)[_#]", text.split("\n", 1)[1])


def test_trap_imagenet_stands_beside_the_mean_in_every_format(result, tmp_path):
    expected = np.mean([result.tasks[name].value for name in ("alpha", "beta_1", "many")])
    assert result.score == pytest.approx(expected)
    for suffix in (".md", ".tex", ".html"):
        text = write_report(result, tmp_path / f"r{suffix}").read_text()
        assert "imagenet (beside the mean)" in text
        assert text.index("mean of 3 of 4") < text.rindex("imagenet (beside the mean)")
    rows = list(csv.DictReader(io.StringIO(write_report(result, tmp_path / "r.csv").read_text())))
    assert {row["task"]: row["in_score"] for row in rows}["imagenet"] == "False"


def test_trap_a_mean_without_all_tasks_says_so_and_stands_beside_no_published_mean(result, tmp_path):
    partial = replace(result, benchmark="elevater")
    text = write_report(partial, tmp_path / "p.html").read_text()
    assert "mean of 3 of 4 tasks" in text
    assert "ask the authors" in text
    row = text[text.index('<div class="row mean">') :].partition("</div>")[0]
    assert 'class="mark' not in row
    whole = write_report(replace(partial, expected=3), tmp_path / "w.html").read_text()
    row = whole[whole.index('<div class="row mean">') :].partition("</div>")[0]
    assert row.count('class="mark') == 4


class Page(HTMLParser):
    """Checks that tags nest, and collects sources and text."""

    VOID = ("meta", "img", "br")
    SHAPES = ("line", "rect", "circle", "path", "polyline")

    def __init__(self, text):
        super().__init__()
        self.stack, self.sources, self.links, self.text, self.ids, self.mistakes = [], [], [], [], set(), []
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag, attrs):
        self.look(tag, attrs)

    def handle_starttag(self, tag, attrs):
        self.look(tag, attrs)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.mistakes.append((tag, self.getpos()))

    def handle_data(self, data):
        self.text.append(data)

    def look(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [value for name, value in attrs.items() if name in ("src", "srcset", "data", "xlink:href")]
        self.links += [attrs["href"]] if tag == "a" else []
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.mistakes.append((tag, self.getpos()))
        self.ids |= {attrs["id"]} if "id" in attrs else set()


def test_page_is_well_formed_and_self_contained(result, tmp_path):
    text = write_report(replace(result, benchmark="elevater"), tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.mistakes == []
    assert page.stack == []
    assert page.sources
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    shown = [model for model in published().models.values() if model.label]
    allowed = {published().source_of(model, number).url for model in shown for number in model.on_page().values()}
    outside = {link for link in page.links if not link.startswith("#")}
    assert outside <= allowed
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert not re.findall(r"url\(|@import|https?:", text[text.index("<style>") : text.index("</style>")])
    addresses = set(re.findall(r"https?://[^\"<\s]+", text))
    assert addresses <= allowed
    assert "NaN" not in text
    assert ">nan" not in text


def test_names_from_data_cannot_break_the_page(result, tmp_path):
    page = Page(write_report(result, tmp_path / "r.html").read_text())
    assert "<b>bold</b>" in "".join(page.text)  # as text, not as a tag
    assert "runs/x_1 & co" in "".join(page.text)


def test_thumbnails_on_the_page_decode(result, tmp_path):
    page = Page(write_report(result, tmp_path / "r.html").read_text())
    kept = sum(len(task.predictions.pictures.webp) for task in result.tasks.values())
    assert len(page.sources) >= kept > 5
    for source in page.sources:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert (image.format, image.size) == ("WEBP", (12, 12))
        image.load()


def test_page_shows_numbers_of_classes_and_calibration(result, tmp_path):
    text = " ".join("".join(Page(write_report(result, tmp_path / "r.html").read_text()).text).split())
    p = result.tasks["alpha"].predictions
    cats = p.labels == 0
    assert f"{100 * p.correct[cats].mean():.1f}%" in text
    assert f"scale 100: ECE {100 * result.tasks['alpha'].calibration['ece']:.1f}%" in text
    assert "Missing: not evaluated for lack of data" in text
    assert "other 1 | 2" in text


def test_a_result_whose_answers_were_not_kept_still_has_a_page(root, result, tmp_path):
    tasks = {name: replace(task, predictions=None) for name, task in result.tasks.items()}
    page = Page(write_report(replace(result, tasks=tasks), tmp_path / "r.html").read_text())
    assert page.mistakes == []
    assert "answers to the single images were not kept" in "".join(page.text)
    empty = Page(
        write_report(Result("x", "elevater", 20, missing={"dtd": "needs it"}), tmp_path / "e.html").read_text()
    )
    assert empty.mistakes == []
    assert "0 of 20 tasks evaluated" in "".join(empty.text)


def test_trap_at_or_below_chance_is_starred(result):
    kitti = replace(result.tasks["alpha"], value=0.29, interval=(0.26, 0.33), chance=0.25, extras={"majority": 0.295})
    assert not kitti.beats_guessing  # above chance, not above always saying the commonest class
    assert replace(kitti, interval=(0.296, 0.33)).beats_guessing
    below = replace(result, tasks={"kitti": kitti})
    assert "29.0*" in result_table(below)
    assert "* not above guessing" in result_table(below)


def test_trap_recalled_numbers_are_marked_and_other_measurements_are_named():
    ids = {task.id for task in registered_tasks("elevater")}
    models = {model.label: model for model in published().models.values() if model.label}
    assert list(models) == ["CLIP ViT-B/32", "CLIP ViT-B/16", "UniCL Swin-B", "UniCL FocalNet-B"]
    for name in ("CLIP ViT-B/32", "CLIP ViT-B/16"):
        numbers = models[name].on_page()
        assert numbers.keys() == ids | {SCORE}
        trusts = {task: published().source_of(models[name], number).trust for task, number in numbers.items()}
        assert trusts["hateful-memes"] == trusts["voc-2007-classification"] == "recalled"
        assert trusts.pop(SCORE) == "derived"
        assert {task for task, trust in trusts.items() if trust == "read"} == ids - {
            "hateful-memes",
            "voc-2007-classification",
        }
        for task in ("eurosat_clip", "fer-2013", "resisc45_clip", "patch-camelyon", "kitti-distance", "caltech-101"):
            assert numbers[task].remark, task  # other images, prompts or crop than ELEVATER's
    shown = models["CLIP ViT-B/32"].on_page()  # of several numbers of a task the one nearest to ELEVATER's measurement
    values = {
        task: shown[task].value for task in ("eurosat_clip", "fer-2013", "kitti-distance", "resisc45_clip", SCORE)
    }
    assert list(values.values()) == [50.44, 41.2, 27.43, 53.62, 58.2]
    assert shown["voc-2007-classification"].value == 83.1
    assert models["UniCL FocalNet-B"].on_page()[SCORE].value == 44.0  # README of microsoft/UniCL
    assert "42.5" in models["UniCL Swin-B"].on_page()[SCORE].remark  # two READMEs disagree on one model
    for model in published().models.values():
        for number in model.numbers:
            assert 1 < number.value < 100
            assert published().source_of(model, number).url.startswith("https://")


def test_submission_has_the_servers_fields_and_the_probabilities(root, result, tmp_path):
    path = write_report(result, tmp_path / "s.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["all_predictions.json"]
        text = archive.read("all_predictions.json").decode()
    records = {record["dataset_name"]: record for record in json.loads(text)["data"]}
    assert list(records) == ["alpha", "beta_1", "many", "imagenet"]
    record = records["alpha"]
    assert list(record) == [
        "model_name", "dataset_name", "num_trainable_params", "num_params", "num_visual_params", "num_backbone_params",
        "n_shot", "rnd_seeds", "predictions",
    ]  # fmt: skip
    assert (record["n_shot"], record["rnd_seeds"], record["num_trainable_params"]) == (0, [0], 0)
    assert record["num_params"] == record["num_backbone_params"] == sum(p.numel() for p in tiny_model().parameters())
    assert not re.findall(r"\d\.\d{7,}|e-", text)  # six decimals, no exponents
    model, data = tiny_model(), read_task_folder(root / "alpha")
    with torch.no_grad():
        classes = class_matrix(model, data.class_names, data.templates)
        images = encode_images(model, data.entries, batch_size=64, progress=False)
    expected = references.softmax(100 * (images.embeds @ classes.T).double().numpy())
    predictions = np.array(record["predictions"])
    assert predictions.shape == (1, 40, 3)
    np.testing.assert_allclose(predictions[0], expected, atol=2e-5)
    for record in records.values():
        assert (np.abs(np.array(record["predictions"]).sum(axis=-1) - 1) <= 1e-3).all()
    assert "gone" in notes(result)[0]
    assert "taken to be the official one: alpha, beta_1, many, imagenet" in notes(result)[1]


def test_submission_follows_the_official_order(result, tmp_path):
    task = result.tasks["alpha"]
    order = np.random.default_rng(0).permutation(40)
    p = replace(task.predictions, official=order)
    one = replace(result, tasks={"alpha": replace(task, predictions=p)})
    with zipfile.ZipFile(write_report(one, tmp_path / "s.zip")) as archive:
        record = json.loads(archive.read("all_predictions.json"))["data"][0]
    for i in (0, 7, 39):  # the i-th of the official order is entry order[i]
        np.testing.assert_allclose(record["predictions"][0][i], p.all_probabilities()[order[i]], atol=1e-6)
    assert not any("official" in note for note in notes(one))


def test_submission_of_adapted_models_has_seeds(tmp_path):
    seeds = [np.full((4, 2), 0.5) for _ in range(3)]
    record = SubmissionRecord("dtd", seeds, 110, 50, 100, num_trainable_params=10, n_shot=5, seeds=(0, 1, 2))
    with zipfile.ZipFile(write_records([record], "m", tmp_path / "s.zip")) as archive:
        content = json.loads(archive.read("all_predictions.json"))["data"][0]
    assert np.array(content["predictions"]).shape == (3, 4, 2)
    assert content["rnd_seeds"] == [0, 1, 2]
    with pytest.raises(UserError, match="3 predictions for 1 seeds"):
        write_records([replace(record, seeds=(0,))], "m", tmp_path / "s.zip")
    with pytest.raises(UserError, match="not probabilities, a row is off by 1"):
        write_records([replace(record, probabilities=[np.ones((4, 2))] * 3)], "m", tmp_path / "s.zip")


def test_submission_refuses_what_the_server_would_score_wrongly(result, tmp_path):
    task = result.tasks["alpha"]
    cases = {
        "needs ELEVATER's own test set, this is wds": replace(task, test_set="wds"),
        "this is a part of elevater": replace(task, test_set="a part of elevater, wds"),
        "needs every image, 1 are damaged": replace(task, broken=("test/0.tar:s0000001 (not an image)",)),
        "predictions are not beside the result": replace(task, predictions=None),
        "keeps only the top 5 classes": replace(
            task, predictions=replace(task.predictions, cosines=np.empty((40, 0), np.float32))
        ),
    }
    for message, faulty in cases.items():
        with pytest.raises(UserError, match=message):
            write_report(replace(result, tasks={"alpha": faulty}), tmp_path / "s.zip")
    with pytest.raises(UserError, match="under the protocol elevater"):
        write_report(replace(result, protocol="clip_benchmark"), tmp_path / "s.zip")
    assert not list(tmp_path.glob("*.zip"))


def test_command_writes_every_format_and_compares(root, tmp_path, capsys):
    files = [str(tmp_path / f"r{suffix}") for suffix in (".html", ".csv", ".md", ".tex", ".json", ".zip")]
    assert main([str(root / "r.json"), *files]) == 0
    printed = capsys.readouterr().out
    assert printed.count("written to") == 6
    assert "the server gives no average" in printed
    assert main([str(root / "r.json")]) == 0
    assert (root / "r.html").is_file()
    assert (
        main(["--compare", str(root / "r.json"), str(tmp_path / "r.json"), "--output", str(tmp_path / "c.json")]) == 0
    )
    assert "mean of 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["score"]["p"] == 1.0
    assert zeroshot(["--compare", str(root / "r.json"), str(tmp_path / "r.json")]) == 0
    assert "B - A" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a result's JSON or a run directory"),
        (["{root}/r.json", "page.pdf"], "--report page.pdf: the ending must be one of .json, .html"),
        (["{root}/none"], "neither a result's JSON nor a run directory"),
        (["{root}/r.json", "--output", "x.json"], "--output goes with --compare"),
        (["{root}/r.json", "--compare", "a", "b"], "--compare takes two results"),
        (["--compare", "{root}/r.json", "none.json"], "none.json: neither a result's JSON"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(root, capsys, words, message):
    assert main([word.format(root=root) for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
