"""The configuration: defaults, files, flags, and one clear line for every mistake."""

import json
import re

import pytest
from conftest import MODEL, ROOT, TINY, run_script

import prepare_data
from longcat_common import KEYS, UserError, buckets, check_precision, config_from_flags, load_config


def message(path=None, **overrides):
    with pytest.raises(ValueError) as error:
        load_config(path, **overrides)
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
        str(file),
        "--gradient_checkpointing",
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
    for words, value in ((["3"], 3), (["0"], 0), (["--seed", "1"], True), (["True"], True)):
        found = config_from_flags("", ["--gradient_checkpointing", *words]).gradient_checkpointing
        assert found == value and type(found) is type(value), "0 and 1 are numbers of blocks"
    assert type(load_config(gradient_checkpointing=1).gradient_checkpointing) is int
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


def test_numbers_in_flags_are_numbers():
    config = config_from_flags(
        "", "--learning_rate .0001 --validation_guidance 4. --validation_lora_strength .5,1 --lora_alpha 8".split()
    )
    assert (config.learning_rate, config.validation_guidance, config.lora_alpha) == (1e-4, 4.0, 8.0)
    assert config.validation_lora_strength == [0.5, 1.0]
    for text in ("1_000", "many", "nan"):
        with pytest.raises(UserError, match=f"lora_rank: found .*{text[:2]}.*, must be a valid integer"):
            config_from_flags("", ["--lora_rank", text])


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"lora_rnk": 8}, ["unknown", "'lora_rnk' (did you mean 'lora_rank'?)"]),
        ({"lora_rank": "8"}, ["lora_rank: found '8', must be a valid integer"]),
        ({"lora_rank": True}, ["lora_rank: found True, must be a valid integer"]),
        ({"LORA_RANK": 8}, ["unknown", "'LORA_RANK' (did you mean 'lora_rank'?)"]),
        ({"\ud83d": 1}, ["unknown keys: '\\\\ud83d'"]),
        ({"lora_rank": 10**30}, ["lora_rank: found 1000", "must be less than or equal to 4096"]),
        ({"data_dir": [{"path": "x", "repeats": 10**30}]}, ["data_dir[0].repeats", "less than or equal to 1000000"]),
        ({"resolution": "64x64000"}, ["resolution: found '64x64000', '64x64000' is no WIDTHxHEIGHT"]),
        ({"lora_rank": 0}, ["lora_rank: found 0, must be greater than or equal to 1"]),
        ({"learning_rate": float("nan")}, ["learning_rate: found nan", "finite"]),
        ({"learning_rate": True}, ["learning_rate: found True, must be a valid number"]),
        ({"lora_alpha": 0}, ["lora_alpha: found 0, must be greater than 0"]),
        ({"torch_compile": "yes"}, ["torch_compile: found 'yes', must be a valid boolean"]),
        ({"offloaded_blocks": -1}, ["offloaded_blocks: found -1, must be greater than or equal to 0"]),
        ({"gradient_checkpointing": "auto"}, ["gradient_checkpointing: found 'auto', must be true, false or a number"]),
        ({"gradient_checkpointing": -1}, ["gradient_checkpointing: found -1, must be true, false or a number"]),
        (
            {"base_model_precision": "int9"},
            ["base_model_precision: found 'int9', must be 'int8-quanto', 'int4-quanto'"],
        ),
        ({"base_model_precision": "int8"}, ["base_model_precision: found 'int8', must be 'int8-quanto'"]),
        ({"optimizer": "sgd"}, ["optimizer: found 'sgd', must be 'adamw' or 'prodigy'"]),
        ({"lr_scheduler": "cosine_with_restarts"}, ["lr_scheduler: found 'cosine_with_restarts', must be 'constant'"]),
        ({"model_family": "flux"}, ["model_family: found 'flux', must be 'longcat_image'"]),
        ({"aspect_bucket_alignment": 100}, ["aspect_bucket_alignment: found 100, must be a multiple of 64"]),
        ({"resolution": "1000"}, ["resolution: found '1000'", "multiples of 64"]),
        ({"resolution": "64000000"}, ["resolution: found '64000000', must be multiples of 64 under 10000"]),
        (
            {"resolution": "1024x1000"},
            ["resolution: found '1024x1000', '1024x1000' is no WIDTHxHEIGHT in multiples of 64"],
        ),
        ({"resolution": None}, ["resolution: found None, must be a valid string"]),
        ({"aspect_bucket_alignment": 192}, ["resolution: found '1024', must be multiples of 192"]),
        ({"validation_resolution": "big"}, ["validation_resolution: found 'big'", "1024x1024"]),
        ({"validation_resolution": "1024x1024,100"}, ["validation_resolution", "'100'", "1024x1024"]),
        (
            {"caption_dropout_probability": 1.5},
            ["caption_dropout_probability: found 1.5, must be less than or equal to 1"],
        ),
        ({"validation_split": 1.0}, ["validation_split: found 1.0, must be less than 1"]),
        (
            {"data_dir": [{"path": "x", "folder": "y"}]},
            ["data_dir[0].folder: found 'y', Extra inputs are not permitted"],
        ),
        ({"data_dir": [{"repeats": 2}]}, ["data_dir[0].path: ", "Field required"]),
        ({"data_dir": [{"path": "x"}, {"path": "x", "repeats": 0}]}, ["data_dir[1].repeats: found 0"]),
        ({"data_dir": 3}, ["data_dir[0]: found 3, must be a valid dictionary"]),
        ({"data_dir": ""}, ["data_dir[0].path: found '', must have at least 1"]),
        ({"lora_target_modules": [1]}, ["lora_target_modules[0]: found 1, must be a valid string"]),
        ({"lora_target_modules": []}, ["lora_target_modules: found [], must have at least 1"]),
        ({"instance_prompt": ""}, ["instance_prompt: found '', must have at least 1"]),
        ({"instance_prompt": "half \ud83d"}, ["instance_prompt: found 'half", "unicode"]),
        ({"trigger_words": ["a", "\ud800"]}, ["trigger_words[1]: found", "unicode"]),
        ({"output_dir": "E:\runs\neon"}, ["output_dir: found 'E:", "control character", "backslash"]),
        ({"data_dir": [{"path": "a\tb"}]}, ["data_dir[0].path", "control character"]),
        ({"validation_seed": []}, ["validation_seed: found [], must have at least 1"]),
        ({"validation_seed": [1, "2"]}, ["validation_seed[1]: found '2', must be a valid integer"]),
        ({"validation_seed": [1, -2]}, ["validation_seed[1]: found -2, must be greater than or equal to 0"]),
        ({"validation_seed": 2**64}, ["validation_seed[0]: found 18446744073709551616, must be less"]),
        ({"validation_lora_strength": [1, "x"]}, ["validation_lora_strength[1]: found 'x', must be a valid number"]),
        (
            {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
            ["learning_rate: found 1e-07, must be more", "polynomial"],
        ),
    ],
)
def test_mistakes_are_named(overrides, words):
    text = message(**overrides)
    assert len(text.splitlines()) == 1 and all(word in text for word in words), text


