"""The console script: its table of commands, and help that names the command as it was called."""

import re
import tomllib

import pytest

from focalclip import cli
from focalclip.base import __version__
from focalclip.cli import pretrain
from focalclip.cli.command import as_called
from focalclip.cli.pretrain import parse
from focalclip.config import RunConfig, config_dir

ROOT = config_dir().parent
ZEROSHOT = "  python eval/zeroshot.py --benchmark demo           the newest run"


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/focalclip", "zeroshot"])


def test_the_table_and_the_scripts_are_the_same_commands():
    scripts = {path.relative_to(ROOT) for folder in ("scripts", "eval") for path in (ROOT / folder).glob("*.py")}
    assert {
        (ROOT / folder / f"{name.replace('-', '_')}.py").relative_to(ROOT) for name, (folder, _) in cli.COMMANDS.items()
    } == scripts
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "focalclip": "focalclip.cli:main"
    }


def test_help_lists_every_command_and_version_is_the_packages(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert all(
            re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE) for name, (_, text) in cli.COMMANDS.items()
        )
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"focalclip {__version__}\n"


def test_a_misspelt_command_is_named(capsys):
    assert cli.main(["zeroshoot"]) == 2
    assert capsys.readouterr().err == "error: zeroshoot is not a command of focalclip; did you mean zeroshot?\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize("launcher", [[], ["--local_rank=0"]], ids=["plain", "deepspeed"])
def test_every_command_shows_its_help_under_the_name_that_was_called(name, launcher, installed, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*launcher, name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: focalclip {name} ")
    assert not re.search(r"python (scripts|eval)/|(scripts|eval)/\w+\.py", out)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_script_shows_its_help_under_its_path(name, monkeypatch, capsys):
    script = f"{cli.COMMANDS[name][0]}/{name.replace('-', '_')}.py"
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python {script} ")
    assert f"  python {script} " in out.partition("examples:")[2]


def test_columns_and_launchers_of_examples_are_kept(installed):
    assert as_called(ZEROSHOT) == "  focalclip zeroshot --benchmark demo                the newest run"
    assert as_called("deepspeed scripts/pretrain.py --a 1") == "deepspeed --no_python focalclip pretrain --a 1"
    torchrun = "torchrun --nproc-per-node 8 eval/zeroshot.py"
    assert as_called(torchrun) == "torchrun --nproc-per-node 8 --no-python focalclip zeroshot"
    assert as_called("see scripts/make_shards.py") == "see focalclip make-shards"


def test_examples_stay_as_they_are_in_a_checkout(monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval/zeroshot.py"])
    assert as_called(ZEROSHOT) == ZEROSHOT


def test_help_of_pretraining_has_every_setting_with_its_meaning_and_the_value_of_the_file(capsys):
    with pytest.raises(SystemExit):
        parse(["--config", "focalclip_small_lrf", "--help"])
    out = capsys.readouterr().out
    for path in _settings(RunConfig()):
        found = re.search(rf"^  --{re.escape(path)}[., ].*\n(?P<meaning>(      .+\n?)+)", out, re.MULTILINE)
        assert found, path
        assert re.search(r"\w.* \(default: ", found["meaning"].replace("\n", " ")), path
    assert re.search(r"--model\.image\.drop-path NUMBER\n.*\(default: 0\.3\)", out)
    assert re.search(r"--train\.zero-stage 0\|1\|2\|3\n.*\(default: 1\)", out)
    assert max(map(len, out.splitlines())) <= 130


def _settings(section, path=""):
    for name in type(section).model_fields:
        value = getattr(section, name)
        if hasattr(value, "model_dump"):
            yield from _settings(value, f"{path}{name.replace('_', '-')}.")
        else:
            yield f"{path}{name.replace('_', '-')}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("zeroshot --bench demo", "--bench is not an argument; did you mean --benchmark?"),
        ("zeroshot --batch_size 3", "--batch_size is not an argument; did you mean --batch-size?"),
        ("zeroshot --dataset demo", "--dataset is not an argument; did you mean --benchmark?"),
        ("zeroshot --pretrained openai", "did you mean --model open_clip:NAME/PRETRAINED?"),
        ("probe --seeds -1", "argument --seeds: '-1' is not a whole number from 0"),
        ("compare-towers --seeds -1", "argument --seeds: '-1' is not a whole number from 0"),
        ("retrieval", "the following arguments are required: --data"),
        ("export runs/demo out", "the following arguments are required: --format"),
    ],
)
def test_a_wrong_argument_is_one_line(words, message, installed, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert f"(see focalclip {words.split()[0]} --help)" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("make-shards a b.txt", "OUT b.txt: is a file; name a folder"),
        ("export . b.txt --format timm", "OUT b.txt: is a file; name a folder"),
        ("zeroshot --model runs", "runs: is a folder of runs; name one of them: runs/demo"),
        ("retrieval --data a --ranks b.txt --model x", "--ranks b.txt: the ending must be .npz"),
        ("pretrain --train.init-from nowhere", "train.init_from nowhere: no such file or folder"),
        ("pretrain -b 8", "b is not a setting; did you mean data.batch_size (--data.batch-size)?"),
        ("pretrain --model.image.name focalnet_tiny", "not a FocalNet variant; did you mean focalnet_tiny_srf?"),
        ("pretrain --model.image.name resnet50", "one of another library is written timm:resnet50"),
        ("pretrain --resume=last", "--resume takes no value ('last')"),
        ("pretrain --optim.betas 0.9", "optim.betas: input should be 2 values, such as [0.9, 0.98]"),
        ("eval", "eval is not a command of focalclip; did you mean zeroshot?"),
        ("--versoin", "did you mean --version?"),
    ],
)
def test_a_plausible_mistake_leads_on(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "1")  # as commands set them, and put back after the test
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("")
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("words", "is_warned"),
    [
        ("--data.train photos", True),
        ("--data.train=photos --name other", True),
        ("", False),
        ("--data.train emoji", False),
        ("--data.train photos --config focalclip_tiny_lrf", False),
        ("--data.train photos --config=focalclip_pico", False),
        ("--data.train photos --model.image.image-size 224", False),
        ("--data.train photos --data.augment.rotate 0", False),
        ("--data.train photos --resume", False),
    ],
)
def test_own_pictures_under_the_settings_of_the_demo_are_warned_of(words, is_warned, capsys):
    end = ["--eval.benchmark", "nowhere"]  # an error before any data are read
    assert pretrain.main([*words.split(), *end]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(lines) == is_warned
    if is_warned:
        assert "at 32 px with the demo's augmentation" in lines[0]
        assert "--config focalclip_tiny_lrf" in lines[0]


def test_one_rank_of_all_warns(capsys, monkeypatch):
    words = ["--data.train", "photos", "--train.init-from", "nowhere"]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert pretrain.main(words) == 2
        assert capsys.readouterr().err.count("warning:") == (rank == 0)
