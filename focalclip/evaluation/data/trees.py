"""Trees of files, in a folder or in a zip, that readers use alike: list paths, read a text, name an image.

A zip is read in place: its directory says where each member lies, and members are then read by position from as many
threads as there are. A zip inside a zip works the same where the outer one stores it uncompressed.
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

from focalclip.base.errors import UserError

# torchvision.datasets.folder.IMG_EXTENSIONS: the order of ELEVATER's archive is that of torchvision's ImageFolder
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # PKWARE's APPNOTE 4.3.7: signature, 22 bytes, lengths of name and extra


class FileEntry(NamedTuple):
    """An image in a file of its own."""

    path: Path
    key: str

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path)

    @property
    def file(self) -> Path:
        """The file itself."""
        return self.path

    def read(self) -> bytes:
        """The compressed image."""
        return self.path.read_bytes()


class ZipEntry(NamedTuple):
    """An image that is a member of a zip."""

    archive: Path
    key: str
    offset: int
    """Of the member's own header in the file."""
    packed: int
    method: int
    crc: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.archive.name}:{self.key}"

    @property
    def file(self) -> Path:
        """The zip."""
        return self.archive

    def read(self) -> bytes:
        """The compressed image; empty if the zip's checksum does not fit."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            data = file.read(self.packed)
        try:
            data = data if self.method == zipfile.ZIP_STORED else zlib.decompress(data, -zlib.MAX_WBITS)
        except zlib.error:
            return b""
        return data if zlib.crc32(data) == self.crc else b""


class Tree(Protocol):
    """Files by their path below a root, with ``/`` on every system."""

    place: Path
    """What messages call it."""

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly in a folder, in order."""
        ...

    def paths(self, under: str) -> list[str]:
        """Every file below a folder."""
        ...

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        ...

    def entry(self, path: str, key: str) -> "FileEntry | ZipEntry":
        """An image, to be read later."""
        ...


class FolderTree:
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        self.place = root

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly in a folder, in order; hidden ones left out."""
        folder = self.place / under
        if not folder.is_dir():
            return []
        with os.scandir(folder) as items:
            return sorted(item.name for item in items if item.is_dir() and not item.name.startswith("."))

    def paths(self, under: str) -> list[str]:
        """Every file below a folder."""
        found = []
        for parent, _, names in os.walk(self.place / under, followlinks=True):
            prefix = Path(parent).relative_to(self.place).as_posix()
            found += [f"{prefix}/{name}" if prefix != "." else name for name in names]
        return found

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        file = self.place / path
        return file.read_bytes() if file.is_file() else None

    def entry(self, path: str, key: str) -> FileEntry:
        """An image, to be read later."""
        return FileEntry(self.place / path, key)


class ZipTree:
    """The files of a zip below one of its folders.

    Args:
        archive: The file.
        root: Folder inside the zip.
        members: The zip's directory, by path.
        start: Where the zip begins in the file; not 0 for a zip inside a zip.
    """

    def __init__(self, archive: Path, root: str, members: dict[str, zipfile.ZipInfo], start: int = 0) -> None:
        self.place = archive
        self._start = start
        prefix = f"{root}/" if root else ""
        self._members = {
            path.removeprefix(prefix): member for path, member in members.items() if path.startswith(prefix)
        }

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly in a folder, in order."""
        depth = len(PurePosixPath(under).parts)
        parts = (PurePosixPath(path).parts for path in self.paths(under))
        return sorted({names[depth] for names in parts if len(names) > depth + 1})

    def paths(self, under: str) -> list[str]:
        """Every file below a folder."""
        return [path for path in self._members if not under or path.startswith(f"{under}/")]

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        return self.entry(path, path).read() if path in self._members else None

    def entry(self, path: str, key: str) -> ZipEntry:
        """An image, to be read later.

        Raises:
            UserError: if it is encrypted, or packed in a way that images seldom are.
        """
        member = self._members[path]
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{self.place}: {path} is encrypted or packed by method {member.compress_type}; unzip it")
        return ZipEntry(
            self.place, key, self._start + member.header_offset, member.compress_size, member.compress_type, member.CRC
        )


def zip_members(archive: Path, start: int = 0, size: int | None = None) -> dict[str, zipfile.ZipInfo]:
    """The directory of a zip, or of a zip that is ``size`` bytes from ``start`` of the file, by path.

    Raises:
        UserError: if it is not a whole zip.
    """
    try:
        with archive.open("rb") as file:
            part = file if size is None else _Section(file, start, size)
            with zipfile.ZipFile(part) as opened:
                return {member.filename: member for member in opened.infolist() if not member.is_dir()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a whole zip ({error}); download it again") from None


def content_offset(archive: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's content begins in the file."""
    with archive.open("rb") as file:
        file.seek(member.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def lines_of(data: bytes, what: object, content: str, *, empty: bool = False) -> tuple[str, ...]:
    """The stripped lines of a UTF-8 text, but for empty ones at its end.

    Raises:
        UserError: naming ``what``, if it is no UTF-8 or a line is empty (all lines, where ``empty`` ones are allowed);
            ``content`` says what lines should hold.
    """
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not (any(lines) if empty else all(lines)):
        raise UserError(f"{what}: line {lines.index('') + 1} is empty; expected {content}")
    return tuple(lines)


def images_by_class(tree: Tree, folder: str) -> list[tuple[str, str]]:
    """Class folder and path of every image below ``folder``, in the order of torchvision's ``ImageFolder``."""
    prefix = f"{folder}/" if folder else ""
    found = []
    for path in tree.paths(folder):
        class_folder, _, inside = path.removeprefix(prefix).partition("/")
        if inside and inside.lower().endswith(IMAGE_SUFFIXES):
            parent, _, name = inside.rpartition("/")
            found.append((class_folder, parent, name, path))
    return [(class_folder, path) for class_folder, _, _, path in sorted(found)]


class _Section:
    """A part of a file as a file of its own, as far as ``zipfile`` needs it to read a zip's directory."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def read(self, count: int = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if count < 0 else min(count, left))
        self._at += len(data)
        return data
