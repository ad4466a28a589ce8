"""Configuration: presets are valid, JSON round trips, wrong keys are refused by name."""

import dataclasses
import json

import pytest

from aftersam.config import PRESETS, Config, from_dict, preset, to_dict, validate


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = validate(preset(name))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_paper_preset_takes_the_literal_reading():
    config = preset("paper")
    assert (config.model.num_blocks, config.model.num_heads, config.model.num_slices) == (6, 8, 9)
    assert (config.model.image_size, config.model.output_stride, config.model.fusion_weights) == (
        1024,
        4,
        "lora",
    )
    assert config.model.position_embedding == "full"
    assert config.data.spacing_mm == (2.5, 1.0, 1.0)
    assert config.data.augmentation == ("elastic",)
    assert config.data.foreground_sampling == 0
    assert (config.train.optimizer, config.train.learning_rate, config.train.epochs) == ("adam", 1e-4, 550)


def test_every_field_has_help():
    for part in ("model", "data", "train"):
        cls = type(getattr(Config(), part))
        for field in dataclasses.fields(cls):
            assert field.name.isidentifier()
            assert field.default is not dataclasses.MISSING, f"{part}.{field.name} has no default"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"num_slice": 3}}, "num_slices"),
        ({"modell": {}}, "model"),
        ({"model": {"attention": "axail"}}, "axial"),
        ({"model": {"num_slices": 2.5}}, "num_slices"),
        ({"model": {"num_slices": True}}, "num_slices"),
        ({"train": {"learning_rate": "fast"}}, "learning_rate"),
        ({"data": {"spacing_mm": [1.0, 1.0]}}, "spacing_mm"),
        ({"model": 3}, "object"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "image_size", 1000),
        ("model", "num_heads", 7),
        ("model", "num_slices", 0),
        ("model", "output_stride", 3),
        ("model", "stem_slices", 0),
        ("model", "stem_slices", 3),  # vit_b has no stem
        ("model", "stem", "wide"),
        ("model", "hu_windows", ((0.0, 1.0), (0.0, 1.0))),
        ("model", "hu_windows", ((100.0, -100.0),)),
        ("model", "lora_dropout", 1.0),
        ("data", "spacing_mm", (2.5, 0.0, 1.0)),
        ("data", "augmentation_probability", 1.5),
        ("data", "foreground_sampling", -0.1),
        ("train", "batch_size", 0),
        ("train", "learning_rate", float("nan")),
        ("train", "ce_hardest", 0.0),
        ("train", "deep_supervision", -0.5),
    ],
    ids=str,
)
def test_validate_names_the_key(part, key, value):
    config = Config()
    broken = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{key: value})})
    with pytest.raises(ValueError, match=key):
        validate(broken)


def test_a_stem_sees_an_odd_number_of_slices():
    small = preset("small")
    for count in (1, 3, 5):
        validate(dataclasses.replace(small, model=dataclasses.replace(small.model, stem_slices=count)))
    with pytest.raises(ValueError, match="odd"):
        validate(dataclasses.replace(small, model=dataclasses.replace(small.model, stem_slices=2)))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'small'"):
        preset("smal")


def test_fractional_json_integers_become_floats():
    assert from_dict(Config, {"data": {"spacing_mm": [3, 1, 1]}}).data.spacing_mm == (3.0, 1.0, 1.0)
