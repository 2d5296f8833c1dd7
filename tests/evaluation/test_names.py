"""Data joined to a task's classes by name, on task folders that are written in other orders and spellings."""

import numpy as np
import pytest
from wds_folder import write_folder

from focalclip.base.errors import UserError
from focalclip.evaluation.data import open_task, read_task_folder
from focalclip.evaluation.opened import join, places
from focalclip.evaluation.protocols import load_protocol
from focalclip.evaluation.task import Task, registered_tasks

ELEVATER = {task.id: task for task in registered_tasks("elevater")}


def folder(tmp_path, names, labels=(0,), templates=("a {c}.",), kind=None):
    """A task folder as read."""
    path = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
    return read_task_folder(write_folder(path, list(labels), names=names, templates=templates, kind=kind))


def birds(**settings):
    return Task(id="birds", classes=3, **{"names": ("Barn Owl", "gull", "Wren"), "templates": ("the {c}",)} | settings)


def test_any_order_and_spelling_of_the_folder_gives_the_same_names_and_labels(tmp_path):
    for names in (("Barn Owl", "gull", "Wren"), ("wren", "barn_owl", "GULL"), ("Gull", "WREN", "Barn-Owl")):
        truth = [1, 2, 0, 1]  # gull, wren, owl, gull
        labels = [[name.casefold()[:2] for name in names].index(start) for start in ("gu", "wr", "ba", "gu")]
        joined = join(birds(), folder(tmp_path, names, labels)).data
        assert joined.class_names == ("Barn Owl", "gull", "Wren")
        assert joined.templates == ("the {c}",)
        assert joined.labels.tolist() == truth
        assert joined.labels.dtype == np.int64


def test_multi_label_columns_move_with_their_names(tmp_path):
    task = birds(metric="map")
    vectors = [[1, 0, 0], [0, 1, 1]]
    joined = join(task, folder(tmp_path, ("wren", "gull", "barn owl"), vectors, kind="multilabel")).data
    np.testing.assert_array_equal(joined.labels, [[False, False, True], [True, True, False]])


def test_names_that_fit_nowhere_are_refused_by_name(tmp_path):
    data = folder(tmp_path, ("barn owl", "seagull", "wren"))
    with pytest.raises(UserError, match=r"do not fit birds: 'seagull' in the data, 'gull' in the task; rename them"):
        join(birds(), data)
    twice = folder(tmp_path, ("wren", "gull", "Wren"))
    with pytest.raises(UserError, match="'wren' in the data, 'Barn Owl' in the task"):
        join(birds(), twice)


def test_a_wrong_number_of_classes_or_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="2 class names, the task has 3"):
        join(birds(), folder(tmp_path, ("wren", "gull")))
    sized = birds(sizes={"test": {"ours": 4}, "train": {"ours": 1}})
    with pytest.raises(UserError, match=r"1 test images, expected 4 \(ours\)"):
        join(sized, folder(tmp_path, ("wren", "gull", "barn owl")))
    assert join(sized, folder(tmp_path, ("wren", "gull", "barn owl")), split="train").data.labels.tolist() == [2]


def test_a_task_without_names_takes_the_folders_own(tmp_path):
    data = folder(tmp_path, ("b", "a"), [1, 0], templates=("one {c}", "two {c}"))
    opened = join(Task(id="own"), data)
    joined = opened.data
    assert (joined.class_names, joined.templates) == (("b", "a"), ("one {c}", "two {c}"))
    assert (opened.differences, opened.test_set) == ((), "unchecked")


def test_names_that_differ_in_punctuation_alone_need_their_exact_spelling(tmp_path):
    task = Task(id="languages", classes=3, names=("C", "C++", "Go"), templates=("{c}",))
    assert places(task, folder(tmp_path, ("go", "C++", "C"))).tolist() == [2, 1, 0]
    with pytest.raises(UserError, match=r"may be any of 'C', 'C\+\+'; spell it as one"):
        places(task, folder(tmp_path, ("go", "c++", "c")))


def test_equal_names_are_taken_in_order_and_codes_and_aliases_fit(tmp_path):
    task = Task(
        id="t", classes=4, names=("missile", "cat", "missile", "off-center face"), templates=("{c}",),
        codes=("n3", "n1", "n9", "n5"), aliases=(("missile", "projectile"), ("off-center face", "Faces")),
    )  # fmt: skip
    assert places(task, folder(tmp_path, ("missile", "missile", "faces", "cat"))).tolist() == [0, 2, 3, 1]
    assert places(task, folder(tmp_path, ("n9", "n3", "n1", "n5"))).tolist() == [2, 0, 1, 3]
    assert places(task, folder(tmp_path, ("projectile", "cat", "missile", "Faces"))).tolist() == [2, 1, 0, 3]


