"""A path that was found is kept, what is not data is passed over, and no task's fault or name reaches beyond it."""

import json
import zipfile

import pytest
from coloured_tasks import ColourModel, write_bench, write_class_folders, write_pure, write_pure_wds
from wds_folder import tiny_model, write_tar, zero_shot

from focalclip.base.errors import UserError
from focalclip.data.folders import FolderTree, is_class_folders, read_classes
from focalclip.data.reader import files_below, is_data
from focalclip.data.shards import resolve_shards
from focalclip.evaluation.data import open_task
from focalclip.evaluation.data.libraries import parquet_splits
from focalclip.evaluation.features.extract import find_pictures as pictures_to_extract
from focalclip.evaluation.probes.result import ProbeSettings
from focalclip.evaluation.probes.run import probe
from focalclip.evaluation.result import Result
from focalclip.evaluation.task import Task, load_benchmark
from focalclip.explanation.figures import find_pictures as pictures_to_explain


def values(benchmark):
    result = zero_shot(ColourModel(), benchmark)
    assert not result.missing
    assert not result.failed
    return {name: (task.value, task.n, task.classes) for name, task in result.tasks.items()}


# A path that was found is kept


def test_tasks_of_one_folder_are_measured_where_they_were_found(tmp_path):
    """``foo`` beside ``wds_foo``: each is looked for by no name, so neither stands in for the other."""
    write_pure_wds(tmp_path / "bench" / "foo")
    write_pure_wds(tmp_path / "bench" / "wds_foo", labels=(2, 0, 1))
    write_pure_wds(tmp_path / "bench" / "wds_foo_test", labels=(0, 1, 1))
    found = values(str(tmp_path / "bench"))
    assert {name: value for name, (value, _, _) in found.items()} == {"foo": 1, "wds_foo": 0, "wds_foo_test": 2 / 3}
    assert values(tmp_path / "bench" / "foo") == {"foo": (1, 3, 3)}


def test_a_users_own_task_takes_the_folder_that_is_called_like_it(tmp_path):
    write_pure_wds(tmp_path / "foo")
    write_pure_wds(tmp_path / "wds_foo", labels=(2, 0, 1))
    (tmp_path / "mine.yaml").write_text("tasks: [{id: foo}, {id: wds_foo}, {id: other, folders: [foo]}]")
    found = values(tmp_path / "mine.yaml")
    assert {name: value for name, (value, _, _) in found.items()} == {"foo": 1, "wds_foo": 0, "other": 1}


def test_linked_tasks_have_the_links_name_and_data(tmp_path):
    write_pure_wds(tmp_path / "disk" / "abc")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "colours").symlink_to(tmp_path / "disk" / "abc")
    write_pure_wds(tmp_path / "bench" / "abc", labels=(2, 0, 1))
    assert values(str(tmp_path / "bench")) == {"abc": (0, 3, 3), "colours": (1, 3, 3)}
    (tmp_path / "linked").symlink_to(tmp_path / "bench")
    assert load_benchmark(tmp_path / "linked").name == "linked"
    assert values(tmp_path / "linked" / "colours") == {"colours": (1, 3, 3)}


def test_a_task_without_class_names_is_named_and_not_passed_over(tmp_path):
    write_pure_wds(tmp_path / "good")
    (write_pure_wds(tmp_path / "half") / "classnames.txt").unlink()
    result = zero_shot(ColourModel(), tmp_path)
    assert list(result.tasks) == ["good"]
    assert "classnames.txt: missing" in result.failed["half"]


@pytest.mark.parametrize("counted", [True, False])
def test_shards_keep_the_names_that_they_have(tmp_path, counted):
    folder = write_pure_wds(tmp_path / "t")
    (folder / "test" / "0.tar").rename(folder / "test" / "00000.tar")
    (folder / "test" / "._00000.tar").write_bytes(b"of macOS")
    if not counted:
        (folder / "test" / "nshards.txt").unlink()
    assert read_classes(folder, "test").labels.tolist() == [0, 1, 2]


# What is not data


@pytest.mark.parametrize("extra", ["__MACOSX", ".ipynb_checkpoints", "lost+found", "@eaDir", ".git", "docs"])
def test_a_folder_beside_the_splits_makes_no_classes_of_them(tmp_path, extra):
    write_class_folders(tmp_path / "t", ("train", "test"))
    (tmp_path / "t" / extra).mkdir()
    (tmp_path / "t" / extra / "notes.txt").write_text("no picture")
    if extra != "docs":  # copies of pictures, as macOS and Jupyter leave them
        write_pure(tmp_path / "t" / extra / "red" / "._test0.png", "green")
        write_pure(tmp_path / "t" / extra / "test0-checkpoint.png", "green")
    assert values(write_bench(tmp_path, "t")) == {"t": (1, 9, 3)}


