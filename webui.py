"""The scripts as a page in the browser: settings, data, training, pictures.

    python webui.py                                            # then open http://localhost:8001
    python webui.py --folders /mnt/pictures                    # a further folder that the page may use
    python webui.py --host 0.0.0.0 --password "a long one"     # for other machines, too

It starts `train_lora.py` and `validate.py`, and shows what they write. A job is a process of its own: it goes on
without the page and without this server.
"""

import argparse
import asyncio
import contextlib
import hmac
import html
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
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
    KEYS, LORA_NAME, UserError, checkpoint_folders, flag_value, in_parallel, load_config, own_keys, own_name,
    parse_json, read_json, sources, write_file,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
FOLDERS = ("data", "cache", "models", "tests/tiny_longcat")  # that the page may use, beside --output and --folders
# The keys that have fields, with labels and help in webui_texts.json; all others are lines of JSON.
FRONT = [
    "data_dir", "trigger_words", "instance_prompt", "validation_prompts", "output_dir",
    "max_train_steps", "learning_rate", "lora_rank", "resolution", "validation_step_interval",
    "model_family", "model_flavour", "pretrained_model_name_or_path", "base_model_precision",
]  # fmt: skip
TRY = [
    "validation_prompts", "validation_negative_prompt", "validation_lora_strength", "validation_seed",
    "validation_num_inference_steps", "validation_guidance", "validation_resolution",
]  # fmt: skip
OTHER_STAGES = ("benchmark", "lora", "compare_checkpoints", "validation_lora_strength")  # mean nothing in training
LISTS = ("trigger_words", "validation_prompts")  # one a line
PATHS = (
    "output_dir", "cache_dir", "init_lora", "lora", "resume_from_checkpoint", "pretrained_model_name_or_path",
    "validation_prompts",
)  # fmt: skip
CURVES = {"loss": "#9ca3af", "held_out_loss": "#ea580c", "held_out_base": "#2563eb"}  # from metrics.jsonl
THUMBNAILS, LOG_LINES, REFRESH_SECONDS = 24, 14, 2
ONE_AT_A_TIME = threading.Lock()
LOG = dict(lines=LOG_LINES, max_lines=LOG_LINES, interactive=False, elem_classes=["log"])
CSS = """
.wrong input, .wrong textarea { border-color: #dc2626 !important }
.wrong [class*=info] { color: #dc2626 !important }
.log textarea { font-family: monospace; font-size: 12px; line-height: 1.4; white-space: pre; overflow-x: auto }
@media (max-width: 600px) { button[role=tab] { padding: 0 8px !important; font-size: 14px !important } }
"""

t = gr.I18n()  # t(name) is shown in the browser's language, see webui_texts.json


# ---------------------------------------------------------------- a form: settings as texts


