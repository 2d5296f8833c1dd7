"""Files that list pictures with their captions: tables, JSON lines, and the caption files of COCO, Karpathy and Flickr.

FILE.csv, .tsv   one line per picture and caption; a picture may have several lines
FILE.txt         Flickr's: captions.txt, a table; or Flickr8k.token.txt with PICTURE#NUMBER, a tab and a caption
FILE.jsonl       an object per line; a picture may have several lines, or a list of captions
FILE.json        Karpathy's splits (dataset_coco.json ...), COCO's captions_val2017.json, or a list of such objects

A blank caption costs that caption, and a row that cannot be read costs that row: both are counted.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.data.reader import FileEntry, PictureSet, Reader, Request

IMAGE_COLUMNS = ("path", "filepath", "file_path", "image_path", "image", "image_name", "filename", "file_name")

CAPTION_COLUMNS = ("caption", "captions", "title", "text", "comment")

_URL_COLUMNS = ("url", "urls", "image_url", "url_link")

_BESIDE = ("", "Images", "images")  # where pictures lie beside the file, the last two as Flickr's sets are packed

_TOKEN = re.compile(r"(.+)#\d+")  # Flickr's number of a caption behind the picture's name


class Listed(NamedTuple):
    """What a file lists."""

    captions: dict[str, list[str]]
    """By the picture's path, blank ones included."""
    left_out: list[str]
    """Rows that belong to no picture, each with the reason."""


def captioned_files(
    source: str, captions: Mapping[str, Sequence[str]], request: Request, left_out: Sequence[str] = ()
) -> PictureSet:
    """Pictures that are files, by their paths as ``source`` names them, each with its captions.

    Args:
        source: The file that lists them.
        captions: Captions by path.
        request: ``image_root`` is the folder that the paths are relative to; None: the folder of ``source``, or
            ``Images`` in it.
        left_out: Rows that belong to no picture, each with the reason.

    Raises:
        UserError: if a picture is missing; all are looked for.
    """
    path = user_path(source)
    captions = {name.replace("\\", "/"): texts for name, texts in captions.items()}
    roots = [request.image_root] if request.image_root else [path.parent / name for name in _BESIDE]
    first = next(iter(captions), "")
    root = next((root for root in roots if (root / first).is_file()), roots[0])
    if missing := [name for name in captions if not (root / name).is_file()]:
        raise UserError(
            f"{request.field} {source}: {len(missing):,} of {len(captions):,} images are not there (the first: "
            f"{root / missing[0]}); say with --image-root what the paths are relative to"
        )
    entries = tuple(FileEntry(root / name, name) for name in captions)
    texts = tuple(tuple(texts) for texts in captions.values())
    return PictureSet(path, entries, path.stem, texts, left_out=tuple(left_out))


def _open_table(source: str, request: Request) -> PictureSet:
    listed = _table(_existing(source, request), request)
    return captioned_files(source, listed.captions, request, listed.left_out)


def _open_caption_file(source: str, request: Request) -> PictureSet:
    listed = _annotations(_existing(source, request), request.split or "train")
    return captioned_files(source, listed.captions, request, listed.left_out)


TABLE = Reader(
    "a table of paths and captions (.csv, .tsv, Flickr's captions.txt)",
    lambda source: source.lower().endswith((".csv", ".tsv", ".txt", ".token")),
    _open_table,
    takes=("image_column", "caption_columns"),
)

CAPTION_FILE = Reader(
    "a caption file (JSON lines, or .json of COCO's or Karpathy's kind)",
    lambda source: source.lower().endswith((".json", ".jsonl")),
    _open_caption_file,
)


def _existing(source: str, request: Request) -> Path:
    path = user_path(source)
    if not path.is_file():
        raise UserError(f"{request.field} {source}: no such file")
    return path


def _given(path: Path, columns: Sequence[str], name: str) -> int:
    if name not in columns:
        raise UserError(f"{path}: has no column {name!r}; it has {', '.join(columns)}")
    return columns.index(name)


def _table(path: Path, request: Request) -> Listed:
    """A table with a header, which says what separates its columns: tabs, commas or bars; or Flickr's without one."""
    listed = Listed({}, [])
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = next((mark for mark in "\t,|" if mark in header), ",")
            columns = next(csv.reader([header], delimiter=separator), [])
            if separator == "\t" and _TOKEN.fullmatch(columns[0]):  # no header
                columns = ["image", "caption"]
                file.seek(0)
            columns = [column.strip() for column in columns]
            wanted = request.image_column
            image = _given(path, columns, wanted) if wanted else _column(path, columns, IMAGE_COLUMNS)
            texts = [_given(path, columns, name) for name in request.caption_columns]
            texts = texts or [_column(path, columns, CAPTION_COLUMNS)]
            caption = texts[0]
            rows = csv.reader(
                file, delimiter=separator, quoting=csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
            )
            for row in rows:
                if path.suffix == ".txt" and caption == len(columns) - 1:  # a caption whose commas nobody quoted
                    row[caption:] = [separator.join(row[caption:])] if row[caption:] else []
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(columns):
                    listed.left_out.append(f"row {row} does not give {len(columns)} columns")
                elif name := row[image].strip():
                    token = _TOKEN.fullmatch(name)
                    listed.captions.setdefault(token[1] if token else name, []).extend(row[i] for i in texts)
                else:
                    listed.left_out.append(f"row {row} names no image")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); save it as CSV or TSV in UTF-8") from None
    if listed.left_out and not listed.captions:
        raise UserError(f"{path}: no row can be read, the first {listed.left_out[0]}; give each row its columns")
    return listed


