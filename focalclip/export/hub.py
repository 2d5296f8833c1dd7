"""Upload of an exported folder to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from focalclip.errors import UserError, first_line


def check_can_push(repo: str) -> None:
    """Find out before the work that the upload cannot succeed.

    Raises:
        UserError: if the name is none of the hub's, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _one_sentence(repo):
        validate_repo_id(repo)
        HfApi().whoami()


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as a model repository, made if need be; returns its address.

    Raises:
        UserError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _one_sentence(repo):
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export of focalclip")
        return str(address)


@contextmanager
def _one_sentence(repo: str) -> Iterator[None]:
    """The hub's many failures as one."""
    from huggingface_hub.errors import HTTPError  # of whichever client the hub library uses

    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"--push-to-hub {repo}: the hub does not take it: {first_line(error)} "
            "Log in with `hf auth login` on a machine that reaches the hub; the export itself needs no connection."
        ) from None
