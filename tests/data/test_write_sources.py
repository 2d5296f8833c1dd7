"""Whole sources to shards: the same bytes however they are written; what is left out or changed; what is said of it."""

import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_shards import picture

from focalclip import cli
from focalclip.base.errors import UserError
from focalclip.cli.make_shards import main as make_shards
from focalclip.data import write
from focalclip.data.images import decode_array
from focalclip.data.index import load_keys
from focalclip.data.reader import FileEntry, PictureSet
from focalclip.data.rules import Rules, earlier_copies
from focalclip.data.shards import LEFT_OUT, left_out
from focalclip.data.write import Output, write_pictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "cache"))


def table(folder, contents, captions=None, name="pairs.csv"):
    """A table of pictures with these bytes, one caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        for i, content in enumerate(contents):
            (folder / f"{i:03d}.img").write_bytes(content)
            rows.writerow([f"{i:03d}.img", captions[i] if captions else f"caption {i}"])
    return folder / name


def pictures_of(folder, contents, **fields):
    """The same as a set of pictures."""
    entries = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(contents):
        (folder / f"{i:03d}.img").write_bytes(content)
        entries.append(FileEntry(folder / f"{i:03d}.img", f"{i:03d}.img"))
    fields = fields or {"captions": tuple((f"caption {i}",) for i in range(len(contents)))}
    return PictureSet(folder, tuple(entries), **fields)


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def samples(folder):
    """Members of every sample by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def smooth(size, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def run_make_shards(*words):
    assert make_shards([str(word) for word in words]) == 0


MIXED = [*(picture(i) for i in range(20)), b"no picture", *(picture(i, format="JPEG") for i in range(20))]


# The same bytes


@pytest.mark.parametrize("rules", [[], ["--resize", "16", "--duplicates", "2"]])
def test_any_number_of_jobs_writes_the_same_bytes(tmp_path, rules):
    source = table(tmp_path / "in", MIXED)
    for jobs in (1, 2, 3):
        run_make_shards(source, tmp_path / f"{jobs}", "--jobs", jobs, "--samples-per-shard", 7, *rules)
    one, two, three = (tars(tmp_path / f"{jobs}") for jobs in (1, 2, 3))
    assert list(one) == [f"{i:05d}.tar" for i in range(6)]
    assert one == two == three
    notes = {(tmp_path / f"{jobs}" / LEFT_OUT).read_text() for jobs in (1, 2, 3)}
    assert len(notes) == 1


def test_parts_joined_are_the_whole_and_lie_in_shards_of_different_names(tmp_path):
    source = table(tmp_path / "in", MIXED)
    run_make_shards(source, tmp_path / "whole", "--samples-per-shard", 7)
    for part in (3, 1, 2):
        before = set(tars(tmp_path / "parts"))
        run_make_shards(source, tmp_path / "parts", "--samples-per-shard", 7, "--part", f"{part}/3", "--jobs", 1)
        assert len(set(tars(tmp_path / "parts")) - before) == 2
    assert tars(tmp_path / "parts") == tars(tmp_path / "whole")
    assert (tmp_path / "parts" / LEFT_OUT).read_text() == (tmp_path / "whole" / LEFT_OUT).read_text()
    assert "captions</dt><dd>40 (" in (tmp_path / "parts" / "index.html").read_text()


def test_copies_are_looked_for_within_a_part(tmp_path):
    source = table(tmp_path / "in", [picture(i % 3) for i in range(12)])
    for part in (1, 2):
        words = ["--samples-per-shard", 3, "--duplicates", 0, "--part", f"{part}/2"]
        run_make_shards(source, tmp_path / "parts", *words)
    assert [len(load_keys(path)) for path in sorted((tmp_path / "parts").glob("*.tar"))] == [3, 3]
    assert make_shards([str(source), str(tmp_path / "parts"), "--samples-per-shard", "3", "--duplicates", "0"]) == 2


SLOW = """
import sys, time
from focalclip.cli.make_shards import main
from focalclip.data.rules import Rules
apply = Rules.apply
def slowly(self, content):
    time.sleep(0.02)
    return apply(self, content)
Rules.apply = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_process_leaves_whole_shards_and_the_same_command_goes_on(tmp_path, capsys, jobs):
    source, words = table(tmp_path / "in", MIXED * 3), ["--samples-per-shard", "5", "--jobs", str(jobs)]
    run_make_shards(source, tmp_path / "whole", *words)
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(out), *words])
    try:
        wait_for(lambda: len(list(out.glob(".make-shards/*.tar.json"))) >= 3 and any(out.glob(".*.tar.*.tmp")))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not children_writing(out))
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(finished) < len(tars(tmp_path / "whole"))
    assert not list(out.glob("index.html"))
    capsys.readouterr()
    run_make_shards(source, out, *words)
    assert re.search(r"\((\d+) of 25 shards were there\)", capsys.readouterr().out)
    assert tars(out) == tars(tmp_path / "whole")
    kept = [name for name, stamp in finished.items() if (out / name).stat().st_mtime_ns == stamp]
    assert len(kept) >= len(finished) - 2, "at most those are written again whose record was not there yet"
    assert not list(out.rglob("*.tmp"))
    assert (out / LEFT_OUT).read_text() == (tmp_path / "whole" / LEFT_OUT).read_text()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    run_make_shards(source, out, *words)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == stamps


def test_an_interrupted_command_ends_its_processes_and_leaves_no_halves(tmp_path):
    source, out = table(tmp_path / "in", MIXED * 3), tmp_path / "out"
    words = [str(source), str(out), "--samples-per-shard", "20", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE)
    wait_for(lambda: list(out.glob(".make-shards/*.tar.json")))
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert not children_writing(out)
    assert not list(out.rglob("*.tmp"))


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children_writing(out):
    """Processes that still name the folder in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"-c" in words:
            found.append(place)
    return found


def test_a_job_that_is_killed_is_one_sentence_and_no_shard_is_lost(tmp_path, monkeypatch):
    pictures = pictures_of(tmp_path / "in", [picture(i) for i in range(12)])
    own, apply = os.getpid(), Rules.apply

    def killed(self, content):
        if content == picture(7):
            os.kill(os.getpid(), signal.SIGKILL)
        return apply(self, content)

    monkeypatch.setattr(Rules, "apply", killed)
    output = Output(samples_per_shard=3, jobs=2)
    with pytest.raises(UserError, match=r"a process that writes shards was killed .* repeat the command"):
        write_pictures(pictures, tmp_path / "out", output=output)
    assert os.getpid() == own
    monkeypatch.setattr(Rules, "apply", apply)
    assert write_pictures(pictures, tmp_path / "out", output=output).samples == 12
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_another_source_or_other_rules_in_the_same_folder_are_refused(tmp_path, capsys):
    source = table(tmp_path / "in", [picture(i) for i in range(4)])
    run_make_shards(source, tmp_path / "out")
    before = tars(tmp_path / "out")

    def refused(*words):
        assert make_shards([*map(str, words)]) == 2
        return capsys.readouterr().err

    other = table(tmp_path / "other", [picture(9)])
    assert f"holds shards already, of {source}; name another folder" in refused(other, tmp_path / "out")
    said = refused(source, tmp_path / "out", "--resize", 16, "--min-words", 1)
    assert "by other rules (min-words not given, not 1; quality not given, not 95; resize not given, not 16)" in said
    (source.parent / "002.img").write_bytes(picture(7))
    assert "before it changed, or with other options" in refused(source, tmp_path / "out")
    assert tars(tmp_path / "out") == before
    write.write_shards([{"txt": "a"}], tmp_path / "foreign")
    assert "foreign: holds shards already; name another folder" in refused(source, tmp_path / "foreign")


def test_our_tars_are_byte_for_byte_those_of_webdataset(tmp_path):
    import webdataset

    own = [{"__key__": f"a/{i}", "png": picture(i), "txt": "é" * i, "json": {"captions": ["x"]}} for i in range(5)]
    write.write_shards(own, tmp_path)
    with webdataset.TarWriter(str(tmp_path / "b.tar"), user="", group="", mtime=0, encoder=False) as tar:
        for sample in own:
            tar.write(sample | {"txt": sample["txt"].encode(), "json": json.dumps(sample["json"]).encode()})
    assert (tmp_path / "00000.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_writes_the_same_bytes_and_its_errors_are_sentences(tmp_path, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    source = table(tmp_path / "in", MIXED)
    run_make_shards(source, tmp_path / "local", "--samples-per-shard", 7)
    ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False)
    monkeypatch.chdir(tmp_path)  # where the command is called, not where the cluster was started
    try:
        run_make_shards("in/pairs.csv", "ray", "--samples-per-shard", 7, "--engine", "ray")
        (tmp_path / "full" / write.STATE / "00000.tar.json").mkdir(parents=True)
        assert make_shards([str(source), str(tmp_path / "full"), "--engine", "ray"]) == 2
    finally:
        ray.shutdown()
    assert "full: cannot be written (Is a directory); choose another" in capsys.readouterr().err
    assert tars(tmp_path / "ray") == tars(tmp_path / "local")
    assert "1 picture: damaged" in (tmp_path / "ray" / LEFT_OUT).read_text()


# What is left out


def written(tmp_path, contents, *words, captions=None):
    """What of a table is written, by the number of the row."""
    source = table(tmp_path / "in", contents, captions)
    run_make_shards(source, tmp_path / "out", "--samples-per-shard", 4, *words)
    return {int(key): members for key, members in samples(tmp_path / "out").items()}


def test_small_and_narrow_pictures_are_left_out_counted_and_listed(tmp_path, capsys):
    sizes = [(64, 48), (47, 64), (48, 97), (48, 96), (200, 48), (24, 24)]
    out = written(tmp_path, [picture(0, size=size) for size in sizes], "--min-side", 48, "--max-aspect", 2)
    assert list(out) == [0, 3]
    said = capsys.readouterr().out
    assert "2 images with their own captions" in said
    place = tmp_path / "in"
    assert f"left out 2 pictures: smaller than 48 pixels, the first being {place}/001.img (47 x 64)" in said
    assert f"left out 2 pictures: one side over 2 times the other, the first being {place}/002.img (48 x 97)" in said
    summary, _, names = (tmp_path / "out" / LEFT_OUT).read_text().partition("\n\n")
    assert len(summary.splitlines()) == 2
    assert sorted(line[len(str(place)) + 1 :][:3] for line in names.splitlines()) == ["001", "002", "004", "005"]


def test_captions_of_other_lengths_are_dropped_and_pictures_without_any_left_out(tmp_path, capsys):
    captions = ["one", "two words", "now three words", "these are four words"]
    out = written(tmp_path, [picture(i) for i in range(4)], "--min-words", 2, "--max-words", 3, captions=captions)
    assert [members["txt"] for members in out.values()] == [b"two words", b"now three words"]
    assert "left out 2 pictures: no caption of 2 to 3 words, the first being" in capsys.readouterr().out
    pictures = pictures_of(tmp_path / "b", [picture(0)], captions=(("short", "long enough", "far too long for it"),))
    result = write_pictures(pictures, tmp_path / "two", rules=Rules(min_chars=6, max_chars=12))
    assert json.loads(samples(tmp_path / "two")["00000000"]["json"]) == {"captions": ["long enough"]}
    assert result.remarks == ["2 captions of other lengths"]
    with pytest.raises(UserError, match="no picture with a caption of 50 to any number of words or a label"):
        write_pictures(pictures, tmp_path / "none", rules=Rules(min_words=50))


def test_rows_of_no_picture_and_blank_captions_are_counted_and_listed(tmp_path, capsys):
    source = table(tmp_path / "in", [picture(0), picture(1)])
    source.write_text(source.read_text() + "000.img,\n,a caption of nothing\n001.img,one,too many\n")
    run_make_shards(source, tmp_path / "out")
    said = capsys.readouterr().out
    assert "left out 2 rows: of no picture, the first being row ['', 'a caption of nothing'] names no image" in said
    assert "left out 1 caption without a word" in said
    counts, _, names = (tmp_path / "out" / LEFT_OUT).read_text().partition("\n\n")
    assert len(counts.splitlines()) == 2
    assert "row ['001.img', 'one', 'too many'] does not give 2 columns" in names


def test_prompts_of_classes_are_not_measured_and_the_json_names_the_classes(tmp_path):
    labels = np.array([1, 0, -1])
    pictures = pictures_of(
        tmp_path / "in",
        [picture(i) for i in range(3)],
        labels=labels,
        class_names=("ant", "bee"),
        templates=("a {c}.",),
    )
    result = write_pictures(pictures, tmp_path / "out", rules=Rules(min_words=5))
    bee, ant = samples(tmp_path / "out").values()
    assert json.loads(bee["json"]) == {"captions": ["a bee."], "class_names": ["bee"]}
    assert (bee["cls"], ant["cls"]) == (b"1", b"0")
    assert result.classes == {"bee": 1, "ant": 1}
    assert list(result.left_out) == ["neither caption nor label"]


def test_damaged_and_missing_pictures_are_left_out_up_to_the_limit(tmp_path, capsys):
    jpeg = encoded(smooth((300, 200)))
    zeros = jpeg[: len(jpeg) // 3] + bytes(len(jpeg) - len(jpeg) // 3 - 2) + jpeg[-2:]
    png = bytearray(picture(0))
    png[png.index(b"IDAT") + 9] ^= 1
    webp = encoded(smooth((60, 40)), "WEBP")
    broken = [b"", b"text", jpeg[:-400], zeros, jpeg[:30], bytes(png), picture(0)[:-20], webp[:-50]]
    pictures = pictures_of(tmp_path / "in", [picture(1), *broken, picture(2)])
    (tmp_path / "in" / "001.img").unlink()
    result = write_pictures(pictures, tmp_path / "out", output=Output(samples_per_shard=3))
    assert [int(key) for key in samples(tmp_path / "out")] == [0, 9]
    assert {reason: len(names) for reason, names in result.left_out.items()} == {
        "cannot be read": 1,
        "damaged, or not a picture": 7,
    }
    assert not (tmp_path / "out" / "00001.tar").exists(), "a stretch without a sound picture has no shard"
    limited = Output(samples_per_shard=3, jobs=1, max_faults=7)
    with pytest.raises(
        UserError, match=r"8 pictures are damaged or cannot be read, more than the limit of 7 \(--max-f"
    ):
        write_pictures(pictures, tmp_path / "limited", output=limited)
    with pytest.raises(UserError, match=r"every picture is left out, the first being .*000.img .*; see .*left-out.txt"):
        write_pictures(pictures_of(tmp_path / "bad", [picture(0), *broken][1:]), tmp_path / "nothing")


def test_verify_finds_the_damage_inside_a_scan_that_a_copy_does_not_show(tmp_path):
    jpeg = encoded(smooth((300, 200)), quality=90)
    half = len(jpeg) // 2
    pictures = pictures_of(tmp_path / "in", [jpeg, jpeg[:half] + jpeg[half + 64 :]])
    assert write_pictures(pictures, tmp_path / "copied").samples == 2
    result = write_pictures(pictures, tmp_path / "verified", rules=Rules(verify=True))
    assert (result.samples, list(result.left_out)) == (1, ["damaged, or not a picture"])
    assert write_pictures(pictures, tmp_path / "resized", rules=Rules(resize=100)).samples == 1


def test_of_copies_the_first_in_order_stays(tmp_path, capsys):
    image, other = smooth((160, 120)), smooth((160, 120), seed=5)
    again = encoded(image.resize((120, 90)), quality=60)
    contents = [b"damaged", encoded(image), encoded(other), again, encoded(image), encoded(other, "PNG")]
    for jobs in (1, 3):
        run_make_shards(
            table(tmp_path / "in", contents), tmp_path / f"{jobs}", "--duplicates", 4, "--jobs", jobs,
            "--samples-per-shard", 2,
        )  # fmt: skip
        assert [int(key) for key in samples(tmp_path / f"{jobs}")] == [1, 2]
    assert tars(tmp_path / "1") == tars(tmp_path / "3")
    place = tmp_path / "in"
    said = f"left out 3 pictures: a copy of an earlier picture, the first being {place}/003.img ({place}/001.img)"
    assert said in capsys.readouterr().out


def test_a_picture_that_another_rule_leaves_out_knocks_out_no_copy(tmp_path):
    image = smooth((160, 120))
    contents = [encoded(image.resize((80, 60))), encoded(image)]
    assert list(written(tmp_path, contents, "--duplicates", 8, "--min-side", 100)) == [1]


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_copies_are_found_as_if_every_pair_were_compared(distance):
    rng = np.random.default_rng(distance)
    base = [int(x) for x in rng.integers(0, 2**63, 30)]
    flips = [(base[rng.integers(30)], rng.integers(0, 64, rng.integers(0, 12))) for _ in range(400)]
    hashes = [None if i % 50 == 7 else h ^ sum(1 << int(b) for b in set(bits)) for i, (h, bits) in enumerate(flips)]
    kept, expected = [], {}
    for i, own in enumerate(hashes):
        near = [j for j in kept if own is not None and (hashes[j] ^ own).bit_count() <= distance]
        if near:
            expected[i] = near[0]
        elif own is not None:
            kept.append(i)
    assert earlier_copies(hashes, distance) == expected


def test_a_run_is_told_what_was_left_out_once_for_each_reason(tmp_path):
    from focalclip.data.index import usable_shards

    written(tmp_path, [*(picture(i) for i in range(6)), b"x", b"y"])
    usable = usable_shards(sorted((tmp_path / "out").glob("*.tar")))
    (line,) = left_out(str(tmp_path / "out"), usable, "first_dot")
    assert line.startswith("2 pictures: damaged, or not a picture, the first being ")


# What is changed


def test_nothing_that_no_rule_asks_for_is_changed(tmp_path):
    contents = [
        encoded(smooth((64, 48)), quality=70, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        picture(1), encoded(smooth((48, 64), 2), "WEBP"), encoded(smooth((50, 90), 3), progressive=True),
    ]  # fmt: skip
    for name, rules in (("a", Rules()), ("b", Rules(resize=50, min_side=1, max_aspect=9, verify=True, duplicates=0))):
        write_pictures(pictures_of(tmp_path / "in", contents), tmp_path / name, rules=rules)
        found = [set(members.values()) for members in samples(tmp_path / name).values()]
        assert [content in members for content, members in zip(contents, found, strict=True)] == [True] * 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_larger_pictures_get_the_shorter_side_and_look_like_pillows(tmp_path, format):
    image = smooth((640, 480))
    options = {"quality": 95} if format == "JPEG" else {}
    (members,) = written(tmp_path, [encoded(image, format, **options)], "--resize", 128).values()
    small = decode_array(members["jpg"])
    assert small.shape == (128, 171, 3)
    expected = np.asarray(image.resize((171, 128), Image.Resampling.BICUBIC), dtype=float)
    error = ((small - expected) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 38


def test_fine_detail_is_averaged_not_sampled(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640), dtype=np.uint8))
    (members,) = written(tmp_path, [encoded(noise, "PNG")], "--resize", 120).values()
    expected = np.asarray(noise.resize((160, 120), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(decode_array(members["jpg"]).mean(axis=2) - expected).mean() < 2


def test_pictures_are_resized_upright_and_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is the top
    (members,) = written(tmp_path, [encoded(smooth((300, 200)), exif=exif.tobytes())], "--resize", 100).values()
    assert decode_array(members["jpg"]).shape == (150, 100, 3)


def test_quality_decides_the_size_and_stands_with_resize_alone(tmp_path, capsys):
    source = table(tmp_path / "in", [encoded(smooth((640, 480)))])
    for quality in (30, 90):
        run_make_shards(source, tmp_path / f"{quality}", "--resize", 128, "--quality", quality)
    low, high = (len(samples(tmp_path / f"{quality}")["00000000"]["jpg"]) for quality in (30, 90))
    assert low < 0.7 * high
    assert make_shards([str(source), str(tmp_path / "c"), "--quality", "90"]) == 2
    assert "give --resize as well" in capsys.readouterr().err


# Mistakes and lacks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--part 4/3", "'4/3' is not I/N"),
        ("--part 3", "'3' is not I/N"),
        ("--max-aspect 0.5", "--max-aspect 0.5: longer over shorter side is at least 1"),
        ("--min-words 5 --max-words 3", "--min-words 5 is more than --max-words 3"),
        ("--duplicates 40", "--duplicates 40: hashes of unlike pictures differ in about 32"),
        ("--resize 8 --quality 101", "--quality 101: give a number from 1 to 100"),
    ],
)
def test_a_mistake_in_a_rule_is_one_sentence_before_anything_is_read(tmp_path, capsys, words, said):
    try:
        status = make_shards([str(tmp_path / "nowhere.csv"), str(tmp_path / "out"), *words.split()])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_sentence_and_later_the_command_goes_on(
    tmp_path, capsys, monkeypatch, jobs, number
):
    source, words = table(tmp_path / "in", [picture(i) for i in range(9)]), ["--samples-per-shard", "3"]
    run_make_shards(source, tmp_path / "whole", *words)
    add = write._add

    def full(file, key, members):
        if key == "00000007":
            raise OSError(number, os.strerror(number))
        add(file, key, members)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_add", full)
        assert make_shards([str(source), str(tmp_path / "out"), *words, "--jobs", str(jobs)]) == 2
    assert f"out: cannot be written ({os.strerror(number)}); choose another, or make room" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.tmp"))
    run_make_shards(source, tmp_path / "out", *words)
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")


def test_a_remote_folder_is_one_sentence(tmp_path, capsys):
    assert make_shards([str(table(tmp_path, [picture(0)])), "s3://bucket/shards"]) == 2
    assert "OUT s3://bucket/shards: shards are written to a folder of this machine" in capsys.readouterr().err


# The page


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.bars, self.text = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [value for name, value in attrs.items() if name in ("src", "href") and value]
        if tag == "img":
            self.images.append(attrs)
        elif tag == "svg":
            name, _, count = attrs["aria-label"].rpartition(": ")
            self.bars[name] = int(count)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_counts_sizes_lengths_classes_and_samples_in_one_file(tmp_path):
    contents = [picture(i, size=(40 + i // 20, 60)) for i in range(40)]
    for i in range(40):
        folder = tmp_path / "in" / ("<ant>" if i % 4 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(contents[i])
    (tmp_path / "in" / "bee" / "broken.png").write_bytes(b"x")
    run_make_shards(tmp_path / "in", tmp_path / "out", "--samples-per-shard", 16)
    text = (tmp_path / "out" / "index.html").read_text()
    page = _Page(text)
    assert page.bars == {"40": 20, "41": 20, "1": 40, "<ant>": 30, "bee": 10}
    assert len(page.images) == 24
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert {image["alt"] for image in page.images} == {"<ant>", "bee"}
    words = " ".join(" ".join(page.text).split())
    for said in ("pictures 40", "captions 40 (1.00 a picture)", "shards 3", "left out 1 pictures", "classes 2"):
        assert said in words
    assert "damaged, or not a picture" in words
    assert f"shards of {tmp_path / 'in'}; samples per shard 16" in words


def test_a_histogram_has_round_and_equal_bins():
    from collections import Counter

    from focalclip.reports.shards import _histogram

    bars = _histogram(Counter({3: 1, 150: 2, 1024: 5}))
    assert [bar["name"] for bar in bars[:3]] == ["0-49", "50-99", "100-149"]
    assert len(bars) <= 25
    assert sum(bar["count"] for bar in bars) == 8
    assert bars[-1] == {"name": "1000-1049", "count": 5, "percent": 100}


# The document


def commands(title):
    """Commands of a section of docs/data.md."""
    document = (Path(__file__).parents[2] / "docs/data.md").read_text()
    section = document.partition(f"## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """What the commands of the document name."""
    monkeypatch.chdir(tmp_path)
    table(
        tmp_path,
        [encoded(smooth((500, 400), i)) for i in range(6)],
        [f"a photo of {i}" for i in range(6)],
        "photos.csv",
    )
    for i in range(6):
        folder = tmp_path / "birds" / ("wren" if i % 2 else "finch")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(picture(i))


def test_the_commands_of_the_document_run(example, tmp_path):
    lines = commands("Writing shards")
    assert len(lines) == 8
    for line in lines:
        name, *words = line.split()
        assert name == "focalclip"
        if "ray" not in words:  # has a test of its own
            assert cli.main(words) == 0
    sizes = {path.name: len(samples(path)) for path in (tmp_path / "shards").iterdir()}
    assert sizes == {"photos": 6, "small": 6, "clean": 6, "birds": 4, "again": 6, "parts": 6}
    assert samples(tmp_path / "shards/again") == samples(tmp_path / "shards/photos")
