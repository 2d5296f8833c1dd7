"""What one side of a comparison does, in a process that does nothing else: ``python -m focalclip.studies.bench.sides``.

Its arguments are a name of :data:`SIDES`, the side's own arguments as JSON, and a file that receives what was measured
as JSON. Clocks start behind the imports and the first batches; processor time is that of the process and of all below
it, user and system.
"""

import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from focalclip.base.errors import UserError
from focalclip.config import AugmentConfig, DataConfig, RunConfig, TextTowerConfig

WARM_UP = 4  # batches before the clock starts: by then every queue is full

_SHUFFLED = 64  # samples in open_clip's shuffle buffer; its own 5,000 would hold 7 GB of the largest pictures


class Spent:
    """Clock of this process and the processes below it."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def over(self, images: int) -> dict[str, float]:
        """Seconds and processor seconds since the clock was made, and for how many images."""
        cpu, wall = _cpu_seconds() - self._cpu, time.perf_counter() - self._wall
        return {"images": images, "seconds": wall, "cpu_seconds": cpu}


def _cpu_seconds() -> float:
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _timed(batches: Iterable[Any], size: int, images: int, warm_up: int = WARM_UP) -> dict[str, float]:
    """Take the time of ``images`` images, in batches of ``size``, behind the first batches."""
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    count = max(1, round(images / size))
    clock = Spent()
    for _ in range(count):
        next(iterator)
    return clock.over(count * size)


def our_loader(shards: str, side: int, images: int, batch: int, workers: int) -> dict[str, float]:
    """Ours: crops of 90 to 100 % of the area, resized to ``side``, and CLIP's tokens, in ``workers`` processes."""
    loader = _our_loader(shards, side, batch, workers)
    with closing(iter(loader)) as batches:
        return _timed(batches, batch, images)


def _our_loader(shards: str, side: int, batch: int, workers: int) -> Any:
    from focalclip.data.loader import TrainLoader
    from focalclip.data.prepared import training_shards
    from focalclip.models.text import create_tokenizer

    data = DataConfig(train=shards, batch_size=batch, workers=workers)
    return TrainLoader(training_shards(shards), data, side, create_tokenizer(TextTowerConfig()), seed=0)


def open_clip_loader(shards: str, side: int, images: int, batch: int, workers: int) -> dict[str, float]:
    """open_clip's: its own pipeline, resampling shards so that it does not end, with a small shuffle buffer."""
    import open_clip
    from open_clip_train import data

    vars(data).update(_SAMPLE_SHUFFLE_SIZE=_SHUFFLED, _SAMPLE_SHUFFLE_INITIAL=_SHUFFLED)
    # open_clip asks for webdataset 0.2.86 at most; later ones mark the end of each shard, which its reader fails on
    data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    settings = SimpleNamespace(
        train_data=shards,
        train_num_samples=2**30,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    chain = open_clip.image_transform(side, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loader = data.get_wds_dataset(settings, chain, is_train=True, tokenizer=tokenizer).dataloader
    return _timed(loader, batch, images)


def bare_decoding(pictures: Sequence[str], side: int, images: int) -> dict[str, float]:
    """Nothing but simplejpeg at the size that we choose, and torch's resize of the whole picture; one thread."""
    import simplejpeg
    import torch
    import torch.nn.functional as F

    from focalclip.data.transforms import min_decoded_side

    torch.set_num_threads(1)
    files = [Path(name).read_bytes() for name in pictures]
    enough = min_decoded_side([0.5] * 16, AugmentConfig(), side)

    def one(data: bytes) -> None:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=enough, min_width=enough, min_factor=2)
        F.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None], size=(side, side), mode="bicubic", antialias=True
        )

    for data in files:
        one(data)
    clock = Spent()
    for data in itertools.islice(itertools.cycle(files), images):
        one(data)
    return clock.over(images)


def datasets_shards(folder: str, output: str, side: int | None, quality: int) -> dict[str, float]:
    """``datasets``' way from a folder of pictures to files that can be trained on: imagefolder, map, Parquet."""
    import io

    from datasets import load_dataset  # noqa: TID251 (a peer)
    from datasets.table import embed_table_storage  # noqa: TID251

    data: Any = load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=f"{output}/cache")

    def resized(row: dict, shorter: int) -> dict:
        picture = row["image"].convert("RGB")
        factor = shorter / min(picture.size)
        buffer = io.BytesIO()
        picture = picture.resize([round(length * factor) for length in picture.size])
        picture.save(buffer, "JPEG", quality=quality)
        return {"image": {"bytes": buffer.getvalue(), "path": None}}

    if side:
        data = data.map(partial(resized, shorter=side), features=data.features)
    # as push_to_hub does it: to_parquet alone would write paths in the place of bytes
    data.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True).to_parquet(
        f"{output}/0.parquet"
    )
    return {"images": len(data)}


