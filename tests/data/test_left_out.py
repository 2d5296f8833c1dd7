"""A run says what of its data it leaves out, once, in its introduction; and goes on with the same shards."""

import json

import pytest
from helpers_run import losses, run
from tiny_shards import good_sample, picture, write_shards, write_tar

pytestmark = pytest.mark.faults

SHORT = ["--train.steps", "2", "--train.save-every", "1", "--data.batch-size", "8", "--optim.warmup-steps", "1"]


def left_out(output: str) -> list[str]:
    return [line.removeprefix("left out").strip() for line in output.splitlines() if line.startswith("left out")]


def test_introduction_counts_and_names_everything_that_is_passed_over(tmp_path):
    data = tmp_path / "data"
    dotted = [(f"IMG_2.{i}.{e}", x) for i in range(8) for e, x in (("png", picture(i)), ("txt", b"a dotted name"))]
    members = [*dotted, *[m for i in range(8) for m in good_sample(i)], ("a.npy", b"x")]
    write_shards(data, [4])
    write_tar(data / "half.tar", members)
    for name in ("00001.TAR", "00002.tar.gz", "00000_stats.json", ".DS_Store"):
        (data / name).write_bytes(b"x")
    (data / "more").mkdir()
    first = run(tmp_path, data, *SHORT)
    assert first.returncode == 0, first.stderr
    assert sorted(left_out(first.stdout)) == [
        "1 file: folders, into which is not looked, the first being " + str(data / "more"),
        "1 file: the extension .TAR, the first being " + str(data / "00001.TAR"),
        "1 file: the extension .json, the first being " + str(data / "00000_stats.json"),
        "1 file: the extension .tar.gz, the first being " + str(data / "00002.tar.gz"),
        "1 member: the extension .npy, the first being half.tar: a.npy",
        "16 members: more than one dot in the name (data.key_rule=last_dot reads them), the first being half.tar: "
        "IMG_2.0.png",
    ]
    assert "12 pairs" in first.stdout
    second = run(tmp_path, data / "half.tar", *SHORT, "--data.key-rule", "last_dot", "--name", "all")
    assert "16 pairs" in second.stdout
    assert left_out(second.stdout) == ["1 member: the extension .npy, the first being half.tar: a.npy"]


def test_a_run_leaves_out_bad_shards_up_to_the_limit_and_resumes_without_them(tmp_path):
    data = tmp_path / "data"
    shards = write_shards(data, [4] * 6)
    bad = shards[1:3]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:3000])
    refused = run(tmp_path, data, *SHORT)
    assert refused.returncode == 2
    assert all(str(path) in refused.stderr for path in bad)
    assert refused.stderr.count("\n") == 1
    limited = [*SHORT, "--data.max-bad-shards", "2"]
    assert run(tmp_path, data, *limited, "--name", "whole").returncode == 0
    first = run(tmp_path, data, *limited, "--train.steps", "1")
    (line,) = left_out(first.stdout)
    assert line.startswith("2 of 6 shards: ")
    assert all(str(path) in line for path in bad)
    resumed = run(tmp_path, data, *limited, "--train.steps", "1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    repaired = write_shards(tmp_path / "again", [4] * 6)[1]
    bad[0].write_bytes(repaired.read_bytes())
    changed = run(tmp_path, data, *limited, "--train.steps", "1", "--resume")
    assert changed.returncode == 2
    assert "data.train: other shards than" in changed.stderr
    for path in bad:
        path.unlink()
    assert run(tmp_path, data, *SHORT, "--name", "whole", "--resume").returncode == 0
    assert losses(tmp_path / "runs/tiny") == losses(tmp_path / "runs/whole")[:1]


def test_ignored_parts_are_named_once_and_counted_at_the_end(tmp_path):
    members = [(name, b"a word" if name.endswith("cls") else data) for i in range(16) for name, data in good_sample(i)]
    write_tar(tmp_path / "data.tar", members)
    done = run(tmp_path, tmp_path / "data.tar", *SHORT, "--data.workers", "0", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ignored in a sample: cls is not an integer of 64 bits (data.tar: 0") == 1
    assert "ignored in 16 samples: cls is not an integer of 64 bits" in done.stderr


def test_pictures_of_a_table_without_a_caption_are_counted_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "cache"))
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [
        {"filename": f"{i}.png", "sentences": [{"raw": f"caption {i}"}] if i < 8 else [], "split": "train"}
        for i in range(10)
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": rows}))
    for name in ("first", "again"):
        done = run(tmp_path, tmp_path / "karpathy.json", *SHORT, "--name", name)
        assert done.returncode == 0, done.stderr
        assert left_out(done.stdout) == [f"2 pictures: neither caption nor label, the first being {tmp_path}/8.png"]