def refuse_urls(what: object, columns: Sequence[str]) -> None:
    """Raise a UserError if these columns, or the first line of a list without any, are those of a list of URLs."""
    if any(
        name.strip().lower() in _URL_COLUMNS or name.strip().startswith(("http://", "https://")) for name in columns
    ):
        raise UserError(
            f"{what}: a list of URLs, which img2dataset downloads (img2dataset --url_list FILE --output_format "
            "webdataset --output_folder OUT ...; docs/data.md, Writing shards); name its OUT"
        )


def _column(path: Path, columns: Sequence[str], known: Sequence[str]) -> int:
    names = [column.strip().lower() for column in columns]
    if found := next((name for name in known if name in names), None):
        return names.index(found)
    refuse_urls(path, columns)
    raise UserError(f"{path}: its first line names {', '.join(columns)}, but no column {' or '.join(known)}")


def _annotations(path: Path, split: str) -> Listed:
    """Captions by image from JSON of any known kind."""
    try:
        content = _json(path)
        if isinstance(content, list):
            return _records(path, content)
        return _coco(content) if "annotations" in content else _karpathy(path, content, split)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: neither Karpathy's caption file nor COCO's ({what}), nor objects with an image and captions;"
            " give one of them"
        ) from None


def _json(path: Path) -> Any:
    """One JSON value; of JSON lines, also in a ``.json``, a list of them, with None for a line that is no JSON."""
    text = path.read_text(encoding="utf-8-sig")
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        return list(map(_line, lines)) if path.suffix.lower() == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        if len(lines) < 2 or not error.msg.startswith("Extra data"):
            raise
        return list(map(_line, lines))


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _coco(content: dict[str, Any]) -> Listed:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    listed = Listed({name: [] for name in names.values()}, [])
    for annotation in content["annotations"]:
        if annotation["image_id"] in names:
            listed.captions[names[annotation["image_id"]]] += _texts(annotation["caption"])
        else:
            listed.left_out.append(f"a caption of image {annotation['image_id']}, which is not listed")
    return listed


def _karpathy(path: Path, content: dict[str, Any], split: str) -> Listed:
    images = [image for image in content["images"] if image["split"] == split]
    if not images:
        splits = ", ".join(sorted({image["split"] for image in content["images"]}))
        raise UserError(f"{path}: no image of the split {split!r}; it has {splits} (--split)")
    listed = Listed({}, [])
    for image in images:
        place = str(Path(image.get("filepath", "")) / image["filename"])
        listed.captions.setdefault(place, []).extend(_texts([sentence["raw"] for sentence in image["sentences"]]))
    return listed


def _records(path: Path, records: Iterable[Any]) -> Listed:
    """Objects with a path and a caption or several, under any of the names of columns."""
    listed, has_captions = Listed({}, []), False
    for number, record in enumerate(records, start=1):
        known = {name.lower(): value for name, value in record.items()} if isinstance(record, dict) else {}
        image = next((known[name] for name in IMAGE_COLUMNS if known.get(name)), None)
        caption = next((name for name in CAPTION_COLUMNS if name in known), None)
        has_captions |= caption is not None
        if isinstance(image, str) and image.strip():
            listed.captions.setdefault(image.strip(), []).extend(_texts(known[caption]) if caption else [])
        else:
            listed.left_out.append(f"object {number} names no image")
    if listed.left_out and not listed.captions:
        raise UserError(f"{path}: no object names an image; one of {', '.join(IMAGE_COLUMNS)} must be its path")
    if not has_captions:
        raise UserError(f"{path}: no object has a caption, called {' or '.join(CAPTION_COLUMNS)}; add them")
    return listed


def _texts(value: Any) -> list[str]:
    """A caption or a list of them, each on one line; what is null counts as blank."""
    values = value if isinstance(value, list) else [value]
    if wrong := [one for one in values if isinstance(one, dict | list)]:
        raise TypeError(f"the caption {str(wrong[0])[:40]} is not text")
    return ["" if one is None else re.sub(r"\s+", " ", str(one)).strip() for one in values]
