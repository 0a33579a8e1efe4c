import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_longcat"
MODEL = os.environ.get("TINY_MODEL", str(TINY / "model"))
sys.path[:0] = [str(ROOT), str(TINY)]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_lora", "validate"])
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))


def start_script(log, script, *arguments, errors=None, **environment):
    """Starts `python script ...` from the repository's root in a process that has the imports behind it. What it prints is
    added to the file `log`, its errors to `errors` if that is another one."""
    logs = [str(log), str(errors or log)]
    for path in logs:
        Path(path).touch()
    process = FORKS.Process(target=run_child, args=(logs, str(script), [*map(str, arguments)], environment), daemon=True)
    process.start()
    return process


def run_child(logs, script, arguments, environment):
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", buffering=1, encoding="utf-8")
    os.chdir(ROOT)
    os.environ.update(environment)
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
    environment = dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    logs = [folder / f"process-{i}" for i in range(count)]
    processes = [start_script(log, script, *arguments, **environment, RANK=str(i), LOCAL_RANK=str(i)) for i, log in enumerate(logs)]
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


@pytest.fixture(scope="session")
def few_pictures(tmp_path_factory):
    """A folder of seven captioned pictures, in two sizes."""
    folder = tmp_path_factory.mktemp("few")
    for i in range(7):
        for path in (TINY / "pictures").glob(f"neonix-{i:02d}.*"):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """A cache that tests share: what one has encoded, the others find."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quick_config(tiny_config, few_pictures, shared_cache):
    """A function that gives a configuration for a few quick steps: few pictures, no previews, a checkpoint a step."""

    def make(**overrides):
        quick = dict(
            data_dir=str(few_pictures), cache_dir=str(shared_cache), train_batch_size=1, max_train_steps=4, validation_step_interval=0, lr_warmup_steps=2,
            report_to="none", checkpoint_step_interval=1, checkpoints_total_limit=9, validation_num_inference_steps=2, validation_prompts=["a red circle"],
        )  # fmt: skip
        return tiny_config(**{**quick, **overrides})

    return make


@pytest.fixture
def tiny_config(tmp_path):
    """A function that gives the demo's configuration, with this test's own output and cache."""
    from longcat_common import load_config

    def make(**overrides):
        paths = {"output_dir": str(tmp_path / "output"), "cache_dir": str(tmp_path / "cache"), "pretrained_model_name_or_path": MODEL}
        return load_config(ROOT / "configs" / "tiny.json", **{**paths, **overrides})

    return make
