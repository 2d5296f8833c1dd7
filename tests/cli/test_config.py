"""The strict configuration: every shipped file loads, every typo is an error with its path."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict, dump_yaml, from_dict, load_yaml
from focalclip.cli.settings import with_overrides
from focalclip.config import RunConfig, SourceConfig, config_dir, config_names, load_config
from focalclip.models.clip import FocalCLIP

ROOT = config_dir()


@pytest.mark.parametrize("name", config_names())
def test_every_config_loads_dumps_and_builds_on_the_meta_device(name, tmp_path):
    config = load_config(ROOT / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_yaml(RunConfig, tmp_path / "again.yaml") == config
    with torch.device("meta"):
        model = FocalCLIP(config.model)
    assert model.logit_scale.shape == (1,)
    assert all(p.is_meta for p in model.parameters())


def test_every_config_resolves_to_the_values_on_record():
    """A changed default must not change a shipped configuration unseen; then this record is changed with it."""
    record = json.loads((Path(__file__).parent / "resolved_configs.json").read_text())
    assert {name: load_config(name).model_dump(mode="json") for name in config_names()} == record


@pytest.mark.parametrize("name", config_names())
def test_every_line_of_a_config_changes_something(name, tmp_path):
    whole, path = load_config(name), tmp_path / "without.yaml"
    values = yaml.safe_load((ROOT / f"{name}.yaml").read_text())
    for section, key in list(_leaves(values)):
        kept = section.pop(key)
        path.write_text(yaml.safe_dump(values))
        try:
            assert load_config(path) != whole, key
        except UserError as error:  # a warm-up of 2,000 steps without the 32 epochs
            assert "optim.warmup_steps" in str(error)  # noqa: PT017
        section[key] = kept


def _leaves(values: dict):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield values, key


def test_a_run_directory_has_the_complete_record(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(load_config("focalclip_small_lrf")))
    assert yaml.safe_load(path.read_text()) == load_config("focalclip_small_lrf").model_dump(mode="json")
    assert load_config(path) == load_config("focalclip_small_lrf")


def test_a_config_is_found_by_path_or_name_wherever_one_is(tmp_path, monkeypatch):
    by_path = load_config(ROOT / "focalclip_tiny_lrf.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("focalclip_tiny_lrf") == by_path
    with pytest.raises(
        UserError, match=r"configs/nono\.yaml: no such configuration file; give a path, or one of the names"
    ):
        load_config("configs/nono.yaml")
    (tmp_path / "focalclip_tiny_lrf").write_text("name: mine\n")
    assert load_config("focalclip_tiny_lrf").name == "mine"  # a path is looked at first


def test_an_installed_package_has_its_configs_inside(tmp_path):
    root = ROOT.parent
    assert '"configs" = "focalclip/configs"' in (root / "pyproject.toml").read_text()
    shutil.copytree(root / "focalclip", tmp_path / "focalclip")
    shutil.copytree(ROOT, tmp_path / "focalclip" / "configs")
    code = "from focalclip.cli.pretrain import parse; print(parse(['--config', 'focalclip_small_lrf'])[0].name)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("focalclip_small_lrf", 0), done.stderr


def test_a_base_is_merged_by_section_and_free_options_are_replaced(tmp_path):
    (tmp_path / "below.yaml").write_text(
        "optim: {lr: 0.5, eps: 0.1}\nmodel: {image: {options: {a: 1}, image_size: 64}}\n"
    )
    path = tmp_path / "top.yaml"
    path.write_text("base: below\nname: top\noptim: {lr: 0.25}\nmodel: {image: {options: {b: 2}}}\n")
    config = load_config(path)
    assert (config.name, config.optim.lr, config.optim.eps) == ("top", 0.25, 0.1)
    assert (config.model.image.options, config.model.image.image_size) == ({"b": 2}, 64)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nono", r"top\.yaml: base: nono: no such configuration file"),
        ("5", r"top\.yaml: base: 5 is not the name of a configuration; known are finetune_pico"),
        ("focalclip_small_lrf", r"base: focalclip_small_lrf has a base itself; name focalclip_tiny_lrf"),
    ],
)
def test_a_wrong_base_is_named(base, message, tmp_path):
    (tmp_path / "top.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "top.yaml")


def test_there_is_a_config_for_each_published_size():
    assert {"focalclip_pico", "focalclip_tiny_lrf", "focalclip_small_lrf", "focalclip_base_lrf"} <= set(config_names())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "x.yaml: modle is not a setting; did you mean model?"),
        ({"optim": {"wieght_decay": 1}}, "optim.wieght_decay is not a setting; did you mean weight_decay?"),
        ({"optim": {"lr": "fast"}}, "optim.lr: input should be a valid number"),
        ({"train": {"steps": 1.5}}, "train.steps: input should be a valid integer"),
        ({"train": {"zero_stage": 4, "steps": 1}}, "train.zero_stage: input should be 0, 1, 2 or 3 (got 4)"),
        ({"train": {"steps": True}}, "train.steps: input should be a number (got True)"),
        ({"data": {"train": 5}}, "x.yaml: data.train: input should be a valid string (got 5)"),
        ({"optim": {"betas": [2, 3]}}, "optim: betas=[2.0, 3.0] are no decay rates"),
        ({"seed": 2**63}, "seed: input should be less than"),
        ({"name": ""}, "name: input should not be empty (got '')"),
        ({"train": {"steps": 1, "epochs": 1}}, "train: give exactly one of steps and epochs"),
        ({"model": {"text": {"width": 30, "heads": 4}}}, "model.text: width=30 is not divisible by heads=4"),
    ],
)
def test_a_mistake_names_file_field_and_fault(values, message):
    with pytest.raises(UserError) as error:
        from_dict(RunConfig, values, "x.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.warmup_steps=1800", "warmup_steps=1,800 is not shorter than the run of 1,800 steps"),
        ("optim.warmup_steps=5000", "lower it, or set null for a tenth of the run"),
        ("optim.min_lr=0.01", "min_lr=0.01 is above lr=0.001"),
        ("model.init_logit_scale=14.3", "init_logit_scale=14.3 is a logarithm, .*; ln\\(14.3\\) is 2.66"),
        ("model.init_logit_scale=10", "max_logit_scale=4.6.* is below init_logit_scale=10"),
        ("model.init_logit_scale=-2.66", "not of the temperature"),
        ("model.max_logit_scale=100", "max_logit_scale=100 is a logarithm, .*; ln\\(100\\) is 4.605"),
        ("model.max_logit_scale=2", "max_logit_scale=2 is below init_logit_scale=2.65"),
        ("model.max_logit_scale=-1", "max_logit_scale=-1 is below"),
        ("model.image.std=[0, 0, 0]", "a std above 0"),
        ("model.image.std=[0.2, 0.2, -0.2]", "a std above 0"),
        ("model.image.std=[58.4, 57.1, 57.4]", "divide statistics of pixels from 0 to 255 by 255"),
        ("model.image.mean=[123.7, 116.3, 103.5]", "divide statistics of pixels from 0 to 255 by 255"),
        ("model.embed_dim=0", "model.embed_dim: input should be greater than"),
        ("model.image.image_size=-32", "model.image.image_size: input should be greater than"),
        ("model.text.context_length=1", "model.text.context_length: input should be greater than"),
        ("model.text.heads=0", "model.text.heads: input should be greater than"),
        ("model.image.drop_path=1", "model.image.drop_path: input should be less than 1"),
        ("optim.betas=[0.9, 1]", "are no decay rates"),
        ("optim.eps=0", "optim.eps: input should be greater than 0"),
        ("optim.weight_decay=-0.1", "optim.weight_decay: input should be greater than or equal to 0"),
        ("optim.lr=-0.001", "optim.lr: input should be greater than 0"),
        ("data.augment.flip=1.5", "data.augment.flip: input should be less than or equal to 1"),
        ("data.workers=-1", "data.workers: input should be greater than or equal to 0"),
        ("train.epochs=0", "train.epochs: input should be greater than 0"),
        ("name=", "name: input should not be empty"),
        ("runs_dir= ", "runs_dir: input should not be empty"),
        ("data.train=", "data.train: input should not be empty"),
        ("train.init_from=", "train.init_from: input should not be empty"),
        ("eval.benchmark=", "eval.benchmark: input should not be empty"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(setting, message):
    with pytest.raises(UserError, match=message) as error:
        with_overrides(RunConfig(), [f"--{setting}"])
    assert "\n" not in str(error.value)


def _numbers(section, path=""):
    for name, field in type(section).model_fields.items():
        if isinstance(value := getattr(section, name), Strict):
            yield from _numbers(value, f"{path}{name}.")
        elif "float" in str(field.annotation) or "dict" in str(field.annotation):
            yield f"{path}{name}", value


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "nan", "1e999"])
@pytest.mark.parametrize(("path", "value"), list(_numbers(RunConfig())))
def test_no_setting_takes_a_number_that_is_not_finite(path, value, number):
    free = ".something" if isinstance(value, dict) else ""
    number = number if not free else ".nan"  # the others are text there
    several = [number] * len(value) if isinstance(value, tuple) else [number]
    with pytest.raises(UserError, match=f"{path}.*(finite|valid) number"):
        with_overrides(RunConfig(), [f"--{path}{free}", *several])


@pytest.mark.parametrize(
    ("statistics", "scale"),
    [(([0, 0, 0], [1, 1, 1]), (0, 1)), (([0.5] * 3, [1 / 255] * 3), (math.log(10), math.log(100)))],
)
def test_unusual_settings_that_can_be_meant_are_taken(statistics, scale):
    mean, std = statistics
    values = {"image": {"mean": mean, "std": std}, "init_logit_scale": scale[0], "max_logit_scale": scale[1]}
    assert from_dict(RunConfig, {"model": values}, "x.yaml").model.init_logit_scale == scale[0]
    assert from_dict(RunConfig, {"train": {"steps": 1}, "optim": {"warmup_steps": 1}}, "x").train.steps == 1


@pytest.mark.parametrize(("steps", "warmup"), [(1800, 100), (1000, 100), (500, 50), (5, 0)])
def test_a_warmup_that_is_not_given_fits_the_run(steps, warmup):
    assert RunConfig(train={"steps": steps}).optim.warmup(steps) == warmup


@pytest.mark.parametrize(
    ("argv", "length"),
    [
        (["--train.epochs", "3"], (None, 3.0)),
        (["--train.steps", "9"], (9, None)),
        (["--train.steps", "null", "--train.epochs", "3"], (None, 3.0)),
        ([], (1800, None)),
    ],
)
def test_one_length_switches_the_other_off(argv, length, tmp_path):
    assert _length(with_overrides(load_config("focalclip_pico"), argv)) == length
    if argv:
        assert (
            _length(with_overrides(load_config("focalclip_tiny_lrf"), ["--optim.warmup-steps", "1", *argv])) == length
        )
    values = {
        name.removeprefix("--train."): yaml.safe_load(value) for name, value in zip(argv[::2], argv[1::2], strict=True)
    }
    for base in ({}, {"base": "focalclip_pico"}):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(base | {"train": values | {"log_every": 5}}))
        assert _length(load_config(tmp_path / "x.yaml")) == length


def _length(config):
    return config.train.steps, config.train.epochs


@pytest.mark.parametrize("argv", [["--train.steps", "9", "--train.epochs", "3"], ["--train.steps", "null"]])
def test_two_lengths_or_none_are_refused(argv):
    with pytest.raises(UserError, match="train: give exactly one of steps and epochs"):
        with_overrides(RunConfig(), argv)


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "train-data": "data.train",
        "batch-size": "data.batch_size",
        "b": "data.batch_size",
        "workers": "data.workers",
        "lr": "optim.lr",
        "min-lr": "optim.min_lr",
        "epochs": "train.epochs",
        "warmup": "optim.warmup_steps",
        "warmup-epochs": "optim.warmup_steps",
        "wd": "optim.weight_decay",
        "weight-decay": "optim.weight_decay",
        "beta1": "optim.betas",
        "eps": "optim.eps",
        "clip-grad": "optim.clip_grad_norm",
        "grad-clip-norm": "optim.clip_grad_norm",
        "precision": "train.precision",
        "pretrained": "train.init_from",
        "accum-freq": "train.accumulation",
        "logs": "runs_dir",
        "save-frequency": "train.save_every",
        "img-size": "model.image.image_size",
        "drop-path": "model.image.drop_path",
        "grad-checkpointing": "model.image.activation_checkpointing",
        "zeroshot-frequency": "eval.every",
        "model": "model.image.name",
        "data": "data.train",
        "loss": "loss.name",
        "batchsize": "data.batch_size",
    }.items(),
)
def test_names_of_open_clip_and_timm_lead_to_ours(name, meant):
    with pytest.raises(UserError) as error:
        with_overrides(RunConfig(), [f"--{name}", "1"])
    assert str(error.value).endswith(f"did you mean {meant} (--{meant.replace('_', '-')})?")
    with pytest.raises(UserError) as error:
        from_dict(RunConfig, {name.replace("-", "_"): 1}, "x.yaml")
    assert str(error.value).endswith(f"did you mean {meant}?")


def test_every_name_of_others_leads_to_a_setting_and_is_none_itself():
    for name, meant in RunConfig.other_names.items():
        *sections, field = meant.split(".")
        section = RunConfig()
        for part in sections:
            section = getattr(section, part)
        assert hasattr(section, field), meant
        assert not hasattr(RunConfig(), name) or isinstance(getattr(RunConfig(), name), Strict), name


def test_a_section_that_gets_a_value_names_its_settings():
    with pytest.raises(UserError, match=r"data\.augment is a section of settings, .*it holds scale, ratio, rotate"):
        with_overrides(RunConfig(), ["--data.augment", "strong"])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping")])
def test_a_file_that_is_no_configuration_is_named(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_yaml(RunConfig, tmp_path / "x.yaml")


def test_a_configuration_in_another_encoding_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UserError, match=r"x.yaml: not valid YAML.*utf-8"):
        load_yaml(RunConfig, tmp_path / "x.yaml")


def test_text_stays_text_whatever_was_there_before():
    words = ["--eval.tasks", "7", "--eval.data-root", "no", "--train.init-from", "1e3", "--eval.benchmark", "on"]
    config = with_overrides(RunConfig(), words)
    assert (config.eval.tasks, config.eval.data_root, config.train.init_from) == (["7"], "no", "1e3")
    assert config.eval.benchmark == "on"
    assert with_overrides(config, ["--eval.tasks", "null"]).eval.tasks is None


def test_a_pattern_replaces_a_list():
    base = with_overrides(RunConfig(), ["--data.train", "a.tar", "b.tar"])
    assert with_overrides(base, ["--data.train", "{00..03}.tar"]).data.train == "{00..03}.tar"


@pytest.mark.parametrize(
    "words",
    [
        ["a.tar", "{source: b, weight: 2}"],
        ["[a.tar, {source: b, weight: 2}]"],
        ['["a.tar", {"source": "b", "weight": 2}]'],
    ],
)
def test_sources_with_settings_of_their_own(words):
    with pytest.raises(UserError, match=r"command line: data: train: a\.tar has no weight and others have one"):
        with_overrides(RunConfig(), ["--data.train", *words])
    words = [word.replace(", weight: 2", "").replace(', "weight": 2', "") for word in words]
    config = with_overrides(RunConfig(), ["--data.train", *words])
    assert config.data.train == ["a.tar", SourceConfig(source="b")]
    assert from_dict(RunConfig, yaml.safe_load(dump_yaml(config)), "again") == config


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"source": "a", "waight": 1}], "x: data.train.0.waight is not a setting; did you mean weight?"),
        ([{"source": "a", "augment": {"flp": 1}}], "x: data.train.0.augment.flp is not a setting; did you mean flip?"),
        (
            [{"source": "a", "weight": -1}],
            "x: data.train.0.weight: input should be greater than or equal to 0 (got -1)",
        ),
        ([{"weight": 1}], "x: data.train.0.source: field required"),
        ([3], "x: data.train.0: input should be a valid string (got 3)"),
        ({"source": "a"}, "x: data.train: input should be a source, or a list of sources"),
        (
            [{"source": "a", "templates": ["a dog"]}],
            "x: data: train: a: templates: 'a dog' holds no {c}, where the name",
        ),
        (
            [{"source": "a", "joined_captions": 0.7}],
            "x: data: train: a: first_caption=0.4 and joined_captions=0.7 exceed",
        ),
        ([{"source": "a", "weight": 0}, {"source": "b", "weight": 0}], "x: data: train: all weights are 0; give one"),
    ],
)
def test_mistakes_in_a_list_of_sources(train, message):
    with pytest.raises(UserError) as error:
        from_dict(RunConfig, {"data": {"train": train, "first_caption": 0.4}}, "x")
    assert str(error.value).startswith(message)


def test_overrides_go_on_top_of_the_file():
    config = with_overrides(
        RunConfig(),
        [
            "--optim.lr",
            "5e-4",
            "--name",
            "7",
            "--data.augment.scale",
            "0.5",
            "1.0",
            "--eval.benchmark",
            "null",
            "--model.text.no-causal",
            "--model.image.activation-checkpointing",
            "--data.train",
            "a.tar",
            "b.tar",
            "--train.steps=9",
        ],
    )
    assert config.optim.lr == 5e-4
    assert config.name == "7"
    assert config.data.augment.scale == (0.5, 1.0)
    assert config.eval.benchmark is None
    assert not config.model.text.causal
    assert config.model.image.activation_checkpointing
    assert config.data.train == ["a.tar", "b.tar"]
    assert config.train.steps == 9


@pytest.mark.parametrize("nothing", ["null", "None"])
def test_nothing_is_written_as_in_yaml_or_as_help_shows_it(nothing):
    base = load_config("focalclip_pico")
    assert base.eval.benchmark is not None
    assert with_overrides(base, ["--eval.benchmark", nothing]).eval.benchmark is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["runs"], "'runs' is not understood"),
        (["--optim.lr"], "--optim.lr needs a value"),
        (["--optim.betas", "[0.9"], "optim.betas: input should be 2 values, such as"),
        (["--optim.lr.x", "1"], "lr is a setting, not a section"),
        (["--optm.lr", "1"], "optm is not a setting; did you mean optim?"),
    ],
)
def test_a_wrong_argument_is_named(argv, message):
    with pytest.raises(UserError, match=message):
        with_overrides(RunConfig(), argv)
