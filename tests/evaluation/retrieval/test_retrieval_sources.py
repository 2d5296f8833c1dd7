"""Every layout that a retrieval set comes in, written here as its owners write it."""

import json

import pytest
from wds_folder import picture, write_folder, write_tar

from focalclip.base.errors import UserError
from focalclip.data.folders import CLASS_FOLDERS, TASK_FOLDER
from focalclip.data.sources import SHARDS
from focalclip.data.tables import CAPTION_FILE, TABLE
from focalclip.evaluation.retrieval.pairs import open_pairs


def write_wds(folder, captions_of, shard_size=3, split="test"):
    """A retrieval set as clip_benchmark's exporter writes it: one caption per line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    starts = range(0, len(captions_of), shard_size)
    for shard, start in enumerate(starts):
        members = []
        for i in range(start, min(start + shard_size, len(captions_of))):
            members.append((f"s{i:07d}.png", picture(i)))
            members.append((f"s{i:07d}.txt", "\n".join(captions_of[i]).encode()))
        write_tar(folder / split / f"{shard}.tar", members)
    (folder / split / "nshards.txt").write_text(str(len(starts)))
    return folder


def write_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))


CAPTIONS = [["a cat", "ein Kätzchen"], ["a dog"], ["an owl", "a bird", "an owl"], ["a bus"]]


def test_wds_folder(tmp_path):
    data = open_pairs(write_wds(tmp_path / "wds_pets", CAPTIONS))
    assert data.name == "wds_pets"
    assert data.captions == ("a cat", "ein Kätzchen", "a dog", "an owl", "a bird", "an owl", "a bus")
    assert data.pairs.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [2, 4], [2, 5], [3, 6]]
    assert [entry.read() for entry in data.entries] == [picture(i) for i in range(4)]
    assert data.entries[3].name == "test/1.tar:s0000003"


def test_limits_take_from_the_front(tmp_path):
    data = open_pairs(write_wds(tmp_path / "t", CAPTIONS), limit=3, captions_per_image=2)
    assert data.captions == ("a cat", "ein Kätzchen", "a dog", "an owl", "a bird")
    assert len(data.entries) == 3


def test_trap_a_split_with_fewer_shards_than_loader_workers(tmp_path):
    assert len(open_pairs(write_wds(tmp_path / "t", CAPTIONS, shard_size=100)).entries) == 4


def test_other_splits_of_a_wds_folder(tmp_path):
    folder = write_wds(write_wds(tmp_path / "t", CAPTIONS), CAPTIONS[:2], split="val")
    assert len(open_pairs(folder, split="val").entries) == 2
    with pytest.raises(UserError, match="splits that are there: test, val"):
        open_pairs(folder, split="train")


def write_training_shard(path, samples):
    members = []
    for key, parts in samples.items():
        members += [(f"{key}.{extension}", data) for extension, data in parts.items()]
    return write_tar(path, members)


def test_training_shards_by_folder_and_by_pattern(tmp_path):
    record = json.dumps({"captions": ["a cat", "kitty"], "keywords": ["animal"]}).encode()
    for i in range(2):
        write_training_shard(
            tmp_path / "train" / f"{i:03d}.tar",
            {
                f"{i}a": {"png": picture(0), "txt": b"a cat", "json": record},
                f"{i}b": {"png": picture(1), "txt": b"dog"},
            },
        )
    for source in (tmp_path / "train", f"{tmp_path}/train/{{000..001}}.tar"):
        data = open_pairs(source)
        assert data.name == "train"
        assert data.captions == ("a cat", "kitty", "dog") * 2  # keywords do not describe a picture alone
        assert data.pairs[:, 0].tolist() == [0, 0, 1, 2, 2, 3]
    assert data.entries[2].name == "train/001.tar:1a"


def test_incomplete_samples_are_left_out_and_named(tmp_path):
    write_training_shard(
        tmp_path / "train" / "0.tar",
        {
            "a": {"png": picture(0), "txt": b"a cat"},
            "b": {"txt": b"no picture"},
            "c": {"png": picture(1)},
            "d": {"png": picture(2), "txt": b"\xff"},
            "e": {"png": picture(3), "json": b"{"},
        },
    )
    data = open_pairs(tmp_path / "train")
    assert data.captions == ("a cat",)
    assert data.faults[:3] == (
        "train/0.tar:b (no image)",
        "train/0.tar:c (no caption)",
        "train/0.tar:d (caption is not UTF-8)",
    )
    assert data.faults[3].startswith("train/0.tar:e (unreadable JSON")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("pairs.csv", ["path,caption", 'img/a.png,"a cat, asleep"', "img/b.png,a dog", "img/a.png,kitty"]),
        ("pairs.tsv", ["title\tfilepath", "a cat, asleep\timg/a.png", "a dog\timg/b.png", "kitty\timg/a.png"]),
        ("open_clip.csv", ["filepath\ttitle", "img/a.png\ta cat, asleep", "img/b.png\ta dog", "img/a.png\tkitty"]),
    ],
)
def test_tables(tmp_path, name, lines):
    write_images(tmp_path, ["img/a.png", "img/b.png"])
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    data = open_pairs(tmp_path / name)
    assert data.captions == ("a cat, asleep", "kitty", "a dog")
    assert data.pairs[:, 0].tolist() == [0, 0, 1]
    assert [entry.key for entry in data.entries] == ["img/a.png", "img/b.png"]
    assert data.entries[1].read() == picture(1)
    assert open_pairs(tmp_path / name, limit=1).captions == ("a cat, asleep", "kitty")


def test_karpathy_file(tmp_path):
    images = [
        {
            "filepath": "val2014",
            "filename": "1.jpg",
            "split": "test",
            "sentences": [{"raw": "a cat\n"}, {"raw": "kitty"}],
        },
        {"filepath": "val2014", "filename": "2.jpg", "split": "val", "sentences": [{"raw": "a dog"}]},
        {"filename": "3.jpg", "split": "test", "sentences": [{"raw": "an  owl."}]},  # flickr has no filepath
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    write_images(tmp_path / "pictures", ["val2014/1.jpg", "val2014/2.jpg", "3.jpg"])
    data = open_pairs(tmp_path / "dataset.json", image_root=tmp_path / "pictures")
    assert data.captions == ("a cat", "kitty", "an owl.")
    assert [entry.key for entry in data.entries] == ["val2014/1.jpg", "3.jpg"]
    with pytest.raises(UserError, match="no image of the split 'train'; it has test, val"):
        open_pairs(tmp_path / "dataset.json", split="train")


def test_coco_captions(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "a dog"},
            {"image_id": 7, "id": 2, "caption": "a cat"},
            {"image_id": 9, "id": 3, "caption": "a puppy"},
        ],
    }
    (tmp_path / "captions_val2017.json").write_text(json.dumps(content))
    write_images(tmp_path, ["7.jpg", "9.jpg", "3.jpg"])
    data = open_pairs(tmp_path / "captions_val2017.json")
    assert data.captions == ("a cat", "a dog", "a puppy")
    assert data.faults == (f"{tmp_path}/3.jpg (no caption)",)


def test_faulty_sources_are_told_in_one_sentence(tmp_path):
    def refused(name, content=None, **options):
        if content is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as info:
            open_pairs(tmp_path / name, **options)
        assert "\n" not in str(info.value)
        return str(info.value)

    assert "no such file" in refused("none.csv")
    assert "no such file or folder" in refused("nowhere")
    assert "do not exist" in refused("{0..3}.tar")
    (tmp_path / "empty").mkdir()
    told = refused("empty")
    for reader in (SHARDS, TASK_FOLDER, CLASS_FOLDERS, TABLE, CAPTION_FILE):
        assert reader.what in told
    assert "its first line names url, caption, but no column path or" in refused("a.csv", b"url,caption\n")
    assert "1 of 1 images are not there" in refused("b.csv", b"path,caption\nx.png,a cat\n")
    assert "say with --image-root" in refused("b.csv", image_root=tmp_path / "empty")
    assert "['x.png']" in refused("c.csv", b"path,caption\nx.png\n")
    assert "not a table in UTF-8" in refused("d.csv", b"path,caption\nx.png,\xff\n")
    assert "no image with a caption in it" in refused("e.csv", b"path,caption\n")
    assert "neither Karpathy's caption file nor COCO's (lacks 'images')" in refused("f.json", b"{}")
    assert "neither Karpathy's caption file nor COCO's" in refused("g.json", b"[1, 2")
    write_folder(tmp_path / "h", [[1, 0, 0]], kind="multilabel")
    assert "has classes and no captions; measure it with eval/zeroshot.py" in refused("h", split="test")
