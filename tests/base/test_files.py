"""Files are there whole or not at all."""

import json
from pathlib import Path

import pytest

from focalclip.base.files import whole_file, write_json, write_text


def test_the_earlier_file_stays_and_nothing_lies_beside_it_when_writing_fails(tmp_path: Path) -> None:
    path = write_text(tmp_path / "results" / "a.txt", "before\n")
    with pytest.raises(TypeError), whole_file(path) as temporary, temporary.open("wb") as file:
        file.writelines([b"new", None])  # pyrefly: ignore[bad-argument-type]
    assert path.read_text() == "before\n"
    assert list(path.parent.iterdir()) == [path]


def test_json_with_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"value": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_the_text_is_written_as_it_is_given(tmp_path: Path) -> None:
    assert write_text(tmp_path / "a.csv", "é,1\r\n").read_bytes() == "é,1\r\n".encode()
