"""A folder of pictures with their captions beside them, at any depth: ``a.jpg`` with ``a.txt`` or ``a.json``.

A ``.txt`` holds a caption per line; a ``.json`` is an object with one of the names of caption columns. img2dataset's
output format ``files`` is of this kind. A ``metadata.csv`` or ``metadata.jsonl`` in the folder, as the library
``datasets`` has it, lists the captions instead.
"""

import json
from pathlib import Path, PurePosixPath

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.data.images import IMAGE_SUFFIXES
from focalclip.data.reader import FileEntry, PictureSet, Reader, Request, files_below
from focalclip.data.tables import CAPTION_COLUMNS, CAPTION_FILE, TABLE

_LISTS = {"metadata.csv": TABLE, "metadata.jsonl": CAPTION_FILE}

_KINDS = (".txt", ".json")


def _sorted_out(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The pictures below a folder, and the caption files by their path without the ending."""
    pictures, texts = [], {}
    for path in files_below(folder):
        if path.lower().endswith(IMAGE_SUFFIXES):
            pictures.append(path)
        elif path.lower().endswith(_KINDS):
            texts.setdefault(_stem(path), []).append(path)
    return pictures, texts


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _recognises(source: str) -> bool:
    folder = user_path(source)
    if any((folder / name).is_file() for name in _LISTS):
        return True
    pictures, texts = _sorted_out(folder)
    return any(_stem(path) in texts for path in pictures)


def _open(source: str, request: Request) -> PictureSet:
    folder = user_path(source)
    for name, reader in _LISTS.items():
        if (folder / name).is_file():
            return reader.open(str(folder / name), request)
    pictures, texts = _sorted_out(folder)
    captions, faults = [], {}
    for number, picture in enumerate(pictures):
        own: list[str] = []
        for path in sorted(texts.get(_stem(picture), ()), key=lambda path: not path.lower().endswith(".txt")):
            try:
                own += _captions(folder / path)
            except UserError as error:
                faults[number] = str(error)
        captions.append(tuple(dict.fromkeys(own)))
    stems = set(map(_stem, pictures))
    alone = [f"{path}: no picture beside it" for stem in texts if stem not in stems for path in texts[stem]]
    if not any(captions):
        reason = next(iter(faults.values()), "the caption files are empty")
        raise UserError(f"{request.field} {source}: no picture has a caption ({reason}); write one into its .txt")
    entries = tuple(FileEntry(folder / path, path) for path in pictures)
    return PictureSet(folder, entries, folder.name, tuple(captions), faults=faults, left_out=tuple(alone))


def _captions(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".txt":
            return text.strip().splitlines()
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise UserError(f"{path}: not {kind}; save it again") from None
    known = {name.lower(): value for name, value in record.items()} if isinstance(record, dict) else {}
    found = next((known[name] for name in ("captions", *CAPTION_COLUMNS) if known.get(name)), [])
    values = found if isinstance(found, list) else [found]
    if any(not isinstance(value, str) for value in values):
        raise UserError(f"{path}: a caption that is not text; correct it")
    return [" ".join(value.split()) for value in values]


CAPTIONS_BESIDE = Reader(
    "a folder of pictures with captions beside them (a.jpg with a.txt or a.json)", _recognises, _open
)