def test_pictures_beside_the_splits_are_a_fault_and_not_classes(tmp_path):
    write_class_folders(tmp_path / "t", ("train", "test"))
    write_class_folders(tmp_path / "t", ("unlabelled",))
    result = zero_shot(ColourModel(), write_bench(tmp_path, "t"))
    assert "holds test, train and beside them pictures in unlabelled" in result.failed["t"]


def test_two_folders_of_one_split_are_a_fault(tmp_path):
    write_class_folders(tmp_path / "t", ("Test", "testing"))
    result = zero_shot(ColourModel(), write_bench(tmp_path, "t"))
    assert "Test and testing are both the split test" in result.failed["t"]


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name, colour in (("bus", "red"), ("train", "blue")):
        write_pure(tmp_path / "t" / name / "0.png", colour)
    assert is_class_folders(tmp_path / "t")
    data = open_task(Task(id="t", templates=("{c}",)), tmp_path, {})
    assert data.class_names == ("bus", "train")


@pytest.mark.parametrize("junk", [".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/x.png", "._test0.png", ".x.png"])
def test_hidden_pictures_inside_a_class_are_passed_over(tmp_path, junk):
    write_class_folders(tmp_path / "t")
    write_pure(tmp_path / "t" / "test" / "red" / junk, "green")
    assert values(write_bench(tmp_path, "t")) == {"t": (1, 9, 3)}


def test_a_folder_without_pictures_is_no_class(tmp_path):
    write_class_folders(tmp_path / "t", ("train", "test"))
    (tmp_path / "t" / "test" / "annotations").mkdir()
    assert values(write_bench(tmp_path, "t")) == {"t": (1, 9, 3)}


def test_cycles_of_links_end(tmp_path):
    write_class_folders(tmp_path / "t")
    (tmp_path / "t" / "test" / "red" / "up").symlink_to(tmp_path / "t")
    (tmp_path / "t" / "test" / "red" / "itself").symlink_to("itself")
    (tmp_path / "t" / "test" / "itself").symlink_to("itself")
    assert values(write_bench(tmp_path, "t")) == {"t": (1, 9, 3)}


def test_a_link_to_a_folder_is_a_folder_everywhere(tmp_path):
    write_class_folders(tmp_path / "disk")
    (tmp_path / "t" / "test").mkdir(parents=True)
    for colour in ("red", "green", "blue"):
        (tmp_path / "t" / "test" / colour).symlink_to(tmp_path / "disk" / "test" / colour)
    assert values(write_bench(tmp_path, "t")) == {"t": (1, 9, 3)}
    assert len(pictures_to_extract(tmp_path / "t")[0]) == 9


