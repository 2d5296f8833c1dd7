"""From a run to a folder that another library loads: weights, configuration, model card; whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from focalclip import names
from focalclip.base.errors import UserError, first_line, require
from focalclip.base.files import user_path, whole_folder
from focalclip.interop.card import Trained, model_card


class Format(NamedTuple):
    """How to write a format, and how to read what was written; functions as ``module:function``."""

    write: str
    """``write(trained, folder)`` into an empty folder; returns what the reader has to know, one sentence each."""
    usage: str
    """``usage(trained, name)``: Python that loads the exported folder of this name."""
    library: str
    """What the Hugging Face hub calls the library."""


FORMATS: dict[str, Format] = {
    library: Format(
        f"focalclip.interop.{module}:write_{library}", f"focalclip.interop.{module}:{library}_usage", library
    )
    for library, module in {
        "open_clip": "open_clip",
        "timm": "timm",
        "transformers": "transformers_model",
        "onnx": "onnx",
    }.items()
}


def export(source: str | Path, folder: str | Path, kind: str, *, license_id: str = "unknown") -> list[str]:
    """Write a trained model for another library, with a model card.

    Args:
        source: a run directory or an exported folder.
        folder: where to; it must not exist yet, or be empty.
        kind: a key of :data:`FORMATS`.
        license_id: licence of the weights for the card, by the hub's names (``mit``, ``cc-by-sa-4.0`` ...).

    Returns:
        What the user has to know besides, one sentence each.

    Raises:
        UserError: if the source is no trained model of ours, the folder is taken, or the format cannot hold the model.
    """
    folder = user_path(folder)
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: not known; use one of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; remove it or choose another folder")
    if needed := {"transformers": ["transformers"], "onnx": ["onnx", "onnxscript"]}.get(kind):
        require(f"--format {kind}", "export", *needed)
    trained = Trained.read(source)
    with whole_folder(folder) as new:
        notes = names.find(FORMATS[kind].write)(trained, new)
        usage = names.find(FORMATS[kind].usage)(trained, folder.name)
        card = model_card(trained, usage, library=FORMATS[kind].library, license_id=license_id, notes=notes)
        (new / "README.md").write_text(card, encoding="utf-8")
    return notes


def check_can_push(repo: str) -> None:
    """Find out before the work whether an upload can succeed.

    Raises:
        UserError: if the name is not valid on the hub, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _as_user_error(repo):
        validate_repo_id(repo)
        HfApi().whoami()


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as a model repository, created if it does not exist; returns its address.

    Raises:
        UserError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _as_user_error(repo):
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export of focalclip")
        return str(address)


@contextmanager
def _as_user_error(repo: str) -> Iterator[None]:
    """Turn any failure of the hub into a UserError."""
    from huggingface_hub.errors import HTTPError  # of whichever client the hub library uses

    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"--push-to-hub {repo}: the hub refuses it: {first_line(error)} "
            "Log in with `hf auth login` on a machine that reaches the hub; the export itself needs no connection."
        ) from None
