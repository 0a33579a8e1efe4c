"""Training that is killed, stopped, starved or given other data goes on, and nothing is lost."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MODEL, REFERENCE, ROOT, made_up, sha256, start_script
from safetensors.torch import load_file, save_file
from test_cache import cached_files

import cache_latents
import prepare_data
import train_lora
from longcat_common import load_config, write_file

NAMES = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"]


def lora_bytes(config):
    """A hash of the bytes of each of the run's LoRA files."""
    return [sha256(Path(config.output_dir) / name) for name in NAMES]


def checkpoints(config):
    return [folder.name for folder in train_lora.checkpoint_folders(config)]


def metrics(config):
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def flags(config):
    """The command line that says the same."""
    words = []
    for name, value in config.model_dump().items():
        if value != getattr(load_config(), name):
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def wait_for(process, condition):
    while not condition():
        assert process.is_alive(), "it ended before it could be disturbed"
        time.sleep(0.002)


# ---------------------------------------------------------------- killed and resumed


def test_resumed_from_any_step_it_ends_with_the_same_bytes(quick_config, reference_run, tmp_path):
    config, settings = reference_run, REFERENCE
    expected = lora_bytes(config)
    states = [json.loads((folder / "state.json").read_text()) for folder in train_lora.checkpoint_folders(config)]
    assert [(state["step"], state["taken"]) for state in states] == [(1, 3), (2, 6), (3, 9)]
    assert len(states[0]["held_out"]) == 1
    bases = [line["held_out_base"] for line in metrics(config) if "held_out_base" in line]
    assert len(bases) == 3 and len(set(bases)) == 1  # the same noise at every scoring
    for done in (0, 2):
        other = quick_config(**settings, output_dir=str(tmp_path / f"resumed-{done}"))
        shutil.copytree(config.output_dir, other.output_dir)
        (Path(other.output_dir) / "pytorch_lora_weights.safetensors").unlink()
        for folder in train_lora.checkpoint_folders(other)[done:]:
            shutil.rmtree(folder)
        train_lora.main(other)
        assert lora_bytes(other) == expected, f"resumed from step {done}"
        assert [line["step"] for line in metrics(other) if "loss" in line] == [3]
        ours, theirs = ([line for line in metrics(run) if "held_out_loss" in line][-1] for run in (other, config))
        assert ours == theirs and ours["held_out_loss"] < ours["held_out_base"]
    # Another seed is another LoRA: the comparison can fail.
    other = quick_config(**{**settings, "max_train_steps": 1}, output_dir=str(tmp_path / "other"), seed=43)
    train_lora.main(other)
    assert lora_bytes(other)[0] != sha256(Path(config.output_dir) / "checkpoints/step-000001" / NAMES[0])


def test_killed_in_every_stage(quick_config, tmp_path):
    config = quick_config(cache_dir=str(tmp_path / "whole_cache"))
    train_lora.main(config)
    other = quick_config(output_dir=str(tmp_path / "killed"), cache_dir=str(tmp_path / "killed_cache"))
    output, cache, log = Path(other.output_dir), Path(other.cache_dir), tmp_path / "log"
    for reached in (
        lambda: any(output.glob(".*.tmp")) or (output / "preview.jpg").exists(),  # while data are prepared
        lambda: len(list((cache / "latents").rglob("*.safetensors"))) >= 3,  # while latents are cached
        lambda: (output / "checkpoints" / "step-000002").exists(),  # while it trains
    ):
        process = start_script(log, "train_lora.py", *flags(other))
        wait_for(process, reached)
        process.kill()
        process.join()
        assert not (output / NAMES[0]).exists()
    process = start_script(log, "train_lora.py", *flags(other))
    process.join()
    assert process.exitcode == 0 and "resumed from" in log.read_text()
    assert lora_bytes(other) == lora_bytes(config)


