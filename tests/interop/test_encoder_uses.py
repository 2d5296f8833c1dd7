"""The frozen encoder inside other people's work: detectors, segmentation, probes, feature extraction."""

import pickle
import re
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import focalclip
from focalclip.base.errors import UserError
from focalclip.cli.extract import main
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.evaluation.features.model import weights_sha256
from focalclip.interop.encoder import ImageEncoder
from focalclip.interop.timm import create_timm_tower, timm_preprocess
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.weights import to_official, to_timm

DOC = Path(__file__).parents[2] / "docs" / "encoder.md"
TINY = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(name="focalnet_pico", image_size=32, init="fan_in"),
    text=TextTowerConfig(context_length=8, width=32, heads=2, layers=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model; untrained, which is enough for features that differ."""
    torch.manual_seed(0)
    return focalclip.save(FocalCLIP(TINY), tmp_path_factory.mktemp("export") / "model")


@pytest.fixture
def encoder(folder) -> ImageEncoder:
    return focalclip.load_image_encoder(folder)


def from_docs(name: str):
    """A class as docs/encoder.md defines it."""
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    namespace: dict = {}
    exec(next(block for block in blocks if f"class {name}" in block), namespace)
    return namespace[name]


def train_step(model: nn.Module, loss) -> float:
    """One step of descent on ``loss()``; asserts that the frozen encoder stays bit for bit and all else moves."""
    frozen = {name: x.clone() for name, x in model.state_dict().items() if "encoder." in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert frozen
    assert not any("encoder." in name for name in before)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    value = loss()
    assert torch.isfinite(value)
    value.backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in frozen.items())
    moved = [name for name, x in before.items() if not torch.equal(after[name], x)]
    assert len(moved) >= 0.8 * len(before), sorted(before.keys() - set(moved))
    return value.item()


@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN"])
def test_a_torchvision_detector_trains_on_the_frozen_tower(kind, encoder):
    from torchvision.models import detection

    torch.manual_seed(0)
    backbone = from_docs("PyramidBackbone")(encoder, out_channels=16)
    detector = getattr(detection, kind)(backbone, num_classes=3, min_size=96, max_size=128)
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 112)]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [30.0, 20.0, 75.0, 70.0]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": torch.ones(2, *image.shape[1:], dtype=torch.uint8)}
        for image in images
    ]
    losses: dict[str, torch.Tensor] = {}

    def loss():
        losses.update(detector(images, targets))
        return sum(losses.values())

    train_step(detector, loss)
    expected = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert losses.keys() == expected | ({"loss_mask"} if kind == "MaskRCNN" else set())
    assert all(torch.isfinite(x) for x in losses.values())
    found = detector.eval()(images)
    assert len(found) == 2
    assert all(x["boxes"].shape[1] == 4 for x in found)


def test_a_segmentation_head_trains_on_the_frozen_tower(encoder):
    torch.manual_seed(0)
    head = from_docs("SegmentationHead")(encoder, num_classes=3)
    images, labels = torch.randn(2, 3, 64, 48), torch.randint(0, 3, (2, 64, 48))
    values = [train_step(head, lambda: F.cross_entropy(head(images), labels)) for _ in range(3)]
    assert head(images).shape == (2, 3, 64, 48)
    assert values[-1] < values[0]


def test_a_logistic_regression_reads_digits_off_the_pooled_features(encoder):
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    pixels, labels = load_digits(return_X_y=True)
    pictures = [Image.fromarray((x.reshape(8, 8) * 15.9).astype(np.uint8)) for x in pixels[:400]]
    batches = torch.stack([encoder.preprocess(picture) for picture in pictures]).split(100)
    features = StandardScaler().fit_transform(torch.cat([encoder(batch) for batch in batches]).numpy())
    probe = LogisticRegression(max_iter=300).fit(features[:300], labels[:300])
    assert probe.score(features[300:], labels[300:400]) > 0.5  # chance is 0.1


def test_feature_maps_are_those_of_timm_features_only():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("focalnet_tiny_srf", features_only=True).eval()
    tower = focalclip.create_image_tower("focalnet_tiny_srf").eval()
    weights = {re.sub(r"^layers\.", "layers_", name): x for name, x in to_timm(tower.state_dict()).items()}
    theirs.load_state_dict({name: x for name, x in weights.items() if not name.startswith("norm.")})
    encoder = ImageEncoder(tower, lambda: None)
    images = torch.randn(1, 3, 96, 64)
    assert encoder.strides == theirs.feature_info.reduction()
    assert encoder.feature_dims == theirs.feature_info.channels()
    with torch.no_grad():
        for ours, expected in zip(encoder.feature_maps(images), theirs(images), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 8])
@pytest.mark.parametrize("method", ["forward", "feature_maps"])
def test_a_frozen_forward_pass_keeps_no_activation(method, depth):
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(depth, depth)))
    saved, outputs, alive = [], [], []

    def note(module, inputs, output):
        outputs.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in outputs))

    for stage in tower.layers:
        for block in stage.blocks:
            block.register_forward_hook(note)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        tower(images)
        kept_in_training = len(saved)
        saved.clear()
        outputs.clear()
        alive.clear()
        result = getattr(ImageEncoder(tower, lambda: None), method)(images)
    assert kept_in_training > 10 * depth
    assert saved == []
    assert len(alive) == 2 * depth
    assert max(alive) <= 3  # input and output of a block, and the map before, however deep the net is
    assert all(x.grad_fn is None for x in ([result] if method == "forward" else result))


# What is not an image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("method", ["forward", "feature_maps"])
def test_integers_are_refused_not_cast(dtype, method, encoder):
    """torchvision.io.decode_image gives uint8 from 0 to 255, of which a tower makes other features."""
    images = torch.ones(1, 3, 32, 32).to(dtype)
    with pytest.raises(UserError, match=rf"normalised floats, not {dtype}: .*encoder\.preprocess") as error:
        getattr(encoder, method)(images)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not ndarray"):
        getattr(encoder, method)(np.ones((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3), (1, 3, 32)])
def test_another_shape_is_refused(shape, encoder):
    with pytest.raises(UserError, match=rf"shape \(B, 3, H, W\), not {re.escape(str(shape))}"):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_precision_are_cast(dtype, encoder):
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(images.to(dtype)), encoder(images), rtol=0.1, atol=0.1)


# Pickles


def test_preprocess_goes_to_loader_processes_started_in_any_way(encoder, pictures):
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    (pictures / "class1" / "05.png").unlink()
    expected = torch.stack([encoder.preprocess(picture) for picture, _ in ImageFolder(pictures)])
    folder = ImageFolder(pictures, encoder.preprocess)
    for method in ("spawn", "forkserver"):
        loader = DataLoader(folder, batch_size=20, num_workers=1, multiprocessing_context=method)
        assert torch.equal(next(iter(loader))[0], expected)


ENCODERS = {
    "exported folder": lambda folder: focalclip.load_image_encoder(folder),
    "open_clip": lambda folder: focalclip.load_image_encoder(f"open_clip:local-dir:{folder}"),
    "file": lambda folder: focalclip.load_image_encoder(folder / "tower.pth"),
    "detector": lambda folder: focalclip.load_image_encoder(folder / "detector.pth"),
    "grey": lambda folder: focalclip.load_image_encoder(folder / "grey.pth"),
    "timm": lambda folder: ImageEncoder(create_timm_tower("resnet10t"), partial(timm_preprocess, "resnet10t")),
}


@pytest.fixture(scope="module")
def sources(folder) -> Path:
    """The exported folder, with files of weights beside."""
    for name, options in {"tower": {}, "detector": {"detector_stages": (0, 1)}, "grey": {"in_channels": 1}}.items():
        tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 1), **options))
        torch.save(to_official(tower.state_dict()), folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("trainable", [False, True])
def test_every_encoder_can_be_pickled_with_its_preprocess(kind, trainable, sources):
    encoder = ENCODERS[kind](sources)
    encoder = encoder.unfreeze() if trainable else encoder
    copy, preprocess = pickle.loads(pickle.dumps(encoder)), pickle.loads(pickle.dumps(encoder.preprocess))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))
    images = encoder.preprocess(picture)[None]
    assert torch.equal(preprocess(picture)[None], images)
    assert torch.equal(copy.preprocess(picture)[None], images)
    assert (copy.training, copy.trainable) == (trainable, trainable)
    assert torch.equal(copy.eval()(images), encoder.eval()(images))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_picture_of_16_bits_is_no_white_square_for_any_encoder(kind, sources):
    encoder = ENCODERS[kind](sources)
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, axis=0)
    picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert torch.equal(encoder.preprocess(picture), encoder.preprocess(Image.fromarray(ramp).convert("RGB")))


# Other than 3 channels


def test_a_tower_of_one_channel_takes_grey_pictures(sources):
    encoder = focalclip.load_image_encoder(sources / "grey.pth")
    picture = Image.new("RGB", (64, 64), (200, 100, 50))
    image = encoder.preprocess(picture)
    grey = np.asarray(picture.convert("L"))[0, 0] / 255
    assert image.shape == (1, 224, 224)
    mean, std = (sum(values) / 3 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(image, torch.full_like(image, (grey - mean) / std))
    assert encoder(image[None]).shape == (1, 16)
    with pytest.raises(UserError, match=r"shape \(B, 1, H, W\), not \(1, 3, 32, 32\)"):
        encoder(torch.zeros(1, 3, 32, 32))


def test_a_tower_of_other_channels_says_that_pictures_do_not_have_them(tmp_path):
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 1), in_channels=12))
    torch.save(to_official(tower.state_dict()), tmp_path / "satellite.pth")
    encoder = focalclip.load_image_encoder(tmp_path / "satellite.pth")
    assert encoder(torch.randn(2, 12, 32, 32)).shape == (2, 16)
    with pytest.raises(UserError, match="takes images of 12 channels, which pictures do not have"):
        _ = encoder.preprocess


# Tracing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_overlap": True, "use_post_norm": True, "layer_scale": 0.1},
        {"drop_path": 0.2, "dropout": 0.1},
        {"mixer": "poolformer"},
        {"detector_stages": (0, 1)},
        {"block": "unicl", "use_overlap": True, "use_post_norm": True},
    ],
)
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_torchvision_extracts_features_of_tower_and_encoder(options):
    from torchvision.models.feature_extraction import create_feature_extractor

    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 2), **options)).eval()
    images = torch.randn(2, 3, 48, 32)
    expected = tower.feature_maps(images)
    torch.fx.symbolic_trace(tower)
    norms = {f"norms.{i}": str(i) for i in range(2)} if "detector_stages" in options else {}
    named = norms or {"layers.0": "0", "layers.1": "1"}
    extractor = create_feature_extractor(tower, named).eval()
    encoder = ImageEncoder(tower, lambda: None)
    of_encoder = create_feature_extractor(encoder, {f"tower.{node}": name for node, name in named.items()})
    for maps in (extractor(images), of_encoder(images)):
        for i, x in enumerate(expected):
            torch.testing.assert_close(maps[str(i)].permute(0, 3, 1, 2), x)
    assert extractor(torch.randn(3, 3, 64, 96))["1"].shape == (3, 8, 12, 16), "of any size, not of the traced one"
    with pytest.raises(UserError, match="normalised floats"):
        of_encoder(images.to(torch.uint8))


# Fine-tuning


def test_a_detector_fine_tunes_a_trainable_encoder(folder):
    from torchvision.models import detection

    torch.manual_seed(0)
    encoder = focalclip.load_image_encoder(folder, trainable=True)
    assert encoder.training
    assert encoder.tower.training
    detector = detection.FasterRCNN(from_docs("PyramidBackbone")(encoder, 16), num_classes=3, min_size=96, max_size=128)
    images, boxes = [torch.rand(3, 96, 96)], torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    before = {name: p.detach().clone() for name, p in encoder.tower.named_parameters()}
    optimizer = torch.optim.SGD(detector.train().parameters(), lr=0.01)
    sum(detector(images, [{"boxes": boxes, "labels": torch.tensor([1])}]).values()).backward()
    optimizer.step()
    still = {name for name, p in encoder.tower.named_parameters() if torch.equal(p, before[name])}
    assert still <= {"norm.weight", "norm.bias"}, "the final norm belongs to the pooled features"
    assert not encoder.eval().tower.training
    assert encoder.train().tower.training
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 32, 32)).grad_fn is None


def test_a_frozen_encoder_is_not_thawed_by_the_model_around_it(encoder):
    model = nn.Sequential(encoder, nn.Linear(encoder.num_features, 2)).train()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert model(torch.randn(1, 3, 32, 32)).requires_grad


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twelve pictures in two folders, one of them damaged, and a file that is none."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / f"class{i % 2}" / f"{i:02d}.{'png' if i % 3 else 'JPG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    damaged = root / "class1" / "05.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (root / "readme.txt").write_text("no picture")
    return root


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_of_pictures_becomes_one_file(suffix, dtype, folder, encoder, pictures, tmp_path, capsys):
    output = tmp_path / "new" / f"features{suffix}"
    command = ["--model", str(folder), str(pictures), str(output), "--dtype", dtype, "--batch-size", "5"]
    assert main([*command, "--device", "cpu"]) == 0
    if suffix == ".npz":
        with np.load(output) as file:
            names, features = file["names"].tolist(), file["features"]
            facts = {key: str(file[key]) for key in ("model", "model_sha256", "broken")}
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(output)
        names, features = table["name"].to_pylist(), np.stack(table["features"].to_numpy())
        facts = {key: table.schema.metadata[f"focalclip.{key}".encode()].decode() for key in ("model", "model_sha256")}
        facts["broken"] = table.schema.metadata[b"focalclip.broken"].decode()
    found = sorted(path for path in pictures.rglob("*.*") if path.suffix != ".txt" and path.name != "05.png")
    assert names == [path.relative_to(pictures).as_posix() for path in found]
    expected = torch.stack([encoder.preprocess(Image.open(path)) for path in found])
    assert features.dtype == dtype
    tolerance = {"float32": 1e-5, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(features, encoder(expected).numpy(), rtol=tolerance, atol=tolerance)
    assert facts["model"] == str(folder)
    assert facts["model_sha256"] == weights_sha256(encoder.tower)
    assert "class1/05.png" in facts["broken"]
    out = capsys.readouterr()
    assert re.search(rf"11 pictures, {encoder.num_features} features each, written to .*features", out.out)
    assert "1 other files" in out.out
    assert re.search(r"left out, 1 pictures that cannot be read:\n  class1/05\.png \(", out.err)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out.npz"], "nowhere: no such folder; name a folder of pictures"),
        (["empty", "out.npz"], r"empty: no picture in it \(.jpg,"),
        (["broken", "out.npz"], "broken: none of the 1 pictures can be read"),
        (["empty", "out.csv"], "out.csv: the output is .npz or .parquet"),
        (["empty", "folder.npz"], "OUT folder.npz: is a folder"),
        (["broken", "out.npz", "--device", "warp"], "--device warp: cannot be used"),
        (["broken", "out.npz", "--post-norm"], "post_norm is for files of FocalNet weights alone"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "folder.npz"):
        Path(name).mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    assert main([*arguments, "--model", str(folder)]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.splitlines()[-1].startswith("error: ")
    assert not list(Path().glob("*out*"))