def our_remote(shards: str, side: int, batch: int, workers: int, samples: int) -> dict[str, float]:
    """One pass over shards behind URLs by our loader, from an empty cache to the last batch."""
    clock, seen, replaced = Spent(), set(), 0
    loader = _our_loader(shards, side, batch, workers)
    with closing(iter(loader)) as batches:
        for taken in itertools.islice(batches, loader.num_samples // batch):
            seen.update(taken.ids.tolist())
            replaced += len(taken.faults)
        spent = clock.over(len(seen))
    rest = loader.num_samples % batch  # of the pass, which ends within a batch
    return spent | {"lost": samples - rest - len(seen), "replaced": replaced}


def webdataset_remote(shards: str, side: int, batch: int, workers: int, samples: int) -> dict[str, float]:
    """One pass over the same by webdataset's reader (curl), with open_clip's chain for the pictures."""
    import open_clip
    import webdataset as wds  # noqa: TID251 (a peer)
    from open_clip_train.data import log_and_continue

    chain = open_clip.image_transform(side, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    clock, seen = Spent(), set()
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=log_and_continue),
        wds.shuffle(_SHUFFLED),
        wds.decode("pilrgb", handler=log_and_continue),
        wds.rename(image="jpg", text="txt", handler=log_and_continue),
        wds.map_dict(image=chain, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text", "__key__"),
        wds.batched(batch),
    )
    for _, _, keys in wds.WebLoader(pipeline, batch_size=None, num_workers=workers):
        seen.update(keys)
    return clock.over(len(seen)) | {"lost": samples - len(seen), "replaced": 0}


def training_step(settings: dict[str, Any], batch: int, steps: int) -> dict[str, float]:
    """Steps of the engine as in a run, with a batch of noise: median seconds, and what memory they add to the imports.

    ``memory`` is the peak of the resident memory (on a GPU: of what torch allocated) above that before the model was
    made: weights, gradients, moments of the optimiser and activations.
    """
    import psutil
    import torch

    from focalclip.base.machine import peak_memory
    from focalclip.base.ranks import joined
    from focalclip.base.strict import from_dict
    from focalclip.data.loader import Batch
    from focalclip.models.clip import FocalCLIP
    from focalclip.models.lock import lock_towers
    from focalclip.training import engine
    from focalclip.training.step import Stepper, create_loss

    config = from_dict(RunConfig, settings, "settings")
    with joined(alone=True):
        engine.set_up()
        before = psutil.Process().memory_info().rss
        torch.manual_seed(0)
        model = FocalCLIP(config.model)
        lock_towers(model)
        side, text = config.model.image.image_size, config.model.text
        tokens = model.tokenizer([f"a photo of the number {i}" for i in range(batch)])
        made = engine.create_engine(model.train(), config, total_steps=1000)
        stepper = Stepper(made, create_loss(config.loss, model.outputs), config)
        noise = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        numbers = torch.arange(batch)
        taken = Batch(noise, tokens[:, : text.context_length], torch.full((batch,), -1), numbers, numbers, [])
        seconds = []
        for step in range(steps + 1):
            start = time.perf_counter()
            stepper(iter([taken]), step)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = peak_memory(engine.device())
        on_gpu = [value for name, value in peak.items() if name != "peak_memory"]
        memory = on_gpu[0] if on_gpu else peak["peak_memory"] - before
    return {"seconds": float(np.median(seconds[1:])), "memory": memory}


def serve(folder: str, latency: float, fault_rate: float, index: bool) -> None:
    """An HTTP server of a folder on a free port, which it prints; it answers ``latency`` seconds late.

    Args:
        folder: what is served.
        latency: in seconds, before every answer.
        fault_rate: of all requests for tars so many fail: by a status of 500, a reset connection or half the bytes, in
            turn.
        index: serve the indexes that lie beside the shards, too.
    """
    root, draws, turn, lock = Path(folder), random.Random(0), itertools.count(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            time.sleep(latency)
            file = root / self.path.partition("?")[0].lstrip("/")
            if not file.is_file() or (file.suffix == ".npz" and not index):
                self._refuse(404)
                return
            with lock:
                fault = next(turn) % 3 if file.suffix == ".tar" and draws.random() < fault_rate else None
            if fault == 0:
                self._refuse(500)
            elif fault == 1:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
            else:
                self._send(file, with_body, is_cut=fault == 2)

        def _refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, file: Path, with_body: bool, is_cut: bool) -> None:
            stat = file.stat()
            start, stop = 0, stat.st_size
            wanted = self.headers.get("Range", "")
            if wanted.startswith("bytes="):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start = int(first) if first else max(0, stop - int(last))
                stop = min(stop, int(last) + 1) if first and last else stop
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stat.st_size}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", self.date_time_string(stat.st_mtime))
            self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')
            self.end_headers()
            if not with_body:
                return
            if is_cut:
                stop = start + (stop - start) // 2
                self.close_connection = True
            with file.open("rb") as opened:
                opened.seek(start)
                while start < stop:
                    sent = self.connection.send(opened.read(min(1 << 20, stop - start)))
                    start += sent
                    opened.seek(start)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


SIDES: dict[str, Callable[..., Any]] = {
    side.__name__: side
    for side in (
        our_loader,
        open_clip_loader,
        bare_decoding,
        datasets_shards,
        our_remote,
        webdataset_remote,
        training_step,
        serve,
    )
}


if __name__ == "__main__":
    name, arguments, *output = sys.argv[1:]
    try:
        measured = SIDES[name](**json.loads(arguments))
    except UserError as error:
        raise SystemExit(str(error)) from None
    Path(output[0]).write_text(json.dumps(measured))
