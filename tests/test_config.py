"""The configuration: flags, files, defaults, and one line for every error."""

import json
import re
import shlex

import pytest
from conftest import ROOT, run_script

import train_lora
from longcat_common import KEYS, UserError, buckets, check_precision, config_from_flags, load_config

# ---------------------------------------------------------------- flags and files


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        ("--learning_rate=.0001", "learning_rate", 1e-4),
        ("--validation_lora_strength .5,1.", "validation_lora_strength", [0.5, 1.0]),
        ("--gradient_checkpointing --seed 1", "gradient_checkpointing", True),
        ("--gradient_checkpointing 1", "gradient_checkpointing", 1),  # a number of blocks
        ('--validation_prompts \'["a", "b"]\'', "validation_prompts", ["a", "b"]),
        ("--trigger_words neonix,zumi", "trigger_words", ["neonix", "zumi"]),
        ("--trigger_words 霓虹，祖米", "trigger_words", ["霓虹", "祖米"]),
        ('--trigger_words \'["a, b", "c"]\'', "trigger_words", ["a, b", "c"]),
        (
            "--lora_target_modules attn.to_q,proj_out",
            "lora_target_modules",
            ["attn.to_q", "proj_out"],
        ),
        ("--validation_prompts 'a cat, asleep'", "validation_prompts", ["a cat, asleep"]),
    ],
)
def test_a_flag_is_parsed_as_the_type_of_its_key(arguments, key, value):
    config = config_from_flags("", shlex.split(arguments))
    assert repr(getattr(config, key)) == repr(value)


# From SimpleTuner's example for this model: keys that have no effect here, and keys that we share.
IGNORED_KEYS = """
    attention_mechanism data_backend_config disable_bucket_pruning flow_schedule_auto_shift
    flow_schedule_shift hub_model_id lora_type num_eval_images push_checkpoints_to_hub push_to_hub
    quantize_via tracker_project_name tracker_run_name use_ema vae_batch_size
    validation_disable_unconditional validation_guidance_rescale validation_prompt_library
""".split()
SHARED_KEYS = dict(
    optimizer="adamw_bf16",
    learning_rate=1e-4,
    validation_prompt="says \U0001f7eb",
    validation_steps=50,
)


@pytest.fixture
def other_trainers_file(tmp_path):
    """A config file with keys of another trainer, comments and a trailing comma."""
    values = SHARED_KEYS | dict.fromkeys(IGNORED_KEYS, "x//y") | {"--lora_rank": "8", "seed": 1}
    file = tmp_path / "config.json"
    file.write_text("{// a comment\n" + json.dumps(values)[1:-1] + ', // "another"\n}')
    return file


def test_files_of_other_trainers_load(other_trainers_file):
    config = config_from_flags("", [str(other_trainers_file), "--seed", "7"])
    assert config.optimizer == "adamw"
    assert config.learning_rate == 1e-4
    assert config.lora_rank == 8
    assert config.seed == 7
    assert config.validation_prompts == ["says \U0001f7eb"]
    assert config.validation_step_interval == 50


def test_ignored_keys_are_listed_once(other_trainers_file, capsys):
    config_from_flags("", [str(other_trainers_file), "--group_offload_use_stream", "--seed", "7"])
    (line,) = capsys.readouterr().err.splitlines()
    ignored = sorted([*IGNORED_KEYS, "group_offload_use_stream"])
    assert line == f"ignoring keys that have no effect here: {', '.join(ignored)}"


EMPTY = dict.fromkeys(KEYS, "")
NULL = dict.fromkeys(KEYS)
UNSET_KEYS = [
    (EMPTY, {}),
    (NULL, {}),
    ({f"--{key}": " " for key in KEYS}, {}),
    ({"--num_train_epochs": "1", "--max_train_steps": 0}, {"num_train_epochs": 1}),
    ({"--num_train_epochs": 2, "--max_train_steps": "0"}, {"num_train_epochs": 2}),
    ({"num_train_epochs": 0, "max_train_steps": 7}, {"max_train_steps": 7}),
    ({"lora_alpha": 0, "lora_rank": 8}, {"lora_rank": 8}),
    ({"validation_steps": "", "validation_step_interval": 5}, {"validation_step_interval": 5}),
    ({"trigger_words": ["", "zumi"]}, {"trigger_words": ["zumi"]}),
]


