"""Every layout that a retrieval set comes in, written here as its owners write it."""

import json

import pytest
from wds_folder import picture, write_folder, write_tar

from focalclip.base.errors import UserError
from focalclip.data.folders import CLASS_FOLDERS, TASK_FOLDER
from focalclip.data.shards import SHARDS
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
    assert "its first line names page, caption, but no column path or" in refused("a.csv", b"page,caption\n")
    assert "a list of URLs, which img2dataset downloads" in refused("a.csv", b"url,caption\n")
    assert "1 of 1 images are not there" in refused("b.csv", b"path,caption\nx.png,a cat\n")
    assert "say with --image-root" in refused("b.csv", image_root=tmp_path / "empty")
    assert "['x.png']" in refused("c.csv", b"path,caption\nx.png\n")
    assert "not a table in UTF-8" in refused("d.csv", b"path,caption\nx.png,\xff\n")
    assert "no image with a caption in it" in refused("e.csv", b"path,caption\n")
    assert "neither Karpathy's caption file nor COCO's (lacks 'images')" in refused("f.json", b"{}")
    assert "neither Karpathy's caption file nor COCO's" in refused("g.json", b"[1, 2")
    write_folder(tmp_path / "h", [[1, 0, 0]], kind="multilabel")
    assert "has classes and no captions; measure it with eval/zeroshot.py" in refused("h", split="test")


# Blank captions are left out and counted, and what one row lacks does not refuse the set

WORDS = ["a red thing", "a blue thing"]
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
    "annotations": [
        *({"image_id": i, "caption": caption} for i, caption in ((0, WORDS[0]), (0, " \n"), (1, None), (2, WORDS[1]))),
        {"image_id": 17, "caption": "of an image that is not listed"},
    ],
}
KARPATHY = {
    "images": [
        {"split": "test", "filename": f"{i}.png", "sentences": [{"raw": caption} for caption in captions]}
        for i, captions in enumerate(([WORDS[0], ""], ["\t"], [WORDS[1]]))
    ]
}
BLANK = {
    "a.csv": f"image,caption\n0.png,{WORDS[0]}\n0.png,  \n1.png,\n,a caption of nothing\n,\n2.png,{WORDS[1]}\n",
    "a.tsv": f"caption\tpath\n{WORDS[0]}\t0.png\n \t0.png\n\t1.png\nof nothing\t\n\t\n{WORDS[1]}\t2.png\n",
    "coco.json": json.dumps(COCO),
    "karpathy.json": json.dumps(KARPATHY),
    "a.jsonl": f'{{"image": "0.png", "caption": ["{WORDS[0]}", ""]}}\n{{"image": "1.png", "caption": null}}\n\n'
    f'{{"image": null, "caption": "x"}}\nnot JSON\n{{"image": "2.png", "caption": "{WORDS[1]}"}}\n',
}


@pytest.mark.parametrize("name", BLANK)
def test_blank_captions_are_left_out_and_counted(tmp_path, name):
    write_images(tmp_path, [f"{i}.png" for i in range(3)])
    (tmp_path / name).write_text(BLANK[name])
    data = open_pairs(tmp_path / name)
    assert [entry.key for entry in data.entries] == ["0.png", "2.png"]
    assert list(data.captions) == WORDS
    assert data.faults[:2] == (
        f"{tmp_path}/0.png (1 of 2 captions blank)",
        f"{tmp_path}/1.png (blank captions)",
    )
    assert len(data.faults) == {"karpathy.json": 2, "a.jsonl": 4}.get(name, 3)


def test_blank_lines_of_a_wds_folder_are_counted(tmp_path):
    data = open_pairs(write_wds(tmp_path / "t", [["a cat", "", "kitty"], ["", " "], ["a dog", ""]]))
    assert data.captions == ("a cat", "kitty", "a dog")  # what ends a text is no caption
    assert data.faults == ("test/0.tar:s0000000 (1 of 3 captions blank)", "test/0.tar:s0000001 (no caption)")


def test_a_row_of_other_columns_costs_that_row(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "p.csv").write_text("path,caption\na.png,a cat, asleep\nb.png,a dog\na.png,kitty\n")
    data = open_pairs(tmp_path / "p.csv")
    assert data.captions == ("a dog", "kitty")
    assert data.faults == ("row ['a.png', 'a cat', ' asleep'] does not give 2 columns",)


# Flickr's files and JSON lines

FLICKR = {
    "captions.txt": 'image,caption\n1.jpg,"A man , asleep ."\n1.jpg,A man, awake .\n2.jpg,A dog .\n',
    "Flickr8k.token.txt": "1.jpg#0\tA man , asleep .\n1.jpg#1\tA man, awake .\n2.jpg#0\tA dog .\n",
    "results_20130124.token": "1.jpg#0\tA man , asleep .\n1.jpg#1\tA man, awake .\n2.jpg#0\tA dog .\n",
    "results.csv": "image_name| comment_number| comment\n1.jpg| 0| A man , asleep .\n1.jpg| 1| A man, awake .\n"
    "1.jpg| 2   A row that lacks its bar .\n2.jpg| 0| A dog .\n",
}


@pytest.mark.parametrize("folder", ["", "Images"])
@pytest.mark.parametrize("name", FLICKR)
def test_flickrs_files(tmp_path, name, folder):
    write_images(tmp_path / folder, ["1.jpg", "2.jpg"])
    (tmp_path / name).write_text(FLICKR[name])
    data = open_pairs(tmp_path / name)
    assert data.captions == ("A man , asleep .", "A man, awake .", "A dog .")
    assert data.pairs[:, 0].tolist() == [0, 0, 1]
    assert len(data.faults) == (name == "results.csv")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "list.json"])
def test_json_lines_and_lists(tmp_path, name):
    """Lines as of an imagefolder's metadata, and the lists that BLIP and ALBEF publish."""
    write_images(tmp_path, ["1.png", "2.png"])
    records = [{"file_name": "1.png", "text": "a cat"}, {"image": "2.png", "caption": ["a dog", "hound"]}]
    lines = [json.dumps(record) for record in [*records, {"file_name": "1.png", "text": 7}]]
    (tmp_path / name).write_text(f"[{', '.join(lines)}]" if name == "list.json" else "\ufeff" + "\n".join(lines))
    data = open_pairs(tmp_path / name)
    assert data.captions == ("a cat", "7", "a dog", "hound")
    assert data.pairs[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"picture": "1.png", "caption": "a"}', "no object names an image; one of path, filepath"),
        ('{"image": "1.png", "words": "a"}', "no object has a caption, called caption or captions"),
        ('{"image": "1.png", "caption": {"en": "a"}}', "is not text"),
    ],
)
def test_json_lines_without_images_or_captions_are_refused(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        open_pairs(tmp_path / "x.jsonl")


def test_a_linked_set_has_the_links_name(tmp_path):
    write_wds(tmp_path / "disk", CAPTIONS)
    (tmp_path / "pets").symlink_to(tmp_path / "disk")
    assert open_pairs(tmp_path / "pets").name == "pets"
