"""What a protocol does to a picture before the model's own preprocessing, which then finds the size that it wants."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from focalclip.evaluation.registry.protocols import Resize

UNICL_RATIO = 256 / 224  # TEST.CROP in data/build.py of microsoft/UniCL


def resizer(preprocess: Callable[[Image.Image], Tensor], resize: Resize) -> Callable[[Image.Image], Image.Image]:
    """A function that resizes a picture (bicubic) to the size that ``preprocess`` gives, the way ``resize`` says.

    ``model`` leaves it alone. ``squash`` keeps the whole picture and not its proportions (ELEVATER's KITTI).
    ``resize256_crop224`` resizes the shorter side to int(256/224 x side), then crops the centre (UniCL's ImageNet).
    """
    if resize == "model":
        return lambda image: image
    size = list(preprocess(Image.new("RGB", (32, 32))).shape[-2:])
    bicubic = v2.InterpolationMode.BICUBIC
    if resize == "squash":
        return v2.Resize(size, bicubic)
    return v2.Compose([v2.Resize(int(UNICL_RATIO * min(size)), bicubic), v2.CenterCrop(size)])
