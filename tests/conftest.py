import os  # one thread each, children too: several PyTorch processes on few cores wait for each other's threads

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # fmt: skip

import hashlib
import multiprocessing
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_longcat"
MODEL = os.environ.get("TINY_MODEL", str(TINY / "model"))
sys.path[:0] = [str(ROOT), str(TINY)]


# A shell's background job, nohup and the like ignore these, and what is ignored on entry the scripts leave ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_lora", "validate"])
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))


def sha256(path):
    """A hash of a file's bytes: of bytes themselves pytest would take minutes to show the difference."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def start_script(log, script, *arguments, errors=None, **environment):
    """Starts `python script ...` from the repository's root in a process that has the imports behind it. What it
    prints is added to the file `log`, its errors to `errors` if that is another one."""
    logs = [str(log), str(errors or log)]
    for path in logs:
        Path(path).touch()
    process = FORKS.Process(
        target=run_child, args=(logs, str(script), [*map(str, arguments)], environment), daemon=True
    )
    process.start()
    return process


def run_child(logs, script, arguments, environment):
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", buffering=1, encoding="utf-8")
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stage in ROOT.glob("*.py"):  # so that ours read the environment anew
        sys.modules.pop(stage.stem, None)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_script(script, *arguments, check=True):
    """Runs `python script ...` as start_script does, to its end. Returns its stdout, stderr and returncode."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = start_script(logs[0], script, *arguments, errors=logs[1])
        process.join()
        printed = [log.read_text(encoding="utf-8") for log in logs]
    done = subprocess.CompletedProcess([script, *arguments], process.exitcode, *printed)
    if check and done.returncode:
        pytest.fail(f"{done.args} exited with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def run_together(script, count, folder, *arguments):
    """Runs a script in `count` processes with the environment that torchrun gives them. Returns what each printed."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    logs = [folder / f"process-{i}" for i in range(count)]
    processes = [
        start_script(log, script, *arguments, **environment, RANK=str(i), LOCAL_RANK=str(i))
        for i, log in enumerate(logs)
    ]
    for process in processes:
        process.join()
    printed = [log.read_text(encoding="utf-8") for log in logs]
    assert [process.exitcode for process in processes] == [0] * count, printed
    return printed


def run_python(*arguments, check=True, **options):
    """Runs `python ...` from the repository's root, from its start; returns the finished process."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", **options)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


# ---------------------------------------------------------------- what tests share, in this process and beside it


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function (name, make) that gives a folder which make(folder) has filled: once for all processes of this
    session."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name, make):
        with FileLock(root / f"{name}.lock"):
            folder = root / name
            if not (root / f"{name}.made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (root / f"{name}.made").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def few_pictures(made_once):
    """A folder of seven captioned pictures, in two sizes."""

    def make(folder):
        for i in range(7):
            for path in (TINY / "pictures").glob(f"zumi-{i:02d}.*"):
                shutil.copy(path, folder)

    return made_once("few", make)


@pytest.fixture(scope="session")
def shared_cache(made_once):
    """A cache that tests share: what one has encoded, the others find."""
    return made_once("cache", lambda folder: None)


def tiny(**overrides):
    """The demo's configuration on the tiny model."""
    from longcat_common import load_config

    return load_config(ROOT / "configs" / "tiny.json", **{"pretrained_model_name_or_path": MODEL, **overrides})


def made_up(i, bucket=(64, 64), **fields):
    """A Picture that no file belongs to."""
    from prepare_data import Picture

    what = dict(path=f"{i}.png", key=f"{i:032x}", size=bucket, bucket=bucket, captions=[f"picture {i}"])
    return Picture(**{**what, "repeats": 1, "loss_weight": 1.0, "file": [], **fields})


@pytest.fixture
def tiny_config(tmp_path):
    """A function that gives the demo's configuration, with this test's own output and cache."""
    paths = {"output_dir": str(tmp_path / "output"), "cache_dir": str(tmp_path / "cache")}
    return lambda **overrides: tiny(**{**paths, **overrides})


def quick(few_pictures, shared_cache, **overrides):
    settings = dict(
        data_dir=str(few_pictures), cache_dir=str(shared_cache), lora_rank=16, train_batch_size=1, max_train_steps=4,
        validation_step_interval=0, lr_warmup_steps=2,
        report_to="none", checkpoint_step_interval=1, checkpoints_total_limit=9, validation_num_inference_steps=2,
        validation_prompts=["a red apple"],
    )  # fmt: skip
    return tiny(**{**settings, **overrides})


@pytest.fixture
def quick_config(tmp_path, few_pictures, shared_cache):
    """A function that gives a configuration for a few quick steps: few pictures, no previews, a checkpoint a step."""
    return lambda **overrides: quick(
        few_pictures, shared_cache, **{"output_dir": str(tmp_path / "output"), **overrides}
    )


# Five pictures in batches of two or one: the first epoch ends within step 2.
REFERENCE = dict(
    max_train_steps=3, gradient_accumulation_steps=3, train_batch_size=2, lora_dropout=0.1, gradient_checkpointing=1,
    validation_split=0.2,
    validation_step_interval=2,
)  # fmt: skip


@pytest.fixture
def reference_run(tmp_path, few_pictures, shared_cache, made_once):
    """The configuration of a finished run of three steps, with a checkpoint each, held-out scores and previews at
    steps 0, 2 and 3: trained once for all tests, and copied into this one's folder."""

    def train(folder):
        import train_lora

        train_lora.main(quick(few_pictures, shared_cache, **REFERENCE, output_dir=str(folder / "output")))

    shutil.copytree(made_once("reference", train), tmp_path, dirs_exist_ok=True)
    return quick(few_pictures, shared_cache, **REFERENCE, output_dir=str(tmp_path / "output"))
