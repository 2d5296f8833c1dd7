"""Where a task's data is, and which layout that place has."""

from pathlib import Path
from typing import cast

from focalclip.base.errors import UserError
from focalclip.evaluation.data import elevater as elevater_archive
from focalclip.evaluation.data import folders as voc
from focalclip.evaluation.data import hub, wds
from focalclip.evaluation.data import libraries as hf_datasets
from focalclip.evaluation.data import libraries as torchvision_sets
from focalclip.evaluation.data.entries import SPLITS, Split, TaskData, Unavailable, no_split
from focalclip.evaluation.data.folders import is_hateful_memes, is_image_folder, read_hateful_memes, read_image_folder
from focalclip.evaluation.task import Task

_UNPACKED = "ELEVATER"  # the folder that the archive of all sets unpacks to

_LAYOUTS = (
    "classnames.txt with test/0.tar (wds), label.txt with test/000/*.jpg (ELEVATER's sets by Chinese-CLIP), test/CLASS"
    " NAME/*.jpg, Parquet files, a data set saved by the library datasets, or torchvision's files"
)


def open_task(task: Task, data_root: Path | None, absent: dict[str, str], split: str = "test") -> TaskData:
    """Read one split of a task from wherever its data lies and in whatever layout.

    Args:
        task: its ``source`` says where, or else its ``folders`` under ``data_root``, or else its ``hub`` repository.
        data_root: folder that holds the data; None: the hub.
        absent: tasks known to be absent, and why.
        split: ``train``, ``val`` or ``test``.

    Raises:
        Unavailable: if the data or the split is not there, saying what to do.
        UserError: if the data is faulty or its layout is none of the known ones, naming what was found.
    """
    if split not in SPLITS:
        raise UserError(f"the split {split!r} is not one of {', '.join(SPLITS)}")
    split = cast("Split", split)
    if task.source:
        return _read_source(task, task.source, data_root, split)
    return read_place(locate(task, data_root, absent, split), task, split)


def locate(task: Task, data_root: Path | None, absent: dict[str, str], split: Split = "test") -> Path:
    """Folder or zip of the task's data: under ``data_root``, or from the hub where there is none.

    Raises:
        Unavailable: saying what to do.
    """
    if data_root is None:
        if task.hub is None:
            raise Unavailable(f"on no hub; {task.obtain or 'put its folder somewhere'}, then give --data-root")
        return hub.fetch(task.hub, split)
    found = _find(task, data_root)
    if found is not None:
        return found
    if task.id in absent:
        raise Unavailable(absent[task.id])
    wanted = data_root / task.folder_names[0]
    if task.hub is None:
        raise Unavailable(f"needs {wanted}; {task.obtain or 'put the task folder there'}")
    raise Unavailable(f"needs {wanted}; on the hub: {task.hub}")


def _find(task: Task, data_root: Path) -> Path | None:
    """Folders by name first, then zips, then a folder that several sets share."""
    unpacked = data_root / _UNPACKED
    for root in (data_root, unpacked):
        if (folder := task.find(root)) is not None:
            return folder
    zips = [root / f"{name}.zip" for root in (data_root, unpacked) for name in task.folder_names]
    if (archive := next((path for path in zips if path.is_file()), None)) is not None:
        return archive
    if elevater_archive.holds(data_root / elevater_archive.WHOLE, task):
        return data_root / elevater_archive.WHOLE
    if torchvision_sets.find_root([data_root], torchvision_sets.sets_of(task)):
        return data_root
    return voc.find_voc(data_root) if task.id == voc.TASK else None


def read_place(place: Path, task: Task, split: Split) -> TaskData:
    """Read one split from a folder or zip, whose layout is told by what is in it.

    Raises:
        Unavailable: if it has no such split.
        UserError: if the data is faulty or the layout is none of the known ones, naming what was found.
    """
    if place.is_file():
        return elevater_archive.read_zip(place, task, split)
    if wds.is_task_folder(place):
        present = wds.splits(place)
        if present and split not in present:
            raise no_split(place, split, present)
        return wds.read_task_folder(place, split, empty_names="" in (task.names or ()))
    own = torchvision_sets.sets_of(task)
    if (found := torchvision_sets.find_root([place], own)) is not None:  # before the others: several sets may share it
        return torchvision_sets.read_torchvision(*found, task, split)
    if is_hateful_memes(place):
        return read_hateful_memes(place, task, split)
    if (folder := voc.find_voc(place)) is not None:
        return voc.read_voc(folder, task, split)
    if elevater_archive.is_archive_folder(place):
        return elevater_archive.read_folder(place, task, split)
    if hf_datasets.is_saved(place):
        return hf_datasets.read_saved(place, task, split)
    # the folder may be a set's own one inside torchvision's root, or the root of a set that the task does not know
    found = torchvision_sets.find_root([place.parent], own) or torchvision_sets.find_root(
        [place], torchvision_sets.SETS
    )
    if found is not None:
        return torchvision_sets.read_torchvision(*found, task, split)
    if is_image_folder(place):
        return read_image_folder(place, task, split)
    if hf_datasets.parquet_splits(place):
        return hf_datasets.read_parquet(place, task, split)
    present = sorted(path.name for path in place.iterdir())
    some = ", ".join(present[:5]) + (" ..." if present[5:] else "")
    raise UserError(f"{place}: no layout that can be read (it holds {some or 'nothing'}); expected {_LAYOUTS}")


def _read_source(task: Task, source: str, data_root: Path | None, split: Split) -> TaskData:
    """``hf:REPOSITORY``, ``hf:REPOSITORY:FOLDER``, ``hf:FOLDER`` under ``data_root``, or ``torchvision:NAME``."""
    kind, _, name = source.partition(":")
    if kind == "hf" and name:
        if data_root is not None and (data_root / name).is_dir():
            return read_place(data_root / name, task, split)
        repo, _, subfolder = name.partition(":")
        return read_place(hub.fetch(repo, split, subfolder) / subfolder, task, split)
    if kind == "torchvision":
        known = torchvision_sets.set_named(name)
        if data_root is None:
            raise Unavailable(f"{source} needs --data-root, the folder that torchvision was given as root")
        places = [data_root, data_root / known.name, *(data_root / folder for folder in task.folder_names)]
        found = torchvision_sets.find_root(places, [known])
        return torchvision_sets.read_torchvision(known, found[1] if found else data_root, task, split)
    raise UserError(f"task {task.id}: source {source!r} is not hf:REPOSITORY, hf:FOLDER or torchvision:NAME")
