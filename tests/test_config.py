"""The configuration: defaults, files, flags, and one clear line for every mistake."""

import json
import re
from pathlib import Path

import pytest
from conftest import MODEL, ROOT, TINY, run_script

import prepare_data
from longcat_common import ALL_KEYS, KEYS, buckets, check_precision, config_from_flags, load_config


def message(path=None, **overrides):
    with pytest.raises(ValueError) as error:
        load_config(path, **overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_file_flags_and_defaults(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(
        '{\n  // a comment, "quoted"\n  "lora_rank": 8, // why\n  "output_dir": "a//b",\n}', encoding="utf-8"
    )
    config = load_config(file, learning_rate=1)
    assert (config.lora_rank, config.output_dir, config.learning_rate) == (8, "a//b", 1.0)
    assert (config.train_batch_size, config.base_model_precision) == (1, "int8-quanto")
    flags = [
        "--gradient_checkpointing",
        str(file),
        "--lora_rank",
        "4",
        "--resolution",
        "512x512",
        "--validation_prompts",
        '["a", "b"]',
    ]
    config = config_from_flags("", flags)
    assert (config.lora_rank, config.output_dir, config.gradient_checkpointing) == (4, "a//b", True)
    assert config.validation_prompts == ["a", "b"]
    for words, value in ((["auto"], "auto"), (["--seed", "1"], True), (["True"], True)):
        assert config_from_flags("", ["--gradient_checkpointing", *words]).gradient_checkpointing == value
    for word in ("false", "False"):
        assert config_from_flags("", ["--gradient_checkpointing", word]).gradient_checkpointing is False
    assert config_from_flags("", ["--validation_prompts", "a red fox"]).validation_prompts == ["a red fox"]
    assert config_from_flags("", ["--validation_prompts", "42"]).validation_prompts == ["42"]
    assert config_from_flags(
        "", ["--validation_seed", "1,2", "--validation_lora_strength", "0.5, 1.0"]
    ).validation_seed == [1, 2]
    config.lora_target_modules.append("x")
    assert "x" not in load_config().lora_target_modules
    assert config_from_flags("", ["--output_dir", "123", "--instance_prompt", "null"]).output_dir == "123"


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"lora_rnk": 8}, ["lora_rnk", "did you mean 'lora_rank'"]),
        ({"lora_rank": "8"}, ["lora_rank", "'8'", "whole number"]),
        ({"lora_rank": True}, ["lora_rank", "True", "whole number"]),
        ({"lora_rank": 0}, ["lora_rank", "0", "1 or more"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"base_model_precision": "int9"}, ["base_model_precision", "int9", "int8-quanto"]),
        ({"aspect_bucket_alignment": 32}, ["aspect_bucket_alignment", "32", "64"]),
        ({"resolution": "1000"}, ["resolution", "1000", "multiple of 64"]),
        ({"resolution": "64000000"}, ["resolution", "64000000", "up to 8192"]),
        ({"resolution": "1024x1000"}, ["resolution", "1024x1000", "multiples of 64"]),
        ({"validation_resolution": "big"}, ["validation_resolution", "big", "1024x1024"]),
        ({"caption_dropout_probability": 1.5}, ["caption_dropout_probability", "1.5", "0 up to 1"]),
        ({"data_dir": [{"folder": "x"}]}, ["data_dir", "folder", "path"]),
        ({"data_dir": [{"path": "x", "repeats": 0}]}, ["data_dir", "repeats 0", "'x'"]),
        ({"lora_target_modules": [1]}, ["lora_target_modules", "list of texts"]),
        ({"lora_target_modules": []}, ["lora_target_modules", "empty"]),
        ({"data_dir": ""}, ["data_dir", "empty"]),
        (
            {"enable_group_offload": True, "gradient_checkpointing": False},
            ["gradient_checkpointing", "enable_group_offload"],
        ),
        ({"validation_split": 1.0}, ["validation_split", "1.0", "below 1"]),
        ({"validation_seed": [1, "2"]}, ["validation_seed", "list of whole numbers"]),
        ({"validation_seed": [1, -2]}, ["validation_seed", "[1, -2]", "0 or more"]),
        ({"validation_seed": 2**64}, ["validation_seed", "less than 2^63"]),
        ({"validation_lora_strength": [1, "x"]}, ["validation_lora_strength", "list of numbers"]),
        ({"validation_resolution": "1024x1024,100"}, ["validation_resolution", "'100'", "1024x1024"]),
    ],
)
def test_mistakes_are_named(overrides, words):
    text = message(**overrides)
    assert all(word in text for word in words), text


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('{\n  "lora_rank": 8\n  "seed": 1\n}')
    assert "bad.json" in message(file) and "line 3" in message(file)
    file.write_text('{"seed": 1, "seed": 2}')
    assert "'seed'" in message(file) and "2 times" in message(file)
    file.write_text("[1]")
    assert "list" in message(file)
    assert "missing.json" in message(tmp_path / "missing.json")


