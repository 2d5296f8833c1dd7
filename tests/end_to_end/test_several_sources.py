"""The configuration of docs/data.md, "Several sources", runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_shards import good_sample, picture, write_tar

from focalclip.cli.settings import with_overrides
from focalclip.config import RunConfig, SourceConfig

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/data.md").read_text().split("## Several sources")[1].split("\n## ")[0]
YAML, COMMANDS = re.findall(r"```(?:yaml|bash)\n(.*?)```", SECTION, re.DOTALL)
SHORT = ["--train.steps", "3", "--data.batch-size", "20", "--eval.benchmark", "null", "--data.workers", "0"]
SHORT += ["--model.embed-dim", "16", "--model.text.width", "16", "--model.text.heads", "2", "--model.text.layers", "1"]


def write_sources(folder: Path) -> None:
    """A table, shards with captions, and class folders, under the names of the example."""
    rows = ["path,caption"]
    for i in range(12):
        (folder / f"{i}.png").write_bytes(picture(i))
        rows.append(f"{i}.png,photo {i}")
    (folder / "photos.csv").write_text("\n".join(rows))
    (folder / "shards/web").mkdir(parents=True)
    write_tar(folder / "shards/web/0.tar", [member for i in range(8) for member in good_sample(i)])
    for i, name in enumerate(["robin", "wren", "robin", "owl", "owl", "wren"]):
        (folder / "birds" / name).mkdir(parents=True, exist_ok=True)
        (folder / "birds" / name / f"{i}.png").write_bytes(picture(i))


def test_the_example_configuration_runs(tmp_path):
    write_sources(tmp_path)
    (tmp_path / "mixed.yaml").write_text(YAML)
    command = COMMANDS.splitlines()[0].split()
    assert command[:2] == ["focalclip", "pretrain"]
    words = [sys.executable, str(ROOT / "scripts/pretrain.py"), *command[2:], *SHORT]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("source ")]
    assert table == [
        ["pairs", "share", "epochs", "source"],
        ["12", "0.5", "2.5", "photos.csv"],
        ["8", "0.3", "2.2", "shards/web"],
        ["6", "0.2", "2.0", "birds"],
    ]
    assert "replaced a broken sample" not in done.stderr
    written = yaml.safe_load((tmp_path / "runs/mixed/config.yaml").read_text())
    assert written["data"]["train"][2]["templates"] == ["a photo of a {c}", "a close-up of a {c}"]


@pytest.mark.parametrize(("line", "weights"), [(1, None), (2, [2, 1])])
def test_the_other_commands_are_understood(line, weights):
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", COMMANDS.splitlines()[line])]
    data = with_overrides(RunConfig(), words[2:]).data
    assert [entry.source if isinstance(entry, SourceConfig) else entry for entry in data.entries] == [
        "photos.csv",
        "shards/web",
    ]
    assert data.weights == weights
