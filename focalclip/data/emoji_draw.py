"""Draw SVG icons as small PNG pictures on white, on all cores."""

import io
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator

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
