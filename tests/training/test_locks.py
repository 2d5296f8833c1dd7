"""Locked towers and rates per tower: what is trained, what is not, and how a run with them goes on."""

import shutil

import helpers_run
import pytest
import timm
import torch
from random_weights import randomise
from timm.optim import param_groups_layer_decay
from tiny_shards import write_shards

import focalclip
from focalclip.base.errors import UserError
from focalclip.config import ImageTowerConfig, ModelConfig, OptimConfig, TextTowerConfig, TowerOptimConfig
from focalclip.models.clip import FocalCLIP
from focalclip.models.lock import LockedFeatures, depth_groups, lock_towers
from focalclip.training.optim import create_optimizer, parameter_groups, parts, table

TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 2}
IMAGE = {"name": "focalnet_pico", "image_size": 32, "feature_norm": "batch", "drop_path": 0.2}


def tiny(image=None, text=None):
    torch.manual_seed(1)
    sections = {"image": ImageTowerConfig(**(image or IMAGE)), "text": TextTowerConfig(**TEXT | (text or {}))}
    return FocalCLIP(ModelConfig(embed_dim=16, **sections)).train()


def locked(image=None, text=None):
    model = tiny(image and IMAGE | image, text)
    lock_towers(model)
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.randint(1, 100, (6, 8), generator=generator)


def names(model, trained):
    return {name for name, p in model.named_parameters() if p.requires_grad == trained}


def test_groups_are_those_of_timm_for_a_focalnet_and_for_a_tower_of_timm():
    theirs = timm.create_model("focalnet_tiny_srf", num_classes=0)
    from timm.models._manipulate import group_parameters

    for name, prefix in (("focalnet_tiny_srf", ""), ("timm:focalnet_tiny_srf", "trunk.")):
        groups = depth_groups(tiny({"name": name, "image_size": 32}), "image")
        expected = group_parameters(theirs, theirs.group_matcher(coarse=False))
        assert [sorted(group) for group in groups] == [
            sorted(prefix + parameter for parameter in expected[i]) for i in sorted(expected)
        ]


def test_groups_of_text_are_embeddings_and_blocks():
    groups = depth_groups(tiny(), "text")
    assert len(groups) == 3
    assert set(groups[0]) == {"token_embedding.weight", "positional_embedding"}
    assert {name for name in groups[2] if "resblocks" not in name} == {"ln_final.weight", "ln_final.bias"}
    whole = {name for name, _ in tiny().text.named_parameters()}
    assert whole - {name for group in groups for name in group} == {"text_projection"}


@pytest.mark.parametrize("unlocked", [0, 2])
def test_a_locked_tower_has_no_gradient_no_dropped_path_and_fixed_statistics(unlocked):
    model = locked({"lock": True, "unlocked_groups": unlocked})
    groups = depth_groups(model, "image")
    fixed = {f"visual.trunk.{name}" for group in groups[: len(groups) - unlocked] for name in group}
    assert names(model, trained=False) == fixed
    images, tokens = batch()
    model.train()
    outputs = model(images, tokens)
    (outputs["image"] * outputs["text"]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} - {"logit_scale"} == fixed
    drops = {n: m for n, m in model.visual.trunk.named_modules() if "drop_path" in n and m.rate}
    training = {n for n, m in drops.items() if m.training}
    assert training == {n for n in drops if f"visual.trunk.{n.rpartition('.')[0]}.mlp.fc1.weight" not in fixed}
    assert bool(training) == bool(unlocked)
    if not unlocked:
        assert torch.equal(model.visual.features(images), model.visual.features(images))
        assert not model.visual.features(images).requires_grad


def test_batch_norm_of_a_locked_tower_keeps_its_statistics():
    model = locked({"name": "timm:test_resnet", "image_size": 32, "drop_path": 0.0, "lock": True, "unlocked_groups": 1})
    model.train()
    before = {name: x.clone() for name, x in model.visual.trunk.named_buffers() if "running" in name}
    model(*batch())
    changed = {n for n, x in model.visual.trunk.named_buffers() if "running" in n and not torch.equal(x, before[n])}
    assert changed
    assert all(model.get_parameter(f"visual.trunk.{n.rpartition('.')[0]}.weight").requires_grad for n in changed)
    assert len(changed) < len(before)


def test_no_activation_of_a_locked_tower_is_kept():
    def kept(model):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.visual(batch()[0])
        return total

    whole, last, none = kept(locked()), kept(locked({"lock": True, "unlocked_groups": 1})), kept(locked({"lock": True}))
    assert none < last < whole
    assert none < whole / 100


