"""How commands end: what a shell and its user see."""

import subprocess
import sys

import pytest

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
