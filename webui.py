"""The scripts as a page in the browser: settings, data, jobs, pictures.

    python webui.py                                            # then open http://localhost:8001
    python webui.py --folders /mnt/pictures                    # a further folder that the page may use
    python webui.py --host 0.0.0.0 --password "a long one"     # for other machines, too

The page edits a config and starts `train_lora.py` or `validate.py` with it; what it shows it reads from the files that they
write. A job is a process of its own: it goes on without the page and without this server.
"""

import argparse
import asyncio
import contextlib
import datetime
import hmac
import html
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin
from urllib.parse import urlsplit

try:
    import fcntl

    import gradio as gr
except ModuleNotFoundError as error:
    if error.name == "fcntl":
        sys.exit("error: the page needs Linux or macOS; on Windows start it in WSL")
    sys.exit("error: the page needs Gradio; install it with: pip install 'gradio>=6.31,<7'")
import pandas as pd
import torch
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

import prepare_data
from longcat_common import (
    GROUPS, KEYS, LORA_NAME, RENAMED, Source, UserError, checkpoint_folders, flag_value, in_parallel, kinds,
    load_config, read_config, read_json, sources, step_of, write_file,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"
FOLDERS = ("data", "cache", "models", "tests/tiny_longcat")  # that the page may use, beside --output and --folders
THUMBNAILS = 24  # a page of the gallery
LOG_LINES, REFRESH_SECONDS = 14, 2
STOPPING = "stopping: saves this step first"
# The keys in front, with labels of their own; the rest are under "more", by name.
FRONT = {
    "data_dir": "Folder with your pictures",
    "trigger_words": "Trigger words",
    "instance_prompt": "Caption for pictures without one",
    "validation_prompts": "Prompts to draw, one a line",
    "output_dir": "Folder for the results",
    "max_train_steps": "Steps",
    "learning_rate": "Learning rate",
    "lora_rank": "LoRA rank",
    "resolution": "Size of the pictures",
    "validation_step_interval": "Steps between previews",
    "model_family": "Model family",
    "model_flavour": "Flavour",
    "pretrained_model_name_or_path": "Model: local folder or hub name",
    "base_model_precision": "Precision",
}
OTHER_STAGES = ("benchmark", "lora", "compare_checkpoints", "validation_lora_strength")  # mean nothing in training
TRY = {
    "validation_prompts": "Prompts to draw, one a line",
    "validation_negative_prompt": "Negative prompt",
    "validation_lora_strength": "Strength of the LoRA",
    "validation_seed": "Seed",
    "validation_num_inference_steps": "Sampling steps",
    "validation_guidance": "Guidance",
    "validation_resolution": "Size",
}
CURVES = {"loss": "#9ca3af", "held_out_loss": "#ea580c", "held_out_base": "#2563eb"}  # from metrics.jsonl
CSS = ".wrong input, .wrong textarea { border-color: #dc2626 !important } .wrong [class*=info] { color: #dc2626 !important } .log textarea { font-family: monospace; font-size: 12px; line-height: 1.4; white-space: pre; overflow-x: auto }"

t = gr.I18n()  # t("a text") is shown in the browser's language, see TEXTS


# ---------------------------------------------------------------- a form: settings as texts


def to_text(name, value):
    """A key's value as its field shows it: a list of texts one a line, true or false as a tick, nothing for null and []."""
    if kinds(KEYS[name].annotation) == {bool}:
        return bool(value)
    if value in (None, []):
        return ""
    if name == "data_dir" and isinstance(value, list):
        value = [part.model_dump(exclude_defaults=True) if isinstance(part, Source) else part for part in value]
        value = (
            value[0]["path"] if len(value) == 1 and isinstance(value[0], dict) and [*value[0]] == ["path"] else value
        )
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if isinstance(value, list) and len(value) == 1 and name != "data_dir":
        value = value[0]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # half a character could not be sent


def from_text(name, text):
    """What load_config is given for a field's content; None for an empty field, whose key is left out."""
    if isinstance(text, bool):
        return text
    text = str(text or "").strip()
    if not text:
        return None
    if name in ("validation_prompts", "trigger_words", "lora_target_modules"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (
            lines[0]
            if name == "validation_prompts" and len(lines) == 1 and lines[0].lower().endswith(".txt")
            else lines
        )
    return flag_value(name, text)


def read_form(texts, place, fixed={}):
    """The configuration that a form's {key: text} and the `fixed` {key: value} stand for, or None, and {key: what is wrong}."""
    given, problems, config = {name: from_text(name, text) for name, text in texts.items()}, {}, None
    given = {name: value for name, value in given.items() if value is not None}
    given |= {RENAMED.get(name, name): value for name, value in fixed.items()}
    for name, value in ({name: KEYS[name].default for name in ("output_dir", "cache_dir")} | given).items():
        try:
            confine(name, value, place)
        except UserError as error:
            problems[name] = str(error)
        except UnicodeEncodeError:
            continue  # half a character in a path: the configuration says so
    try:
        config = load_config(**{name: value for name, value in given.items() if name not in problems})
    except UserError as error:
        problems |= {re.split(r"[:.\[]", line)[0]: line for line in str(error).splitlines()}
    return (None if problems else config), problems


def confine(name, value, place):
    """Raises UserError if a path in this key's value lies outside the page's folders."""
    paths, folders = [], [place.output] if name == "output_dir" else [place.output, *place.folders]
    if name == "data_dir":
        with contextlib.suppress(ValueError, TypeError):  # load_config says so
            paths = [source["path"] for source in map(dict, sources(value)) if isinstance(source.get("path"), str)]
    elif name in (
        "output_dir",
        "cache_dir",
        "init_lora",
        "lora",
        "resume_from_checkpoint",
        "pretrained_model_name_or_path",
        "validation_prompts",
    ) and isinstance(value, str):
        is_word = name in ("lora", "resume_from_checkpoint") and value in ("latest", "none")
        is_hub_name = (
            name == "pretrained_model_name_or_path"
            and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value)
            and not os.path.exists(value)
        )
        paths = [] if is_word or is_hub_name else [value]
    for path in map(os.path.expanduser, paths):
        if "\0" in path or not is_inside(path, folders) or is_inside(path, [place.output / ".webui"]):
            flag = "--output" if name == "output_dir" else "--folders"
            raise UserError(
                f"{name}: found {path!r}, which is outside this page's folders ({', '.join(map(str, folders))}); start webui.py with {flag} {path}"
            )
        if name == "data_dir" and not os.path.isdir(path):  # a list may name pictures anywhere
            raise UserError(
                f"data_dir: {path} is no folder"
                + ("; the page takes folders, only the command line takes lists" if os.path.exists(path) else "")
            )


def is_inside(path, folders):
    """Whether a path, its links followed, is one of these folders or lies in one."""
    path = Path(os.path.realpath(path))
    return any(path.is_relative_to(os.path.realpath(folder)) for folder in folders)


def fields(names, labels, defaults):
    """A form's components, {key: component}, each with the key's own description."""
    made = {}
    for name in names:
        key, value = KEYS[name], to_text(name, getattr(defaults, name))
        label = t(labels[name]) if name in labels else name
        shared = dict(
            label=label, info=description(name, labels), elem_id=f"{'try' if labels is TRY else 'key'}-{name}"
        )
        if kinds(key.annotation) == {bool}:
            made[name] = gr.Checkbox(value, **shared)
        elif get_origin(key.annotation) is Literal:  # a wrong one of a file is told in load_config's words
            made[name] = gr.Dropdown(get_args(key.annotation), value=value, allow_custom_value=True, **shared)
        else:
            lines = 3 if get_origin(key.annotation) is list and not kinds(key.annotation) & {int, float} else 1
            made[name] = gr.Textbox(value, placeholder=to_text(name, key.default), lines=lines, max_lines=8, **shared)
    return made


def description(name, labels):
    """A key's own description, and its name if the field has another label."""
    return f"{t(f'help:{name}')} ({name})" if labels is FRONT and name in FRONT else t(f"help:{name}")


def marked(names, labels, problems):
    """Updates for these keys' fields: each problem stands where the description was."""
    return [
        gr.update(info=f"⚠ {plain(problems[name])}", elem_classes=["wrong"])
        if name in problems
        else gr.update(info=description(name, labels), elem_classes=[])
        for name in names
    ]


def said(problems):
    """The first problem as Markdown, or nothing."""
    return "".join(f"⚠ {plain(line)}" for line in list(problems.values())[:1])


def plain(text):
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", html.escape(str(text), quote=False))


def settings_of(config):
    """What a config file must hold: what is in front, and what is not the default."""
    default, values = load_config().model_dump(), config.model_dump()
    # As written: to Python 1 block and true are equal.
    return {name: values[name] for name in KEYS if name in FRONT or repr(values[name]) != repr(default[name])}


# ---------------------------------------------------------------- jobs: processes, and files that tell about them

# A job's process. Its lock is handed down locked, so whoever can lock it knows that the job has ended. The jobs before
# it on the same device are waited for by their locks: the line needs no server.
JOB = """
import fcntl, os, runpy, sys
lock, script, config, *earlier = sys.argv[1:]
os.write(int(lock), f"{os.getpid()}\\n".encode())
if os.path.exists(os.path.join(os.path.dirname(config), "stop")):
    sys.exit()
for path in earlier:
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_SH)
sys.argv, sys.path[0], code = [script, config], os.path.dirname(script), 1
try:
    runpy.run_path(script, run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
finally:
    os.write(int(lock), f"{code}\\n".encode())
"""


def devices():
    """What jobs can run on, one job at a time each."""
    if torch.cuda.is_available():
        return [f"GPU {i}" for i in range(torch.cuda.device_count())]
    return ["Mac GPU" if torch.backends.mps.is_available() else "CPU"]


def start_job(place, what, script, config, device):
    """Puts a job at the end of the device's line. Returns its number. Raises UserError if one trains in the same folder."""
    place.jobs.mkdir(parents=True, exist_ok=True)
    with open(place.jobs / "start", "w") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        jobs = read_jobs(place)
        for job in jobs:
            if (
                what == job.what == "training"
                and job.alive
                and os.path.realpath(job.output_dir) == os.path.realpath(config.output_dir)
            ):
                raise UserError(
                    f"output_dir: job {job.number} is at work in {config.output_dir}; stop it first, or choose another folder"
                )
        folder = place.jobs / str(
            1 + max([int(path.name) for path in place.jobs.iterdir() if path.name.isdecimal()], default=0)
        )
        earlier = [str(job.folder / "lock") for job in jobs if job.alive and job.device == device]
        write_file(folder / "config.json", config.model_dump_json(indent=2) + "\n")
        facts = {
            "what": what,
            "output_dir": config.output_dir,
            "device": device,
            "time": datetime.datetime.now().isoformat(" ", "minutes"),
        }
        write_file(folder / "job.json", json.dumps(facts, ensure_ascii=False) + "\n")
        environment = {**os.environ, "PYTHONUTF8": "1", "TQDM_MININTERVAL": "1"}
        if device.startswith("GPU "):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(device[4:])]
        with open(folder / "lock", "w") as lock, open(folder / "log.txt", "wb") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = [
                sys.executable,
                "-c",
                JOB,
                str(lock.fileno()),
                str(HERE / script),
                str(folder / "config.json"),
                *earlier,
            ]
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
    return int(folder.name)


