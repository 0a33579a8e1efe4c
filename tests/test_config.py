"""The configuration: flags, files, defaults, and one clear line for every mistake."""

import json
import re
import shlex

import pytest
from conftest import ROOT, run_script

from longcat_common import KEYS, UserError, buckets, check_precision, config_from_flags, load_config


def test_a_flag_is_read_as_its_keys_type():
    for words, name, value in (
        ("--learning_rate=.0001", "learning_rate", 1e-4),
        ("--validation_lora_strength .5,1.", "validation_lora_strength", [0.5, 1.0]),
        ("--gradient_checkpointing --seed 1", "gradient_checkpointing", True),
        ("--gradient_checkpointing 1", "gradient_checkpointing", 1),  # a number of blocks
        ('--validation_prompts \'["a", "b"]\'', "validation_prompts", ["a", "b"]),
    ):
        assert repr(getattr(config_from_flags("", shlex.split(words)), name)) == repr(value)


# SimpleTuner's own example for this model holds these, and what we name in the same way.
MEANS_NOTHING = """attention_mechanism data_backend_config disable_bucket_pruning flow_schedule_auto_shift
    flow_schedule_shift hub_model_id lora_type num_eval_images push_checkpoints_to_hub push_to_hub quantize_via
    tracker_project_name tracker_run_name use_ema vae_batch_size validation_disable_unconditional
    validation_guidance_rescale validation_prompt_library""".split()
TAKEN = dict(
    optimizer="adamw_bf16",
    learning_rate=1e-4,
    validation_prompt="says \U0001f7eb",
    validation_steps=50,
)


def test_other_trainers_files_load_and_what_means_nothing_is_said_once(tmp_path, capsys):
    given = TAKEN | dict.fromkeys(MEANS_NOTHING, "x//y") | {"--lora_rank": "8", "seed": 1}
    file = tmp_path / "config.json"
    file.write_text("{// a comment\n" + json.dumps(given)[1:-1] + ', // "another"\n}')
    config = config_from_flags("", [str(file), "--group_offload_use_stream", "--seed", "7"])
    assert (config.optimizer, config.learning_rate, config.lora_rank, config.seed) == (
        "adamw",
        1e-4,
        8,
        7,
    )
    assert (config.validation_prompts, config.validation_step_interval) == (["says \U0001f7eb"], 50)
    (line,) = capsys.readouterr().err.splitlines()
    ignored = sorted([*MEANS_NOTHING, "group_offload_use_stream"])
    assert line == f"ignored, for they mean nothing here: {', '.join(ignored)}"


def test_paths_may_begin_at_home_and_prompts_may_stand_in_a_text_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my prompts.txt").write_text("\ufeffa red fox\n\n  一只猫 \n", encoding="utf-8")
    paths = (
        "output_dir",
        "cache_dir",
        "init_lora",
        "lora",
        "resume_from_checkpoint",
        "pretrained_model_name_or_path",
    )
    config = load_config(
        **dict.fromkeys(paths, "~/x"), data_dir=["~/x"], validation_prompts="~/my prompts.txt"
    )
    assert {*(getattr(config, path) for path in paths), config.data_dir[0].path} == {
        f"{tmp_path}/x"
    }
    assert config.validation_prompts == ["a red fox", "一只猫"]


def test_buckets_are_on_the_grid_about_as_large_as_wanted_and_come_with_their_turned_ones():
    sizes = buckets(load_config(resolution=1024))
    assert (1024, 1024) in sizes and (832, 1216) in sizes
    for width, height in sizes:
        assert (
            width % 64 == height % 64 == 0
            and 0.5 <= width / height <= 2
            and (height, width) in sizes
        )
        assert abs(width * height / 1024**2 - 1) < 0.1
    assert buckets(load_config(resolution="1024x1024, 1344x768")) == [(1024, 1024), (1344, 768)]


@pytest.mark.parametrize(
    "given, told",  # flags, a file, or keys with values; all that stands around ... in the message
    [
        (
            "--lora_rnk 8 --nonsense",
            "unknown keys: 'lora_rnk' (did you mean 'lora_rank'?), 'nonsense'",
        ),
        ("--seed 1 --seed 2", "the key '--seed' is there 2 times; keep one"),
        ("--lora_rank 1_000", "lora_rank: found '1_000', must be a valid integer"),
        ('{\n  "lora_rank": 8\n  "seed": 1\n}', "bad.json: not JSON ... line 3"),
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
            "validation_resolution: ... '100' is no WIDTHxHEIGHT",
        ),
        (
            dict(output_dir="E:\runs\neon"),
            "output_dir: ... control character ... a backslash is written \\\\",
        ),
        (dict(trigger_words=["a", "\ud800"]), "trigger_words[1]: found ... unicode"),
        (
            dict(validation_prompts=f"{ROOT}/configs/tiny.json"),
            "validation_prompts: ... prompts come from a .txt file",
        ),
        (dict(validation_prompts="['a cat']"), "validation_prompts: ... is none; write it as JSON"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy(tmp_path, given, told):
    with pytest.raises(UserError) as error:
        if isinstance(given, dict):
            load_config(**given)
        elif given.startswith("--"):
            config_from_flags("", given.split())
        else:
            (tmp_path / "bad.json").write_text(given)
            load_config(tmp_path / "bad.json")
    (line,) = str(error.value).splitlines()
    assert re.search(".*".join(map(re.escape, told.split(" ... "))), line), line


def test_a_script_prints_all_mistakes_of_file_and_flags_a_line_each_and_exits_with_2(tmp_path):
    (tmp_path / "mine.json").write_text('{"data_dir": [{"path": "x", "repeat": "2"}], "sed": 1}')
    done = run_script(
        "train_lora.py", tmp_path / "mine.json", "--seed", "x", "--bogus", check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    hints = "'data_dir[0].repeat' (did you mean 'repeats'?), 'sed' (did you mean 'seed'?), 'bogus'"
    told = [f"unknown keys: {hints}", "seed: found 'x'"]
    assert [re.split(", must|; ", line)[0] for line in done.stderr.splitlines()] == [
        f"error: {what}" for what in told
    ]


def test_help_has_every_key_and_a_key_that_is_set_later_is_checked_too(capsys):
    with pytest.raises(SystemExit):
        config_from_flags("What it does.", ["--help"])
    printed, config = capsys.readouterr().out, load_config()
    assert all(f"--{name} {key.description}" in printed for name, key in KEYS.items())
    assert "one of final, dev" in printed and "[0.0001]" in printed
    config.validation_seed, config.data_dir = 7, "pictures"
    assert config.validation_seed == [7] and config.data_dir[0].path == "pictures"
    for name, value in (("lora_rank", 0), ("lora_rnk", 8)):
        with pytest.raises(UserError, match=name):
            setattr(config, name, value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem
)
def test_shipped_configs_load_and_fit_their_device(path):
    config = load_config(path)
    check_precision(config, "mps" if path.stem == "mps" else "cpu")
    assert config.output_dir == f"output/{path.stem}" and (
        config.validation_split or path.stem == "tiny"
    )


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md", "README.zh.md"])
def test_flags_and_files_that_a_readme_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert {
        flag for flag in re.findall(r"--(\w+_\w+)", text) if not flag.startswith("nproc")
    } <= KEYS.keys()
    named = re.findall(r"(?:configs|tests)/[\w/]+\.\w+|\b\w+\.(?:py|ipynb)\b|BENCHMARKS\.md", text)
    assert named and not [path for path in named if not (ROOT / path).exists()]
    assert all(f"| `{path.name}` |" in text for path in (ROOT / "configs").glob("*.json"))
