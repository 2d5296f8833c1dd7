"""How commands end: what a shell and its user see."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from focalclip.base.files import writing
from focalclip.cli import explain, main
from focalclip.cli.command import guarded

PRINTS = "for line in range(100_000): print(line)"
LOSES_A_WORKER = "raise BrokenPipeError('a worker is gone')"


@pytest.mark.parametrize(("body", "status", "said"), [(PRINTS, 141, ""), (LOSES_A_WORKER, 1, "a worker is gone")])
def test_only_a_reader_that_has_read_enough_ends_a_command_in_silence(body, status, said):
    code = f"from focalclip.cli.command import guarded\ndef command():\n  {body}\nraise SystemExit(guarded(command))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    if body == PRINTS:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
    told = process.stderr.read()
    assert (process.wait(timeout=60), said in told, bool(told)) == (status, True, bool(said))


LONG, DEEP = "x" * 300, "[" * 100_000


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("pretrain", ["--config", LONG], "File name too long"),
        ("pretrain", ["--train.init-from", LONG], "File name too long"),
        ("pretrain", ["--train.init-from", "~nosuch/x"], "no such file or folder"),
        ("pretrain", ["--config", "deep.yaml"], "deep.yaml: not valid YAML"),
        ("pretrain", ["--data.train", "deep.json"], "deep.json: neither Karpathy"),
        ("pretrain", ["--data.train", "deep.jsonl"], "deep.jsonl: no object names an image"),
        ("pretrain", ["--data.workers", "100000"], "data.workers: input should be less than or equal to 1024"),
        ("zeroshot", ["--model", LONG], "File name too long"),
        ("zeroshot", ["--model", "export"], "focalclip.json: not the description of an exported model"),
        ("zeroshot", ["--benchmark", LONG, "--model", "export"], "File name too long"),
        ("zeroshot", ["--output", LONG, "--model", "export"], "File name too long"),
        ("zeroshot", ["--class-prompts", "deep.json", "--model", "export"], "--class-prompts deep.json: not JSON"),
        ("zeroshot", ["--compare", "deep.json", "deep.json"], "deep.json: no zero-shot result can be read"),
        ("explain", [LONG], "File name too long"),
    ],
)
def test_what_cannot_be_opened_or_read_is_one_sentence(command, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("deep.yaml", "deep.json", "deep.jsonl"):
        Path(name).write_text(DEEP)
    Path("export").mkdir()
    Path("export/focalclip.json").write_text("[]")
    Path("export/open_clip_model.safetensors").write_text("")
    assert main([command, *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: ")
    assert said in told[-1]


def test_memory_that_the_machine_lacks_is_one_sentence(capsys):
    def command():
        torch.empty(1 << 60)
        return 0

    assert guarded(command) == 1
    assert capsys.readouterr().err.startswith("error: the machine is out of memory (")


def test_explain_expands_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    assert explain._parser().parse_intermixed_args(["--output=~/x", "~/a.jpg"]).output == "/home/of/somebody/x"


def test_an_error_of_the_network_is_no_failed_write(tmp_path):
    fault = RuntimeError("NCCL error: remote process exited, I/O error on socket")
    with pytest.raises(RuntimeError, match="NCCL"), writing(tmp_path):
        raise fault
