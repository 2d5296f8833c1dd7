"""The strict configuration: every shipped file loads, every typo is an error with its path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from focalclip.base.errors import UserError
from focalclip.base.strict import dump_yaml, from_dict, load_yaml
from focalclip.cli.settings import with_overrides
from focalclip.config import RunConfig, config_dir, config_names, load_config
from focalclip.models.clip import create_model

ROOT = config_dir()


@pytest.mark.parametrize("name", config_names())
def test_every_config_loads_dumps_and_builds_on_the_meta_device(name, tmp_path):
    config = load_config(ROOT / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_yaml(RunConfig, tmp_path / "again.yaml") == config
    with torch.device("meta"):
        model = create_model(config.model)
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
        except UserError as error:
            assert "give exactly one of steps and epochs" in str(error)  # noqa: PT017
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
        ({"name": ""}, "name='' is not the name of one folder"),
        ({"train": {"steps": 1, "epochs": 1}}, "train: give exactly one of steps and epochs"),
        ({"model": {"text": {"width": 30, "heads": 4}}}, "model.text: width=30 is not divisible by heads=4"),
    ],
)
def test_a_mistake_names_file_field_and_fault(values, message):
    with pytest.raises(UserError) as error:
        from_dict(RunConfig, values, "x.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping")])
def test_a_file_that_is_no_configuration_is_named(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_yaml(RunConfig, tmp_path / "x.yaml")


def test_a_configuration_in_another_encoding_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UserError, match=r"x.yaml: not valid YAML.*utf-8"):
        load_yaml(RunConfig, tmp_path / "x.yaml")


def test_a_pattern_replaces_a_list():
    base = with_overrides(RunConfig(), ["--data.train", "a.tar", "b.tar"])
    assert with_overrides(base, ["--data.train", "{00..03}.tar"]).data.train == "{00..03}.tar"


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
        (["--optim.betas", "[0.9"], "optim.betas: input should be a valid tuple"),
        (["--optim.lr.x", "1"], "lr is a setting, not a section"),
        (["--optm.lr", "1"], "optm is not a setting; did you mean optim?"),
    ],
)
def test_a_wrong_argument_is_named(argv, message):
    with pytest.raises(UserError, match=message):
        with_overrides(RunConfig(), argv)