def test_locked_text_keeps_nothing_and_its_projection_is_trained():
    model = locked(text={"lock": True})
    assert names(model, trained=True) & {n for n, _ in model.named_parameters() if n.startswith("text.")} == {
        "text.text_projection"
    }
    part = locked(text={"lock": True, "unlocked_groups": 1})
    trained = {n for n in names(part, trained=True) if n.startswith("text.")}
    assert all("resblocks.1" in n or "ln_final" in n or "projection" in n for n in trained)


def test_layer_decay_is_that_of_timm_with_the_projection_as_head():
    theirs = timm.create_model("test_vit", num_classes=16, img_size=32)
    scales = {}
    for group in param_groups_layer_decay(theirs, weight_decay=0.2, layer_decay=0.5):
        for parameter in group["params"]:
            scales[id(parameter)] = (group["lr_scale"], group["weight_decay"])
    expected = {name: scales[id(p)] for name, p in theirs.named_parameters()}
    image = {"name": "timm:test_vit", "image_size": 32, "options": {"img_size": 32}}
    model = tiny(image)
    optim = OptimConfig(lr=1e-3, image=TowerOptimConfig(lr=1e-2, weight_decay=0.2, layer_decay=0.5))
    found = {id(p): (g["lr"] / 1e-2, g["weight_decay"]) for g in parameter_groups(model, optim) for p in g["params"]}
    for name, p in model.visual.trunk.trunk.named_parameters():
        assert found[id(p)] == pytest.approx(expected[name]), name
    assert found[id(model.visual.proj.weight)] == pytest.approx(expected["head.weight"])
    assert found[id(model.text.text_projection)] == pytest.approx((0.1, 0.1))
    assert found[id(model.logit_scale)] == pytest.approx((0.1, 0.0))


def test_without_settings_of_towers_there_are_two_groups_in_the_order_of_the_model():
    model = tiny()
    groups = create_optimizer(model, OptimConfig()).param_groups
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    for group, expected in zip(groups, (matrices, vectors), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]


def test_the_table_has_every_parameter_once():
    model = locked({"lock": True, "unlocked_groups": 1}, {})
    config = OptimConfig(lr=1e-3, text=TowerOptimConfig(lr=1e-4, layer_decay=0.1))
    found = [id(p) for part in parts(model, config) for p in part.parameters.values()]
    assert sorted(found) == sorted(map(id, model.parameters()))
    lines = [line.split() for line in table(model, config).splitlines()]
    assert lines[0] == ["parameters", "tensors", "numbers", "lr", "weight", "decay"]
    rows = {tuple(line[: len(line) - (6 if line[-1] == "locked" else 4)]): line for line in lines}
    assert [line[-1] == "locked" for line in lines].count(True) == 1
    assert ["text", "group", "0", "2", "1,581,312", "1e-07", "0.1"] in lines
    assert ["logit_scale", "1", "1", "0.001", "0"] in lines
    assert rows


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ({"lock": True, "unlocked_groups": 9}, {}, r"^model\.image\.unlocked_groups=9: the image tower has 9 groups"),
        ({}, {"lock": True, "unlocked_groups": 3}, r"^model\.text\.unlocked_groups=3: the text tower has 3 groups"),
    ],
)
def test_more_groups_than_there_are_is_one_sentence(image, text, message):
    with pytest.raises(UserError, match=message):
        locked(image, text)


def test_an_optimiser_that_ignores_the_rates_of_towers_is_refused(monkeypatch):
    from focalclip.training.optim import OPTIMIZERS, OptimizerEntry

    monkeypatch.setitem(OPTIMIZERS, "sgd", OptimizerEntry(f"{__name__}:sgd"))
    assert create_optimizer(tiny(), OptimConfig(name="sgd"))
    with pytest.raises(UserError, match=r"^optim\.name=sgd: it does not train image at lr=0\.5, as optim\.image"):
        create_optimizer(tiny(), OptimConfig(name="sgd", image=TowerOptimConfig(lr=0.5)))


