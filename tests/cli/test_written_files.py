"""Where files are looked for and written: ``~``, the umask, a run that cannot be written, a part of the images."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from coloured_tasks import write_bench, write_class_folders, write_pure
from wds_folder import tiny_model, write_folder, write_tiny_run, zero_shot

import focalclip
from focalclip.base.errors import UserError
from focalclip.base.files import home_expanded, user_path, whole_file, whole_folder
from focalclip.cli.check_reference import main as check_reference
from focalclip.cli.export import main as export_main
from focalclip.cli.extract import main as extract_main
from focalclip.cli.make_shards import main as make_shards
from focalclip.cli.probe import main as probe_main
from focalclip.cli.report import main as report_main
from focalclip.cli.retrieval import main as retrieval_main
from focalclip.cli.zeroshot import main as zeroshot_main
from focalclip.config import RunConfig, load_config
from focalclip.evaluation.result import Result, result_files
from focalclip.evaluation.task import load_benchmark
from focalclip.interop.card import Trained
from focalclip.interop.export import FORMATS, export
from focalclip.interop.load import newest_run
from focalclip.names import split
from focalclip.reports import write_report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with a run in runs/tiny, a task folder and a table of captions."""
    root = tmp_path_factory.mktemp("home")
    write_folder(root / "tasks" / "a", [0, 1, 2, 0, 1, 2, 0])
    write_tiny_run(root)
    write_pure(root / "pictures" / "red.png", "red")
    write_pure(root / "pictures" / "blue.png", "blue")
    (root / "pictures" / "p.csv").write_text("path,caption\nred.png,a red thing\nred.png, \nblue.png,a blue thing\n")
    return root


@pytest.fixture
def home(made, monkeypatch, tmp_path):
    """The same as the home directory, with another working directory."""
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.setenv("FOCALCLIP_CACHE", "~/cache")
    monkeypatch.chdir(tmp_path)
    own = made / "runs" / "tiny" / "eval"
    own.unlink() if own.is_file() else shutil.rmtree(own, ignore_errors=True)
    return made


# ~ is the home directory


def test_home_is_the_home_directory_on_every_command_line(home):
    words = ["--model=~/runs/tiny", "--device=cpu", "--cache-dir=~/kept"]
    assert zeroshot_main(["--benchmark=~/tasks", *words, "--output=~/out/z.json", "--report", "~/out/z.csv"]) == 0
    assert retrieval_main(["--data=~/pictures/p.csv", *words, "--output", "~/out/r.json", "--ranks=~/out/r.npz"]) == 0
    assert export_main(["~/runs/tiny", "~/out/timm", "--format", "open_clip"]) == 0
    assert extract_main(["--model=~/runs/tiny", "~/pictures", "~/out/f.npz", "--device=cpu"]) == 0
    assert make_shards(["~/pictures/p.csv", "~/out/shards"]) == 0
    assert report_main(["~/out/z.json", "~/out/z.md"]) == 0
    names = {path.name for path in (home / "out").iterdir()}
    assert names == {"z.json", "z.csv", "z.md", "z.predictions", "r.json", "r.npz", "timm", "f.npz", "shards"}
    assert list((home / "kept").iterdir())
    assert not list(Path.cwd().iterdir())


def test_home_is_the_home_directory_in_every_function(home):
    assert focalclip.load("~/runs/tiny")
    assert focalclip.load_image_encoder("~/runs/tiny").num_features
    assert newest_run("~/runs") == home / "runs" / "tiny"
    assert load_benchmark("~/tasks").places == {"a": home / "tasks" / "a"}
    assert load_benchmark("demo", "~/tasks").data_root == home / "tasks"
    (home / "mine.yaml").write_text("data_root: ~/tasks\ntasks: [{id: a}]")
    result = zero_shot(tiny_model(), "~/mine.yaml", outputs=["~/api.json"], cache_dir="~/api")
    assert (home / "api.json").is_file()
    assert Result.read("~/api.json").score == result.score == Result.read(result_files("~/api.json")["api"]).score
    assert write_report(result, "~/api.csv") == home / "api.csv"
    assert focalclip.save(focalclip.load("~/runs/tiny"), "~/saved") == home / "saved"
    export("~/saved", "~/exported", "timm")
    assert (home / "exported" / "model.safetensors").is_file()
    assert not list(Path.cwd().iterdir())


