"""Class names and prompts: their checksums, and equality with the lists that installed packages ship.

CLIP_benchmark is no dependency; with it, the checksums of its lists are checked against the package itself:
``uv run --with clip-benchmark==1.6.2 pytest tests/test_class_names.py``
"""

import importlib.util
import json
from pathlib import Path

import pytest

from focalclip.evaluation.opened import name_key
from focalclip.evaluation.protocols import lines_sha256, load_protocol
from focalclip.evaluation.task import registered_tasks

TASKS = {task.id: task for task in registered_tasks("elevater")}

# task: SHA-256 (first 12 digits) of its names in ELEVATER's label order, and of its templates
CHECKSUMS = """
caltech-101                     44dced67cfca d0359fcd9eb1
cifar-10                        bb3914949cec 1762a3675d32
cifar-100                       ad0410630bfb 1762a3675d32
country211                      027b30d283f3 4cb97b776857
dtd                             681d23b9cd3c 38047254790e
eurosat_clip                    ee2e41b9973e 84e63e79ba0b
fer-2013                        0fece1ddf1a3 a2b9b373f09c
fgvc-aircraft-2013b-variants102 331deff41262 d5ef16cd2372
food-101                        513e7f6450e6 ed37b8edb449
gtsrb                           953036bc5aed e330a5788817
hateful-memes                   62a880e9ac28 7a3553e5ccb7
kitti-distance                  ecc16a4f92ee 5678e420e37e
mnist                           29dd21f55e46 1b9b98b6c7bf
oxford-flower-102               5429e1ef6e0e 15a4cd24ceee
oxford-iiit-pets                4a5177fdf86b ee5e9e3f42e3
patch-camelyon                  27352df7ede1 f2f74ed87896
rendered-sst2                   2e61aa755804 1303d6e1f458
resisc45_clip                   3c2177013901 96ec3782664c
stanford-cars                   10033eecdd69 a9a744a57eb6
voc-2007-classification         7d877f185c80 ef16f614aadb
imagenet-1k                     571ae1c583b4 c078f4d4ced9
"""
# CLIP_benchmark 1.6.2: task, its key in en_classnames.json and the checksum of that list (-: not shipped), its key in
# en_zeroshot_classification_templates.json and the checksum of that list
PEER = """
caltech-101                     caltech101_vtab                8cd73f5d8e14 caltech101                     d0359fcd9eb1
cifar-10                        -                              -            cifar10                        1762a3675d32
cifar-100                       -                              -            cifar100                       1762a3675d32
country211                      country211                     027b30d283f3 country211                     4cb97b776857
dtd                             -                              -            dtd                            38047254790e
eurosat_clip                    eurosat                        ee2e41b9973e eurosat                        84e63e79ba0b
fer-2013                        fer2013                        0fece1ddf1a3 fer2013                        a2b9b373f09c
fgvc-aircraft-2013b-variants102 -                              -            fgvc_aircraft                  d5ef16cd2372
food-101                        -                              -            food101                        ed37b8edb449
gtsrb                           gtsrb                          953036bc5aed gtsrb                          e330a5788817
imagenet-1k                     imagenet1k                     571ae1c583b4 imagenet1k                     c078f4d4ced9
kitti-distance                  kitti_closest_vehicle_distance ecc16a4f92ee kitti_closest_vehicle_distance 5678e420e37e
mnist                           mnist                          29dd21f55e46 mnist                          1b9b98b6c7bf
oxford-flower-102               flowers                        5429e1ef6e0e flowers                        15a4cd24ceee
oxford-iiit-pets                pets                           50be1443390f pets                           ee5e9e3f42e3
patch-camelyon                  pcam                           27352df7ede1 pcam                           6bc4924b0f83
rendered-sst2                   -                              -            renderedsst2                   1303d6e1f458
resisc45_clip                   -                              -            resisc45                       4a25337a6d38
stanford-cars                   -                              -            cars                           a9a744a57eb6
voc-2007-classification         -                              -            voc2007_multilabel             ef16f614aadb
"""
TABLE = {line.split()[0]: line.split()[1:] for line in CHECKSUMS.strip().splitlines()}
PEER_TABLE = {line.split()[0]: line.split()[1:] for line in PEER.strip().splitlines()}


