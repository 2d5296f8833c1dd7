"""The model card of an export: a ``README.md`` with the hub's metadata, usage, training data and measured results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.interop import folder as store
from focalclip.interop import load as loading
from focalclip.models.clip import FocalCLIP


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        name: of the run.
        model: as its own export gives it: float32, on the CPU, the feature normalisation folded into the projection.
        provenance: what training wrote beside the weights: versions, steps, samples, the whole configuration.
        results: the zero-shot results in the run's ``eval/`` by name; probes and retrieval are left out, and
            evaluations of a part of the images, which are no results.
    """

    name: str
    model: FocalCLIP
    provenance: dict[str, Any]
    results: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """Read a run directory or an exported folder.

        Raises:
            UserError: if it holds no model trained by focalclip, or a result cannot be read.
        """
        model: Any = loading.load(source)
        if not isinstance(model, FocalCLIP):
            raise UserError(f"{source}: not trained by focalclip; give a run directory or an exported folder")
        run = user_path(source)
        provenance = store.provenance(run / "model" if (run / "model").is_dir() else run)
        read = {path.stem: _read_result(path) for path in sorted(run.glob("eval/*.json"))}
        results = {name: result for name, result in read.items() if _is_zero_shot(result) and not _is_partial(result)}
        return cls(provenance.get("run") or run.resolve().name, model, provenance, results)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and isinstance(result.get("tasks"), dict):
            return result
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: not an evaluation result; remove it or evaluate again with eval/zeroshot.py")


def _is_zero_shot(result: dict[str, Any]) -> bool:
    """Probes tell several values of a task, and a retrieval set's benchmark is called so."""
    return result.get("benchmark") != "retrieval" and all("value" in task for task in result["tasks"].values())


def _is_partial(result: dict[str, Any]) -> bool:
    """Whether only a part of the images of a task was evaluated; older results say it in the name of the test set."""
    names = [str(task.get("test_set", "")) for task in result["tasks"].values()]
    return bool(result.get("partial")) or any(name.startswith("a part of ") for name in names)


# Of the default corpus; see focalclip/data/corpus/emoji.py.
_EMOJI = (
    "the default corpus of focalclip: emoji in many drawing styles with human-written names and keywords. The pictures "
    "belong to their artists: Noto under Apache-2.0; Fluent and the keywords of emojilib and emojibase-data under "
    "MIT; EmojiOne and Streamline under CC BY 4.0; OpenMoji and EmojiOne v1 under CC BY-SA 4.0"
)


def model_card(trained: Trained, usage: str, *, library: str, license_id: str, notes: list[str]) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        trained: the model and what its run tells.
        usage: Python that loads the export.
        library: what the hub calls the library that it is for.
        license_id: licence of the weights, by the hub's names.
        notes: what the user has to know besides.
    """
    header = yaml.safe_dump(_metadata(trained, library, license_id), sort_keys=False, allow_unicode=True)
    of_weights = license_id if license_id != "unknown" else "not stated by whoever exported them"
    parts = [
        f"---\n{header}---\n",
        f"# {trained.name}\n",
        _summary(trained),
        "## Use\n",
        *(f"{note}\n" for note in notes),
        f"```python\n{usage}\n```\n",
        "## Training\n",
        _training(trained.provenance),
        "## Results\n",
        _results(trained.results),
        "## Limits\n",
        "Nothing but the tasks above was measured. The model repeats whatever its pictures and captions had in common, "
        "mistakes and prejudice included; judge it on data of your own before it decides anything.\n",
        "## Licence\n",
        f"Of the weights: {of_weights}. The training data have their own.\n",
    ]
    return "\n".join(parts)


def _summary(trained: Trained) -> str:
    model, version = trained.model, trained.provenance.get("focalclip")
    image, text = model.config.image, model.config.text
    kind = getattr(getattr(model.text, "config", None), "model_type", None)  # of a Hugging Face encoder
    encoder = f"{kind} of transformers" if kind else f"`{text.name}`"
    return (
        f"A contrastive language-image model: image tower `{image.name}` ({_millions(model.visual)} parameters, "
        f"{image.image_size} pixels), text tower {encoder} ({_millions(model.text)}, at most {text.context_length} "
        f"tokens), shared width {model.config.embed_dim}. Trained by focalclip{f' {version}' if version else ''}.\n"
    )


def _metadata(trained: Trained, library: str, license_id: str) -> dict[str, Any]:
    """The header that the Hugging Face hub reads, results included (``model-index``)."""
    task = "image-feature-extraction" if library == "timm" else "zero-shot-image-classification"
    results = [
        {
            "task": {"type": "zero-shot-image-classification"},
            "dataset": {"name": name, "type": name},
            "metrics": [
                {
                    "type": measured["metric"],
                    "value": round(100 * measured["value"], 2),
                    "name": f"{measured['metric']} (%)",
                }
            ],
        }
        for result in trained.results.values()
        for name, measured in result["tasks"].items()
    ]
    index = {"model-index": [{"name": trained.name, "results": results}]} if results else {}
    return {
        "license": license_id,
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["focalclip", "focalnet", "clip", "zero-shot-image-classification"],
        **index,
    }


def _training(provenance: dict[str, Any]) -> str:
    config = provenance.get("config")
    if config is None:
        return "The export does not tell how it was trained.\n"
    data, optim = config["data"], config["optim"]
    sources = data["train"] if isinstance(data["train"], list) else [data["train"]]
    told = _EMOJI if sources == ["emoji"] else ", ".join(f"`{source}`" for source in sources)
    warmup = "100 (or a tenth of the run)" if optim["warmup_steps"] is None else f"{optim['warmup_steps']:,}"
    return (
        f"- data: {told}\n"
        f"- {provenance['step']:,} steps of {data['batch_size']:,} pairs ({provenance['samples']:,} samples seen), "
        f"seed {config['seed']}, {config['train']['precision']}\n"
        f"- optimiser `{optim.get('name', 'adamw')}`, peak learning rate {optim['lr']:g}, "
        f"{warmup} steps of warm-up, then the schedule `{optim.get('schedule', 'cosine')}`, "
        f"weight decay {optim['weight_decay']:g}\n"
        f"- the whole configuration, as `config.yaml`:\n\n"
        f"<details>\n\n```yaml\n{yaml.safe_dump(_without_paths(config), sort_keys=False)}```\n\n</details>\n"
    )


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Where runs are kept concerns nobody but who trained."""
    return {name: value for name, value in config.items() if name != "runs_dir"}


def _results(results: dict[str, dict[str, Any]]) -> str:
    """One table for each benchmark, in %."""
    tables = []
    for name, result in results.items():
        rows = [
            f"| {task} | {x['metric']} | {_percent(x['value'])} | {_percent(x['interval'][0])} - "
            f"{_percent(x['interval'][1])} | {_percent(x['chance'], 2)} | {x['n']:,} |"
            for task, x in result["tasks"].items()
        ]
        if rows:
            head = "| task | metric | value % | 95% interval | chance % | n |\n|---|---|---|---|---|---|\n"
            tables.append(f"Zero-shot, `{name}`:\n\n" + head + "\n".join(rows) + "\n")
    return "\n".join(tables) or "None were measured before the export.\n"


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