def test_home_is_the_home_directory_in_configurations(home):
    (home / "c.yaml").write_text(
        "runs_dir: ~/runs\ndata: {train: [~/a.tar, '~/b/{0..3}.tar']}\n"
        "train: {steps: 1, init_from: ~/runs/tiny}\neval: {benchmark: ~/tasks}\n"
    )
    config = load_config("~/c.yaml")
    assert config.run_dir == home / "runs" / "demo"
    assert config.data.train == [f"{home}/a.tar", f"{home}/b/{{0..3}}.tar"]
    assert (config.train.init_from, config.eval.benchmark) == (f"{home}/runs/tiny", f"{home}/tasks")
    assert split("transformers:~/bert") == ("transformers:", f"{home}/bert")
    defaults = RunConfig()
    assert (defaults.runs_dir, defaults.data.train, defaults.eval.benchmark) == ("runs", "emoji", "demo")


def test_a_name_that_only_begins_with_a_tilde_stays(home):
    assert home_expanded("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    assert user_path("~$table.csv") == Path("~$table.csv")
    assert home_expanded("s3://a//b/") == "s3://a//b/"


# Modes are those of the umask


def modes(folder, umask):
    """Files and folders below whose mode is not that of the umask."""
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert found
    return {path: oct(mode) for path, mode in found.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask}


@pytest.mark.faults
def test_everything_that_is_written_obeys_the_umask(home, tmp_path):
    umask = 0o027
    before = os.umask(umask)
    try:
        focalclip.save(focalclip.load("~/runs/tiny"), tmp_path / "out" / "saved")
        for kind in FORMATS:
            export(tmp_path / "out" / "saved", tmp_path / "out" / kind, kind)
        model = focalclip.load("~/runs/tiny")
        zero_shot(model, home / "tasks", outputs=[tmp_path / "out" / "r.json"], cache_dir=tmp_path / "out" / "cache")
        make_shards([str(home / "pictures" / "p.csv"), str(tmp_path / "out" / "shards")])
        extract_main(["--model=~/runs/tiny", "~/pictures", str(tmp_path / "out" / "f.npz"), "--device=cpu"])
    finally:
        os.umask(before)
    assert modes(tmp_path / "out", umask) == {}


def test_a_file_is_not_private_because_its_writer_made_it_so(tmp_path):
    with whole_file(tmp_path / "a") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    with whole_folder(tmp_path / "b") as new:
        (new / "in").mkdir(mode=0o700)
        os.close(os.open(new / "in" / "a", os.O_CREAT | os.O_WRONLY, 0o600))
        (new / "link").symlink_to(tmp_path)
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert modes(tmp_path / "b" / "in", stat.S_IMODE((tmp_path / "plain").stat().st_mode) ^ 0o666) == {}


# A run that can be read but not written


def test_a_run_that_cannot_be_written_is_measured_with_output_elsewhere(home, capsys):
    (home / "runs" / "tiny" / "eval").write_text("in the way, which stops root as well")
    common = ["--model=~/runs/tiny", "--device", "cpu", "--no-cache"]
    commands = {
        "tasks.json": (zeroshot_main, ["--benchmark=~/tasks"]),
        "retrieval-p.json": (retrieval_main, ["--data=~/pictures/p.csv"]),
        "probe-tasks.json": (probe_main, ["--benchmark=~/tasks", "--methods", "knn", "--shots", "1"]),
    }
    write_folder(home / "tasks" / "a", [0, 1, 2] * 3)
    (home / "tasks" / "a" / "test").rename(home / "tasks" / "a" / "train")
    write_folder(home / "tasks" / "a", [0, 1, 2, 0, 1, 2, 0])
    for name, (command, words) in commands.items():
        assert command([*words, *common]) == 2
        assert f"eval/{name}: cannot be written" in (err := capsys.readouterr().err)
        assert "name a file elsewhere with --output" in err
        assert command([*words, *common, "--output", f"out-{name}"]) == 0
        assert f"eval/{name}: cannot be written" in capsys.readouterr().err
        assert json.loads(Path(f"out-{name}").read_text())["tasks"]


def test_a_file_that_cannot_be_written_any_more_does_not_end_the_others(tmp_path, capsys):
    bench = write_bench(tmp_path, "t", "u")
    for name in ("t", "u"):
        write_class_folders(tmp_path / name)
    good, bad = tmp_path / "good.json", tmp_path / "bad" / "bad.json"
    (tmp_path / "bad").mkdir()
    model = tiny_model()
    encode, calls = model.encode_image, []

    def encode_image(images):
        calls.append(len(images))
        if len(calls) > 1 and (tmp_path / "bad").is_dir():  # after the check, within the first task
            (tmp_path / "bad").rmdir()
            (tmp_path / "bad").write_text("in the way")
        return encode(images)

    model.encode_image = encode_image
    try:
        with pytest.raises(UserError, match="bad"):
            zero_shot(model, bench, outputs=[bad, good])
    finally:
        del model.encode_image
    assert list(Result.read(good).tasks) == ["t", "u"]
    assert capsys.readouterr().err.count("measuring goes on") == 1


def test_names_of_many_tasks_fit_a_file_system(home):
    names = [f"a-task-with-a-long-name-{i}" for i in range(12)]
    for name in names:
        shutil.copytree(home / "tasks" / "a", home / "many" / name, dirs_exist_ok=True)
    words = ["--benchmark=~/many", "--model=~/runs/tiny", "--device=cpu", "--no-cache", "--tasks", *names]
    assert zeroshot_main(words) == 0
    assert len(list((home / "runs" / "tiny" / "eval").glob("many-a-task*.json"))) == 1


def test_the_name_of_a_set_does_not_lead_out_of_the_run(home, capsys):
    words = ["--data=~/pictures/p.csv", "--model=~/runs/tiny", "--device=cpu", "--no-cache", "--name", "../../x"]
    assert retrieval_main(words) == 2
    assert "--name ../../x: cannot be the name of a file" in capsys.readouterr().err


# A part of the images is no result


def test_a_partial_evaluation_is_no_result_of_card_or_report(home, tmp_path, capsys):
    words = ["--benchmark=~/tasks", "--model=~/runs/tiny", "--device=cpu", "--no-cache"]
    assert zeroshot_main([*words, "--max-images", "3", "--output", "part.json"]) == 0
    assert "of a part of the images, which is no result" in capsys.readouterr().out
    own = home / "runs" / "tiny" / "eval" / "tasks-3-images.json"
    content = json.loads(own.read_text())
    assert (content["partial"], content["tasks"]["a"]["part_of"]) == (True, 7)
    assert not own.with_suffix(".html").exists()
    assert Trained.read("~/runs/tiny").results == {}
    with pytest.raises(UserError, match="neither a result's JSON nor a run directory with one"):
        result_files("~/runs/tiny")
    for name in ("p.html", "p.md", "p.csv", "p.tex"):
        assert report_main(["part.json", name]) == 2
        assert "only a part of the images was evaluated" in capsys.readouterr().err
    assert zeroshot_main([*words, "--max-images", "3", "--report", "p.md"]) == 2
    assert "--report goes with all images" in capsys.readouterr().err
    assert not list(tmp_path.glob("p.*"))
    assert zeroshot_main(words) == 0
    assert list(Trained.read("~/runs/tiny").results) == ["tasks"]
    assert list(result_files("~/runs/tiny")) == ["tasks"]
    assert zeroshot_main([*words, "--max-images", "9", "--output", "all.json"]) == 0  # all there are: a whole one
    assert json.loads(Path("all.json").read_text())["partial"] is False


def test_a_part_is_not_checked_against_published_numbers(home, capsys):
    words = ["--benchmark=~/tasks", "--model=~/runs/tiny", "--device=cpu", "--no-cache"]
    assert zeroshot_main([*words, "--max-images", "3", "--output", "part.json"]) == 0
    content = json.loads(Path("part.json").read_text())
    content["protocol"], content["tasks"] = "elevater", {"dtd": content["tasks"]["a"] | {"value": 0.4447}}
    Path("part.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert check_reference(["part.json", "--tasks", "dtd"]) == 1
    assert "a part of the images" in capsys.readouterr().out


def test_what_make_shards_leaves_out_is_counted(home, capsys):
    assert make_shards(["~/pictures/p.csv", "shards"]) == 0
    assert "left out 1 caption without a word" in capsys.readouterr().out
