"""Evaluation data in whatever layout it lies: :func:`open_task` is the one way to get a split of a task.

    records           what every reader returns: names, prompts, labels, and entries that read one compressed image each
    decoding          compressed images to Pillow
    locate            where a task's data is, which layout that place has, and ``open_task``
    wds               CLIP_benchmark's folders of tars
    hub               data set repositories on the Hugging Face hub, downloaded and verified
    elevater_archive  the ELEVATER sets as Chinese-CLIP packed them, unpacked or straight from the zip
    files             trees of files in a folder or a zip
    image_folder      one folder per class
    hf_datasets       what the library ``datasets`` saved, and Parquet files
    torchvision_sets  what torchvision downloaded
    voc               VOC 2007 as its authors packed it, with several labels per image
    hateful_memes     the Hateful Memes set as its authors packed it

Every header and label is read before the first image is encoded, so that faulty data costs seconds, not minutes.
Threads read entries, not shards, so nothing depends on how many shards there are. Only ``hub`` contacts a network.
"""

from focalclip.evaluation.data.entries import Entry, TaskData, Unavailable, decode
from focalclip.evaluation.data.locate import locate, open_task
from focalclip.evaluation.data.wds import read_task_folder

__all__ = ["Entry", "TaskData", "Unavailable", "decode", "locate", "open_task", "read_task_folder"]