@pytest.mark.parametrize("values, expected", UNSET_KEYS)
def test_what_forms_write_for_not_set_is_not_set(tmp_path, values, expected):
    (tmp_path / "form.json").write_text(json.dumps(values))
    for config in (load_config(**values), load_config(tmp_path / "form.json")):
        assert config == load_config(**expected)


def test_a_flag_without_content_takes_back_what_the_file_sets(tmp_path):
    (tmp_path / "mine.json").write_text('{"seed": 7, "max_train_steps": 0, "lora_rank": 8}')
    flags = ["--seed=", "--num_train_epochs", "3"]
    config = config_from_flags("", [str(tmp_path / "mine.json"), *flags])
    assert config == load_config(num_train_epochs=3, lora_rank=8)


def test_tilde_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path_keys = (
        "output_dir",
        "cache_dir",
        "init_lora",
        "lora",
        "resume_from_checkpoint",
        "pretrained_model_name_or_path",
    )
    config = load_config(**dict.fromkeys(path_keys, "~/x"), data_dir=["~/x"])
    paths = {getattr(config, key) for key in path_keys} | {config.data_dir[0].path}
    assert paths == {"/home/me/x"}


def test_prompts_can_be_read_from_a_text_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my prompts.txt").write_text("\ufeffa red fox\n\n  一只猫 \n", encoding="utf-8")
    config = load_config(validation_prompts="~/my prompts.txt")
    assert config.validation_prompts == ["a red fox", "一只猫"]


# ---------------------------------------------------------------- buckets


def test_buckets_are_on_the_grid_and_of_about_the_target_area_in_both_orientations():
    sizes = buckets(load_config(resolution=1024))
    assert (1024, 1024) in sizes and (832, 1216) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.5 <= width / height <= 2
        assert (height, width) in sizes
        assert abs(width * height / 1024**2 - 1) < 0.1


def test_buckets_can_be_listed():
    assert buckets(load_config(resolution="1024x1024, 1344x768")) == [(1024, 1024), (1344, 768)]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "given, message",  # flags, a file, or keys with values; ... in the message stands for any text
    [
        (
            "--lora_rnk 8 --nonsense",
            "unknown keys: 'lora_rnk' (did you mean 'lora_rank'?), 'nonsense'",
        ),
        ("--seed 1 --seed 2", "the key '--seed' appears 2 times; keep one"),
        ("--lora_rank 1_000", "lora_rank: found '1_000', must be a valid integer"),
        ('{\n  "lora_rank": 8\n  "seed": 1\n}', "bad.json: invalid JSON ... line 3"),
        (dict(max_train_steps=0), "max_train_steps: found 0, must be greater"),
        (dict(max_train_steps=0, num_train_epochs=""), "max_train_steps: found 0, must be greater"),
        (dict(sed=""), "unknown keys: 'sed' (did you mean 'seed'?)"),
        (dict(lora_rank=True), "lora_rank: found True, must be a valid integer"),
        (dict(learning_rate=float("nan")), "learning_rate: found nan ... finite"),
        (
            dict(learning_rate=1e-7, lr_scheduler="polynomial"),
            "learning_rate: found 1e-07 ... more ... polynomial",
        ),
        (
            dict(gradient_checkpointing=-1),
            "gradient_checkpointing: found -1, must be true, false or a number",
        ),
        (
            dict(lr_scheduler="cosine_with_restarts"),
            "lr_scheduler: found 'cosine_with_restarts', must be 'constant'",
        ),
        (
            dict(validation_resolution="1024x1024,100"),
            "validation_resolution: ... '100' is not WIDTHxHEIGHT",
        ),
        (
            dict(output_dir="E:\runs\neon"),
            "output_dir: ... control character ... write a backslash as \\\\",
        ),
        (dict(trigger_words=["a", "\ud800"]), "trigger_words[1]: found ... unicode"),
        (
            dict(validation_prompts=f"{ROOT}/configs/tiny.json"),
            "validation_prompts: ... prompts can only be read from a .txt file",
        ),
        (
            dict(validation_prompts="['a cat']"),
            "validation_prompts: ... is not a JSON list; use double quotes",
        ),
    ],
)
def test_an_error_is_one_line_with_key_value_and_remedy(tmp_path, given, message):
    with pytest.raises(UserError) as error:
        if isinstance(given, dict):
            load_config(**given)
        elif given.startswith("--"):
            config_from_flags("", given.split())
        else:
            (tmp_path / "bad.json").write_text(given)
            load_config(tmp_path / "bad.json")
    (line,) = str(error.value).splitlines()
    pattern = ".*".join(re.escape(part) for part in message.split(" ... "))
    assert re.search(pattern, line), line