def test_what_was_done_is_said_in_sentences(tmp_path):
    task = birds(differences=("the mirror has one image more",), note="scored as elsewhere")
    data = folder(tmp_path, ("gull", "Barn_Owl", "Wren"))

    def differences(source, sizes):
        return join(task.model_copy(update={"data": source, "sizes": {"test": sizes}}), data).differences

    assert differences("elevater", {"wds": 1, "elevater": 2}) == (
        "the mirror has one image more",
        "scored as elsewhere",
        "the data numbers 2 of 3 classes otherwise: joined by name",
        "the data spells 1 of 3 names otherwise: the protocol's are used",
        "the protocol's 1 prompts are used instead of the data's 1",
    )
    assert differences("elevater", {"elevater": 1})[0] == "scored as elsewhere"  # the images that it is defined on
    assert differences("wds", {"elevater": 1, "wds": 1})[0] == "scored as elsewhere"
    assert differences("wds", {"elevater": 1})[0] == "the mirror has one image more"


@pytest.mark.parametrize("name", ["Ram C/V Cargo Van Minivan 2012", "ram c v cargo van minivan 2012"])
def test_stanford_cars_spellings(tmp_path, name):
    names = [n if not n.startswith("Ram") else name for n in reversed(ELEVATER["stanford-cars"].names)]
    assert places(ELEVATER["stanford-cars"], folder(tmp_path, names)).tolist() == list(range(195, -1, -1))


def test_known_other_spellings_of_the_20(tmp_path):
    other = {
        "fgvc-aircraft-2013b-variants102": {"F-16A-B": "F-16A/B", "F-A-18": "F/A-18"},
        "oxford-iiit-pets": {"american bulldog": "American_Bulldog", "Sphynx": "sphynx"},
        "voc-2007-classification": {"diningtable": "dining table", "tvmonitor": "TV/monitor"},
        "cifar-100": {"aquarium fish": "aquarium_fish", "crab": "cra"},
        "eurosat_clip": {"annual crop land": "AnnualCrop", "lake or sea": "SeaLake"},
        "caltech-101": {"off-center face": "Faces", "centered face": "Faces_easy", "background": "BACKGROUND_Google"},
        "fer-2013": {"happy": "happiness", "surprised": "Surprise"},
        "country211": {"Switzerland": "CH", "Kosovo": "XK"},
        "oxford-flower-102": {"pink and yellow dahlia": "pink-yellow dahlia?", "air plant": "ball moss"},
    }  # fmt: skip
    for task_id, spellings in other.items():
        task = ELEVATER[task_id]
        names = [spellings.get(name, name) for name in task.names[::-1]]
        multilabel = {"labels": [[1] + [0] * 19], "kind": "multilabel"} if task.metric == "map_11point" else {}
        found = places(task, folder(tmp_path, names, **multilabel))
        assert found.tolist() == list(range(len(names)))[::-1], task_id


def test_unicl_and_openai_names_fit_each_other_both_ways(tmp_path):
    openai, unicl = ELEVATER["imagenet-1k"], ELEVATER["imagenet-1k"].under(load_protocol("unicl"))
    assert places(unicl, folder(tmp_path, openai.names)).tolist() == list(range(1000))
    assert places(openai, folder(tmp_path, unicl.names)).tolist() == list(range(1000))
    assert places(openai, folder(tmp_path, openai.codes[::-1])).tolist() == list(range(1000))[::-1]


def test_an_empty_line_is_a_name_only_where_the_task_says_so(tmp_path):
    clevr = next(task for task in registered_tasks("vtab_plus") if task.id == "clevr-distance")
    place = write_folder(tmp_path / "wds_vtab-clevr_closest_object_distance", [3, 5], names=clevr.names)
    data = join(clevr.model_copy(update={"sizes": {}}), open_task(clevr, tmp_path, {})).data
    assert (data.class_names[3], data.labels.tolist()) == ("", [3, 5])
    with pytest.raises(UserError, match="line 4 is empty"):
        open_task(Task(id=place.name), tmp_path, {})