def to_text(value):
    """A key's value as its field shows it: a list one a line, nothing for null."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def texts_of(config):
    """What the fields of a configuration show, and in JSON the keys that have none, with their descriptions."""
    values = json.loads(config.model_dump_json(exclude_defaults=True, include={"data_dir"})).get("data_dir")
    values = {**json.loads(config.model_dump_json()), "data_dir": values}
    if values["data_dir"] and len(values["data_dir"]) == 1 and [*values["data_dir"][0]] == ["path"]:
        values["data_dir"] = values["data_dir"][0]["path"]
    others = [name for name in KEYS if name not in (*FRONT, *OTHER_STAGES)]
    lines = [f"  // {KEYS[name].description}\n  {json.dumps(name)}: {json.dumps(values[name])},\n" for name in others]
    return ["{\n" + "".join(lines) + "}", *(to_text(values[name]) for name in FRONT)]


def read_form(place, names, texts, others):
    """The Config that a form stands for, or None, and {key: what is wrong}. `texts`: what the fields of `names` hold,
    nothing for the default; `others`: the keys without a field, as a dictionary or in JSON."""
    try:
        others = parse_json(others, "JSON") if isinstance(others, str) else others
        own = own_keys(others)
    except UserError as error:
        return None, {"JSON": str(error)}
    typed, problems = {}, {name: f"{name}: has a field of its own" for name in names if name in own}
    for name, text in zip(names, texts):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            is_list = name in LISTS and not (len(lines) == 1 and lines[0].lower().endswith(".txt"))
            typed[name] = lines if is_list else flag_value(name, text.strip())
    defaults = {name: KEYS[name].default for name in ("output_dir", "cache_dir")}
    for name, value in (defaults | own | typed).items():
        try:
            confine(name, value, place)
        except UserError as error:
            problems[name] = str(error)
        except ValueError:
            continue  # no path at all: load_config says so
    try:
        given = {name: value for name, value in (others | typed).items() if own_name(name) not in problems}
        config = load_config(**given)
        return (None if problems else config), problems
    except UserError as error:
        return None, problems | {re.split(r"[:.\[]", line)[0]: line for line in str(error).splitlines()}


def confine(name, value, place):
    """Raises UserError if a path in this key's value lies outside the page's folders."""
    is_word = name in ("lora", "resume_from_checkpoint") and value in ("latest", "none")
    is_hub = name == "pretrained_model_name_or_path" and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(value))
    if is_word or (is_hub and not os.path.exists(value)):
        return
    folders, paths = [place.output, *place.folders * (name != "output_dir")], [value] if name in PATHS else []
    if name == "data_dir":
        paths = [source.get("path") for source in sources(value) if isinstance(source, dict)]
    for path in (os.path.expanduser(path) for path in paths if isinstance(path, str)):
        if not is_inside(path, folders) or ".webui" in Path(os.path.realpath(path)).parts:
            where = f"outside this page's folders ({', '.join(map(str, folders))})"
            flag = "--output" if name == "output_dir" else "--folders"
            raise UserError(f"{name}: found {path!r}, which is {where}; start webui.py with {flag} {path}")
        if name == "data_dir" and not os.path.isdir(path):  # a list could name pictures anywhere
            raise UserError(f"data_dir: {path} is no folder; lists of pictures are for the command line")


def is_inside(path, folders):
    """Whether a path, its links followed, is one of these folders or lies in one."""
    path = Path(os.path.realpath(path))
    return any(path.is_relative_to(os.path.realpath(folder)) for folder in folders)


def field(name, text, form):
    """The component of a key: a choice where there are few values, else a text."""
    shared = dict(value=text, label=t(name), info=t(f"help_{name}"), elem_id=f"{form}-{name}")
    if get_origin(KEYS[name].annotation) is Literal:
        return gr.Dropdown(get_args(KEYS[name].annotation), **shared)
    return gr.Textbox(lines=3 if name in LISTS else 1, max_lines=8, **shared)


def marked(name, problem):
    """The update of a key's field: what is wrong stands where its help was."""
    if problem:
        return gr.update(info=f"⚠ {problem}", elem_classes=["wrong"])
    return gr.update(info=t(f"help_{name}"), elem_classes=[])


def said(*lines):
    """Problems as Markdown, one a line."""
    return "\n\n".join(f"⚠ {plain(line)}" for line in lines)


def plain(text):
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", html.escape(str(text), quote=False))


# ---------------------------------------------------------------- runs, and the jobs that work on them


def start_job(place, script, config):
    """Starts a script as a process that outlives the page. The lock is handed down to it: as long as nobody else can
    have it, the job that stands in the file is at work. Raises UserError if there is one."""
    folder, name = Path(config.output_dir) / ".webui", Path(script).stem
    with ONE_AT_A_TIME, open(place.lock, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"busy: a job is at work in {json.load(lock)['run']}; stop that, or wait") from None
        write_file(folder / f"{name}.json", config.model_dump_json(indent=2) + "\n")
        environment = {**os.environ, "PYTHONUTF8": "1", "TQDM_MININTERVAL": "1"}
        detached = dict(stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock.fileno()], env=environment)
        with open(folder / f"{name}.log", "wb") as log:
            command = [sys.executable, str(HERE / script), str(folder / f"{name}.json")]
            process = subprocess.Popen(command, stdout=log, stderr=log, **detached)
        lock.truncate(0)
        json.dump({"name": name, "run": config.output_dir, "pid": process.pid}, lock)


