"""The registry against the published table, and benchmarks by name, folder and file."""

import re
from pathlib import Path

import pytest
from wds_folder import write_folder

from focalclip.base.errors import UserError
from focalclip.evaluation.task import Task, load_benchmark, registered_tasks

# ELEVATER's registry of data sets (Elevater_Toolkit_IC): id, classes, images to train, validate, test; prompts; metric
PUBLISHED = """
caltech-101                     102   3060     -  6084 34 mean_per_class
cifar-10                         10  50000     - 10000 18 accuracy
cifar-100                       100  50000     - 10000 18 accuracy
country211                      211  31650 10550 21100  5 accuracy
dtd                              47   1880  1880  1880  8 accuracy
eurosat_clip                     10   5000  5000  5000  3 accuracy
fer-2013                          7  28709  3589  3589  6 accuracy
fgvc-aircraft-2013b-variants102 100   3334  3333  3333  2 mean_per_class
food-101                        101  75750     - 25250  1 accuracy
gtsrb                            43  26640 12569 12630  3 accuracy
hateful-memes                     2   8500     -   500  1 roc_auc
kitti-distance                    4   6347   423   711  1 accuracy
mnist                            10  60000     - 10000  1 accuracy
oxford-flower-102               102   1020  1020  6149  1 mean_per_class
oxford-iiit-pets                 37   3680     -  3669  1 mean_per_class
patch-camelyon                    2 262144 32768 32768  1 accuracy
rendered-sst2                     2   6920   827  1821  1 accuracy
resisc45_clip                    45   3150  3150 25200 18 accuracy
stanford-cars                   196   8144     -  8041  8 accuracy
voc-2007-classification          20   2501  2510  4952  1 map_11point
imagenet-1k                    1000      -     - 50000 80 accuracy
"""
# test sets of the wds mirrors that are not ELEVATER's, and the mirrors themselves
MIRROR_SIZES = {"caltech-101": 6085, "eurosat_clip": 5400, "fer-2013": 7178, "resisc45_clip": 6300}
MIRRORS = """
vtab-caltech101 vtab-cifar10 vtab-cifar100 country211 vtab-dtd vtab-eurosat fer2013 fgvc_aircraft food101 gtsrb -
vtab-kitti_closest_vehicle_distance mnist vtab-flowers vtab-pets vtab-pcam renderedsst2 vtab-resisc45 cars
voc2007_multilabel imagenet1k
"""


def test_registry_equals_the_published_table():
    rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    expected = {}
    for name, classes, *images, templates, metric in rows:
        sizes = {split: int(n) for split, n in zip(("train", "val", "test"), images, strict=True) if n != "-"}
        expected[name] = (int(classes), sizes, int(templates), metric)
    ours = {}
    for task in registered_tasks("elevater"):
        sizes = {split: known["elevater"] for split, known in task.sizes.items() if "elevater" in known}
        ours[task.id] = (len(task.names), sizes, len(task.templates), task.metric)
        assert len(task.names) == task.classes
    assert ours == expected


def test_mirrors_and_their_own_test_sizes():
    tasks = registered_tasks("elevater")
    hubs = [None if name == "-" else f"clip-benchmark/wds_{name}" for name in MIRRORS.split()]
    assert [task.hub for task in tasks] == hubs
    for task in tasks:
        if task.hub:
            assert task.sizes["test"]["wds"] == MIRROR_SIZES.get(task.id, task.sizes["test"]["elevater"])
            assert Path("x", task.folder_names[0]) == Path("x", task.hub.removeprefix("clip-benchmark/"))


def test_the_score_is_of_20_with_imagenet_beside_it():
    scored = [task for task in registered_tasks("elevater") if task.in_score]
    assert len(scored) == 20
    assert "imagenet-1k" not in [task.id for task in scored]
    assert sum(task.sizes["test"]["elevater"] for task in scored) == 192_677
    assert sum(len(task.names) for task in scored) == 1_151
    assert sum(len(task.names) * len(task.templates) for task in scored) == 9_938


@pytest.mark.parametrize("task", [*registered_tasks("elevater"), *registered_tasks("demo")], ids=lambda task: task.id)
def test_every_registered_task_is_complete(task):
    assert task.title
    assert task.classes
    assert task.sizes["test"]
    if task.metric == "map_11point":
        assert task.chance is None  # depends on the labels: the artificial end point lifts it
    else:
        assert task.chance == pytest.approx(0.5 if task.metric == "roc_auc" else 1 / task.classes, abs=5e-6)
    assert task.hub or task.obtain or task.sizes["test"].keys() == {"demo"}


def test_demo_tasks_by_their_names_and_not_mixed_up_with_elevater():
    demo = {task.id: task for task in registered_tasks("demo")}
    assert set(demo) == {"emoji-style", "emoji-concepts", "fashion-mnist", "mnist"}
    elevater = {task.id: task for task in registered_tasks("elevater")}
    assert demo["mnist"].sizes == {"test": {"demo": 5000}}
    assert elevater["mnist"].sizes["test"]["elevater"] == 10000