@pytest.mark.slow
def test_twenty_kills_at_random_steps(quick_config, tmp_path):
    settings = dict(
        max_train_steps=12,
        gradient_accumulation_steps=2,
        validation_split=0.2,
        validation_step_interval=5,
        lora_dropout=0.1,
    )
    whole = quick_config(**settings, cache_dir=str(tmp_path / "whole_cache"))
    train_lora.main(whole)
    kills, rng, log, places = 0, random.Random(5), tmp_path / "log", set()
    for round_number in range(7):
        other = quick_config(
            **settings,
            output_dir=str(tmp_path / f"killed-{round_number}"),
            cache_dir=str(tmp_path / f"killed_cache-{round_number}"),
        )
        manifest = Path(other.output_dir) / "manifest.jsonl"
        # Three steps a run, drawn at random: each time it dies somewhere in the half second after that step's
        # checkpoint.
        for step in sorted(rng.sample(range(11), 3)):
            process = start_script(log, "train_lora.py", *flags(other))
            wait_for(process, lambda: len(checkpoints(other)) >= step if step else manifest.exists())
            process.join(0.5 * rng.random())
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            places.add(len(checkpoints(other)))
        process = start_script(log, "train_lora.py", *flags(other))
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
        assert lora_bytes(other) == lora_bytes(whole)
        for folder in ("checkpoints/step-000012", "validation"):
            for path in (Path(whole.output_dir) / folder).iterdir():
                if path.name != "state.json":  # it holds the folders' names
                    assert sha256(path) == sha256(Path(other.output_dir) / folder / path.name), path
        assert cached_files(other) == cached_files(whole)
    print(f"{kills} kills after {len(places)} different amounts of work")
    assert kills >= 20 and len(places) > 4


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(quick_config, tmp_path, number, code):
    config = quick_config(checkpoint_step_interval=1000, max_train_steps=1000)
    process = start_script(tmp_path / "log", "train_lora.py", *flags(config))
    wait_for(
        process, lambda: (Path(config.output_dir) / "metrics.jsonl").exists() and metrics(config)
    )  # after ten steps
    assert not checkpoints(config)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    printed = (tmp_path / "log").read_text()
    assert "stopping" in printed and "start again to go on" in printed and "Traceback" not in printed
    (name,) = checkpoints(config)
    config.max_train_steps = int(name[5:]) + 1
    train_lora.main(config)
    assert checkpoints(config)[-1] == f"step-{config.max_train_steps:06d}"


def test_a_signal_ends_a_preview(quick_config, tmp_path):
    config = quick_config(checkpoint_step_interval=1000, validation_step_interval=3, validation_num_inference_steps=500)
    process = start_script(tmp_path / "log", "train_lora.py", *flags(config))
    wait_for(process, lambda: "sampling" in (tmp_path / "log").read_text(errors="replace"))
    process.terminate()  # the preview before the first step: nothing to save
    process.join()
    assert process.exitcode == 143 and not checkpoints(config)
    assert "Traceback" not in (tmp_path / "log").read_text(errors="replace")
    train_lora.main(quick_config(validation_step_interval=4))
    pictures = Path(config.output_dir) / "validation"
    (pictures / "step-000004-00.png").unlink()  # as if it had been interrupted
    first = (pictures / "step-000000-00.png").stat().st_mtime_ns
    train_lora.main(quick_config(validation_step_interval=4))
    assert sorted(path.name for path in pictures.glob("step*")) == ["step-000000-00.png", "step-000004-00.png"]
    assert (pictures / "step-000000-00.png").stat().st_mtime_ns == first, "what is there is not drawn again"


@pytest.mark.slow
def test_a_signal_to_torchrun(quick_config):
    config = quick_config(checkpoint_step_interval=10000, max_train_steps=10000)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train_lora.py",
        *flags(config),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not ((Path(config.output_dir) / "metrics.jsonl").exists() and metrics(config)):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    printed = process.communicate()[0]
    assert printed.count("start again to go on") == 2
    (name,) = checkpoints(config)
    config.max_train_steps = int(name[5:]) + 1
    train_lora.main(config)
    assert checkpoints(config) == [name, f"step-{config.max_train_steps:06d}"]


