"""Files that list pictures with their captions: tables, and the caption files of COCO and of Karpathy.

FILE.csv, .tsv   one line per picture and caption; a picture may have several lines
FILE.json        Karpathy's splits (dataset_coco.json ...) or COCO's captions_val2017.json
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from focalclip.base.errors import UserError
from focalclip.data.reader import FileEntry, PictureSet, Reader, Request

IMAGE_COLUMNS = ("path", "filepath", "file_path", "image_path", "image", "filename", "file_name")

CAPTION_COLUMNS = ("caption", "title", "text")


def captioned_files(source: str, captions: Mapping[str, Sequence[str]], request: Request) -> PictureSet:
    """Pictures that are files, by their paths as ``source`` names them, each with its captions.

    Args:
        source: The file that lists them.
        captions: Captions by path.
        request: ``image_root`` is the folder that the paths are relative to; None: the folder of ``source``.

    Raises:
        UserError: if a picture is missing; all are looked for.
    """
    path = Path(source).expanduser()
    root = request.image_root or path.parent
    if missing := [name for name in captions if not (root / name).is_file()]:
        raise UserError(
            f"{request.field} {source}: {len(missing):,} of {len(captions):,} images are not there (the first: "
            f"{root / missing[0]}); say with --image-root what the paths are relative to"
        )
    entries = tuple(FileEntry(root / name, name) for name in captions)
    return PictureSet(path, entries, path.stem, tuple(tuple(texts) for texts in captions.values()))


def _open_table(source: str, request: Request) -> PictureSet:
    return captioned_files(source, _table(_existing(source, request)), request)


def _open_caption_file(source: str, request: Request) -> PictureSet:
    return captioned_files(source, _annotations(_existing(source, request), request.split or "train"), request)


TABLE = Reader(
    "a table of paths and captions (.csv, .tsv)",
    lambda source: source.lower().endswith((".csv", ".tsv")),
    _open_table,
)

CAPTION_FILE = Reader(
    "a caption file of COCO's or Karpathy's kind (.json)",
    lambda source: source.lower().endswith(".json"),
    _open_caption_file,
)


def _existing(source: str, request: Request) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{request.field} {source}: no such file")
    return path


def _table(path: Path) -> dict[str, list[str]]:
    """Captions by image from a table with a header; tabs separate its columns if the header has one."""
    captions: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = "\t" if "\t" in header else ","
            columns = next(csv.reader([header], delimiter=separator), [])
            image, caption = (_column(path, columns, known) for known in (IMAGE_COLUMNS, CAPTION_COLUMNS))
            for row in csv.reader(file, delimiter=separator):
                if row and (len(row) != len(columns) or not row[image].strip() or not row[caption].strip()):
                    raise UserError(f"{path}: the row {row} does not give {len(columns)} columns with an image")
                if row:
                    captions.setdefault(row[image].strip(), []).append(row[caption].strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); save it as CSV or TSV in UTF-8") from None
    return captions


def _column(path: Path, columns: Sequence[str], known: Sequence[str]) -> int:
    names = [column.strip().lower() for column in columns]
    if found := next((name for name in known if name in names), None):
        return names.index(found)
    raise UserError(f"{path}: its first line names {', '.join(columns)}, but no column {' or '.join(known)}")


def _annotations(path: Path, split: str) -> dict[str, list[str]]:
    """Captions by image from a caption file of Karpathy's or of COCO's kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            captions: dict[str, list[str]] = {name: [] for name in names.values()}
            for annotation in content["annotations"]:
                captions[names[annotation["image_id"]]].append(_one_line(annotation["caption"]))
            return captions
        images = [image for image in content["images"] if image["split"] == split]
        if not images:
            splits = ", ".join(sorted({image["split"] for image in content["images"]}))
            raise UserError(f"{path}: no image of the split {split!r}; it has {splits} (--split)")
        return {
            str(Path(image.get("filepath", "")) / image["filename"]): [
                _one_line(sentence["raw"]) for sentence in image["sentences"]
            ]
            for image in images
        }
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: neither Karpathy's caption file nor COCO's ({what}); give one of them") from None


def _one_line(caption: str) -> str:
    return re.sub(r"\s+", " ", caption).strip()