def test_all_mistakes_are_named_at_once(tmp_path):
    file = tmp_path / "mine.json"
    wrong = {
        "lora_rank": 0,
        "seed": "1",
        "resolution": 1000,
        "data_dir": [{"path": "x", "repeats": "2"}],
        "lora_rnk": 8,
    }
    wrong |= {"lr_scheduler": "polynomial", "learning_rate": 1e-8, "validation_seed": [-1], "nonsense": 1}
    file.write_text(json.dumps(wrong))
    lines = message(file, max_train_steps=1.5).splitlines()
    assert lines[0] == "unknown keys: 'lora_rnk' (did you mean 'lora_rank'?), 'nonsense'; --help lists all"
    named = ["data_dir[0].repeats", "learning_rate", "lora_rank", "max_train_steps", "resolution", "seed"]
    assert sorted(line.split(":")[0] for line in lines[1:]) == [*named, "validation_seed[0]"]


def test_a_key_that_is_set_later_is_checked_too():
    config = load_config()
    config.validation_seed, config.data_dir = 7, "pictures"
    assert config.validation_seed == [7] and config.data_dir[0].path == "pictures"
    for name, value in (("lora_rank", 0), ("lora_rnk", 8)):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)
    assert config.lora_rank == 16


def test_the_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    names = "output_dir", "cache_dir", "init_lora", "lora", "resume_from_checkpoint", "pretrained_model_name_or_path"
    config = load_config(**dict.fromkeys(names, "~/x"), data_dir=[{"path": "~/a"}], validation_prompts="~/prompts.txt")
    assert {getattr(config, name) for name in names} == {f"{tmp_path}/x"} and config.data_dir[0].path == f"{tmp_path}/a"
    assert config.validation_prompts == ["a cat"] and load_config(data_dir="~/b").data_dir[0].path == f"{tmp_path}/b"


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('{\n  "lora_rank": 8\n  "seed": 1\n}')
    assert "bad.json" in message(file) and "line 3" in message(file)
    file.write_text('{"seed": 1, "seed": 2}')
    assert "'seed'" in message(file) and "2 times" in message(file)
    file.write_text("[1]")
    assert "list" in message(file)
    assert "missing.json" in message(tmp_path / "missing.json")


