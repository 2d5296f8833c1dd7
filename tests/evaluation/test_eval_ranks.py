"""Two real processes give the numbers of one, and fail together."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers import run_ranks
from helpers_run import ROOT
from local_hub import serving
from wds_folder import picture, tiny_model, write_folder, zero_shot

import focalclip
from focalclip.base import ranks as distributed
from focalclip.base.ranks import rank
from focalclip.cli.zeroshot import main
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.evaluation.task import Benchmark, Task
from focalclip.models.clip import FocalCLIP

NAMES = ("cat", "dog", "ankle boot", "fire engine", "owl", "bus", "tree")
TEMPLATES = ("a photo of a {c}.", "art of the {c}, {c}.", "{c}")
TIMES = {"seconds", "images_per_second", "text_seconds", "image_seconds", "peak_memory", "ranks"}


def untimed(values):
    """A result without what a clock or the number of ranks decides."""
    if isinstance(values, dict):
        return {name: untimed(value) for name, value in values.items() if name not in TIMES}
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """``tasks``, and ``0`` and ``1``: what two ranks see, one of which lacks a task."""
    root = tmp_path_factory.mktemp("ranks")
    images = [picture(i) for i in range(23)]
    images[4], images[17] = b"rubbish", images[17][:60]
    write_folder(root / "tasks" / "a", [i % 7 for i in range(23)], names=NAMES, templates=TEMPLATES, images=images)
    write_folder(root / "tasks" / "b", [0, 1, 2])  # fewer batches than ranks
    vectors = [[i % 2, (i // 2) % 2, 1] for i in range(10)]
    write_folder(root / "tasks" / "c", vectors, kind="multilabel")
    for number in ("0", "1"):
        (root / number / "wds_renderedsst2").mkdir(parents=True)
    write_folder(
        root / "0" / "hateful_memes", [0, 1] * 250, names=["meme", "hatespeech meme"], images=[picture(0)] * 500
    )
    return root


def _measure(root, **options):
    result = zero_shot(tiny_model(), root / "tasks", batch_size=4, **options)
    return untimed(result.to_json())


def _measure_what_one_lacks(root):
    folder, tasks = root / str(rank()), ["hateful-memes", "rendered-sst2"]
    result = zero_shot(tiny_model(), "elevater", data_root=folder, tasks=tasks)
    return [result.missing, result.failed]


def _measure_with_a_lost_disk(root):
    opened, options = {}, {"batch_size": 4, "progress": False}
    zero_shot(tiny_model(), root / "tasks", opened=opened, **options)
    if rank() == 1:
        gone = tuple(entry._replace(shard=Path("/gone/0.tar")) for entry in opened["a"].data.entries)
        opened["a"] = replace(opened["a"], data=replace(opened["a"].data, entries=gone))
    result = zero_shot(tiny_model(), root / "tasks", opened=opened, **options)
    return [list(result.tasks), result.failed]


def _all(root):
    root = Path(root)
    answers = {
        "whole": _measure(root, cache_dir=root / "cache", outputs=[root / "out.json"]),
        "cached": _measure(root, cache_dir=root / "cache"),
        "lacking": _measure_what_one_lacks(root),
        "lost": _measure_with_a_lost_disk(root),
    }
    return json.dumps(answers)


@pytest.fixture(scope="module")
def answers(root):
    """What each of two ranks found."""
    return [json.loads(answer) for answer in run_ranks(_all, 2, str(root))]


@pytest.mark.trap("5.3", "a single GPU")
def test_trap_ranks_give_the_numbers_of_one_process(root, answers):
    """The toolkit knows one GPU, CLIP_benchmark deals out whole runs; here the images of a data set are shared."""
    alone = json.loads(json.dumps(_measure(root)))
    assert alone["tasks"]["a"]["n"] == 21
    assert [answer["whole"] for answer in answers] == [alone, alone]
    assert untimed(json.loads((root / "out.json").read_text())) == alone


def test_the_cache_does_not_depend_on_the_number_of_ranks(root, answers):
    alone = json.loads(json.dumps(_measure(root, cache_dir=root / "cache")))
    assert [task["cached_images"] for task in alone["tasks"].values()] == [23, 3, 10]
    assert [answer["cached"] for answer in answers] == [alone, alone]
    whole = answers[0]["whole"]["tasks"]
    assert {name: task["value"] for name, task in alone["tasks"].items()} == {n: t["value"] for n, t in whole.items()}


def test_what_one_rank_lacks_all_lack(answers):
    assert answers[0]["lacking"] == answers[1]["lacking"]
    missing, failed = answers[0]["lacking"]
    assert "hateful_memes" in missing["hateful-memes"]
    assert "no layout that can be read" in failed["rendered-sst2"]


def test_a_disk_that_fails_on_one_rank_fails_the_task_on_all(answers):
    assert answers[0]["lost"] == answers[1]["lost"]
    tasks, failed = answers[0]["lost"]
    assert tasks == ["b", "c"]
    assert "rank 1: /gone/0.tar: No such file or directory" in failed["a"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_cover_everything_once(world_size, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    for count in (0, 1, 7, 16):
        shares = []
        for number in range(world_size):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(distributed.own_share(count))
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_command_under_torchrun_prints_and_writes_once(root, monkeypatch, capsys):
    config = ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="focalnet_pico", image_size=32),
        text=TextTowerConfig(context_length=12, width=16, heads=2, layers=1),
    )
    torch.manual_seed(0)
    focalclip.save(FocalCLIP(config), root / "model")
    monkeypatch.chdir(root)
    words = ["--benchmark", "tasks", "--model", "model", "--device", "cpu", "--batch-size", "4", "--no-cache"]
    assert main([*words, "--output", "one.json", "--local_rank=0"]) == 0
    alone = capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*launch, str(ROOT / "eval" / "zeroshot.py"), *words, "--output", "two.json"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("two.json", "one.json").strip() == alone.strip()
    assert done.stderr.count("a (1 of 3): ") == 1
    one, two = (untimed(json.loads(Path(name).read_text())) for name in ("one.json", "two.json"))
    assert one == two


def _measure_from_hub(root, address):
    huggingface_hub.constants.HF_HUB_CACHE = str(root / "hub")
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.constants.ENDPOINT = address
    huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    os.environ["NO_PROXY"] = "127.0.0.1"
    result = zero_shot(
        tiny_model(), Benchmark("x", "wds", (Task(id="mine", hub="own/wds_mine"),)), progress=False
    )  # fmt: skip
    return json.dumps([result.missing, [task.n for task in result.tasks.values()]])


def test_one_rank_downloads_and_the_others_read_the_cache(root):
    with serving(write_folder(root / "repository", [0, 1, 2, 0], shard_size=2)) as hub:
        damaged = bytearray(hub.files["test/1.tar"])
        damaged[600] ^= 1
        hub.served["test/1.tar"] = bytes(damaged)
        for answer in map(json.loads, run_ranks(_measure_from_hub, 2, root, hub.address)):
            assert "they were removed, run this again" in answer[0]["mine"]
        hub.served.clear()
        hub.requests.clear()
        assert [json.loads(answer) for answer in run_ranks(_measure_from_hub, 2, root, hub.address)] == [[{}, [4]]] * 2
        asked = [request for request in hub.requests if request.startswith("GET")]
        assert sorted(asked) == ["GET test/1.tar", "GET test/nshards.txt"]
        heads = [request for request in hub.requests if request.startswith("HEAD test/1.tar")]
        assert len(heads) == 1  # the second rank did not ask


def test_caches_are_filled_by_one_process_at_a_time_of_each_machine(monkeypatch):
    turns = []
    for number in range(6):  # two machines of three ranks
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        monkeypatch.setenv("LOCAL_RANK", str(number % 3))
        turns.append(distributed.cache_turn())
    assert turns == [0, 2, 2, 1, 2, 2]


def _measure_twice_with_own_caches(root):
    cache = root / f"cache{rank()}"  # as on two machines, each with a cache of its own
    runs = [zero_shot(tiny_model(), root / "tasks", batch_size=2, cache_dir=cache) for _ in range(2)]
    return [run.score for run in runs]


def test_machines_need_not_share_a_cache(root):
    scores = run_ranks(_measure_twice_with_own_caches, 2, root)
    assert len({score for own in scores for score in own}) == 1
