"""Training that is killed, stopped, starved or given other data resumes, and nothing is lost."""

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from conftest import (
    MODEL, NAMES, ROOT, TORCHRUN, checkpoints, flags, lora_bytes, made_up, metrics, run_script, sha256,
    start_script,
)  # fmt: skip
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache_latents
import train_lora
import validate
from longcat_common import load_config, write_file


@pytest.fixture
def before_each(monkeypatch):
    """before_each(name, do): do(n, *arguments) is called before the n-th call of this function of train_lora."""

    def disturb(name, do):
        original, numbers = getattr(train_lora, name), itertools.count(1)
        disturbed = lambda *arguments: (do(next(numbers), *arguments), original(*arguments))[1]
        monkeypatch.setattr(train_lora, name, disturbed)

    return disturb


@pytest.fixture
def cheap_loss(monkeypatch):
    """For tests of what is around the model: a loss that does not ask it, times what `.factors` gives next."""
    trained = lambda transformer: sum(
        (p + p**2).sum() for p in transformer.parameters() if p.requires_grad
    )
    loss = lambda transformer, latents, *_: (
        latents.square().mean() * trained(transformer) * next(cheap.factors, 1)
    )
    cheap = SimpleNamespace(factors=iter(()))
    monkeypatch.setattr(train_lora, "flow_matching_loss", loss)
    return cheap


def refused(config, words):
    with pytest.raises(ValueError, match=words) as error:
        train_lora.main(config)
    return str(error.value)


def stopped(config):
    """Trains, and returns the number of the signal that has stopped it."""
    with pytest.raises(KeyboardInterrupt) as stop:
        train_lora.main(config)
    return stop.value.args[0]


def checkpoint(config, step):
    return Path(config.output_dir, "checkpoints", f"step-{step:06d}")


def state_of(config, step):
    return json.loads((checkpoint(config, step) / "state.json").read_text())


# ---------------------------------------------------------------- killed and resumed


def test_resumed_from_any_step_it_ends_with_the_same_bytes(reference_run, capsys):
    config, expected = reference_run, lora_bytes(reference_run)
    scored = lambda: [line for line in metrics(config) if "held_out_loss" in line]
    scores = scored()
    seen = [state_of(config, step)["images_seen"] for step in (1, 2, 3)]
    assert seen == [4, 8, 12], "steps end within an epoch of six images"
    assert [line["step"] for line in scores] == [0, 2, 3] and len(
        {line["held_out_base"] for line in scores}
    ) == 1
    assert scores[0]["held_out_loss"] == scores[0]["held_out_base"] > scores[2]["held_out_loss"]
    config.validation_prompts = []
    shutil.rmtree(checkpoint(config, 3))
    for step in (2, 1):
        Path(config.output_dir, NAMES[0]).unlink()
        train_lora.main(config)
        assert f"resumed from {checkpoint(config, step)}, in epoch" in capsys.readouterr().out
        assert lora_bytes(config) == expected and len(checkpoints(config)) == 3
        assert [line["step"] for line in metrics(config) if "loss" in line] == [3], (
            "steps done again are there once"
        )
        assert scored() == (scores if step == 2 else scores[:1])
        shutil.rmtree(checkpoint(config, 3))
        shutil.rmtree(checkpoint(config, 2))
        config.validation_step_interval = 0


KILLED = """
import os, signal, sys, train_lora
from longcat_common import run_stage
word, left = os.environ["KILL_AT"], int(os.environ["KILL_COUNT"])
def count(event, arguments):
    global left
    if event == "os.rename" and word in str(arguments[1]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
run_stage(train_lora.main, "")
"""
STAGES = [
    ("manifest.jsonl", 1),
    ("latents/", 3),
    ("embeddings/", 3),
    (".step-000002.tmp/", 5),
    ("checkpoints/step-000003", 1),
]
ANYWHERE = [("", count) for count in random.Random(5).sample(range(2, 30), 20)]


@pytest.mark.parametrize(
    "kills", [STAGES, pytest.param(ANYWHERE, marks=pytest.mark.slow)], ids=["stages", "anywhere"]
)
def test_killed_before_any_file_has_its_name_it_ends_with_the_same_bytes(
    quick_config, tmp_path, kills
):
    """`kills`: (word, n): the n-th file or folder with this word in its path does not get its name any more."""
    settings = dict(
        max_train_steps=4 if kills is STAGES else 36, checkpoints_total_limit=99, lora_dropout=0.1
    )
    whole = quick_config(
        **settings, output_dir=str(tmp_path / "whole"), cache_dir=str(tmp_path / "whole-cache")
    )
    train_lora.main(whole)
    killed, log, done = (
        quick_config(**settings, cache_dir=str(tmp_path / "cache")),
        tmp_path / "log",
        set(),
    )
    (tmp_path / "killed.py").write_text(KILLED)
    for word, count in kills:
        process = start_script(
            log, tmp_path / "killed.py", *flags(killed), KILL_AT=word, KILL_COUNT=str(count)
        )
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]
        done.add(len(checkpoints(killed)))
    assert len(done) > (8 if kills is ANYWHERE else 1), "it died after different amounts of work"
    run_script("train_lora.py", *flags(killed))
    assert lora_bytes(killed) == lora_bytes(whole) and checkpoints(killed) == checkpoints(whole)


