"""A training's arguments: presets and files give what flags do not, mistakes name the nearest flag."""

import dataclasses

import pytest

from aftersam.config import Config, preset, to_dict
from aftersam.files import write_json
from aftersam.training.arguments import TrainArgs, parse


def parsed(argv):
    return parse(argv, TrainArgs, None)


def test_presets_and_limits_on_the_command_line(tmp_path):
    assert parsed(["--data", "d", "--output", "o"]).config.model.image_encoder == "small"
    assert parsed(["--data", "d", "--output", "o", "--sam-checkpoint", "vit_b"]).config == preset("paper")
    minutes = parsed(["--data", "d", "--output", "o", "--max-minutes", "60"]).config.train
    assert (minutes.max_steps, minutes.max_minutes) == (None, 60.0)
    epochs = parsed(["--data", "d", "--output", "o", "--epochs", "3"]).config.train
    assert (epochs.epochs, epochs.max_steps, epochs.max_minutes) == (3, None, None)
    stored = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, seed=7))
    write_json(tmp_path / "config.json", to_dict(stored))
    again = parsed(
        ["--data", "d", "--output", "o", "--config", str(tmp_path / "config.json"), "--batch-size", "3"]
    )
    assert (again.config.train.seed, again.config.train.batch_size) == (7, 3)


@pytest.mark.parametrize(
    ("encoder", "of"), [("tiny", "tiny"), ("small", "small"), ("vit_b", "paper"), ("vit_t", "paper")]
)
def test_a_start_from_a_run_takes_its_model_and_data_and_a_presets_training(tmp_path, encoder, of):
    theirs = dataclasses.replace(
        preset(of),
        model=dataclasses.replace(preset(of).model, image_encoder=encoder, num_blocks=3),
        data=dataclasses.replace(preset(of).data, spacing_mm="median", foreground_sampling=0.5),
        train=dataclasses.replace(preset(of).train, validations=0, max_minutes=2.0, num_workers=7),
    )
    write_json(tmp_path / "config.json", to_dict(theirs))
    write_json(tmp_path / "run.json", {"labels": {"1": "heart"}, "spacing_mm": [2.5, 3.0, 3.0]})
    ours = parsed(["--data", "d", "--output", "o", "--init", str(tmp_path), "--batch-size", "5"]).config
    assert ours.model == theirs.model
    assert ours.data == dataclasses.replace(theirs.data, spacing_mm=(2.5, 3.0, 3.0))
    assert ours.train == dataclasses.replace(preset(of).train, batch_size=5)


def test_a_misspelt_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(["--data", "d", "--output", "o", "--num-slice", "3"])
    assert stop.value.code == 2
    assert "--num-slices" in capsys.readouterr().err


def test_what_only_a_start_from_a_run_sets_is_not_ignored_in_silence(tmp_path):
    with pytest.raises(ValueError, match="--token-shares follow from the organs of --init"):
        parsed(["--data", "d", "--output", "o", "--token-shares", "1", "0.5"])
    stored = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, token_shares=(1.0, 0.5)))
    write_json(tmp_path / "config.json", to_dict(stored))
    assert (
        parsed(["--data", "d", "--output", "o", "--config", str(tmp_path / "config.json")]).config == stored
    )


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}", "--config-file {}", "--config_file={}"])
def test_a_configuration_file_wins_over_a_preset_and_flags_over_both(tmp_path, spelling):
    path = tmp_path / "config.json"
    write_json(path, to_dict(preset("paper")))
    argv = ["--data", "d", "--output", "o", "--preset", "tiny", *spelling.format(path).split(), "--fold", "2"]
    args = parsed(argv)
    assert (args.config, args.config_file, args.fold) == (preset("paper"), path, 2)
    assert parsed([*argv, "--num_blocks", "3"]).config.model.num_blocks == 3
    assert argv[4:6] == ["--preset", "tiny"]  # as they were


def test_a_flag_without_its_value_is_refused(capsys):
    for flag in ("--config", "--preset", "--max-steps"):
        with pytest.raises(SystemExit) as stop:
            parsed(["--data", "d", "--output", "o", flag])
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err
