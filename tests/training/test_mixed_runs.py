"""Runs on several weighted sources: killed and resumed on other ranks, with other weights, and no pair is lost."""

import json
import signal
import time
from collections import Counter

import helpers_run
import pytest
import recorded_run
import yaml
from tiny_shards import write_shards

from focalclip.base.files import read_sealed_json

COUNTS = {"a": [20, 25], "b": [30], "c": [6, 7]}
ARGS = ["--train.save-every", "2", "--train.zero-stage", "0", "--resume", "--train.steps", "10"]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    (tmp_path / "recorded").mkdir()
    monkeypatch.setenv("RECORDED", str(tmp_path / "recorded"))
    for name, sizes in COUNTS.items():
        write_shards(tmp_path / name, sizes)
    return tmp_path


def mixed(folder, **weights) -> str:
    return json.dumps([{"source": str(folder / name), "weight": weight} for name, weight in weights.items()])


def run(folder, train: str, *args, ranks: int = 0):
    return helpers_run.run(folder, train, *ARGS, *args, ranks=ranks)


def killed_after(step: int, folder, train: str, ranks: int) -> str:
    """Kill all processes once a checkpoint is there."""
    process = helpers_run.start(folder, train, *ARGS, ranks=ranks)
    end = time.monotonic() + 200
    while not (folder / f"runs/tiny/checkpoints/step-{step}").exists():
        assert time.monotonic() < end
        assert process.processes[0].is_alive(), process.communicate(timeout=20)
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    return "".join(process.communicate(timeout=60))


def state_of(folder, step: int) -> dict:
    return read_sealed_json(folder / f"runs/tiny/checkpoints/step-{step}/manifest.json")["state"]


def by_source(found: dict[int, int]) -> dict[str, list[int]]:
    """The numbers of the samples of each source within it, in the order of training."""
    result, first = {}, 0
    for name, sizes in COUNTS.items():
        result[name] = [number - first for number in found.values() if first <= number < first + sum(sizes)]
        first += sum(sizes)
    return result


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [(2, 2, 0), pytest.param((4, 2, 1), marks=pytest.mark.long)])
def test_a_run_is_killed_and_resumed_with_other_ranks_workers_and_weights(sources, ranks):
    killed_after(2, sources, mixed(sources, a=5, b=3, c=2), ranks[0])
    second = killed_after(6, sources, mixed(sources, a=5, b=3, c=2), ranks[1])
    steps = [int(path.name.removeprefix("step-")) for path in (sources / "runs/tiny/checkpoints").glob("step-*")]
    third = run(sources, mixed(sources, a=1, b=1, c=2), "--data.workers", "0", ranks=ranks[2])
    assert third.returncode == 0, third.stderr
    found = recorded_run.read(sources / "recorded")
    assert list(found) == [*range(160)]  # no position lost
    for name, numbers in by_source(found).items():
        count = sum(COUNTS[name])
        for start in range(0, len(numbers), count):  # each epoch of each source has each pair once
            epoch = numbers[start : start + count]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= {*range(count)}
    (first, then), names = state_of(sources, 10)["mixture"], [*COUNTS]
    assert (first["start"], then["start"]) == (0, 16 * max(steps))
    before, after = ({k: n for k, n in found.items() if (k < then["start"]) == old} for old in (True, False))
    drawn = {name: len(numbers) for name, numbers in by_source(before).items()}
    assert [part["place"] for part in then["parts"]] == [drawn[name] for name in names]
    for part, weight in zip(drawn.values(), (0.5, 0.3, 0.2), strict=True):
        assert abs(part - weight * len(before)) < 1
    for part, weight in zip(by_source(after).values(), (0.25, 0.25, 0.5), strict=True):
        assert abs(len(part) - weight * len(after)) < 1
    assert "data.train:" not in second
    (line,) = [line for line in third.stderr.splitlines() if "data.train:" in line]
    assert f"a from weight 0.5 to 0.25, from its sample {drawn['a']} on; " in line
    table = [line.split()[1:] for line in third.stdout.splitlines() if line.startswith("source ")]
    assert table[0] == ["pairs", "share", "epochs", "source"]
    totals = {name: len(numbers) for name, numbers in by_source(found).items()}
    assert table[1:] == [
        [str(sum(COUNTS[name])), share, f"{totals[name] / sum(COUNTS[name]):.1f}", str(sources / name)]
        for name, share in zip(names, ("0.25", "0.25", "0.5"), strict=True)
    ]


@pytest.mark.faults
def test_sources_join_at_a_resume_and_what_cannot_change_is_refused(sources):
    few = ["--train.steps", "4", "--train.save-every", "1"]
    process = helpers_run.start(sources, mixed(sources, a=1, b=1), *ARGS, *few)
    while not (sources / "runs/tiny/checkpoints/step-2").exists():
        assert process.processes[0].is_alive(), process.communicate(timeout=20)
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    lists = {
        mixed(sources, a=1, c=1): "data.train: the run was drawing from ",
        json.dumps([str(sources / "a"), str(sources / "b")]): "data.train: the run mixes its sources by weights; give",
        json.dumps([{"source": str(sources / n), "weight": 1, "use_labels": False} for n in "ab"]): "use_labels=None",
    }
    for train, message in lists.items():
        refused = run(sources, train, *few)
        assert refused.returncode == 2, refused.stderr
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    done = run(sources, mixed(sources, a=1, b=1, c=2), *few)
    assert done.returncode == 0, done.stderr
    assert f"{sources / 'c'} added with weight 0.5" in done.stderr
    found = by_source(recorded_run.read(sources / "recorded"))
    assert sum(map(len, found.values())) == 64
    assert Counter(found["c"]).most_common(1)[0][1] <= 2
    config = yaml.safe_load((sources / "runs/tiny/config.yaml").read_text())
    assert [entry["weight"] for entry in config["data"]["train"]] == [1, 1, 2]


def test_weights_cannot_begin_in_the_middle_of_a_run(sources):
    few = ["--train.steps", "3", "--train.save-every", "1", "--name", "plain"]
    assert run(sources, json.dumps([str(sources / "a"), str(sources / "b")]), *few).returncode == 0
    refused = run(sources, mixed(sources, a=1, b=1), *few)
    assert refused.returncode == 2
    assert "plain began without weights" in refused.stderr