def test_what_a_signal_does_in_the_loop(quick_config, monkeypatch, tmp_path, capsys):
    calls = []

    def disturbed(*arguments):
        calls.append(arguments)
        if len(calls) in when:
            signal.raise_signal(signal.SIGTERM)
            if twice:
                time.sleep(1.1)  # what comes sooner is the same event, sent twice
                signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    step, handler = train_lora.train_step, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train_lora, "train_step", disturbed)
    config, when, twice = quick_config(checkpoint_step_interval=3), [2], False
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_lora.main(config)
    assert stopped.value.args == (signal.SIGTERM,) and checkpoints(config) == ["step-000002"]
    when, twice = [5], True  # the third call of this start, in step 5: step 4 is done and not saved
    config.checkpoint_step_interval, config.max_train_steps = 1000, 9
    with pytest.raises(KeyboardInterrupt):
        train_lora.main(config)
    assert checkpoints(config) == ["step-000002"], "a second signal leaves at once"
    when = []
    assert signal.getsignal(signal.SIGTERM) == handler
    assert train_lora.main(config).exists() and checkpoints(config) == ["step-000002", "step-000009"]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_other_signals_to_stop_save_too_unless_they_were_ignored(quick_config, monkeypatch, name):
    number, step, calls = getattr(signal, name), train_lora.train_step, []

    def disturbed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(number)
        return step(*arguments)

    monkeypatch.setattr(train_lora, "train_step", disturbed)
    config = quick_config(checkpoint_step_interval=1000)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_lora.main(config)
    assert stopped.value.args == (number,) and checkpoints(config) == ["step-000002"]
    calls.clear()
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        train_lora.main(config)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert len(calls) == 2 and checkpoints(config)[-1] == "step-000004"


def test_a_second_signal_in_the_optimizer_saves_no_torn_weights(quick_config, monkeypatch):
    config, update = quick_config(checkpoint_step_interval=1000), torch.optim.AdamW.step

    def torn(optimizer, *arguments):
        update(optimizer, *arguments)
        if optimizer.state_dict()["state"][0]["step"] == 3:
            raise RuntimeError("in the middle of it")

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    with pytest.raises(RuntimeError, match="in the middle"):
        train_lora.main(config)
    assert checkpoints(config) == []


def test_a_stop_after_a_bad_step_saves_the_last_good_state(quick_config, monkeypatch):
    config = quick_config(checkpoint_step_interval=1000)
    loss, calls = train_lora.flow_matching_loss, []

    def disturbed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(*arguments) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train_lora, "flow_matching_loss", disturbed)
    with pytest.raises(KeyboardInterrupt):
        train_lora.main(config)
    assert checkpoints(config) == ["step-000003"]
    state = load_file(Path(config.output_dir) / "checkpoints/step-000003/state.safetensors")
    assert state["optimizer.0.step"] == 2


# ---------------------------------------------------------------- another run's folder


def test_a_second_run_in_the_folder_names_the_first_and_stops(quick_config, tmp_path):
    config = quick_config(max_train_steps=1000, checkpoint_step_interval=1000)
    process = start_script(tmp_path / "log", "train_lora.py", *flags(config))
    wait_for(process, lambda: (Path(config.output_dir) / "metrics.jsonl").exists())
    before = (Path(config.output_dir) / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"output_dir: .* is in use by process {process.pid} of .*, since 20"):
        train_lora.main(quick_config(max_train_steps=2, learning_rate=1.0))
    assert (Path(config.output_dir) / "config.json").read_bytes() == before
    process.kill()  # the lock dies with it
    process.join()
    train_lora.main(quick_config(max_train_steps=2))


def test_a_disk_that_cannot_lock_is_said(quick_config, monkeypatch, capsys):
    def refuse(lock, *arguments, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train_lora.FileLock, "acquire", refuse)
    assert train_lora.main(quick_config(max_train_steps=1)).exists()
    assert "cannot be locked ([Errno 37] No locks available); make sure" in capsys.readouterr().out


