"""The registry against the published table, and benchmarks by name, folder and file."""

from pathlib import Path

import pytest
from wds_folder import write_folder

from focalclip.errors import UserError
from focalclip.evaluation.tasks import Task, load_benchmark, registered_tasks

# ELEVATER's registry of data sets (Elevater_Toolkit_IC): id, classes, test images, metric
PUBLISHED = """
caltech-101                     102   6084  mean_per_class
cifar-10                         10  10000  accuracy
cifar-100                       100  10000  accuracy
country211                      211  21100  accuracy
dtd                              47   1880  accuracy
eurosat_clip                     10   5000  accuracy
fer-2013                          7   3589  accuracy
fgvc-aircraft-2013b-variants102 100   3333  mean_per_class
food-101                        101  25250  accuracy
gtsrb                            43  12630  accuracy
hateful-memes                     2    500  roc_auc
kitti-distance                    4    711  accuracy
mnist                            10  10000  accuracy
oxford-flower-102               102   6149  mean_per_class
oxford-iiit-pets                 37   3669  mean_per_class
patch-camelyon                    2  32768  accuracy
rendered-sst2                     2   1821  accuracy
resisc45_clip                    45  25200  accuracy
stanford-cars                   196   8041  accuracy
voc-2007-classification          20   4952  map_11point
imagenet-1k                    1000  50000  accuracy
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
    tasks = registered_tasks("elevater")
    ours = [(task.id, task.classes, task.test_sizes["elevater"], task.metric) for task in tasks]
    assert ours == [(name, int(classes), int(n), metric) for name, classes, n, metric in rows]


def test_mirrors_and_their_own_test_sizes():
    tasks = registered_tasks("elevater")
    hubs = [None if name == "-" else f"clip-benchmark/wds_{name}" for name in MIRRORS.split()]
    assert [task.hub for task in tasks] == hubs
    for task in tasks:
        if task.hub:
            assert task.test_sizes["wds"] == MIRROR_SIZES.get(task.id, task.test_sizes["elevater"])
            assert Path("x", task.folder_names[0]) == Path("x", task.hub.removeprefix("clip-benchmark/"))


def test_the_score_is_of_20_with_imagenet_beside_it():
    scored = [task for task in registered_tasks("elevater") if task.in_score]
    assert len(scored) == 20
    assert "imagenet-1k" not in [task.id for task in scored]
    assert sum(task.test_sizes["elevater"] for task in scored) == 192_677
    assert sum(task.classes or 0 for task in scored) == 1_151


@pytest.mark.parametrize("task", [*registered_tasks("elevater"), *registered_tasks("demo")], ids=lambda task: task.id)
def test_every_registered_task_is_complete(task):
    assert task.title
    assert task.classes
    assert task.test_sizes
    if task.metric == "map_11point":
        assert task.chance is None  # depends on the labels: the artificial end point lifts it
    else:
        assert task.chance == pytest.approx(0.5 if task.metric == "roc_auc" else 1 / task.classes, abs=5e-6)
    assert task.hub or task.obtain or task.test_sizes.keys() == {"demo"}


def test_demo_tasks_by_their_names_and_not_mixed_up_with_elevater():
    demo = {task.id: task for task in registered_tasks("demo")}
    assert set(demo) == {"emoji-style", "emoji-concepts", "fashion-mnist", "mnist"}
    elevater = {task.id: task for task in registered_tasks("elevater")}
    assert demo["mnist"].test_sizes == {"demo": 5000}
    assert elevater["mnist"].test_sizes["elevater"] == 10000


def test_trap_kitti_alone_is_squashed():
    assert [task.id for task in registered_tasks("elevater") if task.resize == "squash"] == ["kitti-distance"]


def test_trap_voc2007_crops_are_not_taken_for_the_multilabel_task(tmp_path):
    (tmp_path / "wds_voc2007").mkdir()
    voc = next(task for task in registered_tasks("elevater") if task.id == "voc-2007-classification")
    assert voc.find(tmp_path) is None
    (tmp_path / "wds_voc2007_multilabel").mkdir()
    assert voc.find(tmp_path) == tmp_path / "wds_voc2007_multilabel"


@pytest.mark.parametrize("name", ["wds_vtab-dtd", "vtab-dtd", "wds_dtd", "dtd", "wds_vtab-dtd_test"])
def test_accepted_local_folder_names(tmp_path, name):
    (tmp_path / name).mkdir()
    dtd = next(task for task in registered_tasks("elevater") if task.id == "dtd")
    assert dtd.find(tmp_path) == tmp_path / name


def test_the_size_says_which_test_set_it_is():
    eurosat = next(task for task in registered_tasks("elevater") if task.id == "eurosat_clip")
    assert eurosat.which_test_set(5000) == "elevater"
    assert eurosat.which_test_set(5400) == "wds"
    with pytest.raises(UserError, match=r"5,399 test images, expected 5,000 \(elevater\) or 5,400 \(wds\)"):
        eurosat.which_test_set(5399)
    assert Task(id="mine").which_test_set(17) == "unchecked"


def test_benchmark_from_a_folder_of_tasks_or_one_task(tmp_path):
    write_folder(tmp_path / "b", [0, 1])
    write_folder(tmp_path / "a", [[0, 1, 0]], kind="multilabel")
    (tmp_path / "notes").mkdir()
    benchmark = load_benchmark(tmp_path)
    assert benchmark.protocol == "wds"
    assert [(task.id, task.metric) for task in benchmark.tasks] == [("a", "map_11point"), ("b", "accuracy")]
    alone = load_benchmark(tmp_path / "b")
    assert [task.id for task in alone.tasks] == ["b"]
    assert alone.tasks[0].find(alone.data_root) == (tmp_path / "b").resolve()


def test_benchmark_from_a_yaml_file(tmp_path):
    (tmp_path / "birds.yaml").write_text(
        "data_root: data\n"
        "tasks:\n"
        "  - {id: owls, metric: mean_per_class, classes: 4, test_sizes: {ours: 40}}\n"
        "  - id: gulls\n"
    )
    benchmark = load_benchmark(tmp_path / "birds.yaml")
    assert (benchmark.name, benchmark.data_root) == ("birds", tmp_path / "data")
    assert [task.metric for task in benchmark.tasks] == ["mean_per_class", "accuracy"]


def test_a_typo_in_a_yaml_file_is_named(tmp_path):
    (tmp_path / "birds.yaml").write_text("tasks:\n  - {id: owls, metrik: accuracy}\n")
    with pytest.raises(UserError, match=r"birds\.yaml: tasks\.0\.metrik is not a setting"):
        load_benchmark(tmp_path / "birds.yaml")


def test_unknown_benchmark_task_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="--benchmark elevator: not one of elevater, demo"):
        load_benchmark("elevator")
    with pytest.raises(UserError, match=r"no classnames\.txt"):
        load_benchmark(tmp_path)
    with pytest.raises(UserError, match=r"--data-root .*nowhere: no such folder"):
        load_benchmark("elevater", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no task 'gtsbr'; did you mean gtsrb"):
        load_benchmark("elevater", tmp_path).select(["dtd", "gtsbr"])


def test_selection_keeps_the_rest_out():
    benchmark = load_benchmark("elevater", ".").select(["dtd", "cifar-10"])
    assert [task.id for task in benchmark.tasks] == ["cifar-10", "dtd"]