def at_work(place, name, run):
    """The job of this script in this run, if it is at work: {"name", "run", "pid"}, without a pid once it was told to
    stop; else None."""
    with ONE_AT_A_TIME, open(place.lock, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            job = json.load(lock)
            return job if job["name"] == name and Path(job["run"]) == Path(run) else None


def stop_job(place, job):
    """Sends SIGTERM once, for a second one would leave at once: training finishes its step and saves."""
    if job["pid"]:
        os.kill(job["pid"], signal.SIGTERM)
        with ONE_AT_A_TIME:
            place.lock.write_text(json.dumps({**job, "pid": None}))


def state_of(place, name, run):
    """A job's state (None if there never was one), from whether it lives and from what its log says; and its log's last
    lines."""
    path = Path(run or "") / ".webui" / f"{name}.log"
    if not run or not path.is_file():
        return None, ""
    job, log = at_work(place, name, run), log_tail(path)
    if job:
        return ("running" if job["pid"] else "stopping"), log
    finished = re.search(r"^(LoRA|base beside LoRA): ", log, re.MULTILINE)
    return "finished" if finished else "stopped" if re.search(r"^stopp", log, re.MULTILINE) else "failed", log


def log_tail(path):
    """The last lines of a log; of each progress bar what it shows last, if it has not been wiped away."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 60_000))
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", file.read().decode("utf-8", "replace"))
    lines, last = {}, None
    for i, line in enumerate(re.split(r"[\r\n]+", text)):
        bar = re.match(r"([^:|]+): +\d+%\|", line.lstrip()[:200])
        last = bar[1] if bar else last if line.isspace() else i
        lines.pop(last, None)
        lines[last] = line.rstrip()
    return "\n".join([line for line in lines.values() if line][-LOG_LINES:])


def find_runs(place):
    """{a run's folder: its config file}, newest first, under the output folder and up to two deep in it."""
    found = {}
    for depth in ("", "*/", "*/*/"):
        for pattern, folder in (("config.json", 0), (".webui/train_lora.json", 1)):
            found |= {str(path.parents[folder]): path for path in place.output.glob(depth + pattern)}
    found = {run: path for run, path in found.items() if run.isprintable() and is_inside(path, [place.output])}
    return dict(sorted(found.items(), key=lambda item: item[1].stat().st_mtime, reverse=True))


def curves(run):
    """Loss, held-out loss and the base's from a run's metrics.jsonl as a table for the plot, of 500 steps at most."""
    path, points = Path(run or "") / "metrics.jsonl", [(math.nan, math.nan, name) for name in CURVES]
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for i, line in enumerate(lines):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the last one may be half written
            values = json.loads(line)
            if "held_out_loss" in values or i % math.ceil(len(lines) / 500) == 0:
                points += [(int(values["step"]), float(values[name]), name) for name in CURVES if name in values]
    return pd.DataFrame(points, columns=["step", "value", "curve"])


def find_loras(place):
    """{path of a LoRA: its run's folder}: of the newest run first, the last, then those of its checkpoints."""
    found = {}
    for run in find_runs(place):
        for folder in [Path(run), *reversed(checkpoint_folders(SimpleNamespace(output_dir=run)))]:
            found |= {str(folder / LORA_NAME): run} if (folder / LORA_NAME).is_file() else {}
    return found


def stamps(*files):
    """What tells that these files have not changed: size and time of each, None for one that is not there."""
    return [prepare_data.file_stamp(os.stat(file)) if file and os.path.isfile(file) else None for file in files]


def changed(before, updates):
    """The updates whose key is not as it was, the rest skipped, and last all keys, for the next time. `updates`: pairs
    of (key, update or a function that makes it), `before`: the keys of the last time, or []."""
    keys = [str(key) for key, _ in updates]
    same = [bool(before) and key == was for key, was in zip(keys, before or keys)]
    made = [gr.skip() if skip else new() if callable(new) else new for skip, (_, new) in zip(same, updates)]
    return [*made, keys]


# ---------------------------------------------------------------- the page


def set_up_tab(place, start):
    """Settings. Returns the form's components: the box of all other keys, and a field for each in FRONT."""
    files = {path.name: path for path in sorted((HERE / "configs").glob("*.json"))}
    texts = texts_of(load_config(files[start]))
    about = lambda path: path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("//")  # its first comment
    choices = [*files, *find_runs(place)]
    chosen = gr.Dropdown(choices, value=start, label=t("start_from"), info=about(files[start]), elem_id="config")
    form = {}
    with gr.Row():
        for first in (0, 5, 10):
            with gr.Column():
                for name, text in list(zip(FRONT, texts[1:]))[first : first + 5]:
                    form[name] = field(name, text, "key")
    with gr.Accordion(t("more"), open=False, elem_id="more-box"):
        more = gr.Code(texts[0], "javascript", show_label=False, wrap_lines=True, max_lines=30, elem_id="more")
    message = gr.Markdown(elem_id="set-up-message")
    components = [more, *form.values()]

    def check(more, *texts):
        _, problems = read_form(place, FRONT, texts, more)
        others = [line for name, line in problems.items() if name not in FRONT]
        return [*(marked(name, problems.get(name)) for name in FRONT), said(*others)]

    def load(file):
        path = {**files, **find_runs(place)}[file]
        try:
            return [gr.update(info=about(path) if file in files else ""), *texts_of(load_config(path))]
        except UserError as error:
            return [gr.update(info=f"⚠ {error}"), *[gr.skip() for _ in components]]

    checking = [check, components, [*form.values(), message]]
    left = [part.input if isinstance(part, gr.Dropdown) else part.blur for part in components]
    gr.on(left, *checking, show_progress="hidden", trigger_mode="always_last")
    chosen.input(load, chosen, [chosen, *components]).then(*checking, show_progress="hidden")
    chosen.focus(lambda: gr.update(choices=[*files, *find_runs(place)]), None, chosen, show_progress="hidden")
    return components


def data_tab(place, settings):
    """The report and the preview sheet of prepare_data.py, and the captions, to be read and corrected."""
    look = gr.Button(t("look"), variant="primary", elem_id="look")
    message = gr.Markdown(elem_id="data-message")
    with gr.Column(visible=False) as shown:
        sheet = picture("sheet")
        with gr.Accordion(t("report"), open=False, elem_id="report-box"):
            report = gr.Markdown(elem_id="report")
    found = gr.State([])  # {"picture", "captions", "stamps"} of each
    with gr.Row(visible=False) as captions_box:
        with gr.Column(scale=2):
            options = dict(columns=6, height=560, interactive=False, buttons=[])
            gr.Markdown(t("choose_picture"))
            gallery = gr.Gallery(show_label=False, elem_id="pictures", **options)
            page = gr.Slider(1, 2, value=1, step=1, label=t("page"), visible=False, elem_id="page")
        with gr.Column():
            index = gr.Number(visible=False, precision=0)
            caption = gr.Textbox(label=t("caption"), lines=4, elem_id="caption", interactive=True)
            where = gr.Markdown(elem_id="caption-file")
            save = gr.Button(t("save_caption"), elem_id="save-caption")
            saved = gr.Markdown(elem_id="caption-message")

    def show(more, *texts, progress=gr.Progress(track_tqdm=True)):
        config, problems = read_form(place, FRONT, texts, more)
        if problems:
            return [said(*problems.values()), *[gr.skip()] * 11]
        try:
            prepare_data.main(config)
            lines, problem = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8").split("\n"), ""
        except (UserError, OSError) as error:
            lines, problem = [], said(error)
        entries = [  # those without a caption, too
            {"picture": path, "captions": captions, "stamps": stamps(*caption_files(path))}
            for source in config.data_dir
            for path, captions in prepare_data.read_source(source, config, prepare_data.Findings())
        ]
        pages = math.ceil(len(entries) / THUMBNAILS)
        text = "\n".join(f"- {plain(line[2:])}" if line.startswith("- ") else line for line in lines[4:])
        preview = None if problem else Path(config.output_dir) / "preview.jpg"
        slider = gr.update(maximum=max(2, pages), value=1, visible=pages > 1)
        views = [gr.update(visible=not problem), preview, text, gr.update(visible=bool(entries)), slider]
        return [problem or plain(lines[2]), *views, entries, thumbnails(entries, 1), None, "", "", ""]

    def choose(entries, page, event: gr.SelectData):
        i = (int(page) - 1) * THUMBNAILS + event.index
        return i, "\n".join(entries[i]["captions"]), plain(entries[i]["picture"]), ""

    def write(entries, page, i, text):
        captions = [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]
        if i is None or not captions:
            return t("no_caption"), gr.skip(), gr.skip()
        path, files = entries[i]["picture"], caption_files(entries[i]["picture"])
        try:
            if not all(is_inside(file, [place.output, *place.folders]) for file in files):
                raise UserError(f"{path}: its caption is a link out of this page's folders")
            if stamps(*files) != entries[i]["stamps"] or not path.exists():
                return f"{t('changed_meanwhile')} {plain(path)}", gr.skip(), gr.skip()
            file = prepare_data.save_captions(path, captions)
        except UserError as error:
            return said(error), gr.skip(), gr.skip()
        entries[i] |= {"captions": captions, "stamps": stamps(*files)}
        return f"{t('saved')} {plain(file)}", entries, thumbnails(entries, page)

    views = [message, shown, sheet, report, captions_box, page, found, gallery, index, caption, where, saved]
    look.click(show, settings, views, show_progress_on=message)
    page.change(thumbnails, [found, page], gallery, show_progress="hidden")
    gallery.select(choose, [found, page], [index, caption, where, saved], show_progress="hidden")
    save.click(write, [found, page, index, caption], [saved, found, gallery], show_progress="hidden")


def picture(name, **options):
    """A place for a picture; without a label on it, which would hide a part."""
    options |= dict(show_label=False, interactive=False, buttons=["download", "fullscreen"])
    return gr.Image(label=t(name), elem_id=name, **options)


def caption_files(path):
    """A picture's own caption files, whether they are there or not."""
    return [path.with_suffix(suffix) for suffix in (".txt", ".json")]


def thumbnails(entries, page):
    """What the gallery shows on a page: (picture, its first caption) each."""
    entries = entries[(int(page) - 1) * THUMBNAILS :][:THUMBNAILS]
    images = in_parallel(lambda entry: thumbnail(entry["picture"]), entries)
    return [(image, (entry["captions"] or ["⚠"])[0]) for image, entry in zip(images, entries)]


def thumbnail(path):
    """A picture, small and upright; red if it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (512, 512))
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((512, 512))
            return image
    except Exception:  # the report says why; Pillow's plugins raise many kinds
        return Image.new("RGB", (512, 512), "#cc0000")


def train_tab(place, settings):
    """Start, go on, stop, and what a run has come to. Returns what is to be refreshed."""
    start = gr.Button(t("start"), variant="primary", elem_id="start")
    message = gr.Markdown(elem_id="train-message")
    with gr.Row():
        chosen = gr.Dropdown([], label=t("run"), elem_id="run", scale=3)
        stop = gr.Button(t("stop"), variant="stop", elem_id="stop")
    state = gr.Markdown(elem_id="state")
    with gr.Row():
        with gr.Column():
            look = dict(color="curve", color_map=CURVES, colors_in_legend=[], y_title=" ", height=310)
            plot = gr.LinePlot(curves(None), "step", "value", label=t("curves"), elem_id="plot", **look)
            legend = [f'<span style="color: {colour}">●</span> {name}' for name, colour in CURVES.items()]
            gr.HTML(" ".join(legend))  # the plot's own is cut off
        log = gr.Textbox(label=t("log"), elem_id="log", **LOG)
    preview = picture("previews", visible=False)
    lora = gr.DownloadButton(t("download"), visible=False, elem_id="download")
    seen = gr.State([])

    def begin(more, *texts):
        config, problems = read_form(place, FRONT, texts, more)
        try:
            if problems:
                raise UserError("\n".join(problems.values()))
            if not config.data_dir:
                raise UserError("data_dir: not set; name the folder with your pictures")
            start_job(place, "train_lora.py", config)
        except (UserError, OSError) as error:
            return said(*str(error).splitlines()), gr.skip()
        return "", gr.update(choices=[*find_runs(place)], value=str(Path(config.output_dir)))

    def end(run):
        job = at_work(place, "train_lora", run or "")
        if not job:
            return t("not_running")
        stop_job(place, job)
        return ""

    def refresh(run, before):
        runs = [*find_runs(place)]
        run = run if run in runs else next(iter(runs), None)
        state, text = state_of(place, "train_lora", run)
        state = f"**{t(state)}**" if state else t("elsewhere") if run else t("no_run")
        files = [Path(run) / "validation" / "progress.png", Path(run) / LORA_NAME] if run else [None, None]
        files = [str(file) if any(stamps(file)) and is_inside(file, [place.output]) else None for file in files]
        shown = [((file, stamps(file)), gr.update(value=file, visible=bool(file))) for file in files]
        curve = (run, stamps(run and Path(run) / "metrics.jsonl")), lambda: curves(run)
        choice = (runs, run), gr.update(choices=runs, value=run)
        return changed(before, [choice, (state, state), curve, (text, text), *shown])

    views = [chosen, state, plot, log, preview, lora, seen]
    start.click(begin, settings, [message, chosen])
    stop.click(end, chosen, message)
    chosen.input(refresh, [chosen, seen], views, show_progress="hidden")
    return [refresh, [chosen, seen], views]


def try_tab(place):
    """Prompts drawn with the base and with a LoRA, side by side, by validate.py. Returns what is to be refreshed."""
    with gr.Row():
        with gr.Column():
            lora = gr.Dropdown([], label=t("lora"), info=t("help_lora"), elem_id="lora")
            form = [field(TRY[0], "", "try")]
            sheet = gr.Button(t("text_sheet"), size="sm", elem_id="text-sheet")
            form += [field(name, "", "try") for name in TRY[1:]]
            draw = gr.Button(t("draw"), variant="primary", elem_id="draw")
            message = gr.Markdown(elem_id="try-message")
        with gr.Column(scale=2):
            state = gr.Markdown(elem_id="try-state")
            options = dict(columns=4, height=640, preview=True, interactive=False, buttons=["download", "fullscreen"])
            pictures = gr.Gallery(show_label=False, elem_id="grid", **options)
            log = gr.Textbox(label=t("log"), **LOG)
    seen = gr.State([])

    def begin(lora, *texts):
        try:
            loras = find_loras(place)
            if not loras:
                raise UserError("lora: none yet; train one first")
            lora = lora if lora in loras else next(iter(loras))
            run = loras[lora]
            typed = [name for name, text in zip(TRY, texts) if text.strip()]
            given = {name: value for name, value in read_json(find_runs(place)[run]).items() if name not in typed}
            given |= {"data_dir": None, "output_dir": run, "lora": lora, "compare_checkpoints": False}
            config, problems = read_form(place, typed, filter(str.strip, texts), given)
            if not problems:
                start_job(place, "validate.py", config)
        except (UserError, OSError) as error:
            problems = {"": error}
        others = [line for name, line in problems.items() if name not in TRY]
        return [said(*others), *(marked(name, problems.get(name)) for name in TRY)]

    def refresh(lora, before):
        loras = find_loras(place)
        state, text = state_of(place, "validate", loras.get(lora, next(iter(loras.values()), None)))
        state = t(state) if state and state != "finished" else ""
        grid = re.findall(r"^base beside LoRA: (.+)$", text, re.MULTILINE)
        shown = sorted(Path(grid[-1]).parent.glob("*.png")) if grid and is_inside(grid[-1], [place.output]) else []
        shown = [(path, path.stem) for path in sorted(shown, key=lambda path: path.stem != "comparison")]
        choice = [*loras], gr.update(choices=[*loras], value=lora if lora in loras else None)
        opened = gr.update(value=shown, selected_index=0 if shown else None)
        return changed(before, [choice, (state, state), (shown, opened), (text, text)])

    sheet.click(lambda: (HERE / "configs" / "text_prompts.txt").read_text(encoding="utf-8"), None, form[0])
    draw.click(begin, [lora, *form], [message, *form])
    return [refresh, [lora, seen], [lora, state, pictures, log, seen]]


def make_page(place, start):
    """The page. `start`: the config file that it opens with."""
    with gr.Blocks(title="LongCat-Image LoRA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(f"# {t('title')}")
        with gr.Tab(t("set_up")):
            gr.Markdown(t("about_set_up"))
            settings = set_up_tab(place, start)
        with gr.Tab(t("data")):
            gr.Markdown(t("about_data"))
            data_tab(place, settings)
        with gr.Tab(t("train")):
            gr.Markdown(t("about_train"))
            training = train_tab(place, settings)
        with gr.Tab(t("try_it")):
            gr.Markdown(t("about_try_it"))
            pictures = try_tab(place)
        timer = gr.Timer(REFRESH_SECONDS)
        for views in (training, pictures):
            gr.on([page.load, timer.tick], *views, show_progress="hidden", trigger_mode="once", queue=False)
    for function in page.fns.values():  # Gradio would describe public ones, with what the fields hold, to anybody
        function.api_visibility = "private"
    return page


# ---------------------------------------------------------------- the server


async def refuse_other_sites(request, call_next):
    """Another site's page, open in the same browser, must not use this one; it may link here."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    other_host = origin and urlsplit(origin).netloc != request.headers.get("host")
    foreign = site in ("cross-site", "same-site") if site else other_host
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


def main(arguments=None):
    """Serves the page, until Ctrl-C; in a notebook it shows it and returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than the default need a password"
    )
    parser.add_argument("--port", type=int, default=8001)
    password = os.environ.get("WEBUI_PASSWORD")
    parser.add_argument("--password", default=password, help="or in the environment as WEBUI_PASSWORD")
    parser.add_argument("--output", default="output", help="folder of all runs; nothing else is served as it is")
    used = f"folders that the page may use, besides {', '.join(FOLDERS)}"
    parser.add_argument("--folders", nargs="+", default=[], help=used)
    options = parser.parse_args(arguments)
    own_machine = options.host == "localhost" or options.host.startswith("127.")
    if not own_machine and not options.password:
        sys.exit(f"error: --host {options.host}: other machines could use this page; give it a --password")
    place = SimpleNamespace(output=Path(options.output), folders=[Path(path) for path in (*FOLDERS, *options.folders)])
    place.lock = place.output / ".webui" / "lock"
    try:
        place.lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --output {place.output}: cannot be written ({error.strerror})")
    os.environ["GRADIO_TEMP_DIR"] = str((place.lock.parent / "shown").absolute())  # what the page has shown
    # Names that lead to this machine; the last are Colab's. A site that gives its own name to 127.0.0.1 is turned away.
    hosts = ["localhost", "127.0.0.1", options.host, "*.googleusercontent.com"] if own_machine else ["*"]
    guards = [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
        Middleware(BaseHTTPMiddleware, dispatch=refuse_other_sites),
    ]
    texts = json.loads((HERE / "webui_texts.json").read_text(encoding="utf-8"))
    languages = {"en": 0, "pt": 1, "pt-BR": 1, "zh": 2, "zh-CN": 2, "zh-TW": 2}
    translations = {language: {name: text[i] for name, text in texts.items()} for language, i in languages.items()}
    gpu, mac = torch.cuda.is_available(), torch.backends.mps.is_available()
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    print(f"open http://{'localhost' if options.host == '127.0.0.1' else options.host}:{options.port}", flush=True)
    try:
        make_page(place, "24gb.json" if gpu else "mps.json" if mac else "tiny.json").launch(
            server_name=options.host, server_port=options.port, share=False, quiet=True, show_error=True,
            auth=password_check(options.password) if options.password else None, ssr_mode=False, run_history=False,
            auth_message="any name, and the password that webui.py was started with", app_kwargs={"middleware": guards},
            allowed_paths=[str(place.output.absolute())], i18n=gr.I18n(**translations), max_file_size=1,
            theme=gr.themes.Default(**fonts).set(block_info_text_color="*neutral_600"), css=CSS,
            footer_links=["settings"],
        )  # fmt: skip
    except OSError as error:
        sys.exit(f"error: --port {options.port}: {error}")


if __name__ == "__main__":
    main()
