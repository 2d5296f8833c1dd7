"""Where other harnesses fail for reasons of data: one test for each such trap."""

import csv
import hashlib
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from wds_folder import picture, png, tiny_model, write_folder

from focalclip.base.errors import UserError
from focalclip.evaluation.data import Unavailable, decode, open_task
from focalclip.evaluation.data.hub import wanted_files
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.task import Task, registered_tasks

ELEVATER = {task.id: task for task in registered_tasks("elevater")}


@pytest.mark.trap("0.9", "fewer shards than workers")
def test_trap_fewer_shards_than_workers(tmp_path, monkeypatch):
    """clip_benchmark with current webdataset crashes where a split has fewer tars than loader workers."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    labels = [0, 1, 2, 0, 1, 2, 0]
    features = {}
    for shard_size in (1, 3, 7):
        write_folder(tmp_path / f"in{shard_size}", labels, shard_size=shard_size)
        data = open_task(Task(id=f"in{shard_size}"), tmp_path, {})
        with torch.no_grad():
            found = encode_images(tiny_model(), data.entries, batch_size=7, progress=False)
        features[shard_size] = found.embeds
        assert found.readable.all()
    assert torch.equal(features[1], features[7])
    assert torch.equal(features[3], features[7])


@pytest.mark.parametrize(("task", "size"), [("eurosat_clip", 5400), ("resisc45_clip", 6300), ("fer-2013", 7178)])
def test_trap_mirrors_hold_other_test_sets_than_elevater(tmp_path, task, size):
    """The size tells a mirror's test set from ELEVATER's, and neither passes for the other."""
    task = ELEVATER[task]
    names = [f"class {i}" for i in range(task.classes)]
    write_folder(
        tmp_path / task.folder_names[0], [0] * size, names=names, images=[png([[[0, 0, 0]]])] * size, shard_size=size
    )
    data = open_task(task, tmp_path, {})
    assert task.which_set(len(data.entries)) == "wds"
    with pytest.raises(UserError, match="test images, expected"):
        task.which_set(len(data.entries) - 1)


def test_trap_hateful_memes_has_no_mirror(tmp_path, monkeypatch):
    """The licence forbids mirrors: its task says what to do, and its authors' own files are read as they are."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("nothing is there to be asked"))
    task = ELEVATER["hateful-memes"]
    assert task.hub is None
    for root in (None, tmp_path):
        with pytest.raises(Unavailable, match="accept the licence of the Hateful Memes data set"):
            open_task(task, root, {})
    folder = tmp_path / task.folders[0]
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "01.png").write_bytes(picture(0))
    (folder / "dev.jsonl").write_text('{"id": 1, "img": "img/01.png", "label": 1, "text": "look"}\n')
    data = open_task(task.model_copy(update={"templates": ("a {c}.",)}), tmp_path, {})
    assert (data.labels.tolist(), data.class_names[1]) == ([1], "hatespeech meme")


@pytest.mark.trap("0.1", "the official download host is dead")
def test_trap_the_official_host_is_dead_and_never_contacted(tmp_path, monkeypatch):
    """ELEVATER's host is gone: with a data root no host at all is looked up, without one the hub alone."""
    from huggingface_hub.utils import close_session

    hosts = []

    def look_up(host, *_, **__):
        hosts.append(host.decode() if isinstance(host, bytes) else host)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    close_session()  # of other tests: offline ones
    for task in ELEVATER.values():
        with pytest.raises(Unavailable):
            open_task(task, tmp_path, {})
    assert not hosts
    for task in ELEVATER.values():
        with pytest.raises(Unavailable):
            open_task(task, None, {})
    assert set(hosts) == {"huggingface.co"}
    assert len(hosts) >= sum(task.hub is not None for task in ELEVATER.values())
    close_session()


@pytest.mark.trap("5.2 download", "no val split on the hub (evalscope #741)")
def test_trap_mirrors_without_val(tmp_path):
    """The mirrors made from VTAB have no val: that is said, with where one can be cut, and is no crash."""
    folder = write_folder(tmp_path / "mine", [0, 1])
    (folder / "test").rename(folder / "train")
    write_folder(folder, [2])
    task = Task(id="mine")
    assert open_task(task, tmp_path, {}, "train").labels.tolist() == [0, 1]
    with pytest.raises(
        Unavailable, match=r"no val split \(it has train, test\); a validation set can be cut from train"
    ):
        open_task(task, tmp_path, {}, "val")


