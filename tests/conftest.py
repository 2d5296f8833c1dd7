"""Settings that every test needs before any library is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focalclip.base.files import cache_dir


@pytest.fixture(scope="session", autouse=True)
def features_of_tests_are_kept_apart(tmp_path_factory):
    """A cache whose features are the tests' own, while the default corpus and all else are the user's, by links."""
    own, users = tmp_path_factory.mktemp("cache"), cache_dir()
    users.mkdir(parents=True, exist_ok=True)
    for path in users.iterdir():
        if path.name != "features":
            (own / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCALCLIP_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of two standard shards: 128 coloured noise pictures of 20 classes."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(64):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(picture, "png")
                members = {"png": picture.getvalue(), "txt": f"thing {i % 20}".encode(), "cls": str(i % 20).encode()}
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{shard}{i:04d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """The table of traps is made from the marks at their tests."""
    parser.addoption("--traps", action="store_true", help="print the marked traps as a Markdown table and run nothing")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With ``--traps`` this process collects by itself, and prints neither a header nor durations."""
    if config.option.traps:
        config.option.numprocesses, config.option.durations, config.option.verbose = 0, 0, -2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The launcher's tests take longest: they start first, so that no process waits for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_launch.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With ``--traps``, print a row for each mark and run nothing."""
    if not session.config.option.traps:
        return None
    rows = {
        (*mark.args, f"`{item.nodeid.partition('[')[0]}`")
        for item in session.items
        for mark in item.iter_markers("trap")
    }
    print("| place | trap | test |\n|---|---|---|")
    for row in sorted(rows, key=lambda row: ([int(n) for n in re.findall(r"\d+", row[0])], row)):
        print("| " + " | ".join(row) + " |")
    return True