def test_a_script_prints_all_errors_of_file_and_flags_one_per_line_and_exits_with_2(tmp_path):
    (tmp_path / "mine.json").write_text('{"data_dir": [{"path": "x", "repeat": "2"}], "sed": 1}')
    flags = ["--seed", "x", "--bogus"]
    process = run_script("train_lora.py", tmp_path / "mine.json", *flags, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    hints = "'data_dir[0].repeat' (did you mean 'repeats'?), 'sed' (did you mean 'seed'?), 'bogus'"
    beginnings = [re.split(", must|; ", line)[0] for line in process.stderr.splitlines()]
    assert beginnings == [f"error: unknown keys: {hints}", "error: seed: found 'x'"]


def test_a_value_that_is_set_later_is_checked_too():
    config = load_config()
    config.validation_seed = 7
    config.data_dir = "images"
    assert config.validation_seed == [7] and config.data_dir[0].path == "images"
    with pytest.raises(UserError, match="lora_rank"):
        config.lora_rank = 0
    with pytest.raises(UserError, match="lora_rnk"):
        config.lora_rnk = 8


# ---------------------------------------------------------------- help, configs and READMEs


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        config_from_flags("What it does.", ["--help"])
    printed = capsys.readouterr().out
    for name, key in KEYS.items():
        assert f"--{name} {key.description}" in printed
    assert "one of final, dev" in printed and "[0.0001]" in printed


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem
)
def test_shipped_configs_load_and_suit_their_device(path):
    config = load_config(path)
    check_precision(config, "mps" if path.stem == "mps" else "cpu")
    assert config.output_dir == f"output/{path.stem}"
    assert config.validation_split or path.stem == "tiny"


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md", "README.zh.md"])
def test_flags_in_a_readme_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    flags = {flag for flag in re.findall(r"--(\w+_\w+)", text) if not flag.startswith("nproc")}
    assert flags <= KEYS.keys()


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md", "README.zh.md"])
def test_files_in_a_readme_exist_and_every_config_is_listed(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"(?:configs|tests)/[\w/]+\.\w+|\b\w+\.(?:py|ipynb)\b|BENCHMARKS\.md", text)
    assert paths and not [path for path in paths if not (ROOT / path).exists()]
    for path in (ROOT / "configs").glob("*.json"):
        assert f"| `{path.name}` |" in text


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md", "README.zh.md"])
def test_a_readme_runs_the_copied_config_and_agrees_with_the_model_card(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for script in ("prepare_data", "train_lora", "validate"):
        assert f"python {script}.py my.json" in text
    assert "prepare_data.py configs" not in text and "validate.py configs" not in text
    assert "*LoraLoaderModelOnly*" in text
    assert "LoraLoaderModelOnly" in train_lora.model_card(load_config())