def read_jobs(place):
    """All jobs, oldest first: number, folder, what, output_dir, device, time, alive and state."""
    jobs, busy = [], set()
    for folder in sorted(
        (path for path in place.jobs.glob("[0-9]*") if path.name.isdecimal()), key=lambda folder: int(folder.name)
    ):
        try:
            facts = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            facts = {
                name: str(facts[name]).replace("\0", "").encode().decode()
                for name in ("what", "output_dir", "device", "time")
            }
            with open(folder / "lock") as lock:
                numbers = [int(line) for line in lock.read().split()]
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    alive = False
                except BlockingIOError:
                    alive = True
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a job's folder, or one that is just being made
        code, told = numbers[1] if len(numbers) > 1 else None, (folder / "stop").exists()
        if alive:
            state = STOPPING if told else "waiting" if facts["device"] in busy else "running"
            busy.add(facts["device"])
        else:
            state = (
                "finished"
                if code == 0
                else "stopped"
                if code in (130, 143) or (told and code is None)
                else "failed"
                if code
                else "cut off"
            )
        jobs.append(SimpleNamespace(number=int(folder.name), folder=folder, alive=alive, state=state, **facts))
    return jobs


def stop_job(job):
    """SIGTERM, once, for a second one would leave at once: training finishes its step and saves; who waits leaves the line."""
    if job.alive and job.state != STOPPING:
        (job.folder / "stop").touch()
        started = (job.folder / "lock").read_text().split()  # if not yet: it looks for the file itself
        if started:
            os.kill(int(started[0]), signal.SIGTERM)


