"""A checkpoint that was damaged is never loaded, and none can run code."""

import errno
import json
import pickle
import random
import shutil

import helpers_run
import pytest
import torch

from focalclip.base.errors import SharedError
from focalclip.base.files import file_sha256, read_sealed_json, remove_leftovers, write_sealed_json
from focalclip.training import checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shards):
    """A finished run of two ranks at ZeRO 1, with the checkpoints step-2 and step-4."""
    folder = tmp_path_factory.mktemp("two")
    done = helpers_run.run(folder, shards, "--train.steps", "4", "--train.save-every", "2", ranks=2)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture
def run_dir(two_ranks, tmp_path):
    return shutil.copytree(two_ranks, tmp_path / "runs" / "tiny")


def _flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("flips", [10, pytest.param(200, marks=pytest.mark.long)])
def test_no_checkpoint_with_a_flipped_bit_is_loaded(run_dir, flips):
    path, rng = run_dir / "checkpoints/step-4", random.Random(0)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {"manifest.json", "buffers.pt"} < {file.name for file in files}
    assert checkpoint.newest_sound([path]).state.step == 4
    for number in range(flips):
        file = files[number % len(files)]
        whole = file.read_bytes()
        _flip(file, rng)
        with pytest.raises(SharedError, match=f"{file.name} .*: this checkpoint is damaged; start over"):
            checkpoint.newest_sound([path])
        file.write_bytes(whole)
    assert checkpoint.newest_sound([path]).state.step == 4


@pytest.mark.parametrize("fault", ["flip", "missing", "manifest"])
def test_a_run_goes_back_to_the_sound_checkpoint_and_says_so(run_dir, shards, two_ranks, fault):
    damaged = next((run_dir / "checkpoints/step-4").glob("mp_rank*"))
    if fault == "flip":
        _flip(damaged, random.Random(0))
    elif fault == "missing":
        damaged.unlink()
    else:
        (run_dir / "checkpoints/step-4/manifest.json").unlink()
    args = ["--train.steps", "4", "--train.save-every", "2", "--resume"]
    done = helpers_run.run(run_dir.parents[1], shards, *args, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("set aside as step-4.damaged; going back to step-2") == 1
    assert "continued from step 2" in done.stdout
    assert helpers_run.losses(run_dir) == helpers_run.losses(two_ranks)
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step*")) == ["step-2", "step-4", "step-4.damaged"]


def test_a_file_that_cannot_be_read_for_now_costs_no_checkpoint(run_dir, monkeypatch):
    def lack(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    paths = checkpoint.complete(run_dir / "checkpoints")
    monkeypatch.setattr(checkpoint, "file_sha256", lack)
    with pytest.raises(SharedError, match=r"Too many open files; raise the limit"):
        checkpoint.newest_sound(paths)
    assert checkpoint.complete(run_dir / "checkpoints") == paths


class _Hostile:
    """What an attacker writes: an object whose loading leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "buffers.pt"]
)
@pytest.mark.parametrize("ranks", [2, pytest.param(0, marks=pytest.mark.long)], ids=["same", "converted"])
def test_no_file_of_a_checkpoint_runs_code(run_dir, tmp_path, shards, name, ranks):
    path, trace = run_dir / "checkpoints/step-4", tmp_path / "code-ran"
    torch.save({"module": _Hostile(trace)}, path / name)
    manifest = read_sealed_json(path / "manifest.json")
    manifest["files"][name] = file_sha256(path / name)
    write_sealed_json(path / "manifest.json", manifest)
    args = ["--train.steps", "4", "--resume"]
    done = helpers_run.run(tmp_path, shards, *args, ranks=ranks)
    assert not trace.exists()
    assert done.returncode == 0, done.stdout + done.stderr
    fault = f"{path / name} holds other things than data: set aside as step-4.damaged; going back to step-2"
    assert done.stderr.count(fault) == 1
    pickle.loads(pickle.dumps(_Hostile(trace))).close()
    assert trace.exists()  # the object does what it is meant to where it is loaded


def test_what_killed_processes_left_is_removed_and_what_was_moved_aside_comes_back(tmp_path):
    (tmp_path / "checkpoints/.step-4.tmp/deep").mkdir(parents=True)
    (tmp_path / "checkpoints/step-2").mkdir()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/.demo.json.0123456789ab.tmp").touch()
    (tmp_path / ".model.old.tmp").mkdir()
    (tmp_path / ".model.old.tmp/weights").touch()
    (tmp_path / ".model.new.tmp").mkdir()
    remove_leftovers(tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["checkpoints", "checkpoints/step-2", "eval", "model", "model/weights"]


def test_a_sealed_file_is_believed_only_whole(tmp_path):
    path = write_sealed_json(tmp_path / "x.json", {"a": 1, "sha256 of b": "0" * 64})
    assert read_sealed_json(path) == {"a": 1, "sha256 of b": "0" * 64}
    whole = path.read_bytes()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="hash"):
            read_sealed_json(path)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="hash"):
        read_sealed_json(path)
