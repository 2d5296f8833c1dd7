"""Where retrieval sets come from: wds folders, training shards, tables and caption files.

FOLDER/            dataset_type.txt ("retrieval"), test/nshards.txt, test/0.tar ... : the wds layout of
                   CLIP_benchmark; KEY.txt holds one caption per line
FOLDER/ or a/{000..331}.tar   training shards: KEY.txt (one caption) and, or, KEY.json (caption, captions)
FILE.csv, .tsv     one line per image and caption; an image may have several lines
FILE.json          Karpathy's splits (dataset_coco.json ...) or COCO's captions_val2017.json
"""

import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from focalclip.base.errors import UserError
from focalclip.data.index import IMAGE, JSON, TEXT, index_shards, load_keys, load_members
from focalclip.data.samples import read_captions
from focalclip.data.sources import resolve_shards
from focalclip.evaluation.data import Entry
from focalclip.evaluation.data.trees import FileEntry
from focalclip.evaluation.data.wds import TYPE, TarEntry
from focalclip.evaluation.retrieval.pairs import PairData, collect

IMAGE_COLUMNS = ("path", "filepath", "file_path", "image_path", "image", "filename", "file_name")

CAPTION_COLUMNS = ("caption", "title", "text")

Sample = tuple[Entry, Sequence[str] | str]
"""An image, and its captions or the reason why it has none."""


def open_pairs(
    source: str | Path,
    *,
    split: str = "test",
    image_root: str | Path | None = None,
    limit: int | None = None,
    captions_per_image: int | None = None,
) -> PairData:
    """Read a retrieval set; its images are left where they are.

    Args:
        source: see the top of this file.
        split: subfolder of a wds folder, or split of a Karpathy file; the others have none.
        image_root: what image paths of a table or caption file are relative to; None: the folder of that file.
        limit: use only the first so many images; None for all.
        captions_per_image: how many captions of an image are used, from its first; None for all.

    Raises:
        UserError: naming the file at fault: nothing is there, it is of no known kind, broken, or lacks a column or a
            split, or images that it names are missing.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in (".csv", ".tsv", ".json"):
        if not path.is_file():
            raise UserError(f"--data {source}: no such file")
        captions = _annotations(path, split) if path.suffix.lower() == ".json" else _table(path)
        samples = _files(path, captions, Path(image_root).expanduser() if image_root else path.parent)
        name = path.stem
    elif (path / TYPE).is_file():
        samples, name = _read_shards(_wds_shards(path, split), _lines), path.resolve().name
    else:
        shards = resolve_shards(str(source), "--data")
        samples, name = _read_shards(shards, _texts), shards[0].resolve().parent.name
    return collect(name, str(source), itertools.islice(samples, limit), captions_per_image)


def _wds_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split, as many as nshards.txt says."""
    kind = (folder / TYPE).read_text().strip()
    if kind != "retrieval":
        raise UserError(f"{folder / TYPE} says {kind!r}, not retrieval; measure it with focalclip-zeroshot")
    count = folder / split / "nshards.txt"
    text = count.read_text().strip() if count.is_file() else ""
    if not text.isdecimal() or int(text) == 0:
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/nshards.txt"))) or "none"
        raise UserError(f"{count}: missing, or not a number of shards; splits that are there: {splits} (--split)")
    return resolve_shards([str(folder / split / f"{i}.tar") for i in range(int(text))], "--data")


def _read_shards(shards: Sequence[Path], texts: Any) -> Iterator[Sample]:
    """Images and captions in order; ``texts`` makes captions of the bytes of text and JSON."""
    index_shards(shards)
    for shard in tqdm(shards, desc="captions", unit=" shards", leave=False, disable=None):
        members = load_members(shard)
        with shard.open("rb") as file:
            for key, places in zip(load_keys(shard), members.tolist(), strict=True):
                offset, size = places[IMAGE]
                if size < 0:
                    yield TarEntry(shard, key, 0, 0), "no image"
                    continue
                text, record = (_member(file, *places[column]) for column in (TEXT, JSON))
                try:
                    yield TarEntry(shard, key, offset, size), texts(text, record)
                except ValueError as error:
                    yield TarEntry(shard, key, offset, size), str(error)


def _member(file: Any, offset: int, size: int) -> bytes | None:
    if size < 0:
        return None
    file.seek(offset)
    return file.read(size)


def _lines(text: bytes | None, _: bytes | None) -> list[str]:
    """CLIP_benchmark's captions: one per line of the text."""
    if text is None:
        raise ValueError("no .txt with captions")
    try:
        return [line.strip() for line in text.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError("captions are not UTF-8") from None


def _texts(text: bytes | None, record: bytes | None) -> list[str]:
    """A training sample's captions, without the keywords that do not stand alone."""
    return read_captions(text, record).captions


def _files(source: Path, captions: Mapping[str, list[str]], root: Path) -> Iterator[Sample]:
    """Images that are files; all of them are looked for before the first is used."""
    if missing := [name for name in captions if not (root / name).is_file()]:
        raise UserError(
            f"--data {source}: {len(missing):,} of {len(captions):,} images are not there (the first: "
            f"{root / missing[0]}); say with --image-root what the paths are relative to"
        )
    return ((FileEntry(root / name, name), texts) for name, texts in captions.items())


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
