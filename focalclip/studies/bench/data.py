"""Our loader, our writer of shards, remote shards and locked towers against the peers, each side in its own process."""

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focalclip.base.errors import UserError
from focalclip.base.machine import num_cores
from focalclip.studies.bench import BenchResult, BenchRow
from focalclip.studies.bench.peers import IMG2DATASET, install_img2dataset
from focalclip.studies.bench.sides import SIDES

QUALITY = 90  # of the JPEGs

RESIZED = 256  # pixels: the shorter side that shards are resized to


@dataclass(frozen=True)
class Photo:
    """Photographs of one size, and the noise at which a JPEG of quality 90 has the size of a real one."""

    width: int
    height: int
    noise: float

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"

    def jpeg(self, seed: int) -> bytes:
        """One of them: amplitudes that fall with frequency as those of photographs do, and a sensor's noise."""
        rng = np.random.default_rng(seed)
        shape = (self.height, self.width)
        frequency = np.hypot(np.fft.fftfreq(self.height)[:, None], np.fft.rfftfreq(self.width)[None])
        frequency[0, 0] = 1 / max(shape)

        def field(power: float) -> np.ndarray:
            values = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * frequency**-power, s=shape)
            return values / values.std()

        brightness = 50 * field(1.2)
        pixels = np.stack([128 + brightness + 20 * field(1.7) for _ in range(3)], axis=-1)
        pixels += self.noise * rng.standard_normal((*shape, 1))
        buffer = BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()


PHOTOS = (Photo(500, 375, 9.0), Photo(1024, 768, 3.0), Photo(2048, 1536, 5.0))
"""96 kB, 365 kB and 1.36 MB."""

SHARD_PHOTO = PHOTOS[1]

REMOTE_PHOTOS = ((Photo(341, 256, 6.0), 224), (Photo(64, 48, 6.0), 32))
"""Pictures as shards of img2dataset hold them, and some so small that reading is all there is; what they become."""


def loader(images: int, rounds: int, folder: Path, photos: Sequence[Photo] = PHOTOS) -> BenchResult:
    """One worker of our loader against one of open_clip's, and against nothing but decoding and resizing.

    Args:
        images: per round of the largest size; smaller ones get more.
        rounds: how often each side runs, in turn.
        folder: receives the data.
        photos: sizes.
    """
    rows, bytes_each = [], {}
    for photo in photos:
        area = photos[-1].width * photos[-1].height / (photo.width * photo.height)
        count, batch = round(images * min(area, 4)), min(32, images)
        place = folder / f"{photo.width}"
        files = _write_shards(place, photo, shards=4, samples=max(16, batch))
        bytes_each[str(photo)] = round(float(np.mean([file.stat().st_size for file in files])))
        words = {"shards": f"{place}/{{00000..00003}}.tar", "side": 224, "images": count, "batch": batch, "workers": 1}
        bare = {"pictures": [str(file) for file in files], "side": 224, "images": count}
        measured = _in_turns(
            str(photo),
            rounds,
            {
                "ours": partial(_side, "our_loader", words),
                "open_clip": partial(_side, "open_clip_loader", words),
                "bare": partial(_side, "bare_decoding", bare),
            },
        )
        for peer, clock in (("open_clip", "cpu_seconds"), ("bare", "cpu_seconds"), ("open_clip", "seconds")):
            name = {"open_clip": "open_clip's loader", "bare": "decode and resize alone"}[peer]
            kind = "processor time" if clock == "cpu_seconds" else "by the clock"
            ours, theirs = (_milliseconds(measured[side], clock) for side in ("ours", peer))
            rows.append(BenchRow(f"{photo}, {name}, {kind}", ours, theirs, "ms"))
    return BenchResult(
        "loader",
        tuple(rows),
        {
            "peer_name": f"open_clip {version('open_clip_torch')}, simplejpeg {version('simplejpeg')}",
            "what_is_measured": "per image: read, decode, crop to 224 px, tokenise, batch; one worker. open_clip "
            "normalises to float32 in the worker, ours on the device",
            "bytes_per_image": bytes_each,
            "versions": _versions("open_clip_torch", "pillow", "simplejpeg", "torch", "torchvision", "webdataset"),
        },
    )