SIMPLETUNERS = """{
    "base_model_precision": "int8-quanto", "attention_mechanism": "native-flash", "checkpoint_step_interval": 10,
    "data_backend_config": "config/examples/multidatabackend-small-dreambooth-512px.json",
    "disable_bucket_pruning": true,
    "flow_schedule_shift": 0, "flow_schedule_auto_shift": true, "gradient_checkpointing": true,
    "hub_model_id": "simpletuner-example-longcat_image-peft-lora", "learning_rate": 1e-4, "lora_alpha": 16,
    "lora_rank": 16,
    "lora_type": "standard", "lr_scheduler": "constant_with_warmup", "max_train_steps": 1000, "mixed_precision": "bf16",
    "model_family": "longcat_image", "model_type": "lora", "num_eval_images": 25, "num_train_epochs": 0,
    "optimizer": "adamw_bf16", "output_dir": "output/examples/longcat-image.peft-lora",
    "push_checkpoints_to_hub": false,
    "push_to_hub": false, "quantize_via": "cpu", "report_to": "none", "seed": 42,
    "tracker_project_name": "lora-training",
    "tracker_run_name": "example-training-run", "train_batch_size": 1, "use_ema": false, "vae_batch_size": 1,
    "validation_disable_unconditional": true, "validation_guidance": 4.0, "validation_guidance_rescale": 0.0,
    "validation_negative_prompt": "ugly, cropped, blurry, low-quality, mediocre average",
    "validation_num_inference_steps": 16,
    "validation_prompt": "\U0001f7eb is holding a sign that says hello world from longcat-image",
    "validation_prompt_library": false, "validation_resolution": "1024x1024", "validation_seed": 42,
    "validation_steps": 50
}"""


def test_simpletuners_own_example_loads_and_what_has_a_counterpart_is_taken(tmp_path, capsys):
    (tmp_path / "config.json").write_text(SIMPLETUNERS, encoding="utf-8")
    config = load_config(tmp_path / "config.json")
    assert config.validation_prompts == ["\U0001f7eb is holding a sign that says hello world from longcat-image"]
    assert (config.validation_step_interval, config.validation_seed, config.lora_alpha) == (50, [42], 16.0)
    assert config.optimizer == "adamw" and load_config(optimizer="AdamW8bit").optimizer == "adamw"
    (line,) = capsys.readouterr().err.splitlines()
    ignored = line.removeprefix("ignored, for they mean nothing here: ").split(", ")
    given = {*json.loads(SIMPLETUNERS)}
    assert set(ignored) == given - KEYS.keys() - {"validation_prompt", "validation_steps"} and len(ignored) == 18


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
    (line,) = capsys.readouterr().err.splitlines()
    names = "data_backend_config, group_offload_blocks_per_group, group_offload_type, lora_type, push_to_hub"
    assert line == f"ignored, for they mean nothing here: {names}"