def test_one_rule_for_every_reader(tmp_path):
    folder = tmp_path / "x"
    for name in ("a.png", "._a.png", ".hidden/b.png", "__MACOSX/._a.png", "in/.ipynb_checkpoints/c.png"):
        write_pure(folder / name, "red")
    (folder / "Thumbs.db").write_bytes(b"")
    assert files_below(folder) == FolderTree(folder).paths("") == ["a.png"]
    assert pictures_to_extract(folder) == ([folder / "a.png"], 0)
    assert pictures_to_explain([folder]) == [folder / "a.png"]
    for name in ("train-0.parquet", "._train-0.parquet", ".cache/train-1.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert parquet_splits(folder) == {"train": [folder / "train-0.parquet"]}
    for name in ("0.tar", "._0.tar"):
        write_tar(tmp_path / "shards" / name, [])
    assert resolve_shards(str(tmp_path / "shards")) == [tmp_path / "shards" / "0.tar"]
    assert is_data("a/b.c/d..png")
    assert not is_data("a/.b/c.png")


def test_archives_of_macos(tmp_path):
    """A zip made by macOS holds a shadow of every file."""
    write_class_folders(tmp_path / "made")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("label.txt", "red\ngreen\nblue\n")
        archive.writestr("__MACOSX/._label.txt", "shadow")
        for number, colour in enumerate(("red", "green", "blue")):
            archive.write(tmp_path / "made" / "test" / colour / "test0.png", f"test/{number}/a.png")
            archive.writestr(f"test/{number}/._a.png", b"shadow")
            archive.writestr(f"__MACOSX/test/{number}/._a.png", b"shadow")
        archive.writestr("test/.DS_Store", b"")
    assert values(write_bench(tmp_path, "t")) == {"t": (1, 3, 3)}


# No fault of one task ends the others


class Faulty(ColourModel):
    """Raises what nobody foresaw at one prompt."""

    def tokenizer(self, texts):
        if "a bad thing" in texts:
            raise KeyError("bad")
        return super().tokenizer(texts)


def test_whatever_one_task_raises_the_others_are_measured(tmp_path):
    write_class_folders(tmp_path / "first", ("train", "test"), count=6)
    write_class_folders(tmp_path / "last", ("train", "test"), count=6)
    for split in ("train", "test"):
        write_pure(tmp_path / "first" / split / "bad" / "x.png", "red")
    bench = write_bench(tmp_path, "first", "last")
    result = zero_shot(Faulty(), bench)
    assert list(result.tasks) == ["last"]
    assert result.failed["first"].startswith("KeyError: 'bad' (raised at test_kept_places.py:")
    probes = probe(Faulty(), bench, ProbeSettings(shots=(2,), methods=("knn",), seeds=(0,)), progress=False)
    assert list(probes.tasks) == ["last"]
    assert probes.failed["first"].startswith("KeyError: 'bad'")


def test_a_tokenizer_that_tells_no_prompts_apart_measures_nothing(tmp_path):
    write_class_folders(tmp_path / "t")
    model = ColourModel()
    model.tokenizer = lambda texts: ColourModel().tokenizer(["unknown"] * len(texts))
    result = zero_shot(model, write_bench(tmp_path, "t"))
    assert "the tokenizer makes the same tokens of all 3 texts" in result.failed["t"]


# Names do not lead out of a folder


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", "a\\b"])
def test_ids_and_names_are_those_of_one_folder(tmp_path, name):
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({"tasks": [{"id": name}]}))
    with pytest.raises(UserError, match=r"is not the name of one folder|should not be empty"):
        load_benchmark(mine)
    mine.write_text(json.dumps({"name": name, "tasks": [{"id": "t"}]}))
    with pytest.raises(UserError, match=r"cannot be the name of a file|should not be empty"):
        load_benchmark(mine)


@pytest.mark.parametrize("place", ["../x", "/x", "a/../../x"])
def test_folders_and_sources_lie_below_the_data_root(tmp_path, place):
    (tmp_path / "mine.yaml").write_text(json.dumps({"tasks": [{"id": "t", "folders": [place]}]}))
    with pytest.raises(UserError, match="leads out of the data root"):
        load_benchmark(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="leads out of the data root"):
        open_task(Task(id="t", source=f"hf:{place}"), tmp_path, {})


def test_two_tasks_of_one_id_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("tasks: [{id: t}, {id: t}]")
    with pytest.raises(UserError, match="two tasks have the id 't'"):
        load_benchmark(tmp_path / "mine.yaml")


def test_a_results_task_names_are_checked_before_files_are_named_after_them(tmp_path):
    write_pure_wds(tmp_path / "t")
    path = zero_shot(tiny_model(), tmp_path / "t").write(tmp_path / "out" / "r.json")
    path.write_text(path.read_text().replace('"t": {', '"../../t": {'))
    with pytest.raises(UserError, match="is not the name of a task"):
        Result.read(path)


def test_a_result_without_mistakes_is_read_back(tmp_path):
    """Its predictions hold no pictures of mistakes, which were not read: the next run of the command died of it."""
    write_pure_wds(tmp_path / "t")
    path = zero_shot(ColourModel(), tmp_path / "t").write(tmp_path / "r.json")
    assert Result.read(path).tasks["t"].predictions.n == 3


def test_what_is_not_data_in_the_folders_of_torchvision_and_inside_tars(tmp_path):
    for name in ("AnnualCrop/a.jpg", "AnnualCrop/._a.jpg", "SeaLake/b.jpg", "SeaLake/.ipynb_checkpoints/b.jpg"):
        write_pure(tmp_path / "eurosat" / "2750" / name, "red")
    task = Task(id="mine", source="torchvision:EuroSAT", templates=("{c}",))
    data = open_task(task, tmp_path, {})
    assert [entry.key for entry in data.entries] == ["eurosat/2750/AnnualCrop/a.jpg", "eurosat/2750/SeaLake/b.jpg"]
    assert data.labels.tolist() == [0, 1]
    folder = write_pure_wds(tmp_path / "t")
    picture = (tmp_path / "eurosat" / "2750" / "SeaLake" / "b.jpg").read_bytes()
    members = [("a.png", picture), ("a.cls", b"0"), ("._a.png", b"shadow"), (".ipynb_checkpoints/a-1.png", picture)]
    write_tar(folder / "test" / "0.tar", members)
    assert read_classes(folder, "test").labels.tolist() == [0]