def peer_names(task_id):
    """Our names under its protocol, in its order: the two faces of Caltech-101 stand the other way round."""
    names = list(TASKS[task_id].under(load_protocol("clip_benchmark")).names)
    if task_id == "caltech-101":
        names[37], names[38] = names[38], names[37]
    return names


@pytest.mark.parametrize("task_id", TASKS)
def test_names_and_templates_have_their_checksums(task_id):
    task = TASKS[task_id]
    assert [lines_sha256(task.names)[:12], lines_sha256(task.templates)[:12]] == TABLE[task_id]


@pytest.mark.parametrize("task_id", PEER_TABLE)
def test_clip_benchmark_protocol_has_the_lists_of_clip_benchmark(task_id):
    _, names_sha, _, templates_sha = PEER_TABLE[task_id]
    if names_sha != "-":
        assert lines_sha256(peer_names(task_id))[:12] == names_sha
    assert lines_sha256(TASKS[task_id].under(load_protocol("clip_benchmark")).templates)[:12] == templates_sha


@pytest.mark.skipif(importlib.util.find_spec("clip_benchmark") is None, reason="clip_benchmark is not installed")
@pytest.mark.parametrize("task_id", PEER_TABLE)
def test_the_checksums_are_of_what_clip_benchmark_ships(task_id):
    folder = Path(importlib.util.find_spec("clip_benchmark").submodule_search_locations[0]) / "datasets"
    names_key, names_sha, templates_key, templates_sha = PEER_TABLE[task_id]
    templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())[templates_key]
    assert lines_sha256(templates)[:12] == templates_sha
    if names_key != "-":
        names = json.loads((folder / "en_classnames.json").read_text())[names_key]
        assert lines_sha256(names)[:12] == names_sha
        assert peer_names(task_id) == names


def test_imagenet_is_open_clips_list_and_timms_wordnet_ids():
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    task = TASKS["imagenet-1k"]
    assert task.names == tuple(IMAGENET_CLASSNAMES)
    assert [t.replace("{c}", "dog") for t in task.templates] == [t("dog") for t in OPENAI_IMAGENET_TEMPLATES]
    assert task.codes[0] == "n01440764"
    assert list(task.codes) == sorted(set(task.codes))
    assert (task.names[0], task.names[-1]) == ("tench", "toilet paper")


def test_country_codes_stand_beside_their_names():
    task = TASKS["country211"]
    assert list(task.codes) == sorted(set(task.codes))
    pairs = dict(zip(task.codes, task.names, strict=True))
    assert [pairs[code] for code in ("AD", "CH", "GB", "KP", "XK", "ZW")] == [
        "Andorra", "Switzerland", "United Kingdom", "North Korea", "Kosovo", "Zimbabwe",
    ]  # fmt: skip


@pytest.mark.parametrize("task_id", TASKS)
def test_names_that_differ_still_do_without_case_and_punctuation(task_id):
    names = set(TASKS[task_id].names)
    assert len({name_key(name) for name in names}) == len(names)


@pytest.mark.parametrize("task_id", TASKS)
def test_no_spelling_belongs_to_two_classes(task_id):
    task = TASKS[task_id]
    owner = {name_key(name): name for name in task.names}
    for group in task.aliases:
        owners = {owner[name_key(spelling)] for spelling in group if name_key(spelling) in owner}
        assert len(owners) == 1, group
    spellings = [name_key(spelling) for group in task.aliases for spelling in group]
    assert len(spellings) == len(set(spellings))


def test_respelt_names_differ_in_case_and_punctuation_alone():
    changed = [task for task in TASKS.values() if "clip_benchmark" in task.protocols]
    respelt = {task.id: task.protocols["clip_benchmark"].respelt for task in changed}
    assert len(respelt["oxford-iiit-pets"]) == 25  # the dogs: CLIP_benchmark writes them with capitals
    for pairs in respelt.values():
        assert all(name_key(ours) == name_key(theirs) and ours != theirs for ours, theirs in pairs.items())
