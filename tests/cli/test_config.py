"""The strict configuration: every shipped file loads, every typo is an error with its path."""

import pytest
import torch
import yaml

from focalclip.base.errors import UserError
from focalclip.base.strict import dump_yaml, from_dict, load_yaml
from focalclip.cli.settings import with_overrides
from focalclip.config import RunConfig, config_dir, config_names
from focalclip.models.clip import create_model

ROOT = config_dir()


@pytest.mark.parametrize("name", config_names())
def test_every_config_loads_dumps_and_builds_on_the_meta_device(name, tmp_path):
    config = load_yaml(RunConfig, ROOT / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_yaml(RunConfig, tmp_path / "again.yaml") == config
    with torch.device("meta"):
        model = create_model(config.model)
    assert model.logit_scale.shape == (1,)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", config_names())
def test_every_config_states_every_setting(name):
    path = ROOT / f"{name}.yaml"
    assert _keys(yaml.safe_load(path.read_text())) == _keys(load_yaml(RunConfig, path).model_dump())


def _keys(values: dict) -> dict:
    return {key: _keys(value) if isinstance(value, dict) else None for key, value in values.items()}


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
    base = load_yaml(RunConfig, config_dir() / "focalclip_pico.yaml")
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