def sgd(model, config):
    return torch.optim.SGD(model.parameters(), lr=config.lr)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [24, 24])
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained model as TINY of helpers_run has it, with its feature_norm."""
    torch.manual_seed(0)
    image = ImageTowerConfig(name="focalnet_pico", image_size=32, feature_norm="batch")
    text = TextTowerConfig(**TEXT | {"layers": 1})
    model = randomise(FocalCLIP(ModelConfig(embed_dim=32, image=image, text=text)))
    return focalclip.save(model, tmp_path_factory.mktemp("source") / "model")


LIT = ["--model.image.lock", "--optim.text.lr", "0.002", "--optim.text.layer-decay", "0.7"]


@pytest.mark.parametrize(("zero", "ranks"), [(0, 0), (1, 2), (2, 2), (3, 2)])
def test_locked_weights_stay_bit_for_bit_and_a_run_with_them_resumes(zero, ranks, shards, source, tmp_path):
    args = [*LIT, "--model.image.pretrained", str(source), "--train.zero-stage", str(zero), "--train.save-every", "4"]
    args += ["--train.accumulation", "2"]
    result = helpers_run.run(tmp_path, shards, *args, ranks=ranks)
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith(f"weights image tower: {source}, ") for line in lines)
    assert any(line.startswith("image ") and line.endswith("- - locked") for line in lines)
    run_dir = tmp_path / "runs" / "tiny"
    end, begin = focalclip.load(run_dir), focalclip.load(source)
    assert_equal(end.visual.trunk, begin.visual.trunk)
    assert not torch.equal(end.visual.proj.weight, begin.visual.proj.weight)
    whole = helpers_run.losses(run_dir)

    optimizer = sum(path.stat().st_size for path in (run_dir / "checkpoints" / "step-8").rglob("*.pt"))
    trunk = sum(p.numel() for p in end.visual.trunk.parameters())
    everything = sum(p.numel() for p in end.parameters())
    assert optimizer < 4 * (3.3 * (everything - trunk) + 1.5 * everything), "moments or masters of what is locked"

    shutil.rmtree(run_dir / "checkpoints" / "step-8")
    shutil.rmtree(run_dir / "model")
    again = helpers_run.run(tmp_path, shards, *args, "--resume", ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert helpers_run.losses(run_dir) == whole
    assert_equal(focalclip.load(run_dir), end)


def assert_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_with_locks_goes_on_with_other_ranks(shards, source, tmp_path):
    args = [*LIT, "--model.image.pretrained", str(source), "--model.image.unlocked-groups", "1"]
    args += ["--data.batch-size", "16", "--train.save-every", "4"]
    assert helpers_run.run(tmp_path, shards, *args, ranks=2).returncode == 0
    run_dir = tmp_path / "runs" / "tiny"
    whole, end = helpers_run.losses(run_dir), focalclip.load(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-8")
    shutil.rmtree(run_dir / "model")
    again = helpers_run.run(tmp_path, shards, *args, "--resume")
    assert again.returncode == 0, again.stderr
    assert helpers_run.losses(run_dir)[4:] == pytest.approx(whole[4:], rel=1e-4)
    now = focalclip.load(run_dir).state_dict()
    for name, x in end.state_dict().items():
        torch.testing.assert_close(now[name], x, rtol=1e-3, atol=1e-4, msg=name)
    groups = depth_groups(end, "image")
    begin = focalclip.load(source).visual.trunk.state_dict()
    for name in [name for group in groups[:-1] for name in group]:
        assert torch.equal(now[f"visual.trunk.{name}"], begin[name]), name


def test_a_run_starts_from_another_with_its_own_configuration(shards, tmp_path):
    first = helpers_run.run(tmp_path, shards, "--name", "first", "--train.steps", "3")
    assert first.returncode == 0, first.stderr
    config = str(tmp_path / "runs" / "first" / "config.yaml")
    args = ["--config", config, "--name", "second", "--train.init-from", str(tmp_path / "runs" / "first")]
    second = helpers_run.run(tmp_path, shards, *args, "--model.image.lock", "--train.steps", "3")
    assert second.returncode == 0, second.stderr
    begin, end = (focalclip.load(tmp_path / "runs" / name) for name in ("first", "second"))
    assert_equal(begin.visual.trunk, end.visual.trunk)


def test_locked_random_weights_are_warned_of(shards, tmp_path):
    result = helpers_run.run(tmp_path, shards, "--model.image.lock", "--train.steps", "3")
    assert result.returncode == 0
    assert "model.image.lock: the weights that are locked are random; name trained ones in" in result.stderr


class Counted:
    """A tower that counts what it computes: its features are the sums of its inputs, twice."""

    def __init__(self):
        self.rows = 0

    def __call__(self, inputs):
        self.rows += len(inputs)
        return inputs.flatten(1).sum(1, keepdim=True).repeat(1, 2)


def test_what_a_locked_tower_has_met_is_not_computed_again(tmp_path):
    tower, path = Counted(), tmp_path / "features" / "image-0.bin"
    cache = LockedFeatures(path, 2, limit=3 * (16 + 8 + 4))

    def ask(*numbers):
        rows = torch.tensor(numbers).view(-1, 1).repeat(1, 3)
        cache.announce(rows)
        assert cache(tower, rows.float()).tolist() == [[3.0 * n, 3.0 * n] for n in numbers]

    ask(1, 2, 1)
    assert tower.rows == 2
    ask(2, 3, 1)
    assert tower.rows == 3
    ask(4)
    ask(4)
    assert tower.rows == 5, "what finds no room is computed each time"
    assert (cache.read, cache.computed) == (3, 5)
    path.write_bytes(path.read_bytes()[:-1])  # as a process that was killed leaves it
    cache = LockedFeatures(path, 2, limit=10**6)
    ask(1, 2, 3)
    assert tower.rows == 6
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    cache = LockedFeatures(path, 2, limit=10**6)
    ask(1, 2, 3)
    assert tower.rows == 7
    assert path.stat().st_size == 3 * 28


def test_captions_of_batches_of_any_length_are_one_input(tmp_path):
    model = locked(text={"lock": True}).train()
    model.text_cache = cache = LockedFeatures(tmp_path / "text.bin", 32, limit=10**6)
    short, long = model.tokenizer(["a cat", "dogs"]), model.tokenizer(["a cat", "two dogs in the rain"])
    for tokens, computed in ((short, 2), (long, 3)):
        cache.announce(tokens)
        embeds = model.encode_text(tokens)
        torch.testing.assert_close(embeds, model.eval().encode_text(tokens))
        model.train()
        assert cache.computed == computed
    embeds.sum().backward()
    assert {n for n, p in model.text.named_parameters() if p.grad is not None} == {"text_projection"}


FIXED = ["--data.augment.scale", "1.0", "1.0"]


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_reads_features_that_come_again(ranks, shards, source, tmp_path):
    args = ["--model.image.lock", "--model.image.pretrained", str(source), *FIXED]
    args += ["--model.text.lock", "--model.text.pretrained", str(source)]
    plain = helpers_run.run(tmp_path, shards, *args, "--name", "plain", "--train.feature-cache-gb", "0", ranks=ranks)
    assert plain.returncode == 0, plain.stderr
    assert "features   image: computed at each step, as train.feature_cache_gb is 0" in plain.stdout
    result = helpers_run.run(tmp_path, shards, *args, ranks=ranks)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "runs" / "tiny"
    for tower in ("image", "text"):
        assert f"features   {tower}: kept in {run_dir / 'features'} and not computed again" in result.stdout
    assert not (run_dir / "features").exists()
    assert helpers_run.losses(run_dir) == pytest.approx(helpers_run.losses(tmp_path / "runs" / "plain"), rel=1e-4)


def test_a_run_that_is_stopped_goes_on_with_the_features_it_has(shards, source, tmp_path):
    args = ["--model.image.lock", "--model.image.pretrained", str(source), *FIXED, "--train.steps", "12"]
    whole = helpers_run.run(tmp_path, shards, *args, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    process = helpers_run.start(tmp_path, shards, *args, "--train.log-every", "1")
    run_dir = tmp_path / "runs" / "tiny"
    helpers_run.wait_for_lines(run_dir, 5)
    process.send_signal(15)
    process.communicate(60)
    assert process.returncode in (0, 75)
    if process.returncode == 75:
        assert (run_dir / "features" / "image-0.bin").stat().st_size == 48 * (16 + 4 * 192 + 4)
        again = helpers_run.run(tmp_path, shards, *args, "--resume")
        assert again.returncode == 0, again.stderr
    assert helpers_run.losses(run_dir) == helpers_run.losses(tmp_path / "runs" / "whole")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--data.augment.flip", "0.5"], "data.augment varies the pictures"),
        (["--train.steps", "3", "--optim.warmup-steps", "1"], "each picture comes once"),
        (["--train.zero-stage", "3"], "train.zero_stage is 3, at which all ranks compute together"),
    ],
)
def test_features_are_not_kept_where_that_is_no_use(extra, reason, shards, source, tmp_path):
    args = ["--model.image.lock", "--model.image.pretrained", str(source), *FIXED, *extra]
    result = helpers_run.run(tmp_path, shards, *args)
    assert result.returncode == 0, result.stderr
    assert f"features   image: computed at each step, as {reason}" in result.stdout
