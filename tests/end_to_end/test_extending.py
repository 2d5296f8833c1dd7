"""The examples of docs/extending.md: one new file and one line each, run in a copy of the package as a reader would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """One section: ``blocks`` are (language, title, content) in order."""

    heading: str
    blocks: list[tuple[str, str, str]]


def _examples() -> list[Example]:
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    examples = [Example(section.partition("\n")[0], BLOCK.findall(section)) for section in sections]
    return [example for example in examples if example.blocks]


EXAMPLES = _examples()
DOORS = ("loss", "metric", "optimiser", "schedule", "image tower", "source", "data source")


def _insert(file: Path, diff: str) -> None:
    """Put the one line that begins with + behind the lines above it in the block, which the file holds once."""
    lines = diff.splitlines()
    added = [line[1:] for line in lines if line.startswith("+")]
    assert len(added) == 1, f"{file}: {len(added)} lines are added, not one"
    context = [line[1:] for line in lines[: lines.index("+" + added[0])]]
    present = file.read_text(encoding="utf-8").splitlines()
    places = [i for i in range(len(present)) if present[i : i + len(context)] == context]
    assert len(places) == 1, f"{file}: the context of the line stands there {len(places)} times"
    present.insert(places[0] + len(context), added[0])
    file.write_text("\n".join(present) + "\n", encoding="utf-8")


def test_every_door_has_an_example():
    headings = " / ".join(example.heading.lower() for example in EXAMPLES)
    assert [door for door in DOORS if door not in headings] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.heading.replace(" ", "-").lower())
def test_it_is_one_new_file_and_one_line(example, tmp_path):
    for name in ("focalclip", "configs", "scripts", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    changes = [block for block in example.blocks if block[1] != "use"]
    uses = [block for block in example.blocks if block[1] == "use"]
    new = [title for language, title, _ in changes if language != "diff"]
    assert uses, "an example that nothing uses"
    assert len(new) == len(set(new)) == sum(language == "diff" for language, _, _ in changes), "a file and a line each"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for language, title, content in changes:
        if language == "diff":
            _insert(tmp_path / title, content)
        else:
            assert not (tmp_path / title).exists(), f"{title} is there already"
            (tmp_path / title).write_text(content, encoding="utf-8")
    for language, _, content in uses:
        command = [sys.executable, "-c", content] if language == "python" else ["bash", "-euc", content]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"
