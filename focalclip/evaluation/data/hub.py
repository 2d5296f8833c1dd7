"""Data set repositories on the Hugging Face hub: the local cache first, then a download that resumes and is verified.

Repositories hold the wds layout or Parquet files. Only one split is fetched. What was downloaded is checked against the
hub's own size and SHA-256 of each file, and the file that makes a split whole is fetched after that check, so a split
that is whole in the cache is a verified one.
"""

from pathlib import Path

from focalclip.base.errors import UserError, first_line
from focalclip.data.folders import COUNT, NAMES, TEMPLATES, TYPE, is_whole
from focalclip.data.reader import SplitName, Unavailable
from focalclip.evaluation.data.libraries import parquet_splits

_LAST = ("README.md", f"*/{COUNT}")

_TEXTS = (NAMES, TEMPLATES, TYPE)


def fetch(repo: str, split: SplitName, subfolder: str = "") -> Path:
    """Local folder of a repository with one split in it.

    Args:
        repo: ``owner/name`` of a data set repository.
        split: Which split.
        subfolder: Of a repository that holds several configurations: the folder of the one wanted.

    Raises:
        Unavailable: saying what to do: no such repository or split, gated, offline, damaged on the way.
        UserError: if no repository can have that name.
    """
    patterns = wanted_files(split, subfolder)
    cached = _cached(repo, patterns)
    if cached is not None and has_split(cached, split, subfolder):
        return cached
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        folder = _download(repo, patterns)
    except GatedRepoError:
        raise Unavailable(f"{repo} is gated: accept its terms on the hub and log in, or give --data-root") from None
    except RepositoryNotFoundError:
        raise Unavailable(f"the hub has no {repo} (any more); give --data-root") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = error.__cause__ or error
        why = "offline" if isinstance(reason, OfflineModeIsEnabled) else f"the hub fails ({first_line(reason)})"
        what = repo if cached is None else f"the {split} split of {repo}"
        raise Unavailable(f"{why}, {what} not cached; go online once, or give --data-root") from None
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001 - the client's network, disk and Xet errors share no base
        raise Unavailable(f"{repo}: {first_line(error)}; try again, or give --data-root") from None
    if not has_split(folder, split, subfolder):
        hint = "; most mirrors have none, cut one from train" if split == "val" else ""
        raise Unavailable(f"{repo} has no {split} split, neither in the wds layout nor as Parquet files{hint}")
    return folder


def wanted_files(split: SplitName, subfolder: str = "") -> list[str]:
    """Patterns of the files that a split needs, in the hub's own form: with ``/`` on every system."""
    place = f"{subfolder}/" if subfolder else ""
    return ["README.md", *_TEXTS, f"{split}/*", f"{place}*{split}*.parquet"]


def has_split(folder: Path, split: SplitName, subfolder: str = "") -> bool:
    """Whether a repository's folder holds a whole split in one of the layouts."""
    if (folder / NAMES).is_file():
        return is_whole(folder / split)
    return split in parquet_splits(folder / subfolder)


def _cached(repo: str, patterns: list[str]) -> Path | None:
    """The repository in the cache; None if it is not there, or known to lack Parquet files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, local_files_only=True))
    except IncompleteSnapshotError as error:  # whether a split in the wds layout is whole we see for ourselves
        folder = Path(error.snapshot_path)
        return folder if (folder / NAMES).is_file() else None
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"{repo}: not the name of a repository, OWNER/NAME ({first_line(error)})") from None


def _download(repo: str, patterns: list[str]) -> Path:
    """Download what is missing; verify; then fetch what makes the split whole."""
    from huggingface_hub import HfApi, snapshot_download

    folder = snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, ignore_patterns=list(_LAST))
    checked = HfApi().verify_repo_checksums(repo, repo_type="dataset", revision=Path(folder).name)
    damaged = [mismatch["path"] for mismatch in checked.mismatches]
    for path in damaged:
        file = Path(folder) / path
        file.resolve().unlink(missing_ok=True)  # what the link in the snapshot points to
        file.unlink(missing_ok=True)
    if damaged:
        raise Unavailable(
            f"{repo}: {len(damaged)} of {checked.checked_count} files differ from the hub's SHA-256 ({damaged[0]} ...);"
            " they were removed, run this again to fetch them"
        )
    return Path(snapshot_download(repo, repo_type="dataset", revision=Path(folder).name, allow_patterns=patterns))
