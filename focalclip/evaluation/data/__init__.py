"""Evaluation data in any layout: :func:`open_task` is the one way to get a split of a task.

    open       where a task's data is, which layout that place has, and ``open_task``
    hub        data set repositories on the Hugging Face hub, downloaded and verified
    elevater   ELEVATER's sets as Chinese-CLIP and their authors packed them, unpacked or straight from the zip
    libraries  what the library ``datasets`` saved, Parquet files, and what torchvision downloaded

Task folders and folders per class are read by ``focalclip.data``, as for training. Every header and label is read
before the first image is encoded, so that faulty data costs seconds, not minutes. Threads read entries, not shards, so
nothing depends on how many shards there are. Only ``hub`` contacts a network.
"""

from focalclip.data.images import decode
from focalclip.data.reader import Entry, Unavailable
from focalclip.evaluation.data.open import TaskData, locate, open_task, read_task_folder

__all__ = ["Entry", "TaskData", "Unavailable", "decode", "locate", "open_task", "read_task_folder"]