def test_another_runs_lora_is_refused_and_its_metrics_are_set_aside(quick_config, tmp_path, capsys):
    config = quick_config(max_train_steps=2)
    output, last = Path(config.output_dir), train_lora.main(config)
    shutil.rmtree(output / "checkpoints")
    lora, lines = last.read_bytes(), (output / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a finished LoRA, and no checkpoint of its run; move it away"):
        train_lora.main(quick_config(max_train_steps=1))
    assert last.read_bytes() == lora and (output / "metrics.jsonl").read_bytes() == lines
    last.unlink()
    (output / "validation").mkdir()
    (output / "validation" / "step-000002-00.png").write_bytes(b"a picture of the other run")
    train_lora.main(quick_config(max_train_steps=1, validation_step_interval=1))
    (aside,) = output.glob("before-20*")
    assert f"{aside}: here are metrics and previews of a run that came to no checkpoint" in capsys.readouterr().out
    assert (aside / "metrics.jsonl").read_bytes() == lines
    assert (aside / "validation" / "step-000002-00.png").exists()
    assert [line["step"] for line in metrics(config) if "loss" in line] == [1]


def test_what_a_disk_cannot_do_is_found_out_before_and_nothing_whole_is_deleted(quick_config, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.is_dir() and (when == "at once" or path.name.startswith(".step")):
            raise OSError(errno.EPERM, "Operation not permitted", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    config, when = quick_config(max_train_steps=2, checkpoint_step_interval=2), "at once"
    with pytest.raises(ValueError, match="checkpoints: folders there cannot be renamed .*not permitted"):
        train_lora.main(config)
    when = "later"
    with pytest.raises(ValueError, match="step-000002.tmp: is whole, but cannot be renamed to step-000002") as error:
        train_lora.main(config)
    assert "free space" not in str(error.value)
    monkeypatch.undo()
    whole = Path(config.output_dir) / "checkpoints/.step-000002.tmp"
    whole.rename(whole.with_name("step-000002"))
    config.max_train_steps = 3
    train_lora.main(config)
    assert checkpoints(config) == ["step-000002", "step-000003"]


def test_foreign_files_beside_ours_are_passed_over(quick_config, capsys):
    config = quick_config(max_train_steps=2, validation_step_interval=2, validation_split=0.2)
    folder = Path(config.output_dir) / "validation"
    folder.mkdir(parents=True)
    (folder / "step-000000-00.png").write_bytes(b"")
    (folder / "step-000002 (1).png").write_bytes(b"no picture")
    (folder / "step-000001-00.png").write_text("nor this")
    (folder.parent / "checkpoints" / "step-000100 copy").mkdir(parents=True)
    train_lora.main(config)
    assert "failed" not in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "step-000000-00.png", "step-000001-00.png", "step-000002 (1).png", "step-000002-00.png", "progress.png",
    }  # fmt: skip


# ---------------------------------------------------------------- damaged and changed checkpoints


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:1000]),
        lambda folder: (folder / NAMES[0]).write_bytes(b""),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text('{"step": 3'),
        lambda folder: (folder / "state.json").unlink(),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(quick_config, reference_run, damage, capsys):
    config = reference_run
    expected = lora_bytes(config)
    newest = Path(config.output_dir) / "checkpoints" / "step-000003"
    damage(newest)
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*step-000003 is no whole checkpoint"):
        train_lora.main(quick_config(**REFERENCE, resume_from_checkpoint=str(newest)))
    capsys.readouterr()
    train_lora.main(config)
    printed = capsys.readouterr().out
    assert "step-000003: is no whole checkpoint, and passed over" in printed
    assert "resumed from" in printed and "step-000002" in printed
    assert lora_bytes(config) == expected and checkpoints(config)[-2:] == ["step-000002", "step-000003"]


