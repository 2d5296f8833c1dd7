"""The log's promises: faults and losses over all steps, and an end with one sentence where the numbers are no good."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from focalclip.base.errors import SharedError, UserError, first_line
from focalclip.base.ranks import in_turns, main_only
from focalclip.config import RunConfig
from focalclip.training import engine
from focalclip.training.checkpoint import TrainState
from focalclip.training.log import TrainLog
from focalclip.training.step import StepResult


@pytest.fixture
def config(tmp_path):
    values = {"runs_dir": str(tmp_path), "train": {"steps": 6, "log_every": 3}, "data": {"max_faults": 2}}
    config = RunConfig.model_validate(values)
    config.run_dir.mkdir()
    return config


def _steps(config, state, losses, faults=(), scale=1.0):
    with closing(TrainLog(config, 6, state)) as log:
        for loss in losses:
            state.step += 1
            norm = torch.tensor(loss)  # not finite where the loss is not
            log.step(state, StepResult(torch.tensor(loss), torch.full((1,), scale), 0.1, norm, list(faults), []))
            faults = ()
        log.settle(state)
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_losses_and_faults_since_the_last_line_survive_a_stop(config, capsys):
    state = TrainState()
    lines = _steps(config, state, [1.0, 2.0, 3.0, 4.0], faults=["00000.tar: 7: no image"])
    assert [line["loss"] for line in lines] == [2.0]
    assert state.losses == [4.0]
    assert "replaced a broken sample: 00000.tar: 7: no image" in capsys.readouterr().err

    lines = _steps(config, replace(state), [5.0, 6.0])
    assert [(line["step"], line["loss"], line["faults"]) for line in lines] == [(3, 2.0, 1), (6, 5.0, 1)]


def test_a_line_has_the_scale_of_the_cosines_and_so_has_the_terminal(config, capsys):
    lines = _steps(config, TrainState(), [1.0, 2.0, 3.0, 1.0, 2.0, 4.5], scale=22.34)
    keys = {"step", "samples", "loss", "scale", "lr", "grad_norm", "images_per_second", "faults", "skipped"}
    assert [line.keys() for line in lines] == [keys, keys]
    assert [line["scale"] for line in lines] == pytest.approx([22.34, 22.34])
    assert "step 6/6: loss 2.500, scale 22.3, " in capsys.readouterr().err
    board = EventAccumulator(str(config.run_dir / "tensorboard"))
    board.Reload()
    assert [(event.step, round(event.value, 2)) for event in board.Scalars("train/scale")] == [(3, 22.34), (6, 22.34)]


def test_too_many_faults_end_the_run(config):
    with pytest.raises(SharedError, match=r"data.max_faults: 3 broken samples, more than 2; repair the shards"):
        _steps(config, TrainState(faults=1), [1.0], faults=["a", "b"])


def test_steps_that_were_skipped_are_named_counted_and_in_no_mean(config, capsys):
    nan, inf = float("nan"), float("inf")
    state = TrainState()
    lines = _steps(config, state, [1.0, nan, 3.0, inf, nan, inf])
    assert [(line["loss"], line["grad_norm"], line["skipped"]) for line in lines] == [(2.0, 3.0, 1), (None, None, 4)]
    assert state.skipped_in_a_row == 3
    errors = capsys.readouterr().err
    assert "step 2: skipped, as its loss is nan and the norm of its gradient nan" in errors
    assert "step 6/6: loss not finite" in errors


def test_lines_after_the_checkpoint_are_cut(config):
    path = config.run_dir / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    TrainLog(config, 6, TrainState(step=2)).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_damaged_lines_are_left_out_and_named(config, capsys):
    path = config.run_dir / "metrics.jsonl"
    damaged = [
        b'{"step": 1, "lo',
        b"\xff\xfe",
        b"[3]",
        b'{"loss": 2.0}',
        b'{"step": "2"}',
        b"\0" * 9,
        b"[" * 10**5,
        b"",
    ]
    lines = [b'{"step": 1}', *damaged, b'{"step": 2, "loss": NaN}', b'{"step": 3}']
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 4')
    TrainLog(config, 6, TrainState(step=2)).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": NaN}\n'
    assert f"warning: {path}: 8 damaged lines are left out (line 2, 3, 4 ...)\n" in capsys.readouterr().err


def test_what_is_drawn_depends_on_seed_step_and_rank_alone(monkeypatch):
    def draws(seed, step, rank=0):
        monkeypatch.setattr(engine, "rank", lambda: rank)
        engine.seed_step(seed, step)
        return tuple(torch.rand(4).tolist())

    largest = (2**63 - 1, 10**9)  # any seed and step can be seeded
    assert draws(*largest) == draws(*largest)
    others = [draws(2**63 - 2, 10**9), draws(2**63 - 1, 10**9 + 1), draws(*largest, rank=1)]
    assert len({draws(*largest), *others}) == 4


@pytest.mark.parametrize("run", [in_turns, main_only])
def test_work_that_fails_for_the_user_or_the_disk_fails_with_one_sentence(run, tmp_path):
    def refuse():
        raise UserError("mend it")

    with pytest.raises(SharedError, match=r"^mend it$"):
        run(refuse)
    with pytest.raises(SharedError, match=r"/file/x: Not a directory; name another path"):
        run(lambda: (tmp_path.touch(), (tmp_path / "file").touch(), (tmp_path / "file" / "x").mkdir()))


def test_the_first_line_of_an_error_that_says_nothing_is_its_type():
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError"