# ---------------------------------------------------------------- stopped

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")


@pytest.fixture
def handlers():
    """A handler of each signal to stop, {number: handler}: without one that signal would end the tests."""
    unheard = lambda number, frame: pytest.fail(f"{signal.Signals(number).name} is not handled")
    numbers = [getattr(signal, name) for name in SIGNALS]
    before = [signal.signal(number, unheard) for number in numbers]
    yield dict.fromkeys(numbers, unheard)
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


SENT = [
    *([name] for name in SIGNALS),
    ["SIGHUP", "SIGHUP"],
    ["SIGTERM", "later", "SIGTERM"],
    ["ignored", *SIGNALS],
]


@pytest.mark.parametrize("sent", SENT, ids=" ".join)
def test_a_signal_finishes_the_step_and_saves_a_second_leaves_at_once_and_an_ignored_one_does_nothing(
    quick_config, before_each, handlers, sent
):
    def send(n, *arguments):
        for name in sent if n == 2 else ():  # what comes within a second is one event, sent twice
            time.sleep(1.1) if name == "later" else name in SIGNALS and signal.raise_signal(
                getattr(signal, name)
            )
        reached.append(n)

    before_each("train_step", send)
    config, reached = quick_config(max_train_steps=3, checkpoint_step_interval=1000), []
    if "ignored" in sent:  # on entry, as by nohup
        for number in handlers:
            handlers[number] = signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN)
        assert train_lora.main(config).exists()
    else:
        assert stopped(config) == getattr(signal, sent[0])
        assert (reached, checkpoints(config)) == (
            ([1], []) if "later" in sent else ([1, 2], ["step-000002"])
        )
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.parametrize(
    "launcher", [[], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["alone", "torchrun"]
)
def test_a_script_that_is_told_to_stop_says_so_in_a_line_and_goes_on_from_there(
    quick_config, tmp_path, launcher
):
    config, log = (
        quick_config(checkpoint_step_interval=10000, max_train_steps=10000),
        tmp_path / "log",
    )
    with open(log, "w") as file:
        command = [sys.executable, *launcher, "train_lora.py", *flags(config)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    while not re.search(r"\| [1-9]\d*/10000 ", log.read_text(errors="replace")):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    process.terminate()
    code, printed = process.wait(), log.read_text(errors="replace")
    assert (
        printed.count("start again to resume") == (2 if launcher else 1) and "LoRA:" not in printed
    )
    assert (
        "10000 steps of 2 images" in printed
        if launcher
        else code == 143 and "Traceback" not in printed
    )
    (name,) = checkpoints(config)
    config.max_train_steps = int(name[5:]) + 1
    train_lora.main(config)
    assert checkpoints(config) == [name, f"step-{config.max_train_steps:06d}"]


def test_a_signal_ends_a_preview_at_once(quick_config, before_each, handlers):
    drawn, config = [], quick_config(validation_step_interval=1)
    before_each(
        "generate",
        lambda *arguments: signal.raise_signal(signal.SIGTERM) or drawn.append(arguments),
    )
    assert stopped(config) == signal.SIGTERM and not drawn and not checkpoints(config)


# ---------------------------------------------------------------- what is not finite


def test_a_step_that_is_not_finite_is_left_out_and_three_end_the_run(
    quick_config, cheap_loss, capsys
):
    cheap_loss.factors = iter([1, math.nan, 1, 1, math.inf, math.nan, math.nan])
    config = quick_config(max_train_steps=7, checkpoint_step_interval=2)
    refused(config, "step 7: .* 3 times in a row; the newest checkpoint is step 4")
    assert (
        capsys.readouterr().out.count("step skipped") == metrics(config)[-1]["skipped_steps"] == 4
    )
    assert checkpoints(config) == ["step-000003", "step-000004"], (
        "not after a bad step, but after the next good one"
    )
    tensors = load_file(checkpoint(config, 4) / "state.safetensors")
    assert tensors["optimizer.0.step"] == 3 and all(
        tensor.isfinite().all() for tensor in tensors.values()
    )
    assert train_lora.main(config).exists()


def test_the_loss_scaler_backs_off_and_is_resumed(quick_config, monkeypatch, cheap_loss, capsys):
    unscale, limit = torch.amp.GradScaler.unscale_, 2.0**15

    def overflowing(scaler, optimizer):
        if scaler.get_scale() > limit:  # it is 2^16 at first
            optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        return unscale(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflowing)
    config = quick_config(mixed_precision="fp16", max_train_steps=1)
    train_lora.main(config)
    state = state_of(config, 1)
    assert state["scaler"]["scale"] == limit and "step skipped" not in capsys.readouterr().out
    state["scaler"]["scale"], limit = (
        2.0,
        0.0,
    )  # at a scale of 1 the gradients themselves are to blame
    (checkpoint(config, 1) / "state.json").write_text(json.dumps(state))
    config.max_train_steps = 40
    refused(config, "step 5: .*not finite 3 times in a row")


# ---------------------------------------------------------------- another run's folder


def test_a_second_run_in_the_folder_names_the_first_and_stops(quick_config, before_each):
    config, said = quick_config(max_train_steps=1), []
    read = lambda: [
        Path(config.output_dir, name).read_bytes() for name in ("config.json", "metrics.jsonl")
    ]
    second = lambda: refused(
        quick_config(seed=1), f"output_dir: .* is in use by process {os.getpid()} of .*, since 20"
    )
    before_each("train_step", lambda *_: said.append((read(), second(), read())))
    train_lora.main(config)
    ((before, _, after),) = said
    assert before == after and train_lora.main(config).exists(), "the lock goes with the run"


def test_a_disk_that_cannot_lock_is_said(quick_config, monkeypatch, capsys):
    monkeypatch.setattr(filelock.FileLock, "acquire", failing("ENOLCK"))
    assert train_lora.main(quick_config(max_train_steps=1)).exists()
    assert "cannot be locked ([Errno 37] No locks available); make sure" in capsys.readouterr().out


def test_another_runs_lora_is_refused_and_its_metrics_are_set_aside(
    reference_run, quick_config, tmp_path, capsys
):
    output, elsewhere = Path(reference_run.output_dir), str(tmp_path / "elsewhere")
    before = (output / "metrics.jsonl").read_bytes()
    shutil.move(checkpoint(reference_run, 3), elsewhere)
    shutil.rmtree(output / "checkpoints")
    for reference_run.resume_from_checkpoint, name in (("latest", NAMES[0]), (elsewhere, NAMES[1])):
        done = run_script("train_lora.py", *flags(reference_run), check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert (
            "holds a finished LoRA, but no checkpoint of its run; move the LoRA elsewhere"
            in done.stderr
        )
        (output / name).unlink()  # one that is left is refused, too
    train_lora.main(quick_config(max_train_steps=1))
    (aside,) = output.glob("before-20*")
    assert (
        f"{aside}: metrics and previews of a run that ended before its first checkpoint"
        in capsys.readouterr().out
    )
    assert (aside / "metrics.jsonl").read_bytes() == before and (
        aside / "validation/step-000002-00.png"
    ).exists()
    assert [line["step"] for line in metrics(reference_run)] == [1]


# ---------------------------------------------------------------- corrupt and changed checkpoints


def all_files(folder):
    """{path: hash of its bytes} of everything in a folder."""
    return {path: sha256(path) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("kept", [10, -3, None, "a folder"])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_checkpoint_that_cannot_be_used_stops_the_run_and_nothing_is_deleted(
    reference_run, tmp_path, name, kept, step
):
    config = reference_run
    path = checkpoint(config, step) / name
    whole = path.read_bytes()
    path.unlink()
    if kept == "a folder":
        path.mkdir()  # as unreadable as a file on a broken disk, for root too
    elif kept:
        path.write_bytes(whole[:kept])

    before = all_files(path.parents[1])
    advice = f"move step-00000{step} out of .*checkpoints to resume from the one before"
    for resume in ("latest", f"step-00000{step}", str(path.parent), "none"):
        config.resume_from_checkpoint = resume
        problem = refused(config, f"{re.escape(str(path))}: .*{advice}")
        assert len(problem.splitlines()) == 1
    assert all_files(path.parents[1]) == before

    config.resume_from_checkpoint = "latest"
    path.parent.rename(tmp_path / "aside")
    found = train_lora.find_checkpoint(config)
    assert found[0] == checkpoint(config, 3 if step == 2 else 2)


def test_a_checkpoints_folder_that_cannot_be_read_now_stops_the_run(reference_run, tmp_path):
    config, folder = reference_run, checkpoint(reference_run, 3)
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "not mounted")
    refused(config, f"{folder}: cannot be read .*No such file.*move step-000003 out of")
    assert folder.is_symlink()
    folder.unlink()
    (tmp_path / "disk").rename(folder)

    # A parent that cannot be listed is not an empty one.
    parent = folder.parent.rename(tmp_path / "parent")
    folder.parent.symlink_to(folder.parent)
    refused(config, f"{folder.parent}: cannot be read")
    folder.parent.unlink()
    parent.rename(folder.parent)
    assert train_lora.find_checkpoint(config)[1]["step"] == 3


def test_a_checkpoint_resumes_without_its_lora_which_is_written_again(reference_run, capsys):
    config, folder = reference_run, checkpoint(reference_run, 3)
    config.trigger_words = ["since then"]
    config.validation_step_interval, config.max_train_steps = 0, 4
    before = all_files(folder)
    (folder / NAMES[0]).unlink()
    (folder / NAMES[2]).unlink()
    (folder / NAMES[1]).write_bytes(b"the user's")
    train_lora.main(config)
    printed = capsys.readouterr().out
    assert f"resumed from {folder}" in printed
    assert f"{folder}: {NAMES[0]} and {NAMES[2]} were gone; written again" in printed
    before[folder / NAMES[1]] = sha256(folder / NAMES[1])
    assert all_files(folder) == before
    assert (folder / NAMES[1]).read_bytes() == b"the user's"

    # Another run's folder is left as it is.
    (folder / NAMES[0]).unlink()
    other = config.model_copy(update={"output_dir": str(folder.parents[2] / "other")})
    other.resume_from_checkpoint = str(folder)
    train_lora.main(other)
    assert not (folder / NAMES[0]).exists() and checkpoints(other) == ["step-000004"]


def test_what_is_not_a_checkpoint_is_skipped_and_makes_room_by_a_rename(reference_run, capsys):
    config, notes = reference_run, checkpoint(reference_run, 4) / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    shutil.copy(checkpoint(config, 3) / NAMES[0], notes.parent)
    checkpoint(config, 5).write_text("a file")
    config.validation_step_interval, config.max_train_steps = 0, 5
    train_lora.main(config)
    printed = capsys.readouterr().out
    assert checkpoints(config)[-2:] == ["step-000004", "step-000005"]
    assert state_of(config, 4)["step"] == 4 and state_of(config, 5)["step"] == 5
    (aside,) = notes.parent.parent.glob("before-*-step-000004")
    assert (aside / "notes.txt").read_text() == "mine" and (aside / NAMES[0]).exists()
    assert f"{notes.parent}: was in the way, and is now {aside.name}" in printed
    (aside,) = notes.parent.parent.glob("before-*-step-000005")
    assert aside.read_text() == "a file"


def test_the_limit_deletes_only_what_the_program_wrote(reference_run, tmp_path, capsys):
    config = reference_run
    notes = checkpoint(config, 1) / "notes.txt"
    notes.write_text("mine")
    linked = shutil.move(checkpoint(config, 2), tmp_path / "linked")
    checkpoint(config, 2).symlink_to(linked)
    before = all_files(linked)
    config.validation_step_interval, config.checkpoints_total_limit = 0, 1
    for config.max_train_steps in (4, 5):
        train_lora.main(config)
        assert "resumed from" in capsys.readouterr().out
    assert checkpoints(config) == ["step-000001", "step-000002", "step-000005"]
    assert all_files(notes.parent).keys() == {notes}
    assert all_files(linked) == before


def test_a_kill_while_an_old_checkpoint_is_deleted_stops_nothing(
    reference_run, tmp_path, monkeypatch
):
    config, folder = reference_run, checkpoint(reference_run, 1)
    whole = shutil.copytree(folder, tmp_path / "whole")
    count = len(list(folder.iterdir()))
    unlink = Path.unlink

    def unlink_some(path, *arguments, **options):
        if path.parent == folder and next(numbers) == last:
            raise KeyboardInterrupt
        unlink(path, *arguments, **options)

    for last in range(1, count + 1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        numbers = itertools.count(1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink_some)
            train_lora.delete_checkpoint(folder)
        assert folder.exists()
        assert train_lora.find_checkpoint(config)[1]["step"] == 3
        config.checkpoints_total_limit = 9
        train_lora.delete_old_checkpoints(config)
        assert not folder.exists(), "what was begun is completed"
    assert checkpoints(config) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("number", [None, 1, 3, "2"])
def test_a_checkpoint_of_another_version_is_called_that(reference_run, number):
    state = state_of(reference_run, 3)
    assert state["format"] == 2
    del state["format"]
    if number:
        state["format"] = number
    state["fixed"]["pretrained_model_name_or_path"] = "counted differently then"
    (checkpoint(reference_run, 3) / "state.json").write_text(json.dumps(state))
    (checkpoint(reference_run, 3) / "state.safetensors").write_bytes(b"of another kind")
    problem = refused(reference_run, "step-000003: was written by another version of these scripts")
    assert f"(format {number or 1!r}, this one reads 2)" in problem
    assert "finish it with that version, or start a new output_dir" in problem
    assert "its LoRA works as init_lora" in problem


def test_a_state_that_is_not_the_lora_of_this_run_is_named(reference_run):
    path = checkpoint(reference_run, 3) / "state.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("lora."))
    reference_run.max_train_steps = 4
    for wrong in ({"unknown": torch.ones(1)}, {name: tensors[name][1:].clone()}):
        save_file(tensors | wrong, path)
        refused(reference_run, f"{path}: does not hold the tensors of this run.*; restore it")


@pytest.mark.parametrize(
    "key, value, problem",
    [
        ("lora_rank", 8, "^lora_rank: found 8, but .*was trained with 16"),
        ("optimizer", "prodigy", "^optimizer: found 'prodigy', but .* was trained with 'adamw'"),
        (
            "pretrained_model_name_or_path",
            "changed",
            "^pretrained_model_name_or_path: .*was trained with",
        ),
        ("resume_from_checkpoint", "step-000001", "holds later checkpoints, up to step-000003"),
    ],
)
def test_what_must_not_change_on_resume_is_refused(
    reference_run, tmp_path, monkeypatch, key, value, problem
):
    monkeypatch.chdir(tmp_path)
    if value == "changed":
        shutil.copytree(f"{MODEL}/transformer", "moved/transformer")
        reference_run.pretrained_model_name_or_path = "moved"
        assert train_lora.find_checkpoint(reference_run)[1]["step"] == 3, "moved, and the same"
        path = Path(
            shutil.copytree("moved", "changed"), "transformer/diffusion_pytorch_model.safetensors"
        )
        save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)
    refused(reference_run.model_copy(update={key: value}), problem)


def test_what_may_change_is_said_and_counts_and_what_is_not_ours_is_left_alone(
    reference_run, capsys
):
    config, own = reference_run, checkpoint(reference_run, 1).with_name("step-000001 copy")
    shutil.copytree(checkpoint(config, 1), own)
    shutil.copytree(checkpoint(config, 1), checkpoint(config, 12))
    for name in ("state.safetensors", "state.json"):  # the user has kept the LoRA only
        (checkpoint(config, 12) / name).unlink()
    with open(Path(config.output_dir, "metrics.jsonl"), "a") as file:
        file.write('{"step": 1, "lo')  # cut off by a kill
    config.max_train_steps, config.checkpoints_total_limit, config.validation_step_interval = (
        4,
        1,
        0,
    )
    config.learning_rate, config.train_batch_size, config.lora_alpha, config.init_lora = (
        2e-4,
        1,
        16,
        "gone",
    )
    config.gradient_checkpointing = True  # it was 1, one block
    train_lora.main(config)
    printed = capsys.readouterr().out
    for said in (
        "learning_rate: 0.008 -> 0.0002",
        'null -> "gone" (no effect',
        "train_batch_size: 2 -> 1 (some images",
        "gradient_checkpointing: 1 -> true\n",
    ):
        assert said in printed
    assert "lora_alpha" not in printed and "in epoch 2, of 6 images" in printed
    assert checkpoints(config) == ["step-000004", "step-000012"], (
        "only complete ones count towards the limit"
    )
    assert own.is_dir() and metrics(config)[-1]["lr"] == pytest.approx(1e-4), (
        "after warm-up, half way down the cosine"
    )


@pytest.mark.parametrize("first, then", [(1, 4), (4, 1), (2, 3)])
def test_epochs_are_counted_in_images_whatever_the_batch_size_was(
    quick_config, cheap_loss, before_each, capsys, first, then
):
    settings = dict(num_train_epochs=4, resolution="128x128", checkpoint_step_interval=1000)
    seen = Counter()

    def note(n, config, samples, *arguments):
        seen.update(record.path for _, record in samples)

    before_each("load_batch", note)
    config = quick_config(**settings, train_batch_size=first)
    data = train_lora.read_data(config, None)
    per_epoch = len(train_lora.epoch_batches(data.images, first, 42, 0))
    config.num_train_epochs, config.max_train_steps = 0, per_epoch + 1  # one and a bit
    train_lora.main(config)
    config = quick_config(**settings, train_batch_size=then)
    train_lora.main(config)
    printed = capsys.readouterr().out
    assert f"train_batch_size: {first} -> {then} (some images" in printed
    assert "nothing to train" not in printed
    assert f"in epoch 1, of {len(data.images)} images" in printed
    final = state_of(config, int(checkpoints(config)[-1][5:]))
    assert final["images_seen"] == 4 * len(data.images)
    # Batches that were loaded ahead and not trained on aside.
    assert len(seen) == len(data.images) and min(seen.values()) >= 4 - (first != 1)


def test_with_other_data_the_run_stays_where_it_was_in_epochs(
    quick_config, few_images, tmp_path, cheap_loss, capsys
):
    sources = [{"path": str(few_images), "repeats": 4}]
    config = quick_config(data_dir=sources, num_train_epochs=4, resolution="128x128")
    data = train_lora.read_data(config, None)
    config.num_train_epochs, config.max_train_steps = 0, 2 * data.images_per_epoch
    train_lora.main(config)
    capsys.readouterr()
    config = quick_config(data_dir=str(few_images), num_train_epochs=4, resolution="128x128")
    train_lora.main(config)
    printed = capsys.readouterr().out
    assert f"in epoch 2, of {len(data.images)} images" in printed
    assert "each seen 4.0 times its repeats" in printed and "nothing to train" not in printed


def test_a_checkpoint_that_was_moved_and_linked_is_still_this_runs(
    quick_config, tmp_path, cheap_loss
):
    config = quick_config(max_train_steps=2)
    train_lora.main(config)
    moved = checkpoint(config, 2).rename(tmp_path / "moved")
    checkpoint(config, 2).symlink_to(moved)
    config.max_train_steps = 3
    assert train_lora.main(config).exists()
    assert [line["step"] for line in metrics(config)] == [2, 3], "its metrics are not moved aside"


def test_values_that_are_not_finite_in_the_cache_name_their_image_and_file(
    quick_config, tmp_path, cheap_loss
):
    config = quick_config(cache_dir=str(tmp_path / "own"), max_train_steps=20)
    images, _ = cache_latents.main(config)
    path = cache_latents.latents_file(config, images[2])
    tensors = load_file(path)
    tensors["mean"][0, 0, 0] = math.nan
    save_file(tensors, path)
    refused(config, f"{path.name}: holds values that are not finite, for {images[2].path}; delete")
    config.validation_split, config.validation_step_interval = 0.9, 1
    config.output_dir += "-2"
    refused(config, f"{path.name}: holds values that are not finite")  # when it is scored, too
    path.unlink()
    assert train_lora.main(config).exists()


def test_held_out_images_are_compared_with_training_images_of_their_source_and_size(
    quick_config, few_images, tmp_path
):
    for name in ("one", "two"):
        shutil.copytree(few_images, tmp_path / name)
    for path in (tmp_path / "two").glob("*.png"):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(path)
    sources = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    config = quick_config(
        data_dir=sources, resolution="64,128", validation_split=0.3, validation_step_interval=5
    )
    data = train_lora.read_data(config, None)

    def kinds(records):
        return Counter(
            (record.source, round(math.prod(record.bucket) ** 0.5, -1)) for record in records
        )

    assert kinds(data.held_out) == kinds(data.scored_training)
    assert len({area for _, area in kinds(data.held_out)}) == 2, "both sizes"
    held_out = {record.content_hash for record in data.held_out}
    assert not held_out & {record.content_hash for record in data.images}


def test_changed_data_count_from_the_next_step_on_and_held_out_stays_held_out(
    quick_config, few_images, tmp_path, before_each, cheap_loss, capsys
):
    data, seen = Path(shutil.copytree(few_images, tmp_path / "data")), {}
    before_each(
        "load_batch",
        lambda n, config, samples, files, epoch, number, *_: seen.update({number: samples}),
    )
    config = quick_config(
        data_dir=str(data),
        validation_split=0.2,
        max_train_steps=3,
        validation_step_interval=999,
        validation_prompts=[],
    )
    train_lora.main(config)
    (key,) = state_of(config, 3)["held_out"]
    images = {record.content_hash: Path(record.path) for record in cache_latents.main(config)[0]}
    held, (gone, other, *_) = images.pop(key), images.values()
    assert all(len(samples) == 1 for samples in seen.values())
    assert key not in {record.content_hash for samples in seen.values() for _, record in samples}

    seen.clear()
    for path in held, gone:
        path.rename(path.with_suffix(".away"))
    other.with_suffix(".json").write_text('{"caption": "a new caption"}')
    config.train_batch_size, config.max_train_steps = 2, 8
    train_lora.main(config)
    now = cache_latents.main(config)[0]
    assert 1 <= min(seen) <= 2, "it resumes in the middle of the epoch, which is shorter now"
    epoch = []
    for number, samples in seen.items():
        if len(now) <= number < 2 * len(now):
            epoch += [record for _, record in samples]
    assert sorted(p.content_hash for p in epoch) == sorted(p.content_hash for p in now), (
        "each of now, once"
    )
    assert ["a new caption"] in [record.captions for record in epoch]

    held.with_suffix(".away").rename(held)
    config.max_train_steps = 16
    train_lora.main(config)
    assert key not in {record.content_hash for samples in seen.values() for _, record in samples}
    said = re.findall(r"never trained on: (.*) \(", capsys.readouterr().out)
    assert said == [f"1 of the 7 in {data}", "none", f"1 of the 6 in {data}"]


def test_every_source_is_held_out_in_its_share():
    images = [made_up(i, source="ordinary" if i < 60 else "concept") for i in range(70)]
    for split, expected in (
        (0.1, {"ordinary": 6, "concept": 1}),
        (0.5, {"ordinary": 4, "concept": 4}),
        (0.0, {}),
    ):
        keys = train_lora.hold_out(load_config(validation_split=split), images)
        assert (
            Counter(record.source for record in images if record.content_hash in keys) == expected
        )
    assert train_lora.hold_out(load_config(validation_split=0.1), images[:1]) == [], (
        "one is left to train on"
    )


def test_what_is_never_scored_is_not_held_out():
    images = [made_up(i) for i in range(9)]
    settings = dict(validation_split=0.5, validation_step_interval=0)
    assert train_lora.hold_out(load_config(**settings), images) == []


@pytest.mark.parametrize(
    "held_out, state, interval, expected",
    [
        (1, None, 5, "1 of the 3 in cats (at least one of every source that has two images)"),
        (0, None, 0, "none (validation_step_interval is 0: no image is scored)"),
        (2, {}, 0, "2 of the 3 in cats (validation_step_interval is 0: no image is scored)"),
        (2, {"step": 1}, 5, "2 of the 3 in cats (2 chosen when the run began)"),
        (0, {"step": 1}, 5, "none (0 chosen when the run began)"),
    ],
)
def test_the_log_tells_what_is_held_out(capsys, held_out, state, interval, expected):
    images = [made_up(i, source="cats") for i in range(3)]
    images.append(made_up(1, bucket=(128, 128), source="cats"))  # in two buckets, one image
    hashes = [record.content_hash for record in images[:held_out]]
    config = load_config(validation_split=0.1, validation_step_interval=interval)
    train_lora.report_held_out(config, images, hashes, state)
    line = f"held-out images, never trained on: {expected}\n"
    assert capsys.readouterr().out == line


def test_prodigy_is_cautious_during_warmup():
    """With `safeguard_warmup` its estimate falls with the square of lr, without it only with lr."""
    config = load_config(optimizer="prodigy", learning_rate=1.0, adam_weight_decay=0.0)
    estimates = []
    for lr in (0.1, 0.01):
        parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = train_lora.make_optimizer(config, [parameter], torch.device("cpu"))
        (group,) = optimizer.param_groups
        group["lr"] = lr
        for _ in range(5):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        estimates.append(group["d_hat"])
    assert estimates[0] / estimates[1] == pytest.approx(100, rel=0.01)


def test_a_run_with_prodigy_finds_its_rate_and_is_resumed_to_the_same_bytes(
    quick_config, cheap_loss
):
    config = quick_config(
        optimizer="prodigy", learning_rate=1.0, lr_scheduler="constant", max_train_steps=12
    )
    train_lora.main(config)
    expected, rates = (
        lora_bytes(config),
        [state_of(config, step)["optimizer"]["d"] for step in (10, 12)],
    )
    assert 1e-6 < rates[0] < rates[1]
    assert [line["lr"] for line in metrics(config)] == rates
    for step in (11, 12):
        shutil.rmtree(checkpoint(config, step))
    train_lora.main(config)
    assert lora_bytes(config) == expected


# ---------------------------------------------------------------- starved


def failing(code):
    def fail(*arguments, **options):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    return fail


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done, sync, replace = tmp_path / "file", [], os.fsync, os.replace
    path.write_text("before")
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(os.fstat(number).st_size) or sync(number)
    )
    monkeypatch.setattr(
        os, "replace", lambda *paths: done.append(path.read_text()) or replace(*paths)
    )
    write_file(path, "after it")
    assert done == [8, "before"] and path.read_text() == "after it"


def test_free_space_is_advised_for_a_full_disk_only(tmp_path, monkeypatch):
    for code, full in (("ENOSPC", True), ("EDQUOT", True), ("EIO", False)):
        monkeypatch.setattr(os, "fsync", failing(code))
        with pytest.raises(ValueError, match="file: cannot be written") as error:
            write_file(tmp_path / "file", "x")
        assert ("free space" in str(error.value)) == full and not list(tmp_path.iterdir())


def test_what_a_disk_cannot_do_is_found_out_before_and_nothing_whole_is_deleted(
    quick_config, monkeypatch
):
    config, rename, cannot = quick_config(max_train_steps=1), Path.rename, "."
    refuse = lambda path, target: (failing("EPERM") if path.name.startswith(cannot) else rename)(
        path, target
    )
    monkeypatch.setattr(Path, "rename", refuse)
    refused(config, "checkpoints: folders in it cannot be renamed .*not permitted")
    cannot = ".step"
    assert "free space" not in refused(
        config, "step-000001.tmp: is complete, but cannot be renamed to step-000001"
    )
    rename(checkpoint(config, 1).with_name(".step-000001.tmp"), checkpoint(config, 1))
    monkeypatch.undo()
    assert train_lora.find_checkpoint(config)[1]["step"] == 1
    shutil.rmtree(checkpoint(config, 1).parent)
    checkpoint(config, 1).parent.write_text("in the way")
    refused(config, "checkpoints.*cannot be written")


def fill(patch, *arguments):
    patch.setattr(os, "fsync", failing("ENOSPC"))


def vanish(patch, config, samples, *arguments):
    cache_latents.latents_file(config, samples[0][1]).unlink()


def tear(patch, *arguments):
    update, calls = torch.optim.AdamW.step, itertools.count(1)
    torn = lambda optimizer, *_: (update(optimizer), next(calls) == 2 and failing("EIO")())
    patch.setattr(torch.optim.AdamW, "step", torn)


@pytest.mark.parametrize(
    "what, name, when, problem, saved",
    [
        (
            fill,
            "save_checkpoint",
            2,
            "step-000002.* cannot be written .*; free space",
            ["step-000001"],
        ),
        (vanish, "load_batch", 3, "latents.*is missing or corrupt", ["step-000002"]),
        (
            tear,
            "set_up",
            1,
            "Input/output error",
            [],
        ),  # step 1 is not saved: the weights are no step's
    ],
)
def test_whatever_fails_in_a_step_the_last_complete_one_is_saved(
    quick_config, tmp_path, monkeypatch, before_each, what, name, when, problem, saved
):
    every = 1 if what is fill else 1000
    config = quick_config(
        cache_dir=str(tmp_path / "cache"), max_train_steps=3, checkpoint_step_interval=every
    )
    with monkeypatch.context() as patch:
        before_each(name, lambda n, *arguments: n == when and what(patch, *arguments))
        with pytest.raises((ValueError, OSError), match=problem):
            train_lora.main(config)
    assert checkpoints(config) == saved
    train_lora.main(config)
    assert checkpoints(config)[-1] == "step-000003" and not list(tmp_path.rglob("*.tmp"))


# ---------------------------------------------------------------- previews, the card, what is said


def test_a_lora_says_its_format_and_with_any_other_it_still_opens(reference_run):
    output = Path(reference_run.output_dir)
    path = output / NAMES[0]
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["longcat_lora"])
    assert header["format"] == 1 and header["steps"] == 3
    tensors = load_file(path)
    for number in (None, 7):
        header["format"] = number
        save_file(tensors, path, {"longcat_lora": json.dumps(header)})
        assert validate.trained_steps(path) == 3
        assert validate.read_lora(path).keys()


def test_previews_of_steps_done_again_are_generated_again_and_foreign_files_skipped(
    reference_run, capsys
):
    config, folder = reference_run, Path(reference_run.output_dir) / "validation"
    second, third = (folder / f"step-{step:06d}-00.png" for step in (2, 3))
    (folder / "step-000000-00.png").write_bytes(b"")
    (folder / "step-000002 (1).png").write_bytes(second.read_bytes())
    names = {path.name for path in folder.iterdir()}
    begun, before = second.stat().st_mtime_ns, third.read_bytes()
    shutil.rmtree(checkpoint(config, 3))
    config.learning_rate, config.gradient_accumulation_steps = 0.05, 1
    train_lora.main(config)
    after = third.read_bytes()
    third.unlink()  # as if it had been interrupted
    train_lora.main(config)
    assert third.read_bytes() == after != before
    assert second.stat().st_mtime_ns == begun, "what a start begins with is there"
    config.validation_prompts = ["another apple"]
    train_lora.main(config)
    assert third.read_bytes() != after, "what was there is of another prompt"
    assert {
        path.name for path in folder.iterdir()
    } == names and "failed" not in capsys.readouterr().out


def test_the_card_names_the_base_and_the_best_step_is_chosen_among_scores_of_the_same_images(
    reference_run, capsys
):
    config, card = reference_run, Path(reference_run.output_dir) / "README.md"
    config.model_flavour, config.lr_warmup_steps = "dev", 3
    scores = {
        line["step"]: line["held_out_loss"] for line in metrics(config) if "held_out_loss" in line
    }
    with open(
        Path(config.output_dir) / "metrics.jsonl", "a"
    ) as file:  # the lowest, but of other images
        file.write('{"step": 1, "held_out_loss": 0.01, "held_out_base": 9.0}\n')
    card.unlink()
    train_lora.main(config)
    assert "\nbase_model: meituan-longcat/LongCat-Image-Dev\n" in card.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert (
        "lr_warmup_steps: 3 steps of warmup never reach the full learning rate; lower it" in printed
    )
    assert (
        f"lowest held-out loss: step {min(scores, key=scores.get)}\n" in printed
        and "nothing to train" in printed
    )
