"""Hub repositories: the cache first and offline, then real downloads from a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_hub import COMMIT, serving
from wds_folder import picture, write_folder

from focalclip.base.errors import UserError
from focalclip.evaluation.data import Unavailable, locate, open_task, read_task_folder
from focalclip.evaluation.task import Task

TASK = Task(id="mine", hub="own/wds_mine")
MIB = 1 << 20


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """A function that points the hub's client at a server, or takes it offline without one, with a cache of its own."""
    from huggingface_hub.utils import close_session

    def to(hub=None):
        address = hub.address if hub else "http://127.0.0.1:9"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", hub is None)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()

    yield to
    close_session()


def gets(hub, name=""):
    return [request for request in hub.requests if request.startswith(f"GET {name}")]


def cached_repository(cache, repo="own/wds_mine"):
    """Where a snapshot lies in the hub's cache."""
    folder = Path(cache) / f"datasets--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_nothing_cached_and_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match="offline, own/wds_mine not cached; go online once, or give --data-root"):
        locate(TASK, None, {})


def test_the_cache_is_used_offline_and_a_split_that_is_not_in_it_is_named(tmp_path, monkeypatch):
    write_folder(cached_repository(tmp_path), [0, 1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert read_task_folder(locate(TASK, None, {})).labels.tolist() == [0, 1]
    assert open_task(TASK, None, {}).labels.tolist() == [0, 1]
    with pytest.raises(Unavailable, match="offline, the train split of own/wds_mine not cached; go online once"):
        open_task(TASK, None, {}, "train")


def test_a_cached_split_with_a_missing_shard_is_not_taken_for_whole(tmp_path, monkeypatch):
    folder = write_folder(cached_repository(tmp_path), [0, 1, 2], shard_size=1)
    (folder / "test" / "1.tar").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match="offline, the test split of own/wds_mine not cached"):
        open_task(TASK, None, {})


def test_only_the_split_asked_for_is_downloaded_and_then_never_asked_again(tmp_path, connect):
    folder = write_folder(tmp_path / "repository", [0, 1, 2, 0, 1], shard_size=2)
    (folder / "train").mkdir()
    (folder / "train" / "0.tar").write_bytes(b"not asked for")
    with serving(folder) as hub:
        connect(hub)
        assert open_task(TASK, None, {}).labels.tolist() == [0, 1, 2, 0, 1]
        assert not gets(hub, "train")
        assert gets(hub)[-1] == "GET test/nshards.txt"  # what makes the split whole comes after the rest was verified
        asked = len(hub.requests)
        assert open_task(TASK, None, {}).labels.tolist() == [0, 1, 2, 0, 1]
        assert len(hub.requests) == asked
    connect()
    assert open_task(TASK, None, {}).labels.tolist() == [0, 1, 2, 0, 1]


def test_a_broken_download_is_resumed_where_it_stopped(tmp_path, connect):
    noise = np.random.default_rng(0).integers(0, 256, 11 * MIB, dtype=np.uint8).tobytes()
    folder = write_folder(tmp_path / "repository", [2], images=[picture(0) + noise])
    with serving(folder) as hub:
        connect(hub)
        hub.cut["test/0.tar"] = 10 * MIB + 5000  # the client writes pieces of 10 MiB
        assert open_task(TASK, None, {}).labels.tolist() == [2]
        assert gets(hub, "test/0.tar") == ["GET test/0.tar", f"GET test/0.tar bytes={10 * MIB}-"]


def test_what_differs_from_the_hubs_sha256_is_removed_and_alone_fetched_anew(tmp_path, connect):
    folder = write_folder(tmp_path / "repository", [0, 1, 2, 0], shard_size=2)
    with serving(folder) as hub:
        connect(hub)
        damaged = bytearray(hub.files["test/1.tar"])
        damaged[600] ^= 1
        hub.served["test/1.tar"] = bytes(damaged)
        with pytest.raises(Unavailable, match=r"SHA-256 \(test/1\.tar \.\.\.\); they were removed, run this again"):
            open_task(TASK, None, {})
        connect()
        with pytest.raises(Unavailable, match="offline, the test split of own/wds_mine not cached"):
            open_task(TASK, None, {})
        connect(hub)
        hub.served.clear()
        assert open_task(TASK, None, {}).labels.tolist() == [0, 1, 2, 0]
        assert (len(gets(hub, "test/0.tar")), len(gets(hub, "test/1.tar"))) == (1, 2)


def test_a_file_shorter_than_the_hub_says_is_not_accepted(tmp_path, connect):
    folder = write_folder(tmp_path / "repository", [0, 1])
    with serving(folder) as hub:
        connect(hub)
        hub.served["test/0.tar"] = hub.files["test/0.tar"][:1024]
        with pytest.raises(Unavailable, match=r"own/wds_mine: .*(1024|size|differ)"):
            open_task(TASK, None, {})
        hub.served.clear()
        assert open_task(TASK, None, {}).labels.tolist() == [0, 1]


def test_a_name_that_no_repository_can_have_is_refused(connect):
    connect()
    with pytest.raises(UserError, match="own/wds/mine: not the name of a repository, OWNER/NAME"):
        open_task(Task(id="mine", source="hf:own/wds/mine"), None, {})


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "own/wds_mine is gated: accept its terms on the hub and log in, or give --data-root"),
        (404, "RepoNotFound", "the hub has no own/wds_mine"),
        (418, "", r"the hub fails \(.*418.*\), own/wds_mine not cached; go online once"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(tmp_path, connect, status, code, message):
    (tmp_path / "repository").mkdir()
    with serving(tmp_path / "repository") as hub:
        connect(hub)
        hub.refusal = status, code
        with pytest.raises(Unavailable, match=message) as raised:
            open_task(TASK, None, {})
        assert "\n" not in str(raised.value)


def test_a_repository_of_parquet_files(tmp_path, connect, monkeypatch):
    from datasets import ClassLabel, Dataset, Features, Image

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "label": [1, 0, 1]}
    table = Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])}))
    (tmp_path / "repository" / "plain").mkdir(parents=True)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "repository" / "plain" / f"{split}-00000-of-00001.parquet")
    task = Task(id="ants", source="hf:own/wds_mine:plain", templates=("a {c}.",))
    with serving(tmp_path / "repository") as hub:
        connect(hub)
        data = open_task(task, None, {})
        assert (data.labels.tolist(), data.class_names) == ([1, 0, 1], ("ant", "bee"))
        assert not gets(hub, "plain/train")
        with pytest.raises(Unavailable, match=r"own/wds_mine has no val split, .* cut one from train"):
            open_task(task, None, {}, "val")
    connect()
    assert [entry.read() for entry in open_task(task, None, {}).entries] == [picture(i) for i in range(3)]


def test_a_process_of_its_own_reads_the_cache_offline(tmp_path):
    write_folder(cached_repository(tmp_path), [0, 1, 1])
    script = (
        "from focalclip.evaluation.data import open_task; from focalclip.evaluation.task import Task;"
        "print(open_task(Task(id='mine', hub='own/wds_mine'), None, {}).labels.tolist())"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "[0, 1, 1]\n", done.stderr
