"""What a result knows of the model and the machine, in words."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import Result


def facts(result: "Result") -> list[tuple[str, str]]:
    """Names and values; what the result does not know is left out."""
    model: dict[str, Any] = {name: value for name, value in result.model.items() if value is not None}
    if "parameters" in model and "image_parameters" in model:
        model["text_parameters"] = model["parameters"] - model["image_parameters"]
    lines = {
        "weights (SHA-256)": str(model.get("sha256", ""))[:16],
        "precision, device": ", ".join(str(model[key]) for key in ("precision", "device") if key in model),
        "parameters": _sides(model, "parameters"),
        "multiply-adds": _sides(model, "multiply_adds"),
        "learned scale": own_scale(result),
        "machine": _machine(model),
        "peak memory": _bytes(model.get("peak_memory")),
        "peak GPU memory": _bytes(model.get("peak_gpu_memory")),
        "images": _images(result),
        "software": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    return [(name, value) for name, value in lines.items() if value]


def own_scale(result: "Result") -> str:
    """The scale that the model itself multiplies cosines with; empty where it has none."""
    scales = [task.calibration["own_scale"] for task in result.tasks.values() if "own_scale" in task.calibration]
    return f"{scales[0]:.1f}" if scales else ""


def _machine(model: dict[str, Any]) -> str:
    parts = [str(model.get("processor", ""))]
    parts += [f"{model[key]} {key}" for key in ("threads", "ranks") if model.get(key, 1) > 1]
    return ", ".join(part for part in parts if part)


def _bytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f} GiB"


def _images(result: "Result") -> str:
    """How many were scored, and how fast those were encoded that no cache remembered."""
    tasks = result.tasks.values()
    timed = [(task.n - task.cached_images, task.images_per_second) for task in tasks if task.images_per_second]
    seconds = sum(n / speed for n, speed in timed)
    speed = f" at {sum(n for n, _ in timed) / seconds:,.0f} images/s" if seconds else ""
    cached = sum(task.cached_images for task in tasks)
    return f"{sum(task.n for task in tasks):,}{speed}" + (f", {cached:,} from the cache" if cached else "")


def _sides(model: dict[str, Any], what: str) -> str:
    """``12.3 M (image 4.5 M, text 7.8 M)``, of what is known."""
    sides = [f"{side} {_size(model[f'{side}_{what}'])}" for side in ("image", "text") if f"{side}_{what}" in model]
    whole = _size(model[what]) if what in model else ""
    return f"{whole} ({', '.join(sides)})" if whole and sides else whole or ", ".join(sides)


def _size(number: float) -> str:
    """Three digits and the thousands in a letter."""
    power = next((i for i, letter in enumerate("kMG") if number < 999.5 * 1000 ** (i + 1)), 2) if number >= 1000 else -1
    return f"{number:.0f}" if power < 0 else f"{number / 1000 ** (power + 1):.3g} {'kMG'[power]}"