def log_tail(path):
    """The last lines of a log; of each progress bar what it shows last, if it has not been wiped away."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 60_000))
        text = re.sub(
            r"\x1b\[[0-9;]*[A-Za-z]", "", file.read().decode("utf-8", "replace")
        )  # without a terminal's commands
    lines, last = {}, None
    for i, line in enumerate(re.split(r"[\r\n]+", text)):
        bar = re.match(r"([^:|]+): +\d+%\|", line.lstrip()[:200])
        last = bar[1] if bar else last if line.isspace() else i
        lines.pop(last, None)
        lines[last] = line.rstrip()
    return "\n".join([line for line in lines.values() if line][-LOG_LINES:])


# ---------------------------------------------------------------- runs: what training leaves


def find_runs(place, jobs):
    """The folders under the output folder that hold a run, newest first: those of jobs, and of others two folders deep."""
    found = {
        path.parent: path
        for pattern in ("config.json", "*/config.json", "*/*/config.json")
        for path in place.output.glob(pattern)
    }
    found |= {
        Path(job.output_dir): Path(job.output_dir) / "config.json"
        for job in jobs
        if is_inside(job.output_dir, [place.output])
    }
    times = {
        folder: stamp(path)
        for folder, path in found.items()
        if ".webui" not in folder.parts and str(folder).isprintable()
    }
    return sorted((folder for folder, time in times.items() if time), key=lambda folder: times[folder][1], reverse=True)


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, as dictionaries of numbers."""
    path, lines = folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            values = {name: float(value) for name, value in json.loads(line).items()}
            if all(map(math.isfinite, values.values())):
                lines.append({**values, "step": int(values["step"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # the last one may be half written
    return lines


def newest(metrics, name):
    return next((line[name] for line in reversed(metrics) if name in line), None)


def figures(metrics, steps, running):
    """What a run's row of figures shows: step, loss, held-out loss, seconds a step, peak memory, time left."""
    number = lambda value, form: "" if value is None else format(value, form)
    step, seconds, memory, base = (
        newest(metrics, "step") or 0,
        newest(metrics, "seconds_per_step"),
        newest(metrics, "peak_memory_gib"),
        newest(metrics, "held_out_base"),
    )
    left = (
        str(datetime.timedelta(seconds=round((steps - step) * seconds))) if running and seconds and step < steps else ""
    )
    held_out = number(newest(metrics, "held_out_loss"), ".4f") + (f" / {base:.4f}" if base is not None else "")
    return [
        f"{step} / {steps}",
        number(newest(metrics, "loss"), ".4f"),
        held_out,
        number(seconds, ".3g"),
        f"{memory:.1f} GiB" if memory else "",
        left,
    ]


def curves(metrics):
    """Loss, held-out loss and the base's as a table for the plot; of a long run an even choice."""
    kept = [line for i, line in enumerate(metrics) if "held_out_loss" in line or i % math.ceil(len(metrics) / 500) == 0]
    points = [
        (math.nan, math.nan, name) for name in CURVES
    ]  # a plot that began without a curve would not draw it later
    points += [(line["step"], line[name], name) for line in kept for name in CURVES if name in line]
    return pd.DataFrame(points, columns=["step", "value", "curve"])


def loras_of(folder):
    """{label: path} of a run's LoRAs, the newest first, to choose from."""
    found = {LORA_NAME: folder / LORA_NAME}
    found |= {path.name: path / LORA_NAME for path in reversed(checkpoint_folders(SimpleNamespace(output_dir=folder)))}
    return {label: path for label, path in found.items() if path.exists()}


# ---------------------------------------------------------------- the page


def set_up_tab(place, start):
    """Settings: choose a config, change it, save it. Returns the form's components, and what is to be done when the page is
    loaded."""
    with gr.Row():
        chosen = gr.Dropdown(config_names(), value=start, label=t("Start from"), elem_id="config", scale=2)
        about = gr.Markdown(plain(about_config(start)), elem_id="about")
    config = load_config(CONFIGS / start)
    with gr.Row():
        names = list(FRONT)
        with gr.Column():
            form = fields(names[:5], FRONT, config)
        with gr.Column():
            form |= fields(names[5:10], FRONT, config)
        with gr.Column():
            form |= fields(names[10:], FRONT, config)
    names = [*KEYS]
    starts = [names.index(first) for first in GROUPS]
    for group, start, end in zip(GROUPS.values(), starts, [*starts[1:], len(names)]):
        with gr.Accordion(t(f"More: {group}"), open=False, elem_id=f"more-{group}"):
            rest = [name for name in names[start:end] if name not in FRONT and name not in OTHER_STAGES]
            for i in range(0, len(rest), 3):
                with gr.Row():
                    form |= fields(rest[i : i + 3], {}, config)
    message = gr.Markdown(elem_id="set-up-message")
    with gr.Row():
        name = gr.Textbox(
            label=t("Save as"), info=t("a file in configs/, for the command line, too"), elem_id="save-name"
        )
        replace = gr.Checkbox(label=t("Replace the file of that name"))
        save = gr.Button(t("Save"), elem_id="save")
    saved = gr.Markdown(elem_id="save-message")  # its own place: a check still at work must not wipe it away
    names, components = list(form), list(form.values())
    kept = gr.BrowserState({}, storage_key="longcat-webui", secret="form")  # a reloaded page shows what was typed

    def check(file, *texts):
        _, problems = read_form(dict(zip(names, texts)), place)
        return [*marked(names, FRONT, problems), said(problems), {"file": file, "texts": dict(zip(names, texts))}]

    def load(file):
        if file not in config_names():
            raise gr.Error(f"{file}: there is no such file")
        try:
            given = read_config(CONFIGS / file)
        except UserError as error:
            return [f"⚠ {plain(error)}", *[gr.skip() for _ in names]]
        default, texts, unused = load_config(), [], [name for name in given if name not in names]
        for name in names:
            value = given.get(name, getattr(default, name))
            if kinds(KEYS[name].annotation) == {bool} and not isinstance(value, bool):  # no tick can show it
                unused.append(f"{name}: found {ascii(value)}")
                value = getattr(default, name)
            texts.append(to_text(name, value))
        return [
            plain(about_config(file)) + (f"\n\n⚠ {plain('ignored: ' + ', '.join(unused))}" if unused else ""),
            *texts,
        ]

    def write(file, may_replace, *texts):
        config, problems = read_form(dict(zip(names, texts)), place)
        file = file.strip().removesuffix(".json")
        if problems:
            return [said(problems), *[gr.skip()] * 3]
        if not re.fullmatch(r"\w[\w .-]{0,49}", file):
            return [
                t("⚠ The name of a file needs letters, digits, spaces, dots, - or _, 50 at most."),
                *[gr.skip()] * 3,
            ]
        path = CONFIGS / f"{file}.json"
        if path.is_file() and not may_replace:
            return [
                f"{t('⚠ There is such a file already; choose another name, or tick Replace:')} {plain(path.name)}",
                *[gr.skip()] * 3,
            ]
        try:
            about = f"// {about_config(path.name)}\n" if path.is_file() and about_config(path.name) else ""
            write_file(path, about + json.dumps(settings_of(config), indent=2, ensure_ascii=False) + "\n")
        except UserError as error:
            return [f"⚠ {plain(error)}", *[gr.skip()] * 3]
        return [
            f"{t('Saved:')} configs/{plain(path.name)}",
            gr.update(choices=config_names(), value=path.name),
            plain(about_config(path.name)),
            False,
        ]

    def restore(stored):
        file, texts = stored.get("file"), stored.get("texts", {})
        if set(texts) != set(names) or file not in config_names():
            return [gr.update(choices=config_names()), *[gr.skip() for _ in range(len(names) + 1)]]
        return [
            gr.update(choices=config_names(), value=file),
            plain(about_config(file)),
            *(texts[name] for name in names),
        ]

    checking = [check, [chosen, *components], [*components, message, kept]]
    typed = [component.blur if isinstance(component, gr.Textbox) else component.input for component in components]
    gr.on(typed, *checking, show_progress="hidden", trigger_mode="always_last")
    chosen.input(load, chosen, [about, *components]).then(*checking, show_progress="hidden")
    save.click(write, [name, replace, *components], [saved, chosen, about, replace])
    return form, lambda page: page.load(restore, kept, [chosen, about, *components], show_progress="hidden").then(
        *checking, show_progress="hidden"
    )


def config_names():
    """The config files to choose from."""
    return sorted(path.name for path in CONFIGS.glob("*.json"))


def about_config(file):
    """A config file's first comment: what it is for, and the memory it takes."""
    first = (CONFIGS / file).read_text(encoding="utf-8", errors="replace").splitlines()[:1]
    return first[0][2:].strip() if first and first[0].startswith("//") else ""


def data_tab(place, form):
    """The report and the preview sheet of prepare_data.py, and the captions, to be read and corrected."""
    names, components = list(form), list(form.values())
    look = gr.Button(t("Look at the data"), variant="primary", elem_id="look")
    message = gr.Markdown(elem_id="data-message")
    sheet = picture("What the model will see", elem_id="sheet", visible=False)
    with gr.Accordion(t("Report"), open=False, visible=False, elem_id="report-box") as report_box:
        report = gr.Markdown(elem_id="report")
    pictures = gr.State([])  # {"picture", "captions", "stamp"} each, and "typed" if that is not saved yet
    with gr.Column(visible=False) as captions_box:
        gr.Markdown(f"### {t('Captions: choose a picture')}")
        with gr.Row():
            with gr.Column(scale=2):
                gallery = gr.Gallery(
                    show_label=False,
                    columns=6,
                    height=560,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="pictures",
                )
                number, first = (
                    gr.Slider(1, 2, value=1, step=1, label=t("Page"), visible=False, elem_id="page"),
                    gr.State(0),
                )
            with gr.Column():
                index = gr.Number(
                    visible=False, precision=0
                )  # in the browser, so that it changes together with the caption
                large = picture("Picture", height=300, elem_id="picture")
                caption = gr.Textbox(label=t("Caption, one a line"), lines=4, elem_id="caption", interactive=True)
                where = gr.Markdown(elem_id="caption-file")
                save = gr.Button(t("Save the caption"), elem_id="save-caption")
                saved = gr.Markdown(elem_id="caption-message")

    def show(before, i, text, *texts, progress=gr.Progress(track_tqdm=True)):
        config, problems = read_form(dict(zip(names, texts)), place)
        if not problems and not config.data_dir:
            problems = {"data_dir": "data_dir: not set; name the folder with your pictures"}
        if problems:
            return [said(problems), *[gr.skip() for _ in outputs[1:]]]
        found, output = [], Path(config.output_dir)
        try:
            prepare_data.main(config)
            line = ""
        except (UserError, OSError) as error:
            line = f"⚠ {plain(error)}"
        for source in config.data_dir:
            for path, captions in prepare_data.read_source(source, config, prepare_data.Findings()):
                found.append({"picture": path, "captions": captions, "stamp": own_stamps(path)})
        keep_typed(before, i, text)
        typed = {entry["picture"]: {"typed": entry["typed"]} for entry in before if "typed" in entry}
        found = [entry | typed.get(entry["picture"], {}) for entry in found]
        text = (output / "report.md").read_text(encoding="utf-8") if (output / "report.md").exists() else ""
        pages = math.ceil(len(found) / THUMBNAILS)
        return [
            line or plain(text.split("\n")[2]), gr.update(value=None if line else str(output / "preview.jpg"), visible=not line), gr.update(visible=bool(text)),
            report_as_text(text), found, gr.update(visible=bool(found)), gr.update(maximum=max(2, pages), value=1, visible=pages > 1),
            *turn(found, 1), None, None, "", "", "",
        ]  # fmt: skip

    def turn(found, page):
        start = (int(page) - 1) * THUMBNAILS
        return thumbnails(found[start : start + THUMBNAILS]), start

    def choose(found, start, i, text, event: gr.SelectData):
        kept, entry = keep_typed(found, i, text), found[start + event.index]
        left = f"{t('⚠ Not saved yet, but kept here as you typed it:')} {plain(found[i]['picture'])}" if kept else ""
        return (
            found,
            start + event.index,
            thumbnail(entry["picture"], 768),
            entry.get("typed", "\n".join(entry["captions"])),
            plain(entry["picture"]),
            left,
        )

    def write(found, i, text, start):
        captions = lines_of(text)
        if i is None or not 0 <= i < len(found) or not captions:
            return t("⚠ Choose a picture, and write a caption."), gr.skip(), gr.skip()
        path = found[i]["picture"]
        try:
            for suffix in (".txt", ".json"):
                if not is_inside(path.with_suffix(suffix), [place.output, *place.folders]):
                    raise UserError(f"{path.with_suffix(suffix)}: is a link out of this page's folders")
            if own_stamps(path) != found[i]["stamp"] or not path.exists():
                return (
                    f"{t('⚠ This file has changed meanwhile; look at the data again:')} {plain(path)}",
                    gr.skip(),
                    gr.skip(),
                )
            file = prepare_data.save_captions(path, captions)
        except UserError as error:
            return f"⚠ {plain(error)}", gr.skip(), gr.skip()
        found[i].pop("typed", None)
        found[i] |= {"captions": captions, "stamp": own_stamps(path)}
        return f"{t('Saved:')} {plain(file)}", found, thumbnails(found[start : start + THUMBNAILS])

    outputs = [
        message,
        sheet,
        report_box,
        report,
        pictures,
        captions_box,
        number,
        gallery,
        first,
        index,
        large,
        caption,
        where,
        saved,
    ]
    look.click(show, [pictures, index, caption, *components], outputs, show_progress_on=message)
    number.change(turn, [pictures, number], [gallery, first], show_progress="hidden")
    gallery.select(
        choose,
        [pictures, first, index, caption],
        [pictures, index, large, caption, where, saved],
        show_progress="hidden",
    )
    save.click(write, [pictures, index, caption, first], [saved, pictures, gallery], show_progress="hidden")


def lines_of(text):
    """Captions as typed, one a line."""
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]


def keep_typed(found, i, text):
    """Notes what is typed for the picture `i`, if that is not what its file holds. Returns whether it is not."""
    if i is None or not 0 <= i < len(found):
        return False
    found[i].pop("typed", None)
    if lines_of(text) == found[i]["captions"]:
        return False
    found[i]["typed"] = text
    return True


def report_as_text(report):
    """report.md for the page: what stands in its lists, file names and captions, is shown as it is."""
    return "\n".join(f"- {plain(line[2:])}" if line.startswith("- ") else line for line in report.split("\n")[4:])


def picture(label, **options):
    """A place for a picture; without a label on it, which would hide a part."""
    return gr.Image(label=t(label), show_label=False, interactive=False, buttons=["download", "fullscreen"], **options)


def stamp(file):
    """What tells that a file has not changed; None if there is none."""
    return prepare_data.file_stamp(os.stat(file)) if file and os.path.isfile(file) else None


def own_stamps(path):
    """The stamps of a picture's own caption files."""
    return [stamp(path.with_suffix(suffix)) for suffix in (".txt", ".json")]


def thumbnails(entries):
    """What the gallery shows of these pictures: (picture, its first caption) each; ✎ if another one is typed, but not saved."""
    images = in_parallel(lambda entry: thumbnail(entry["picture"], 192), entries)
    return [
        (image, "✎ " * ("typed" in entry) + (entry["captions"][0] if entry["captions"] else "⚠"))
        for image, entry in zip(images, entries)
    ]


def thumbnail(path, side):
    """A picture, small and upright; red if it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((side, side))
            return image
    except Exception:  # the report says why; Pillow's plugins raise many kinds
        return Image.new("RGB", (side, side), "#cc0000")


def jobs_tab(place, form):
    """Start, stop, resume; and what a job or an earlier run has come to."""
    names, components = list(form), list(form.values())
    with gr.Row():
        device = gr.Dropdown(
            devices(), value=devices()[0], label=t("Device"), visible=len(devices()) > 1, elem_id="device"
        )
        start = gr.Button(t("Start training"), variant="primary", elem_id="start")
        measure = gr.Button(t("Measure speed and memory"), elem_id="measure")
    message = gr.Markdown(elem_id="jobs-message")
    with gr.Row():
        chosen = gr.Dropdown([], label=t("Job or earlier run"), elem_id="job", scale=3)
        stop = gr.Button(t("Stop"), variant="stop", elem_id="stop")
        resume = gr.Button(t("Go on"), elem_id="resume")
    with gr.Row():
        state = gr.Markdown(elem_id="state", container=True)
        shown = [
            gr.Textbox(label=t(label), interactive=False, min_width=100, elem_id=label.split()[0].lower())
            for label in ("Step", "Loss", "Held-out loss / base", "Seconds a step", "Peak memory", "Time left")
        ]
    with gr.Row():
        with gr.Column():
            plot = gr.LinePlot(
                curves([]),
                x="step",
                y="value",
                color="curve",
                color_map=CURVES,
                colors_in_legend=[],
                y_title=" ",
                label=t("Loss"),
                height=310,
                elem_id="plot",
            )
            gr.HTML(
                " ".join(f'<span style="color: {colour}">●</span> {name}' for name, colour in CURVES.items())
            )  # the plot's own is cut off
        with gr.Column():
            log = gr.Textbox(
                label=t("Last lines of the log"),
                lines=LOG_LINES,
                max_lines=LOG_LINES,
                interactive=False,
                elem_id="log",
                elem_classes=["log"],
            )
    preview = picture("Previews", elem_id="preview", visible=False)
    lora = gr.DownloadButton(t("Download the LoRA"), visible=False, elem_id="download")
    seen = gr.State([])

    def begin(device, *texts, benchmark=0):
        config, problems = read_form(dict(zip(names, texts)), place, {"benchmark": benchmark})
        if not problems and not benchmark:
            problems = why_not(config)
        return (
            [f"{t('⚠ Correct this in Set up:')} {plain(next(iter(problems.values())))}", gr.skip()]
            if problems
            else begin_with(config, device)
        )

    def begin_with(config, device):
        try:
            number = start_job(
                place, "measurement" if config.benchmark else "training", "train_lora.py", config, device
            )
        except (UserError, OSError) as error:
            return [f"⚠ {plain(error)}", gr.skip()]
        return ["", gr.update(choices=choices(place, read_jobs(place)), value=str(number))]

    def go_on(value, device):
        job, run = find(place, read_jobs(place), value)
        if not run or (job and job.what != "training"):
            return [t("⚠ Choose a job that trains, or a run."), gr.skip()]
        try:
            given = {**read_config((job.folder if job else run) / "config.json"), "output_dir": str(run)}
            if checkpoint_folders(SimpleNamespace(output_dir=run)):
                given["resume_from_checkpoint"] = "latest"
            config, problems = read_form({}, place, given)
        except UserError as error:
            problems = {"config": str(error)}
        return [said(problems), gr.skip()] if problems else begin_with(config, device)

    def end(value):
        job, _ = find(place, read_jobs(place), value)
        if not job or not job.alive:
            return t("⚠ This job is not at work.")
        stop_job(job)
        return ""

    def refresh(value, before):
        jobs = read_jobs(place)
        listed = choices(place, jobs)
        value = value if value in dict(map(reversed, listed)) else listed[0][1] if listed else None
        job, run = find(place, jobs, value)
        state, metrics, steps, text, previews, final = t("No job yet."), [], 0, "", None, None
        if run:
            state, text = (
                (f"**{t(job.state)}**", log_tail(job.folder / "log.txt"))
                if job
                else (t("not started from this page"), "")
            )
        if run and not (job and job.what == "measurement"):
            metrics, steps, previews, final = (
                read_metrics(run),
                total_steps(job.folder if job else run),
                *(
                    path if is_inside(path, [place.output]) else None
                    for path in (run / "validation" / "progress.png", run / LORA_NAME)
                ),
            )
        return what_changed(before, [
            ((listed, value), gr.update(choices=listed, value=value)),
            (state, state),
            *((figure, figure) for figure in (figures(metrics, steps, job and job.state in ("running", STOPPING)) if steps else [""] * 6)),
            ((value, len(metrics)), curves(metrics)),
            (text, text),
            *((f"{path} {stamp(path)}", gr.update(value=str(path) if stamp(path) else None, visible=bool(stamp(path)))) for path in (previews, final)),
        ])  # fmt: skip

    views = [chosen, state, *shown, plot, log, preview, lora, seen]
    start.click(begin, [device, *components], [message, chosen])
    measure.click(lambda *texts: begin(*texts, benchmark=20), [device, *components], [message, chosen])
    resume.click(go_on, [chosen, device], [message, chosen])
    stop.click(end, chosen, message)
    chosen.input(refresh, [chosen, seen], views, show_progress="hidden")
    return refresh, [chosen, seen], views, device


def what_changed(before, updates):
    """The updates whose key is not as it was, the rest skipped, and last all keys, for the next time. `updates`: pairs of
    (key, update), `before`: the keys of the last time, or []."""
    keys = [str(key) for key, _ in updates]
    return [
        *(
            gr.skip() if before and key == was else update
            for (_, update), key, was in zip(updates, keys, before or keys)
        ),
        keys,
    ]


def total_steps(folder):
    """The steps that a job or a run is told to take; of epochs, what its log says."""
    try:
        config, log = read_json(folder / "config.json"), folder / "log.txt"
        with open(log if log.is_file() else os.devnull, "rb") as file:
            told = (
                re.search(rb"^(\d+) steps of ", file.read(1_000_000), re.MULTILINE)
                if config["num_train_epochs"]
                else None
            )
        return int(told[1] if told else config["max_train_steps"])
    except (UserError, OSError, KeyError, ValueError, TypeError, OverflowError):
        return 0


def why_not(config):
    """{key: why training cannot start with this}, or {}: a folder that holds another run, or one that has all its steps."""
    if not config.data_dir:
        return {"data_dir": "data_dir: not set; name the folder with your pictures"}
    folders, output = checkpoint_folders(config), Path(config.output_dir)
    if not folders or config.resume_from_checkpoint != "latest":
        return {}
    try:
        before = load_config(data_dir=read_json(output / "config.json").get("data_dir")).data_dir
    except UserError:
        return {}
    if {source.path for source in before}.isdisjoint(source.path for source in config.data_dir):
        return {
            "output_dir": f"output_dir: {output} holds a run with other pictures ({', '.join(source.path for source in before)}); choose another folder for this one"
        }
    if step_of(folders[-1]) >= config.max_train_steps and not config.num_train_epochs:
        return {
            "max_train_steps": f"max_train_steps: {output} has {step_of(folders[-1])} steps already; take more, or choose another output_dir"
        }
    return {}


def choices(place, jobs):
    """What can be looked at: (label, value) of every job, the newest first, and of the runs that no job has made."""
    listed, made = [], {os.path.realpath(job.output_dir) for job in jobs}
    for job in reversed(jobs):
        what = {"measurement": " · --benchmark", "pictures": " · validate.py"}.get(job.what, "")
        listed.append((f"{job.number}. {job.output_dir}{what} · {job.time} · {t(job.state)}", str(job.number)))
    return listed + [(str(run), f"run:{run}") for run in find_runs(place, []) if os.path.realpath(run) not in made]


def find(place, jobs, value):
    """(the job or None, the run's folder) that a choice stands for; (None, None) for one that is not there."""
    for job in jobs:
        if str(job.number) == value:
            return job, Path(job.output_dir)
    return None, next((run for run in find_runs(place, []) if f"run:{run}" == value), None)


def try_tab(place, device):
    """Prompts drawn with the base and with a run's LoRA, side by side, by validate.py."""
    with gr.Row():
        with gr.Column():
            run = gr.Dropdown([], label=t("Run"), elem_id="run")
            lora = gr.Dropdown([], label=t("LoRA"), info=t("of the last step, or of a checkpoint"), elem_id="lora")
            names, form = list(TRY), {}
            for some in (names[:1], names[1:2], names[2:4], names[4:6], names[6:]):
                with gr.Row():
                    form |= fields(some, TRY, load_config())
            draw = gr.Button(t("Draw"), variant="primary", elem_id="draw")
            message = gr.Markdown(elem_id="try-message")
        with gr.Column(scale=2):
            state = gr.Markdown(elem_id="try-state")
            grid = picture("Base beside LoRA", elem_id="grid")
            gr.Markdown(t("Each picture, to be saved"))
            single = gr.Gallery(
                show_label=False,
                columns=4,
                height=320,
                interactive=False,
                elem_id="single",
                buttons=["download", "fullscreen"],
            )
            log = gr.Textbox(
                label=t("Last lines of the log"),
                lines=LOG_LINES,
                max_lines=LOG_LINES,
                interactive=False,
                elem_classes=["log"],
            )
    seen, components = gr.State([]), list(form.values())

    def runs_of(jobs):
        return [str(path) for path in find_runs(place, jobs)]

    def settings(folder):
        """A run's own settings for its pictures."""
        try:
            given = read_json(Path(folder) / "config.json") if folder in runs_of(read_jobs(place)) else {}
            config = load_config(**{name: given[name] for name in names if name in given})
        except UserError:
            config = load_config()
        return [to_text(name, getattr(config, name)) for name in names]

    def begin(folder, lora, device, *texts):
        nothing = [gr.skip() for _ in names]
        if folder not in runs_of(read_jobs(place)):
            return [t("⚠ Choose a run: train one first."), *nothing]
        loras = {"latest": "latest", **loras_of(Path(folder)), "none": "none"}
        if lora not in loras:
            return [t("⚠ Choose a LoRA of this run."), *nothing]
        try:
            given = {
                name: value
                for name, value in read_config(Path(folder) / "config.json").items()
                if name not in names and name != "data_dir"
            }
            given |= {"output_dir": folder, "lora": str(loras[lora]), "compare_checkpoints": False, "benchmark": 0}
            config, problems = read_form(dict(zip(names, texts)), place, given)
            if not problems:
                start_job(place, "pictures", "validate.py", config, device)
        except (UserError, OSError) as error:
            return [f"⚠ {plain(error)}", *nothing]
        return [said(problems), *marked(names, TRY, problems)]

    def refresh(folder, lora, before):
        jobs = read_jobs(place)
        runs = runs_of(jobs)
        folder = folder if folder in runs else next(iter(runs), None)
        loras = ["latest", *(loras_of(Path(folder)) if folder else []), "none"]
        jobs = [job for job in jobs if job.what == "pictures" and job.output_dir == folder]
        job, text = (jobs[-1], log_tail(jobs[-1].folder / "log.txt")) if jobs else (None, "")
        drawn = re.findall(r"^base beside LoRA: (.+)$", text, re.MULTILINE) if job and job.state == "finished" else []
        grid = Path(drawn[-1]) if drawn and is_inside(drawn[-1], [place.output]) else None
        pictures = sorted(path for path in grid.parent.glob("*.png") if path != grid) if grid else []
        state = f"{t(job.state)} · {job.number}" if job and job.state != "finished" else ""
        return what_changed(before, [
            ((runs, folder), gr.update(choices=runs, value=folder)),
            ((folder, loras), gr.update(choices=loras, value=lora if lora in loras else "latest")),
            (state, state),
            (grid, str(grid) if grid else None),
            (grid, [(str(path), re.sub(r".*-seed\d+-", "", path.stem)) for path in pictures]),
            (text, text),
        ])  # fmt: skip

    run.change(settings, run, components, show_progress="hidden")
    draw.click(begin, [run, lora, device, *components], [message, *components])
    return refresh, [run, lora, seen], [run, lora, state, grid, single, log, seen]


def make_page(place, start):
    """The page. `start`: the config file that it opens with."""
    with gr.Blocks(title="LongCat-Image LoRA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(f"# {t('LoRA training for LongCat-Image')}")
        with gr.Tab(t("1 Set up")):
            gr.Markdown(
                t(
                    "Choose the file for your machine, then name the folder with your pictures. What is under More can stay as it is."
                )
            )
            form, when_loaded = set_up_tab(place, start)
        with gr.Tab(t("2 Data")):
            gr.Markdown(
                t(
                    "See what the model will see, and correct captions. To teach a new word, write it into every caption."
                )
            )
            data_tab(place, form)
        with gr.Tab(t("3 Train")):
            gr.Markdown(
                t(
                    "Training does what Set up says, and goes on where it was stopped. It goes on without this page, too."
                )
            )
            jobs, job_inputs, job_views, device = jobs_tab(place, form)
        with gr.Tab(t("4 Try it")):
            gr.Markdown(t("Draw prompts with the base model and with a LoRA, from the same noise."))
            pictures, picture_inputs, picture_views = try_tab(place, device)
        when_loaded(page)
        timer = gr.Timer(REFRESH_SECONDS)
        for views in ((jobs, job_inputs, job_views), (pictures, picture_inputs, picture_views)):
            gr.on([page.load, timer.tick], *views, show_progress="hidden", trigger_mode="once", queue=False)
    for (
        function
    ) in page.fns.values():  # Gradio describes public ones, with what the fields hold, even on the login page
        function.api_visibility = "private"
    return page


# ---------------------------------------------------------------- the server


async def refuse_other_sites(request, call_next):
    """Another site's page, open in the same browser, must not use this one; it may link here."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    foreign = (
        site in ("cross-site", "same-site")
        if site
        else origin and urlsplit(origin).netloc != request.headers.get("host")
    )
    if foreign and (request.method != "GET" or request.headers.get("sec-fetch-mode") != "navigate"):
        return PlainTextResponse("this page takes no orders from another site", 403)
    return await call_next(request)


def password_check(password):
    """A function for Gradio that takes any name with this password, and one wrong guess a second."""
    turn = asyncio.Lock()

    async def is_right(_, guess):
        async with turn:
            right = hmac.compare_digest(guess.encode(), password.encode())
            await asyncio.sleep(0 if right else 1)
            return right

    return is_right


def is_loopback(host):
    """Whether an address is this machine's own."""
    return host == "localhost" or host.startswith("127.")


def main(arguments=None):
    """Serves the page, until Ctrl-C; in a notebook it shows it and returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="IPv4 address to listen on; another one than this machine's own needs a password [%(default)s]",
    )
    parser.add_argument("--port", type=int, default=8001, help="[%(default)s]")
    parser.add_argument(
        "--password",
        default=os.environ.get("WEBUI_PASSWORD"),
        help="asked for before anything is shown; or in the environment as WEBUI_PASSWORD",
    )
    parser.add_argument(
        "--output",
        default="output",
        help="folder of all runs; nothing else is served from the disk as it is [%(default)s]",
    )
    parser.add_argument(
        "--folders",
        nargs="+",
        default=[],
        help=f"folders of pictures, caches and models that the page may use, besides {', '.join(FOLDERS)}",
    )
    options = parser.parse_args(arguments)
    if not is_loopback(options.host) and not options.password:
        sys.exit(
            f"error: --host {options.host}: other machines could use this page; give it a password with --password"
        )
    place = SimpleNamespace(
        output=Path(options.output), folders=[Path(folder) for folder in (*FOLDERS, *options.folders)]
    )
    place.jobs = place.output / ".webui" / "jobs"
    try:
        place.jobs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --output {place.output}: cannot be written ({error.strerror})")
    os.environ["GRADIO_TEMP_DIR"] = str((place.output / ".webui" / "shown").absolute())  # what the page has shown
    # Names that lead to this machine; the last are Colab's. A site that gives its own name to 127.0.0.1 is turned away.
    own = (
        [
            Middleware(
                TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", options.host, "*.googleusercontent.com"]
            )
        ]
        if is_loopback(options.host)
        else []
    )
    start = (
        "24gb.json" if torch.cuda.is_available() else "mps.json" if torch.backends.mps.is_available() else "tiny.json"
    )
    print(f"open http://{'localhost' if options.host == '127.0.0.1' else options.host}:{options.port}", flush=True)
    try:
        make_page(place, start).launch(
            server_name=options.host, server_port=options.port, share=False, quiet=True, ssr_mode=False, footer_links=["settings"], run_history=False,
            auth=password_check(options.password) if options.password else None, auth_message="any name, and the password that webui.py was started with",
            allowed_paths=[str(place.output.absolute())], max_file_size=1, css=CSS, show_error=True,
            app_kwargs={"middleware": [*own, Middleware(BaseHTTPMiddleware, dispatch=refuse_other_sites)]},
            i18n=gr.I18n(**translations()), theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(block_info_text_color="*neutral_600"),
        )  # fmt: skip
    except OSError as error:
        sys.exit(f"error: --port {options.port}: {error}")


# ---------------------------------------------------------------- the page in Portuguese and Chinese


def translations():
    """{language: {text: translation}} for Gradio; a key's description has the name `help:` and the key."""
    described = {
        f"help:{name}": (key.description.replace("null:", "empty:"), *HELP[name]) for name, key in KEYS.items()
    }
    texts = {
        english: (english, *others) for english, others in TEXTS.items()
    } | described  # a form's field is empty where a file has null
    languages = {"en": 0, "pt": 1, "pt-BR": 1, "zh": 2, "zh-CN": 2, "zh-TW": 2}
    return {language: {name: given[i] for name, given in texts.items()} for language, i in languages.items()}


TEXTS = {
    "LoRA training for LongCat-Image": ("Treino de LoRA para o LongCat-Image", "LongCat-Image 的 LoRA 训练"),
    "1 Set up": ("1 Configurar", "1 设置"),
    "2 Data": ("2 Dados", "2 数据"),
    "3 Train": ("3 Treinar", "3 训练"),
    "4 Try it": ("4 Experimentar", "4 试用"),
    "Choose the file for your machine, then name the folder with your pictures. What is under More can stay as it is.": (
        "Escolha o arquivo para a sua máquina e indique a pasta com as suas imagens. O que está em Mais pode ficar como está.",
        "选择适合你机器的文件，再填写图片文件夹。“更多”里的可以不动。",
    ),
    "See what the model will see, and correct captions. To teach a new word, write it into every caption.": (
        "Veja o que o modelo vai ver e corrija legendas. Para ensinar uma palavra nova, escreva-a em todas as legendas.",
        "看看模型将看到什么，并修改描述。要教一个新词，请把它写进每条描述。",
    ),
    "Training does what Set up says, and goes on where it was stopped. It goes on without this page, too.": (
        "O treino faz o que Configurar diz e continua de onde parou. Ele segue também sem esta página.",
        "训练按照“设置”进行，停止后可以接着练。关掉本页，训练也会继续。",
    ),
    "Draw prompts with the base model and with a LoRA, from the same noise.": (
        "Gere imagens dos prompts com o modelo base e com um LoRA, a partir do mesmo ruído.",
        "用基础模型和 LoRA，从同样的噪声出发，按提示词生成图片。",
    ),
    "Start from": ("Partir de", "从这里开始"),
    "Folder with your pictures": ("Pasta com as suas imagens", "图片文件夹"),
    "Trigger words": ("Palavras-gatilho", "触发词"),
    "Caption for pictures without one": ("Legenda para imagens sem legenda", "没有描述的图片用的描述"),
    "Prompts to draw, one a line": ("Prompts das imagens, um por linha", "用来出图的提示词，每行一条"),
    "Folder for the results": ("Pasta dos resultados", "结果文件夹"),
    "Steps": ("Passos", "训练步数"),
    "Learning rate": ("Taxa de aprendizado", "学习率"),
    "LoRA rank": ("Posto (rank) do LoRA", "LoRA 秩（rank）"),
    "Size of the pictures": ("Tamanho das imagens", "图片尺寸"),
    "Steps between previews": ("Passos entre prévias", "预览间隔步数"),
    "Model family": ("Família do modelo", "模型系列"),
    "Flavour": ("Versão", "版本"),
    "Model: local folder or hub name": ("Modelo: pasta local ou nome no hub", "模型：本地文件夹或 hub 名称"),
    "Precision": ("Precisão", "精度"),
    "More: model": ("Mais: modelo", "更多：模型"),
    "More: data": ("Mais: dados", "更多：数据"),
    "More: LoRA": ("Mais: LoRA", "更多：LoRA"),
    "More: training": ("Mais: treino", "更多：训练"),
    "More: memory": ("Mais: memória", "更多：显存与内存"),
    "More: output": ("Mais: saída", "更多：输出"),
    "More: validation": ("Mais: validação", "更多：验证"),
    "Save as": ("Salvar como", "另存为"),
    "a file in configs/, for the command line, too": (
        "um arquivo em configs/, que serve também na linha de comando",
        "configs/ 里的文件，命令行也能用",
    ),
    "Replace the file of that name": ("Substituir o arquivo com esse nome", "替换同名文件"),
    "Save": ("Salvar", "保存"),
    "Saved:": ("Salvo:", "已保存："),
    "⚠ The name of a file needs letters, digits, spaces, dots, - or _, 50 at most.": (
        "⚠ O nome do arquivo leva letras, algarismos, espaços, pontos, - ou _, no máximo 50.",
        "⚠ 文件名只能用字母、数字、空格、点、- 或 _，最多 50 个。",
    ),
    "⚠ There is such a file already; choose another name, or tick Replace:": (
        "⚠ Já existe um arquivo assim; escolha outro nome ou marque Substituir:",
        "⚠ 已有这个文件；请换个名字，或勾选替换：",
    ),
    "Look at the data": ("Examinar os dados", "检查数据"),
    "What the model will see": ("O que o modelo vai ver", "模型将看到的图片"),
    "Report": ("Relatório", "报告"),
    "Captions: choose a picture": ("Legendas: escolha uma imagem", "描述：选择一张图片"),
    "Page": ("Página", "页"),
    "Picture": ("Imagem", "图片"),
    "Caption, one a line": ("Legenda, uma por linha", "描述，每行一条"),
    "Save the caption": ("Salvar a legenda", "保存描述"),
    "⚠ Choose a picture, and write a caption.": (
        "⚠ Escolha uma imagem e escreva uma legenda.",
        "⚠ 请选择一张图片并写上描述。",
    ),
    "⚠ Not saved yet, but kept here as you typed it:": (
        "⚠ Ainda não salvo, mas guardado aqui como você digitou:",
        "⚠ 还没有保存，但你输入的内容保留在这里：",
    ),
    "⚠ This file has changed meanwhile; look at the data again:": (
        "⚠ Este arquivo mudou nesse meio-tempo; examine os dados de novo:",
        "⚠ 这个文件刚被改过；请重新检查数据：",
    ),
    "Device": ("Dispositivo", "设备"),
    "Start training": ("Iniciar o treino", "开始训练"),
    "Measure speed and memory": ("Medir velocidade e memória", "测量速度和显存"),
    "Job or earlier run": ("Tarefa ou treino anterior", "任务或以前的训练"),
    "Stop": ("Parar", "停止"),
    "Go on": ("Continuar", "继续"),
    "No job yet.": ("Nenhuma tarefa ainda.", "还没有任务。"),
    "waiting": ("na fila", "排队中"),
    "running": ("em andamento", "进行中"),
    "finished": ("concluída", "已完成"),
    "stopping: saves this step first": ("parando: salva antes este passo", "正在停止：先保存这一步"),
    "stopped": ("parada", "已停止"),
    "failed": ("falhou", "失败"),
    "cut off": ("interrompida de repente", "意外中断"),
    "not started from this page": ("não iniciado nesta página", "不是从本页启动的"),
    "Step": ("Passo", "步"),
    "Loss": ("Perda (loss)", "损失（loss）"),
    "Held-out loss / base": ("Perda nas imagens reservadas / base", "留出图片的损失 / 基础模型"),
    "Seconds a step": ("Segundos por passo", "每步秒数"),
    "Peak memory": ("Pico de memória", "显存峰值"),
    "Time left": ("Tempo restante", "剩余时间"),
    "Last lines of the log": ("Últimas linhas do registro", "日志末尾"),
    "Previews": ("Prévias", "预览"),
    "Download the LoRA": ("Baixar o LoRA", "下载 LoRA"),
    "⚠ This job is not at work.": ("⚠ Esta tarefa não está em andamento.", "⚠ 这个任务没有在运行。"),
    "⚠ Choose a job that trains, or a run.": (
        "⚠ Escolha uma tarefa de treino ou um treino anterior.",
        "⚠ 请选择一个训练任务，或以前的训练。",
    ),
    "⚠ Correct this in Set up:": ("⚠ Corrija isto em Configurar:", "⚠ 请在设置里改正："),
    "Run": ("Treino", "训练"),
    "LoRA": ("LoRA", "LoRA"),
    "of the last step, or of a checkpoint": ("do último passo ou de um checkpoint", "最后一步的，或某个检查点的"),
    "Negative prompt": ("Prompt negativo", "负向提示词"),
    "Strength of the LoRA": ("Força do LoRA", "LoRA 强度"),
    "Seed": ("Semente", "种子"),
    "Sampling steps": ("Passos de amostragem", "采样步数"),
    "Guidance": ("Orientação (guidance)", "引导系数"),
    "Size": ("Tamanho", "尺寸"),
    "Draw": ("Gerar", "生成"),
    "Base beside LoRA": ("Base ao lado do LoRA", "基础模型与 LoRA 对比"),
    "Each picture, to be saved": ("Cada imagem, para salvar", "每张图片，可保存"),
    "⚠ Choose a run: train one first.": (
        "⚠ Escolha um treino: treine primeiro.",
        "⚠ 请选择一次训练：请先完成一次训练。",
    ),
    "⚠ Choose a LoRA of this run.": ("⚠ Escolha um LoRA deste treino.", "⚠ 请选择这次训练的 LoRA。"),
}

HELP = {
    "model_type": ("o que se treina", "训练什么"),
    "model_family": ("a família do modelo", "模型系列"),
    "model_flavour": ("a versão principal ou o checkpoint do meio do treino", "正式版，或训练中期的检查点"),
    "pretrained_model_name_or_path": (
        "nome no hub ou pasta local; vazio: escolhido por model_flavour",
        "hub 名称或本地文件夹；留空：由 model_flavour 决定",
    ),
    "base_model_precision": (
        "como o transformer congelado é guardado; int8-matmul: também os produtos em 8 bits",
        "冻结的 transformer 如何存放；int8-matmul：乘法也用 8 位",
    ),
    "mixed_precision": (
        "aritmética; auto: bf16 onde houver, fp16 em CUDA mais antigo, fp32 na CPU",
        "运算精度；auto：支持时用 bf16，较旧的 CUDA 用 fp16，CPU 用 fp32",
    ),
    "data_dir": (
        'pasta de imagens, ou uma lista de {"path", "repeats", "caption_prefix", "loss_weight"}',
        '图片文件夹，或 {"path", "repeats", "caption_prefix", "loss_weight"} 的列表',
    ),
    "instance_prompt": ("legenda das imagens que não têm nenhuma", "没有描述的图片用的描述"),
    "resolution": (
        'lado de um quadrado com a área desejada, ou tamanhos: "1024x1024,1344x768"',
        '所需面积的正方形边长，或若干尺寸："1024x1024,1344x768"',
    ),
    "aspect_bucket_alignment": ("grade dos tamanhos, em pixels", "尺寸的网格，单位像素"),
    "validation_split": (
        "parte das imagens (no máximo 8) nunca usada no treino, só avaliada ao lado de outras tantas; 0: nenhuma",
        "从不参与训练、只和同样多的训练图片一起评分的图片比例（最多 8 张）；0：没有",
    ),
    "caption_dropout_probability": ("parte das amostras treinada com o prompt vazio", "用空提示词训练的样本比例"),
    "cache_dir": (
        "pasta do cache de latents e embeddings; vários treinos podem compartilhá-la",
        "latent 和提示词嵌入的缓存文件夹；多次训练可以共用",
    ),
    "text_encoder_batch_size": ("prompts por lote ao guardar embeddings no cache", "缓存嵌入时每批提示词数"),
    "lora_rank": ("posto (rank)", "秩（rank）"),
    "lora_alpha": (
        "a força é lora_alpha / lora_rank; vazio: igual ao rank",
        "强度为 lora_alpha / lora_rank；留空：等于 rank",
    ),
    "lora_dropout": ("dropout na entrada do LoRA", "LoRA 输入的 dropout"),
    "init_lora": ("arquivo ou pasta do LoRA de partida", "作为起点的 LoRA 文件或文件夹"),
    "lora_target_modules": ("finais dos nomes das camadas que recebem LoRA", "加 LoRA 的层，写名字的结尾"),
    "trigger_words": (
        "palavras que chamam o que foi aprendido; anotadas no arquivo do LoRA",
        "唤起所学内容的词；记在 LoRA 文件里",
    ),
    "license": ("licença do LoRA; anotada no arquivo", "LoRA 的许可证；记在文件里"),
    "train_batch_size": ("imagens por lote", "每批图片数"),
    "gradient_accumulation_steps": ("lotes por passo", "每步批数"),
    "max_train_steps": ("passos de treino", "训练步数"),
    "num_train_epochs": (
        "se não for 0: épocas de treino, no lugar de max_train_steps",
        "不为 0 时：按轮数训练，代替 max_train_steps",
    ),
    "optimizer": ("AdamW, ou Prodigy, que acha a taxa de aprendizado sozinho", "AdamW，或自己找学习率的 Prodigy"),
    "learning_rate": (
        "taxa de aprendizado depois do aquecimento; com prodigy 1",
        "预热之后的学习率；用 prodigy 时为 1",
    ),
    "lr_scheduler": ("curso da taxa de aprendizado", "学习率的变化方式"),
    "lr_warmup_steps": ("passos até a taxa de aprendizado plena", "达到完整学习率之前的步数"),
    "adam_beta2": ("beta2 do otimizador; beta1 é 0.9", "优化器的 beta2；beta1 是 0.9"),
    "adam_weight_decay": ("decaimento de pesos do otimizador", "优化器的权重衰减"),
    "max_grad_norm": ("os gradientes são cortados nesta norma; 0: sem corte", "梯度裁剪到这个范数；0：不裁剪"),
    "gradient_checkpointing": (
        "recalcular blocos no passo inverso: todos, nenhum ou quantos",
        "反向时重新计算的块：全部、不用，或块数",
    ),
    "seed": ("todo sorteio decorre dela", "所有随机数都由它决定"),
    "enable_group_offload": (
        "guardar blocos congelados na memória do computador; eles visitam o dispositivo um a um",
        "把冻结的块放在内存里，逐个轮流上设备",
    ),
    "offloaded_blocks": (
        "quantos dos 30 blocos enable_group_offload guarda lá; null: todos",
        "enable_group_offload 放在内存里的块数，共 30 块；null：全部",
    ),
    "torch_compile": (
        "compilar os blocos: minutos no início, menos tempo e memória por passo",
        "编译各块：开头花几分钟，之后每步更快、更省显存",
    ),
    "benchmark": (
        "train_lora.py: rodar tantos passos com pesos e dados aleatórios, mostrar velocidade e memória, e nada mais",
        "train_lora.py：用随机权重和数据跑这么多步，打印速度和内存，此外什么也不做",
    ),
    "output_dir": ("pasta dos arquivos deste treino", "这次训练的文件夹"),
    "checkpoint_step_interval": ("passos entre checkpoints", "检查点间隔步数"),
    "checkpoints_total_limit": ("quantos checkpoints ficam guardados", "保留多少个检查点"),
    "resume_from_checkpoint": (
        'checkpoint de onde continuar: "latest", uma pasta ou "none"',
        '从哪个检查点继续："latest"、一个文件夹或 "none"',
    ),
    "report_to": ("para onde vão as curvas, além de metrics.jsonl", "除 metrics.jsonl 之外，曲线还写到哪里"),
    "validation_step_interval": ("passos entre prévias e avaliações; 0: nenhuma", "预览图和评分的间隔步数；0：没有"),
    "validation_prompts": ("prompts das prévias e do validate.py", "预览和 validate.py 用的提示词"),
    "validation_negative_prompt": ("prompt negativo", "负向提示词"),
    "validation_resolution": (
        'largura x altura das imagens, múltiplos de 16; o validate.py aceita várias, "1024x1024,1344x768"',
        '图片的宽 x 高，16 的倍数；validate.py 可用多个："1024x1024,1344x768"',
    ),
    "validation_guidance": ("escala de orientação (guidance)", "引导系数"),
    "validation_num_inference_steps": ("passos de amostragem", "采样步数"),
    "validation_seed": (
        "semente do primeiro ruído de cada imagem; o validate.py aceita uma lista",
        "每张图片初始噪声的种子；validate.py 可用列表",
    ),
    "validation_lora_strength": (
        "validate.py: força do LoRA; uma lista dá uma coluna para cada",
        "validate.py：LoRA 的强度；列表则每个一列",
    ),
    "lora": (
        'validate.py: arquivo ou pasta de LoRA, "latest" de output_dir, ou "none"; vazio: o último, se houver',
        'validate.py：LoRA 文件、文件夹、output_dir 的 "latest" 或 "none"；留空：有最新的就用它',
    ),
    "compare_checkpoints": (
        "validate.py: uma coluna para cada checkpoint de output_dir",
        "validate.py：output_dir 的每个检查点一列",
    ),
}


if __name__ == "__main__":
    main()