@pytest.mark.trap("5.2 download", "split names (#104)")
def test_trap_split_names(tmp_path):
    """Folders say val, valid or validation; callers say val, and a misspelt split is not another one."""
    for i, word in enumerate(("val", "valid", "validation", "Val")):
        for kind, path in (("a", "ant/1.png"), ("b", "bee/1.png")):
            file = tmp_path / f"set{i}" / word / path
            file.parent.mkdir(parents=True)
            file.write_bytes(picture(ord(kind)))
        task = Task(id=f"set{i}", templates=("{c}",))
        assert open_task(task, tmp_path, {}, "val").labels.tolist() == [0, 1]
        with pytest.raises(Unavailable, match=r"no test split \(it has val\)"):
            open_task(task, tmp_path, {}, "test")
        with pytest.raises(UserError, match="'validation' is not one of train, val, test"):
            open_task(task, tmp_path, {}, "validation")


@pytest.mark.trap("5.2 download", "path joins of Windows (evalscope #619)")
def test_trap_windows_path_joins(tmp_path, monkeypatch):
    """What the hub is asked for, and the keys that a result's hash is made from, have / on every system."""
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os.path, "sep", "\\")
    monkeypatch.setattr(os.path, "join", lambda *parts: "\\".join(map(str, parts)))
    for split in ("train", "val", "test"):
        assert f"{split}/*" in wanted_files(split)
        assert not any("\\" in pattern for pattern in wanted_files(split, "plain"))
    monkeypatch.undo()
    (tmp_path / "mine" / "test" / "ant").mkdir(parents=True)
    (tmp_path / "mine" / "test" / "bee").mkdir()
    (tmp_path / "mine" / "test" / "ant" / "1.png").write_bytes(picture(0))
    (tmp_path / "mine" / "test" / "bee" / "2.png").write_bytes(picture(1))
    data = open_task(Task(id="mine", templates=("{c}",)), tmp_path, {})
    assert [entry.key for entry in data.entries] == ["test/ant/1.png", "test/bee/2.png"]


def test_trap_label_orders_differ_between_sources(tmp_path, monkeypatch):
    """FER2013's authors number sad 4 and surprised 5, ELEVATER neutral 4 and sad 5: names come with the source."""
    (tmp_path / "fer2013").mkdir()
    faces = np.random.default_rng(0).integers(0, 256, (3, 48 * 48), dtype=np.uint8)
    with (tmp_path / "fer2013" / "fer2013.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["emotion", "pixels", "Usage"])
        for label, pixels, usage in zip((4, 6, 0), faces, ("PublicTest", "PrivateTest", "Training"), strict=True):
            rows.writerow([label, " ".join(map(str, pixels)), usage])
    md5 = hashlib.md5((tmp_path / "fer2013" / "fer2013.csv").read_bytes()).hexdigest()
    make = torchvision.datasets.FER2013
    monkeypatch.setattr(make, "_RESOURCES", {**make._RESOURCES, "fer": ("fer2013.csv", md5)})
    task = ELEVATER["fer-2013"].model_copy(update={"templates": ("{c}",)})
    data = open_task(task, tmp_path, {})
    assert [data.class_names[label] for label in data.labels] == ["sad", "neutral"]
    assert np.array_equal(np.asarray(decode(data.entries[1].read()))[..., 0].ravel(), faces[1])


def test_trap_the_folder_voc2007_is_another_task(tmp_path):
    """CLIP_benchmark's voc2007 is 14,976 crops with one label each: it never stands in for VOC classification."""
    write_folder(tmp_path / "wds_voc2007", [0, 1, 2])
    with pytest.raises(Unavailable, match=r"needs .*wds_voc2007_multilabel"):
        open_task(ELEVATER["voc-2007-classification"], tmp_path, {})


@pytest.mark.trap("5.2 prompts", "a folder's prompts overwritten by defaults (#109)")
def test_trap_prompts_of_a_folder_are_not_overwritten(tmp_path):
    """CLIP_benchmark 1.5 put its own prompts in place of a folder's; the reader returns the folder's."""
    write_folder(tmp_path / "mine", [0], templates=("the folder's {c}.",))
    assert open_task(Task(id="mine", templates=("another {c}.",)), tmp_path, {}).templates == ("the folder's {c}.",)


@pytest.mark.trap("0.9", "import needs an undeclared package")
@pytest.mark.trap("5.3", "NLTK downloads at import")
def test_trap_undeclared_packages_at_import(tmp_path):
    """Without requests, webdataset, datasets, huggingface_hub, torchvision or scipy a local wds folder is read."""
    write_folder(tmp_path / "mine", [0, 2])
    script = (
        "import sys\n"
        "for name in 'requests webdataset datasets huggingface_hub torchvision scipy torch'.split():\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from focalclip.evaluation.data import open_task\n"
        "from focalclip.evaluation.task import Task\n"
        "print(open_task(Task(id='mine'), Path(sys.argv[1]), {}).labels.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "[0, 2]\n", done.stderr