@pytest.mark.parametrize("name", ["wds_vtab-dtd", "vtab-dtd", "wds_dtd", "dtd", "wds_vtab-dtd_test"])
def test_accepted_local_folder_names(tmp_path, name):
    (tmp_path / name).mkdir()
    dtd = next(task for task in registered_tasks("elevater") if task.id == "dtd")
    assert dtd.find(tmp_path) == tmp_path / name


def test_the_size_says_which_data_it_is():
    eurosat = next(task for task in registered_tasks("elevater") if task.id == "eurosat_clip")
    assert eurosat.which_set(5000) == "elevater"
    assert eurosat.which_set(5400) == "wds"
    assert (eurosat.which_set(16200, "train"), eurosat.which_set(5000, "train")) == ("wds", "elevater")
    with pytest.raises(UserError, match=r"5,399 test images, expected 5,000 \(elevater\) or 5,400 \(wds\)"):
        eurosat.which_set(5399)
    with pytest.raises(UserError, match=r"4,999 val images, expected 5,000 \(elevater\)"):
        eurosat.which_set(4999, "val")
    assert Task(id="mine").which_set(17) == "unchecked"


def test_a_source_whose_size_is_not_known_lets_any_size_pass_and_the_answer_says_so():
    cars = next(task for task in registered_tasks("elevater") if task.id == "stanford-cars")
    assert cars.sizes["train"] == {"elevater": 8144, "wds": None}
    assert cars.which_set(8144, "train") == "elevater"
    assert cars.which_set(7000, "train") == "unchecked"


def test_benchmark_from_a_folder_of_tasks_or_one_task(tmp_path):
    write_folder(tmp_path / "b", [0, 1])
    write_folder(tmp_path / "a", [[0, 1, 0]], kind="multilabel")
    (tmp_path / "notes").mkdir()
    benchmark = load_benchmark(tmp_path)
    assert benchmark.protocol == "wds"
    assert [(task.id, task.metric) for task in benchmark.tasks] == [("a", "map_11point"), ("b", "accuracy")]
    alone = load_benchmark(tmp_path / "b")
    assert [task.id for task in alone.tasks] == ["b"]
    assert alone.places == {"b": tmp_path / "b"}


def test_benchmark_from_a_yaml_file(tmp_path):
    (tmp_path / "birds.yaml").write_text(
        "data_root: data\n"
        "tasks:\n"
        "  - {id: owls, metric: mean_per_class, classes: 4, sizes: {test: {ours: 40}}}\n"
        "  - id: gulls\n"
    )
    benchmark = load_benchmark(tmp_path / "birds.yaml")
    assert (benchmark.name, benchmark.data_root) == ("birds", tmp_path / "data")
    assert [task.metric for task in benchmark.tasks] == ["mean_per_class", "accuracy"]


def test_a_typo_in_a_yaml_file_is_named(tmp_path):
    (tmp_path / "birds.yaml").write_text("tasks:\n  - {id: owls, metrik: accuracy}\n")
    with pytest.raises(UserError, match=r"birds\.yaml: tasks\.0\.metrik is not a setting"):
        load_benchmark(tmp_path / "birds.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("classes: 3, names: [a, b]", "names has 2 entries, classes is 3; make them agree"),
        ("templates: [a photo]", "'a photo' has no {c} where the class name goes"),
        (
            "names: open_clip:imagnet, classes: 1000",
            "'open_clip:imagnet' is neither a list nor one of open_clip:imagenet",
        ),
        ("protocols: {unicorn: {resize: model}}", "there is no 'unicorn'; known: elevater, clip_benchmark"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, entry, message):
    (tmp_path / "birds.yaml").write_text(f"tasks:\n  - {{id: owls, {entry}}}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        load_benchmark(tmp_path / "birds.yaml")


def test_unknown_benchmark_task_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="--benchmark elevator: not one of elevater, demo"):
        load_benchmark("elevator")
    (tmp_path / "birds/test/owl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no classnames\.txt.*a folder per class, are named in a YAML file"):
        load_benchmark(tmp_path)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/dataset_type.txt").write_text("retrieval\n")
    for folder in (tmp_path, tmp_path / "pairs"):
        with pytest.raises(
            UserError, match=r"a retrieval set, which has no classes; run eval/retrieval.py --data .*pairs"
        ):
            load_benchmark(folder)
    with pytest.raises(UserError, match=r"--data-root .*nowhere: no such folder"):
        load_benchmark("elevater", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no task 'gtsbr'; did you mean gtsrb"):
        load_benchmark("elevater", tmp_path).select(["dtd", "gtsbr"])


def test_selection_keeps_the_rest_out():
    benchmark = load_benchmark("elevater", ".").select(["dtd", "cifar-10"])
    assert [task.id for task in benchmark.tasks] == ["cifar-10", "dtd"]