def test_what_must_not_change_on_resume_is_refused_and_what_may_is_said(quick_config, tmp_path, capsys):
    config = quick_config(max_train_steps=2)
    train_lora.main(config)
    for name, value in (("lora_rank", 8), ("lora_alpha", 3.0), ("lora_target_modules", ["attn.to_q"])):
        with pytest.raises(ValueError, match=f"^{name}: found .*was trained with"):
            train_lora.main(quick_config(**{name: value}))
    shutil.copytree(MODEL, tmp_path / "model")
    train_lora.main(
        quick_config(max_train_steps=2, pretrained_model_name_or_path=str(tmp_path / "model"))
    )  # moved, and the same
    path = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)
    train_lora.model_identity.__globals__["folder_identity"].cache_clear()
    with pytest.raises(ValueError, match="^pretrained_model_name_or_path: .*was trained with"):
        train_lora.main(quick_config(pretrained_model_name_or_path=str(tmp_path / "model")))
    copy = tmp_path / "zcopy"
    shutil.copytree(Path(config.output_dir) / "checkpoints/step-000001", copy)
    for wanted in ("none", str(copy)):
        with pytest.raises(ValueError, match="holds later checkpoints, up to step-000002"):
            train_lora.main(quick_config(resume_from_checkpoint=wanted))
    with pytest.raises(ValueError, match="there is no such LoRA file"):
        train_lora.main(quick_config(init_lora="nowhere.safetensors", output_dir=str(tmp_path / "new")))

    with open(Path(config.output_dir) / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # cut off by a kill
    own = Path(config.output_dir) / "checkpoints" / "step-000001-keep"
    shutil.copytree(own.with_name("step-000001"), own)
    capsys.readouterr()
    train_lora.main(
        quick_config(
            max_train_steps=3, checkpoints_total_limit=1, learning_rate=2e-4, train_batch_size=2, lora_alpha=16
        )
    )
    printed = capsys.readouterr().out
    assert (
        "learning_rate: 0.008 -> 0.0002" in printed
        and "max_train_steps: 2 -> 3" in printed
        and "train_batch_size: 1 -> 2\n" in printed
        and "in epoch 0, of 4 batches" in printed
    )
    assert "lora_alpha" not in printed
    assert checkpoints(config) == ["step-000003"] and own.is_dir()
    assert metrics(config)[-1]["lr"] == pytest.approx(2e-4 * config_factor(2, 3))
    train_lora.main(quick_config(max_train_steps=3))
    assert "nothing to train" in capsys.readouterr().out


def config_factor(step, steps, warmup=2):
    """The cosine schedule's factor of the learning rate."""
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_what_is_changed_counts_from_the_next_step_on(quick_config, few_pictures, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    shutil.copytree(few_pictures, data)
    config = quick_config(data_dir=str(data), max_train_steps=3)
    seen, load_batch = {}, train_lora.load_batch

    def noted(config, samples, prompt_files, epoch, number):
        seen[number] = [(name.split("-")[0], picture.captions) for name, picture in samples]
        return load_batch(config, samples, prompt_files, epoch, number)

    monkeypatch.setattr(train_lora, "load_batch", noted)
    train_lora.main(config)
    first = {name for number in range(3) for name, _ in seen[number]}
    assert len(first) == 3 and all(len(seen[number]) == 1 for number in range(3))
    for path in data.glob("zumi-00.*"):
        path.unlink()
    new = "a new caption"
    for path in (ROOT / "tests/tiny_longcat/pictures").glob("zumi-1[01].*"):
        shutil.copy(path, data)
    (data / "zumi-01.json").write_text(json.dumps({"caption": new}))
    capsys.readouterr()
    seen.clear()
    changed = quick_config(data_dir=str(data), max_train_steps=9, train_batch_size=2)
    train_lora.main(changed)
    printed = capsys.readouterr().out
    batches = len(train_lora.epoch_batches(prepare_data.main(changed), 2, 42, 0))
    assert f"in epoch {3 // batches}, of {batches} batches" in printed
    # From the third batch on, by the new pictures' own order.
    samples = [sample for number in range(batches, 2 * batches) for sample in seen.get(number, [])]
    assert max(map(len, seen.values())) == 2 and min(seen) == 3
    assert sum(new in captions for number in seen for _, captions in seen[number]) >= 1
    assert len({name for name, _ in samples}) == len(samples)


def test_held_out_is_held_out_also_after_it_was_away(quick_config, few_pictures, tmp_path, monkeypatch, capsys):
    data, seen, load_batch = tmp_path / "data", [], train_lora.load_batch
    shutil.copytree(few_pictures, data)

    def noted(config, samples, *arguments):
        seen.extend(picture.key for _, picture in samples)
        return load_batch(config, samples, *arguments)

    monkeypatch.setattr(train_lora, "load_batch", noted)
    held = quick_config(data_dir=str(data), output_dir=str(tmp_path / "held"), validation_split=0.2, max_train_steps=1)
    train_lora.main(held)
    keys = json.loads((Path(held.output_dir) / "checkpoints/step-000001/state.json").read_text())["held_out"]
    (path,) = [Path(picture.path) for picture in prepare_data.main(held) if picture.key == keys[0]]
    for step in (2, 12):
        path.rename(path.with_suffix(".away")) if step == 2 else path.with_suffix(".away").rename(path)
        held.max_train_steps = step
        train_lora.main(held)
        now = "none, a source needs two pictures" if step == 2 else f"1 of {data}"
        said = f"held out, only scored and never trained on: {now} (1 chosen when the run began)"
        assert said in capsys.readouterr().out
    assert len(seen) > 12 and not set(seen) & set(keys)


def test_every_source_is_held_out_in_its_share():
    split = load_config(validation_split=0.1)
    concept = [made_up(i, source="concept") for i in range(10)]
    ordinary = [made_up(100 + i, source="ordinary") for i in range(60)]
    count = lambda keys: [sum(p.key in keys for p in own) for own in (concept, ordinary)]
    assert count(train_lora.hold_out(split, concept + ordinary)) == [1, 6]
    assert count(train_lora.hold_out(load_config(validation_split=0.5), concept + ordinary)) == [4, 4]
    assert train_lora.hold_out(split, concept[:1]) == [] == train_lora.hold_out(load_config(), concept)


# ---------------------------------------------------------------- what is not finite


def disturb_loss(monkeypatch, factor_of):
    """Multiplies the n-th loss by factor_of(n), and with it every gradient."""
    original, calls = train_lora.flow_matching_loss, []

    def disturbed(*arguments):
        calls.append(1)
        return original(*arguments) * factor_of(len(calls))

    monkeypatch.setattr(train_lora, "flow_matching_loss", disturbed)
    return calls


def test_a_step_that_is_not_finite_is_left_out_and_three_end_the_run(quick_config, monkeypatch, capsys):
    config = quick_config(max_train_steps=12, checkpoint_step_interval=4)
    bad = {2: math.nan, 3: math.inf, 5: math.nan, 8: math.nan, 9: math.nan, 10: math.nan}
    calls = disturb_loss(monkeypatch, lambda n: bad.get(n, 1.0))
    with pytest.raises(ValueError, match="step 10: .* 3 times in a row; the newest checkpoint is step 4"):
        train_lora.main(config)
    printed = capsys.readouterr().out
    assert printed.count("not learned from") == 6 and "step 3: loss inf" in printed
    assert checkpoints(config) == ["step-000004"], "not at step 8, which was bad, and not at the end"
    other = quick_config(output_dir=config.output_dir + "-2", max_train_steps=12, checkpoint_step_interval=1)
    calls.clear()
    bad.clear()
    bad.update({5: math.nan, 6: math.nan, 7: math.nan})
    with pytest.raises(ValueError, match="the newest checkpoint is step 4"):
        train_lora.main(other)
    assert checkpoints(other)[-1] == "step-000004"
    assert metrics(config)[0]["skipped_steps"] == 6
    monkeypatch.undo()
    assert train_lora.main(config).exists()
    assert all(tensor.isfinite().all() for tensor in load_file(Path(config.output_dir) / NAMES[0]).values())


def test_the_loss_scaler_backs_off_and_is_resumed(quick_config, monkeypatch, capsys):
    unscale, limit = torch.amp.GradScaler.unscale_, 2.0**15

    def overflowing(scaler, optimizer):
        if scaler.get_scale() > limit:  # it is 2^16 at first
            optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        return unscale(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflowing)
    config = quick_config(mixed_precision="fp16", max_train_steps=2)
    train_lora.main(config)
    folder_of = lambda step: Path(config.output_dir) / "checkpoints" / f"step-{step:06d}"
    state_of = lambda step: json.loads((folder_of(step) / "state.json").read_text())
    assert [state_of(step)["scaler"]["scale"] for step in (1, 2)] == [2.0**15, 2.0**15]
    assert "not learned from" not in capsys.readouterr().out
    learned = [
        any(tensor.any() for name, tensor in load_file(folder_of(step) / NAMES[0]).items() if "lora_B" in name)
        for step in (1, 2)
    ]
    assert learned == [False, True]
    shutil.rmtree(folder_of(2))  # a checkpoint without any optimizer state is gone on from, too
    state = state_of(1)
    state["scaler"]["scale"] = 2.0
    (folder_of(1) / "state.json").write_text(json.dumps(state))
    limit = 0.0  # at a scale of 1 the gradients themselves are to blame
    with pytest.raises(ValueError, match="step 5: .*not finite 3 times in a row"):
        train_lora.main(quick_config(mixed_precision="fp16", max_train_steps=40))


# ---------------------------------------------------------------- starved


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done, sync, replace = tmp_path / "file", [], os.fsync, os.replace
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_size) or sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append(path.read_text()) or replace(*paths))
    write_file(path, "after it")
    assert done == [8, "before"] and path.read_text() == "after it"