def shards(photos: int, rounds: int, folder: Path, photo: Photo = SHARD_PHOTO) -> BenchResult:
    """``make-shards`` against img2dataset and ``datasets``, as commands, bytes unchanged and resized.

    Args:
        photos: number of photographs.
        rounds: how often each side runs, in turn.
        folder: receives the data.
        photo: their size.

    Raises:
        UserError: if a side fails, or img2dataset cannot be installed.
    """
    img2dataset = install_img2dataset()
    few = min(8, photos // 2)
    for count, place in ((photos, folder / "all"), (few, folder / "few")):
        _write_photographs(place / "photos", photo, count)
    rows = []
    for side in (None, RESIZED):
        sides: dict[str, Callable[[Path, int], float]] = {
            "ours": partial(_make_shards, side),
            "img2dataset": partial(_img2dataset, img2dataset, side),
            "datasets": partial(_datasets, side),
        }

        def both(run: Callable[[Path, int], float]) -> dict[str, float]:
            whole = run(folder / "all", photos)
            beyond_start = (whole - run(folder / "few", few)) * photos / (photos - few)
            return {"images": photos, "cpu_seconds": whole, "beyond_start": beyond_start}

        case = f"resized to {side}" if side else "unchanged"
        measured = _in_turns(case, rounds, {name: partial(both, run) for name, run in sides.items()})
        for clock, note in (("cpu_seconds", ""), ("beyond_start", ", without the start")):
            for peer in ("img2dataset", "datasets"):
                ours, theirs = (_milliseconds(measured[name], clock) for name in ("ours", peer))
                rows.append(BenchRow(f"{case}, {peer}{note}", ours, theirs, "ms"))
    return BenchResult(
        "shards",
        tuple(rows),
        {
            "peer_name": f"img2dataset {IMG2DATASET}, datasets {version('datasets')}",
            "what_is_measured": "processor time per image of the whole command, with its start and all its processes; "
            f"without the start: less that of the same command on {few} pictures",
            "images": photos,
            "picture": str(photo),
            "versions": _versions("datasets", "pillow", "simplejpeg", "webdataset"),
        },
    )


def remote(
    num_shards: int, samples: int, rounds: int, folder: Path, latency: float = 0.03, fault_rate: float = 0.1
) -> BenchResult:
    """Our loader against webdataset's reader on a server of this machine that answers late, and one that also fails.

    Args:
        num_shards: number of shards.
        samples: per shard.
        rounds: how often each side runs, in turn.
        folder: receives the data.
        latency: seconds before each answer.
        fault_rate: share of the requests for tars that fail, in the last case.
    """
    rows, lost, workers = [], {}, 2
    for photo, side in REMOTE_PHOTOS:
        place = folder / f"{photo.width}"
        _write_shards(place, photo, num_shards, samples, with_index=True)
        for has_index, rate in ((True, 0.0), (False, 0.0), (True, fault_rate)):
            if (rate or not has_index) and photo is not REMOTE_PHOTOS[-1][0]:
                continue
            kind = f"{rate:.0%} of requests fail" if rate else "index beside the shard" if has_index else "no index"
            case = f"{photo} to {side} px, {kind}"

            def one(name: str, place: Path, has_index: bool, rate: float, side: int) -> dict[str, float]:
                with _server(place, latency, rate, has_index) as url, tempfile.TemporaryDirectory() as cache:
                    pattern = f"{url}/{{00000..{num_shards - 1:05d}}}.tar"
                    words = {"shards": pattern, "side": side, "batch": 64, "workers": workers}
                    words |= {"samples": num_shards * samples}
                    return _side(name, words, {"FOCALCLIP_CACHE": cache})

            measured = _in_turns(
                case,
                rounds,
                {
                    "ours": partial(one, "our_remote", place, has_index, rate, side),
                    "webdataset": partial(one, "webdataset_remote", place, has_index, rate, side),
                },
            )
            if rate:
                lost[case] = {
                    name: {"lost": [run["lost"] for run in runs], "replaced": [run["replaced"] for run in runs]}
                    for name, runs in measured.items()
                }
            ours, theirs = (_milliseconds(measured[name], "seconds") for name in ("ours", "webdataset"))
            rows.append(BenchRow(case, ours, theirs, "ms"))
    return BenchResult(
        "remote",
        tuple(rows),
        {
            "peer_name": f"webdataset {version('webdataset')} (curl) with open_clip's chain",
            "what_is_measured": f"time per image of one pass from an empty cache, {workers} workers each, every answer "
            f"{1000 * latency:.0f} ms late",
            "shards": num_shards,
            "samples": num_shards * samples,
            "samples_lost": lost,
            "versions": _versions("obstore", "open_clip_torch", "torch", "webdataset"),
        },
    )


def lit(model: str, side: int, batch: int, steps: int, rounds: int) -> BenchResult:
    """A training step with the image tower locked against the step with nothing locked: time and memory.

    Args:
        model: an image tower.
        side: of the images in pixels.
        batch: pairs.
        steps: per round, of which the median counts.
        rounds: how often each side runs, in turn.
    """

    def one(is_locked: bool) -> dict[str, float]:
        settings = {
            "model": {"image": {"name": model, "image_size": side, "lock": is_locked}},
            "data": {"batch_size": batch},
            "optim": {"warmup_steps": 0},
        }
        return _side("training_step", {"settings": settings, "batch": batch, "steps": steps})

    measured = _in_turns("lit", rounds, {"locked": partial(one, True), "unlocked": partial(one, False)})
    case = f"{model}, {side} px, batch {batch}"
    (fast, slow), (small, large) = (
        [[run[what] / unit for run in measured[name]] for name in ("locked", "unlocked")]
        for what, unit in (("seconds", 1), ("memory", 2**20))
    )
    rows = (BenchRow(f"{case}: time", fast, slow), BenchRow(f"{case}: memory", small, large, "MiB"))
    return BenchResult(
        "lit",
        rows,
        {
            "locked_over_unlocked": {row.case: round(1 / statistics.median(row.ratios), 3) for row in rows},
            "peer_name": "the same step with nothing locked",
            "what_is_measured": "median step of the engine with a batch of noise; memory: weights, gradients, moments, "
            "activations",
            "versions": _versions("deepspeed", "torch"),
        },
    )


def _in_turns(
    case: str, rounds: int, sides: dict[str, Callable[[], dict[str, float]]]
) -> dict[str, list[dict[str, float]]]:
    """Run every side ``rounds`` times, each round beginning with another one."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for i in range(rounds):
        names = list(sides)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            measured[name].append(sides[name]())
        print(f"{case}: round {i + 1} of {rounds}", file=sys.stderr)
    return measured


def _milliseconds(runs: Sequence[dict[str, float]], clock: str) -> list[float]:
    return [1000 * run[clock] / run["images"] for run in runs]


def _side(name: str, words: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, float]:
    """What a side of :data:`~focalclip.studies.bench.sides.SIDES` measures in a process of its own, on the CPU.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    assert name in SIDES
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        _run([sys.executable, "-m", SIDES[name].__module__, name, json.dumps(words), str(output)], name, environment)
        return json.loads(output.read_text())


def _run(command: Sequence[str], what: str, environment: dict[str, str] | None = None) -> float:
    """Run a command; returns the processor seconds of it and of all its processes.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    variables = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables | (environment or {}), check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"{what} failed with status {done.returncode}: {lines[-1].strip() if lines else 'no message'}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _make_shards(side: int | None, folder: Path, images: int) -> float:
    code = "from focalclip.cli.make_shards import main; raise SystemExit(main())"
    resized = ["--resize", str(side), "--quality", str(QUALITY)] if side else []
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = [str(folder / "photos.csv"), f"{output}/shards", "--jobs", str(num_cores()), *resized]
        spent = _run([sys.executable, "-c", code, *words], "make-shards")
        _check_count(f"{output}/shards", images, "make-shards")
    return spent


def _img2dataset(command: Path, side: int | None, folder: Path, images: int) -> float:
    """Its defaults but for what it would do besides: hashes, metadata of the pictures, and files of its own on them."""
    resized = ["keep_ratio", "--image_size", str(side), "--encode_quality", str(QUALITY)] if side else ["no"]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = ["--url_list", str(folder / "urls.tsv"), "--input_format", "tsv", "--url_col", "url"]
        words += ["--caption_col", "caption", "--output_folder", f"{output}/shards", "--output_format", "webdataset"]
        words += ["--resize_mode", *resized, "--resize_only_if_bigger", "True", "--skip_reencode", "True"]
        words += ["--processes_count", str(num_cores()), "--thread_count", "8", "--number_sample_per_shard", "1000"]
        words += ["--compute_hash", "None", "--extract_exif", "False", "--enable_wandb", "False"]
        spent = _run([str(command), *words], "img2dataset", {"PYTHONPATH": ""})
        _check_count(f"{output}/shards", images, "img2dataset")
    return spent


def _datasets(side: int | None, folder: Path, images: int) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = {"folder": str(folder / "photos"), "output": output, "side": side, "quality": QUALITY}
        command = [sys.executable, "-m", SIDES["datasets_shards"].__module__, "datasets_shards", json.dumps(words)]
        spent = _run([*command, f"{output}/measured.json"], "datasets")
        if (found := json.loads(Path(f"{output}/measured.json").read_text())["images"]) != images:
            raise UserError(f"datasets wrote {found} of {images} pictures")
    return spent


def _check_count(folder: str, images: int, what: str) -> None:
    """Raise UserError unless as many pictures were written as there are."""
    found = 0
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += sum(name.endswith(".jpg") for name in tar.getnames())
    if found != images:
        raise UserError(f"{what} wrote {found} of {images} pictures")


def _write_photographs(folder: Path, photo: Photo, count: int, different: int = 16) -> None:
    """A folder of photographs with ``metadata.csv``, and beside it lists of paths and of URLs.

    A few pictures are written over and over, each with a comment of its own, so that no two files are equal.
    """
    folder.mkdir(parents=True)
    photos = [photo.jpeg(seed) for seed in range(min(different, count))]
    rows = []
    for i in range(count):
        note = f"photograph {i}".encode()
        comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2) + note
        data = photos[i % len(photos)]
        (folder / f"{i:06d}.jpg").write_bytes(data[:2] + comment + data[2:])
        rows.append((f"{i:06d}.jpg", _caption(i)))
    lists = {"photos/metadata.csv": ("file_name", "text", ",", ""), "photos.csv": ("path", "caption", ",", "photos/")}
    lists["urls.tsv"] = ("url", "caption", "\t", f"{folder.resolve().as_uri()}/")
    for name, (path, text, comma, start) in lists.items():
        lines = [f"{path}{comma}{text}", *(f"{start}{file}{comma}{caption}" for file, caption in rows)]
        (folder.parent / name).write_text("\n".join(lines) + "\n")


def _caption(i: int) -> str:
    return f"a photograph of a harbour in the evening light seen from the hill above it number {i}"


def _write_shards(
    folder: Path, photo: Photo, shards: int, samples: int, with_index: bool = False, different: int = 8
) -> list[Path]:
    """Write plain shards of a few pictures, over and over; returns the files of the different pictures."""
    folder.mkdir(parents=True)
    photos = [photo.jpeg(seed) for seed in range(different)]
    number = itertools.count()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in itertools.islice(number, samples):
                for suffix, data in (("jpg", photos[i % different]), ("txt", _caption(i).encode())):
                    member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    if with_index:
        from focalclip.data.index import usable_shards

        usable_shards(sorted(folder.glob("*.tar")))
    files = [folder / f"{seed}.jpg" for seed in range(different)]
    for file, data in zip(files, photos, strict=True):
        file.write_bytes(data)
    return files


@contextmanager
def _server(folder: Path, latency: float, fault_rate: float, index: bool) -> Iterator[str]:
    """URL of a server in a process of its own, as long as the context lasts."""
    words = json.dumps({"folder": str(folder), "latency": latency, "fault_rate": fault_rate, "index": index})
    command = [sys.executable, "-m", SIDES["serve"].__module__, "serve", words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}