def test_a_file_of_flags_works_too_and_flags_that_mean_nothing_are_named(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text("""{"--model_family": "longcat_image", "--gradient_checkpointing": "true", "--learning_rate":
    "1e-4", "--lora_rank": 8,
        "--validation_num_inference_steps": "20", "--report_to": "none", "--lycoris_config": "x.json",
        "--validation_prompt": "a cat"}""")
    config = config_from_flags("", [str(file), "--push_to_hub", "true", "--group_offload_use_stream", "--seed", "7"])
    assert (
        config.learning_rate,
        config.lora_rank,
        config.validation_num_inference_steps,
        config.seed,
        config.report_to,
    ) == (1e-4, 8, 20, 7, "none")
    assert config.validation_prompts == ["a cat"]
    assert capsys.readouterr().err.splitlines() == [
        "ignored, for they mean nothing here: group_offload_use_stream, lycoris_config, push_to_hub",
    ]
    file.write_text('{"--lora_rank": "many"}')
    assert "lora_rank" in message(file) and "'many'" in message(file)


def test_two_names_of_one_key_are_refused_and_a_renamed_flag_in_a_file_is_read(tmp_path):
    file = tmp_path / "config.json"
    for text in ('{"checkpointing_steps": 5, "checkpoint_step_interval": 7}', '{"--lora_rank": 8, "lora_rank": 9}'):
        file.write_text(text)
        assert "is there 2 times" in message(file)
    file.write_text('{"--validation_steps": "50"}')
    assert load_config(file).validation_step_interval == 50


def test_flags_without_a_value_leave_the_config_file_alone(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"lora_rank": 5}')
    for words in (["--use_ema"], ["--push_to_hub"], ["--enable_group_offload"], ["--data_backend_config", "x.json"]):
        assert config_from_flags("", [str(file), *words]).lora_rank == 5
    with pytest.raises(UserError, match="unknown keys: 'bogus'.*\nseed: found -1"):
        file.write_text('{"seed": -1}')
        config_from_flags("", [str(file), "--bogus"])


def test_script_prints_one_line_and_exits_with_2():
    done = run_script("train_lora.py", "--lora_rnk", "8", check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown keys: 'lora_rnk' (did you mean 'lora_rank'?); --help lists all"
    done = run_script("train_lora.py", "--lora_rank", "0", "--seed", "x", check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.splitlines() == [
        "error: lora_rank: found 0, must be greater than or equal to 1",
        "error: seed: found 'x', must be a valid integer",
    ]
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


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md", "README.zh.md"])
def test_flags_and_files_that_a_readme_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert {flag for flag in re.findall(r"--(\w+_\w+)", text) if not flag.startswith("nproc")} <= KEYS.keys()
    named = re.findall(r"(?:configs|tests)/[\w/]+\.\w+|\b\w+\.(?:py|ipynb)\b|BENCHMARKS\.md", text)
    assert named and not [path for path in named if not (ROOT / path).exists()]
    assert {path.name for path in (ROOT / "configs").glob("*.json")} <= {
        *re.findall(r"^\| `(\w+\.json)`", text, re.MULTILINE)
    }


def test_help_names_every_key_with_its_default_and_choices(capsys):
    with pytest.raises(SystemExit):
        config_from_flags("What it does.", ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, key in KEYS.items():
        assert f"--{name} " in printed and f"{key.description}" in printed
    assert "one of final, dev" in printed and "[0.0001]" in printed and "--use_ema" not in printed


@pytest.mark.parametrize(
    "words, told",
    [
        (["--lora_rnk", "8", "--nonsense"], "unknown keys: 'lora_rnk' (did you mean 'lora_rank'?), 'nonsense'"),
        (["--lora_rank"], "lora_rank: found True, must be a valid integer"),
        (["--output_dir", "--seed", "1"], "output_dir: found True, must be a valid string"),
        (["--seed", "1", "a.json"], "'a.json' is no flag; write [config.json] [--key value ...]"),
        (["--path", "x"], "unknown keys: 'path'"),
        (["--torch_compile", "no"], "torch_compile: found 'no', must be a valid boolean"),
        (["--gradient_checkpointing", "-1"], "gradient_checkpointing: found -1, must be true, false or a number"),
        (["--gradient_checkpointing", "null"], "gradient_checkpointing: found None, must be true, false or a number"),
        (["a.json", "b.json"], "'b.json' is no flag"),
    ],
)
def test_flags_that_cannot_be_understood_are_named(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        config_from_flags("", words)