def test_a_full_disk_is_one_line_and_what_is_saved_still_loads(quick_config, tmp_path):
    config = quick_config(max_train_steps=2)
    train_lora.main(config)
    config.max_train_steps = 4
    size = (Path(config.output_dir) / "checkpoints/step-000002/state.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = start_script(tmp_path / "log", "train_lora.py", *flags(config))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    process.join()
    printed = (tmp_path / "log").read_text()
    assert (
        process.exitcode == 2
        and "error: " in printed
        and "cannot be written (File too large); free space" in printed
        and "Traceback" not in printed
    )
    assert checkpoints(config) == ["step-000001", "step-000002"]
    train_lora.main(config)
    assert checkpoints(config)[-1] == "step-000004" and not list(Path(config.output_dir).rglob("*.tmp"))


def test_folders_that_cannot_be_written_and_files_that_vanish_are_one_line(quick_config, tmp_path, monkeypatch):
    config = quick_config(output_dir=str(tmp_path / "taken"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "checkpoints").write_text("in the way")
    with pytest.raises(ValueError, match="checkpoints.*cannot be written"):
        train_lora.main(config)
    assert not (tmp_path / "taken" / "metrics.jsonl").exists(), "it is said before the training"

    config, load_batch = (
        quick_config(cache_dir=str(tmp_path / "cache"), checkpoint_step_interval=1000),
        train_lora.load_batch,
    )

    def vanishing(config, batch, prompt_files, epoch, number):
        if number == 2:
            cache_latents.latents_file(config, batch[0][1]).unlink()
        return load_batch(config, batch, prompt_files, epoch, number)

    monkeypatch.setattr(train_lora, "load_batch", vanishing)
    with pytest.raises(ValueError, match="latents.*is missing or damaged"):
        train_lora.main(config)
    assert checkpoints(config) == ["step-000002"], "the last complete step is saved"
    monkeypatch.undo()
    train_lora.main(config)
    assert checkpoints(config) == ["step-000002", "step-000004"]


# ---------------------------------------------------------------- Prodigy, the card, what is said


def test_a_run_with_prodigy_is_resumed_to_the_same_bytes(quick_config, tmp_path, capsys):
    settings = dict(optimizer="prodigy", learning_rate=1.0, lr_scheduler="constant", max_train_steps=14)
    whole = quick_config(**settings, checkpoint_step_interval=7)
    train_lora.main(whole)
    states = [json.loads((folder / "state.json").read_text()) for folder in train_lora.checkpoint_folders(whole)]
    assert states[-1]["optimizer"]["d"] > 1.2e-6, "it finds its rate, from 1e-6 on"
    other = quick_config(**settings, output_dir=str(tmp_path / "resumed"))
    shutil.copytree(whole.output_dir, other.output_dir)
    shutil.rmtree(train_lora.checkpoint_folders(other)[-1])
    train_lora.main(other)
    assert lora_bytes(other) == lora_bytes(whole)
    with pytest.raises(ValueError, match="^optimizer: found 'adamw', but .* was trained with 'prodigy'"):
        train_lora.main(quick_config(max_train_steps=15))
    capsys.readouterr()
    train_lora.main(quick_config(optimizer="prodigy", max_train_steps=1, output_dir=str(tmp_path / "new")))
    assert "learning_rate: 0.008 is a factor of the rate that prodigy finds; set it to 1" in capsys.readouterr().out


def test_the_card_names_base_words_and_pictures_and_is_never_overwritten(quick_config, capsys):
    words = ["neonix style", '霓虹 "风格"']
    config = quick_config(
        max_train_steps=2, validation_step_interval=2, trigger_words=words, license="cc-by-4.0", model_flavour="dev",
        validation_prompts=["a red apple", '一个 "红" 苹果'], validation_split=0.2, lr_warmup_steps=2,
    )  # fmt: skip
    train_lora.main(config)
    card = Path(config.output_dir) / "README.md"
    front = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
    assert (front["base_model"], front["license"]) == ("meituan-longcat/LongCat-Image-Dev", "cc-by-4.0")
    assert front["instance_prompt"] == ", ".join(words) and "lora" in front["tags"]
    assert "](validation/progress.png)" in card.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "lr_warmup_steps: 2, so the full learning rate is never reached; lower it" in printed
    best = min((line for line in metrics(config) if "held_out_loss" in line), key=lambda line: line["held_out_loss"])
    assert f"lowest held-out loss: step {best['step']}" in printed
    card.write_text("my own words")
    config.max_train_steps = 3
    train_lora.main(config)
    assert card.read_text() == "my own words"


# ---------------------------------------------------------------- what a review and an attempt to break it found


def test_only_whole_checkpoints_count_towards_the_limit(quick_config):
    config = quick_config(max_train_steps=2)
    train_lora.main(config)
    broken = Path(config.output_dir) / "checkpoints/step-000012"
    shutil.copytree(broken.with_name("step-000002"), broken)
    (broken / "state.safetensors").write_bytes(b"half")
    train_lora.main(quick_config(max_train_steps=4, checkpoints_total_limit=1))
    assert checkpoints(config) == ["step-000004", "step-000012"]


def test_a_signal_sent_twice_at_once_is_one(quick_config, monkeypatch):
    config, step = quick_config(checkpoint_step_interval=1000), train_lora.train_step

    def disturbed(*arguments):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        return step(*arguments)

    monkeypatch.setattr(train_lora, "train_step", disturbed)
    with pytest.raises(KeyboardInterrupt):
        train_lora.main(config)
    assert checkpoints(config) == ["step-000001"]


def test_previews_of_steps_that_are_done_again_are_drawn_again(quick_config):
    config = quick_config(max_train_steps=3, validation_step_interval=1)
    train_lora.main(config)
    picture = Path(config.output_dir) / "validation/step-000003-00.png"
    before = picture.read_bytes()
    shutil.rmtree(Path(config.output_dir) / "checkpoints/step-000003")
    train_lora.main(quick_config(max_train_steps=3, validation_step_interval=1, learning_rate=0.05))
    assert picture.read_bytes() != before


def test_another_runs_lora_is_refused_also_when_a_checkpoint_elsewhere_is_named(quick_config, tmp_path):
    config, other = quick_config(max_train_steps=1), quick_config(max_train_steps=2, output_dir=str(tmp_path / "other"))
    last = train_lora.main(config)
    train_lora.main(other)
    shutil.rmtree(Path(config.output_dir) / "checkpoints")
    config.resume_from_checkpoint, before = f"{other.output_dir}/checkpoints/step-000002", last.read_bytes()
    config.max_train_steps = 3
    with pytest.raises(ValueError, match="holds a finished LoRA, and no checkpoint of its run"):
        train_lora.main(config)
    assert last.read_bytes() == before


def test_the_lowest_held_out_loss_is_of_the_same_pictures(tmp_path):
    line = lambda step, loss, base: json.dumps({"step": step, "held_out_loss": loss, "held_out_base": base}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(
        line(0, 1.0, 1.0) + line(2, 0.2, 1.0) + line(4, 0.9, 2.0) + line(6, 0.8, 2.0)
    )
    assert train_lora.Metrics(load_config(output_dir=str(tmp_path), report_to="none"), 6).best() == 6


def test_what_runs_out_of_memory_while_loading_is_not_a_damaged_model(quick_config, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("longcat_common.fill_transformer", full)
    with pytest.raises(ValueError, match="^out of memory; what to change"):
        train_lora.main(quick_config())