def test_keys_of_other_trainers_are_named_and_ignored(capsys):
    load_config(data_backend_config="x.json")
    assert "data_backend_config" in capsys.readouterr().err


GUIDE = """{
  "model_type": "lora",
  "model_family": "longcat_image",
  "model_flavour": "final",                // or dev
  "pretrained_model_name_or_path": null,   // by flavour, or a local path
  "base_model_precision": "int8-quanto",   // fp8-torchao as well
  "train_batch_size": 1,
  "gradient_checkpointing": true,
  "lora_rank": 16,
  "learning_rate": 1e-4,
  "validation_resolution": "1024x1024",
  "validation_guidance": 4.5,
  "validation_num_inference_steps": 30,
  "lora_type": "standard",
  "data_backend_config": "config/multidatabackend.json",
  "push_to_hub": false,
  "optimizer": "adamw_bf16"
}
"""


def test_a_config_of_the_quick_start_guide_works_as_it_is(tmp_path, capsys):
    (tmp_path / "config.json").write_text(GUIDE)
    flags = "--enable_group_offload --group_offload_type block_level --group_offload_blocks_per_group 1".split()
    config = config_from_flags("", [str(tmp_path / "config.json"), *flags])
    assert (
        config.learning_rate,
        config.validation_guidance,
        config.enable_group_offload,
        config.pretrained_model_name_or_path,
    ) == (1e-4, 4.5, True, None)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["lora_type", "data_backend_config", "push_to_hub", "optimizer"]
    assert "ignored: data_backend_config (use data_dir)" in said


def test_a_file_of_flags_works_too_and_flags_that_mean_nothing_are_named(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text("""{"--model_family": "longcat_image", "--gradient_checkpointing": "true", "--learning_rate": "1e-4", "--lora_rank": 8,
        "--validation_num_inference_steps": "20", "--report_to": "wandb", "--lycoris_config": "x.json", "--validation_prompt": "a cat"}""")
    config = config_from_flags("", [str(file), "--push_to_hub", "true", "--group_offload_use_stream", "--seed", "7"])
    assert (
        config.learning_rate,
        config.lora_rank,
        config.validation_num_inference_steps,
        config.seed,
        config.report_to,
    ) == (1e-4, 8, 20, 7, "tensorboard")
    said = capsys.readouterr().err
    for words in (
        "report_to: wandb is not here",
        "lycoris_config (",
        "validation_prompt (use validation_prompts)",
        "push_to_hub (",
        "group_offload_use_stream (",
    ):
        assert said.count(words) == 1, said
    file.write_text('{"--lora_rank": "many"}')
    assert "lora_rank" in message(file) and "'many'" in message(file)


def test_script_prints_one_line_and_exits_with_2():
    done = run_script("train_lora.py", "--lora_rnk", "8", check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown key 'lora_rnk'; did you mean 'lora_rank'?"
    with pytest.raises(ValueError, match="README.md/manifest.jsonl: cannot be written"):
        prepare_data.main(
            load_config(
                data_dir=str(TINY / "pictures"), output_dir=str(ROOT / "README.md"), pretrained_model_name_or_path=MODEL
            )
        )
    done = run_script("prepare_data.py", "--data_dir", "no/such/folder", check=False)
    assert (done.returncode, done.stderr.strip()) == (2, "error: data_dir: no/such/folder is no folder")


def test_buckets():
    sizes = buckets(load_config(resolution=1024))
    assert (1024, 1024) in sizes and (832, 1216) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and 0.5 <= width / height <= 2 and (height, width) in sizes
        assert abs(width * height / 1024**2 - 1) < 0.1
    assert buckets(load_config(resolution="1024x1024, 1344x768")) == [(1024, 1024), (1344, 768)]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_fit_their_device(path):
    config = load_config(path)
    check_precision(config, "mps" if path.stem == "mps" else "cpu")
    if path.stem != "tiny":
        assert (
            config.output_dir == f"output/{path.stem}"
            and config.validation_split
            and config.checkpoint_step_interval <= 250
        )
        assert f"`{path.name}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_table_is_the_keys():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name: help for name, help, _ in rows} == {name: key.help for name, key in ALL_KEYS.items()}
    assert len(rows) == sum(map(len, KEYS.values()))
    defaults = {name: default for name, _, default in rows if name != "lora_target_modules"}
    assert defaults == {
        name: json.dumps(key.default) for name, key in ALL_KEYS.items() if name != "lora_target_modules"
    }
    assert Path(ROOT / "LICENSE").exists()
