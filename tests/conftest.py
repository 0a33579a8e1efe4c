import os  # one thread each, children too: several PyTorch processes on few cores wait for each other's threads

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # fmt: skip

import gc
import hashlib
import json
import multiprocessing
import runpy
import shutil
import signal
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
QUANTIZED = ("int8-quanto", "int4-quanto", "fp8-torchao", "int8-matmul")
NAMES = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"]
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
sys.path[:0] = [str(ROOT), str(TINY)]

# A shell's background job, nohup and the like ignore these, and what is ignored on entry the scripts leave ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish():
    gc.freeze()  # what is imported is no garbage: each stage looks for garbage twice, a quarter of a second a time


# ---------------------------------------------------------------- scripts, as users run them

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_lora", "validate"])
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))


def start_script(log, script, *arguments, errors=None, **environment):
    """Starts `python script ...` from the repository's root in a process that has the imports behind it. What it
    prints is added to the file `log`, its errors to `errors` if that is another one."""
    what = (str(log), str(errors or log), str(script), [*map(str, arguments)], environment)
    process = FORKS.Process(target=run_child, args=what, daemon=True)
    process.start()
    return process


def run_child(log, errors, script, arguments, environment):
    for number, path in enumerate((log, errors), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdout, sys.stderr = (
        open(1, "w", encoding="utf-8"),
        open(2, "w", buffering=1, encoding="utf-8"),
    )
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stage in ROOT.glob("*.py"):  # so that ours read the environment anew
        sys.modules.pop(stage.stem, None)
    gc.freeze()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_script(script, *arguments, check=True):
    """Runs `python script ...` as start_script does, to its end. Returns its stdout, stderr and returncode."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start_script(logs[0], script, *arguments, errors=logs[1])
        process.join()
        printed = [log.read_text(encoding="utf-8") for log in logs]
    if check and process.exitcode:
        pytest.fail(
            f"{script} {arguments} exited with {process.exitcode}:\n" + "\n".join(printed)[-5000:]
        )
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, *printed)


def flags(config):
    """The command line that says the same as this configuration."""
    changed = config.model_dump(exclude_defaults=True).items()
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    return [word for name, value in changed for word in (f"--{name}", text(value))]


# ---------------------------------------------------------------- what a run leaves


def sha256(path):
    """A hash of a file's bytes: of bytes themselves pytest would take minutes to show the difference."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def lora_bytes(config):
    """A hash of the bytes of each of the run's LoRA files."""
    return [sha256(Path(config.output_dir) / name) for name in NAMES]


def checkpoints(config):
    return sorted(
        folder.name for folder in Path(config.output_dir, "checkpoints").glob("step-??????")
    )


def metrics(config):
    return [
        json.loads(line)
        for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    ]


# ---------------------------------------------------------------- configurations, and what tests share


def tiny(**overrides):
    """The demo's configuration on the tiny model."""
    from longcat_common import load_config

    return load_config(
        ROOT / "configs" / "tiny.json", **{"pretrained_model_name_or_path": MODEL, **overrides}
    )


def give_the_authors_positions(text_encoder):
    """Makes transformers' own text encoder count positions as transformers 4.57.1 did, with which the model was
    trained: a real token's are those of transformers 5, every padding token has position 1."""

    def add_position_ids(module, arguments, options):
        mask = options["attention_mask"]
        positions = torch.where(mask == 1, mask.cumsum(dim=1) - 1, 1)
        return arguments, options | {"position_ids": positions.expand(3, -1, -1)}

    text_encoder.register_forward_pre_hook(add_position_ids, with_kwargs=True)


def made_up(i, bucket=(64, 64), **fields):
    """A ImageRecord that no file belongs to."""
    from prepare_data import ImageRecord

    what = dict(
        path=f"{i}.png",
        content_hash=f"{i:032x}",
        size=bucket,
        bucket=bucket,
        captions=[f"picture {i}"],
    )
    return ImageRecord(**{**what, "repeats": 1, "loss_weight": 1.0, "stamp": [], **fields})


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function (name, make) that gives a folder which make(folder) has filled, once for this session's processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name, make):
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def few_images(made_once):
    """A folder of seven captioned pictures, in three sizes."""
    copy = lambda folder: [
        shutil.copy(p, folder) for i in range(7) for p in TINY.glob(f"pictures/zumi-{i:02d}.*")
    ]
    return made_once("few", copy)


@pytest.fixture
def tiny_config(tmp_path):
    """A function that gives the demo's configuration, with this test's own output and cache."""
    paths = {"output_dir": str(tmp_path / "output"), "cache_dir": str(tmp_path / "cache")}
    return lambda **overrides: tiny(**{**paths, **overrides})


@pytest.fixture
def quick_config(tmp_path, few_images, made_once):
    """A function that gives a configuration for a few steps: few pictures, a cache that tests share, no previews."""
    settings = dict(
        output_dir=str(tmp_path / "output"), data_dir=str(few_images), cache_dir=str(made_once("cache", Path)),
        lora_rank=16, train_batch_size=1, max_train_steps=4, lr_warmup_steps=2, report_to="none",
        checkpoint_step_interval=1, checkpoints_total_limit=9,
        validation_step_interval=0, validation_num_inference_steps=2, validation_prompts=["a red apple"],
    )  # fmt: skip
    return lambda **overrides: tiny(**{**settings, **overrides})


@pytest.fixture
def reference_run(tmp_path, quick_config, made_once):
    """The configuration of a finished run of three steps, with a checkpoint each, held-out scores and previews at
    steps 0, 2 and 3: trained once for all tests, and copied into this one's folder. Six images in three
    batches of two: the first epoch ends within step 2."""
    settings = dict(
        max_train_steps=3, gradient_accumulation_steps=2, train_batch_size=2, lora_dropout=0.1,
        gradient_checkpointing=1, validation_split=0.2, validation_step_interval=2,
    )  # fmt: skip

    def train(folder):
        import train_lora

        train_lora.main(quick_config(**settings, output_dir=str(folder / "output")))

    shutil.copytree(made_once("reference", train), tmp_path, dirs_exist_ok=True)
    return quick_config(**settings)
