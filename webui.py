"""The scripts as a page in the browser: settings, data, training, pictures.

    python webui.py                                            # then open http://localhost:8001
    python webui.py --folders /mnt/pictures                    # a further folder that the page may use
    python webui.py --host 0.0.0.0 --password "a long one"     # for other machines, too

It starts `train_lora.py` and `validate.py`, and shows what they write. A job is a process of its own: it goes on
without the page and without this server.
"""

import argparse
import hmac
import html
import json
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
    KEYS, LORA_FILE, UserError, in_parallel, load_config, normalize_keys, parse_json, read_json, write_file,
)  # fmt: skip
from validate import read_metrics

HERE = Path(__file__).resolve().parent
FOLDERS = (
    "data",
    "cache",
    "models",
    "configs",
    "tests/tiny_longcat",
)  # open to the page, beside --output
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
LISTS = ("trigger_words", "validation_prompts")  # one a line
PATHS = (
    "output_dir",
    "cache_dir",
    "init_lora",
    "lora",
    "resume_from_checkpoint",
    "pretrained_model_name_or_path",
)
CURVES = {
    "loss": "#9ca3af",
    "held_out_loss": "#ea580c",
    "held_out_base": "#2563eb",
}  # from metrics.jsonl
THUMBNAILS, LOG_LINES, REFRESH_SECONDS = 200, 14, 2
ONE_AT_A_TIME = threading.RLock()
PICTURE = dict(show_label=False, interactive=False, buttons=["download", "fullscreen"])
LOG = dict(lines=LOG_LINES, max_lines=LOG_LINES, interactive=False, elem_classes=["log"])
CSS = """
.log textarea { font-family: monospace; font-size: 12px; line-height: 1.4; white-space: pre; overflow-x: auto }
@media (max-width: 600px) { button[role=tab] { padding: 0 8px !important; font-size: 14px !important } }
"""

t = gr.I18n()  # t(name) is shown in the browser's language, see webui_texts.json


# ---------------------------------------------------------------- a form: settings as texts


def texts_of(config):
    """What the fields of a configuration show, and before them in JSON the keys without one, with descriptions."""
    values = config.model_dump()
    values |= {name: "\n".join(values[name]) for name in LISTS}
    sources = [source.model_dump(exclude_defaults=True) for source in config.data_dir]
    values["data_dir"] = (
        sources[0]["path"] if [[*source] for source in sources] == [["path"]] else sources or None
    )
    others = [name for name in KEYS if name not in FRONT]
    lines = [
        f"  // {KEYS[name].description}\n  {json.dumps(name)}: {json.dumps(values[name])},\n"
        for name in others
    ]
    shown = [values[name] for name in FRONT]
    shown = [
        "" if value is None else value if isinstance(value, str) else json.dumps(value)
        for value in shown
    ]
    return ["{\n" + "".join(lines) + "}", *shown]


def read_form(place, fields, others):
    """The Config that a form stands for. `fields`: {key: the field's text}, an empty one for the default; `others`: the
    keys without a field, as a dictionary or in JSON. Raises UserError with all that is wrong, one line a key."""
    others = parse_json(others, "JSON") if isinstance(others, str) else others
    for name, text in fields.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            several = name in LISTS and len(lines) > 1
            others = {**others, f"--{name}": lines if several else text.strip()}
    prompts = normalize_keys(others).get("validation_prompts")
    if str(prompts).lower().endswith(".txt"):  # load_config reads it
        confine(place, "validation_prompts", prompts)
    config = load_config(**others)
    for name in PATHS:
        confine(place, name, getattr(config, name))
    for source in config.data_dir:
        confine(place, "data_dir", source.path)
        if not os.path.isdir(source.path):  # a list could name pictures anywhere
            raise UserError(
                f"data_dir: {source.path} is no folder; lists of pictures are for the command line"
            )
    return config


def confine(place, name, path):
    """Raises UserError if this key's path lies outside the page's folders."""
    is_hub = name == "pretrained_model_name_or_path" and re.fullmatch(
        r"\w[\w.-]*/\w[\w.-]*", str(path)
    )
    is_word = name in ("lora", "resume_from_checkpoint") and path in ("latest", "none")
    if path is None or is_word or (is_hub and not os.path.exists(path)):
        return
    flag, folders = ("--output", []) if name == "output_dir" else ("--folders", place.folders)
    if (
        not is_inside(path, [place.output, *folders])
        or ".webui" in Path(os.path.realpath(path)).parts
    ):
        where = f"outside this page's folders ({', '.join(map(str, [place.output, *folders]))})"
        raise UserError(
            f"{name}: found {path!r}, which is {where}; start webui.py with {flag} {path}"
        )


def is_inside(path, folders):
    """Whether a path, its links followed, is one of these folders or lies in one."""
    path = Path(os.path.realpath(os.path.expanduser(path)))
    return any(path.is_relative_to(os.path.realpath(folder)) for folder in folders)


def field(name, text, form):
    """The component of a key: a choice where there are few values, else a text."""
    shared = dict(
        value=text, label=t(name), info=t(f"help_{name}"), elem_id=f"{form}-{name}", min_width=320
    )
    if get_origin(KEYS[name].annotation) is Literal:
        return gr.Dropdown(get_args(KEYS[name].annotation), **shared)
    return gr.Textbox(lines=3 if name in LISTS else 1, max_lines=8, **shared)


def said(error):
    """What is wrong as Markdown, a paragraph a line; before a key that has a field stands the field's label."""
    lines = [(re.split(r"[:.\[]", line)[0], plain(line)) for line in str(error).splitlines()]
    return "\n\n".join(
        f"⚠ **{t(key)}** – {line}" if key in FRONT + TRY else f"⚠ {line}" for key, line in lines
    )


def told(action):
    """The action as a function that returns its message, or what was wrong."""

    def tell(*values):
        try:
            return action(*values) or ""
        except (UserError, OSError) as error:
            return said(error)

    return tell


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
            raise UserError(
                f"busy: a job is at work in {json.load(lock)['run']}; stop that, or wait"
            ) from None
        write_file(folder / f"{name}.json", config.model_dump_json(indent=2) + "\n")
        environment = {**os.environ, "PYTHONUTF8": "1", "TQDM_MININTERVAL": "1"}
        detached = dict(
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock.fileno()],
            env=environment,
        )
        with open(folder / f"{name}.log", "wb") as log:
            command = [sys.executable, str(HERE / script), str(folder / f"{name}.json")]
            process = subprocess.Popen(command, stdout=log, stderr=log, **detached)
        lock.truncate(0)
        json.dump({"name": name, "run": config.output_dir, "pid": process.pid}, lock)


def at_work(place, name, run):
    """This script's job in this run, {"name", "run", "pid"}, if it is at work; without a pid once told to stop."""
    with ONE_AT_A_TIME, open(place.lock, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            job = json.load(lock)
            return job if job["name"] == name and Path(job["run"]) == Path(run) else None


def stop_job(place, name, run):
    """Sends SIGTERM once, for a second one would leave at once: training finishes its step and saves."""
    with ONE_AT_A_TIME:
        job = at_work(place, name, run)
        if job and job["pid"]:
            os.kill(job["pid"], signal.SIGTERM)
            place.lock.write_text(json.dumps({**job, "pid": None}))


def state_of(place, name, run):
    """A job's state, by whether it lives and what its log says (None: there never was one), and the last lines."""
    path = Path(run or "") / ".webui" / f"{name}.log"
    if not run or not path.is_file():
        return None, ""
    job = at_work(place, name, run)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", path.read_bytes().decode("utf-8", "replace"))
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    bar = lambda line: re.sub(
        r": +\d+%\|.*", "", line
    )  # a progress bar's name, of another line all
    last = sorted({bar(line): i for i, line in enumerate(lines) if line}.values())
    log = "\n".join(lines[i] for i in last[-LOG_LINES:])
    if job:
        return ("running" if job["pid"] else "stopping"), log
    finished = re.search(r"^(LoRA|base beside LoRA): ", log, re.MULTILINE)
    return "finished" if finished else "stopped" if re.search(
        r"^stopp", log, re.MULTILINE
    ) else "failed", log


def find_runs(place):
    """{a run's folder: its config file}, newest first, under the output folder and up to two deep in it."""
    names = [
        depth + name
        for depth in ("", "*/", "*/*/")
        for name in ("config.json", ".webui/train_lora.json")
    ]
    found = [path for name in names for path in place.output.glob(name)]
    found = {
        str(path.parent.parent if path.parent.name == ".webui" else path.parent): path
        for path in found
    }
    found = {
        run: path
        for run, path in found.items()
        if run.isprintable() and is_inside(path, [place.output])
    }
    return dict(sorted(found.items(), key=lambda item: item[1].stat().st_mtime, reverse=True))


def find_loras(place):
    """{path of a LoRA: its run's folder}: of the newest run first, the last, then those of its checkpoints."""
    files = lambda run: [
        run / LORA_FILE,
        *sorted(run.glob(f"checkpoints/step-*/{LORA_FILE}"), reverse=True),
    ]
    return {
        str(file): run for run in find_runs(place) for file in files(Path(run)) if file.is_file()
    }


def curves(metrics):
    """The losses in a run's metrics.jsonl as the plot's table. Every curve has a row, or it could not come later."""
    table = pd.DataFrame(read_metrics(Path(metrics)), columns=["step", *CURVES])
    return pd.concat(
        [pd.DataFrame({"curve": [*CURVES]}), table.melt("step", var_name="curve").dropna()]
    )


newest = lambda found: next(iter(found), "")  # of find_runs or find_loras


def stamp(path):
    """What tells that a file has not changed, None if it is not there."""
    return prepare_data.file_stamp(os.stat(path)) if os.path.isfile(path) else None


# ---------------------------------------------------------------- the page


def set_up_tab(place, start):
    """Settings. Returns the form's components: the box of all other keys, and a field for each in FRONT."""
    files = {path.name: path for path in sorted((HERE / "configs").glob("*.json"))}
    texts = texts_of(load_config(files[start]))
    choices = lambda: [*files, *find_runs(place)]
    chosen = gr.Dropdown(choices(), value=start, label=t("start_from"), elem_id="config")
    with gr.Row():
        form = [field(name, text, "key") for name, text in zip(FRONT, texts[1:])]
    with gr.Accordion(t("more"), open=False, elem_id="more-box"):
        more = gr.Code(
            texts[0], "javascript", show_label=False, wrap_lines=True, max_lines=30, elem_id="more"
        )
    message = gr.Markdown(elem_id="set-up-message")
    components = [more, *form]

    load = lambda file: texts_of(load_config({**files, **find_runs(place)}[file]))
    check = told(lambda more, *texts: read_form(place, dict(zip(FRONT, texts)), more) and "")
    left = [part.input if isinstance(part, gr.Dropdown) else part.blur for part in components]
    gr.on(left, check, components, message, show_progress="hidden", trigger_mode="always_last")
    chosen.input(load, chosen, components).then(check, components, message, show_progress="hidden")
    chosen.focus(lambda: gr.update(choices=choices()), None, chosen, show_progress="hidden")
    return components


def data_tab(place, settings):
    """The report and the preview sheet of prepare_data.py, and the captions, to be read and corrected."""
    look = gr.Button(t("look"), variant="primary", elem_id="look")
    message = gr.Markdown(elem_id="data-message")
    with gr.Column(visible=False) as shown:
        sheet = gr.Image(elem_id="sheet", **PICTURE)
        report = gr.Textbox(label=t("report"), elem_id="report", **LOG)
        gr.Markdown(t("choose_picture"))
        with gr.Row():
            gallery = gr.Gallery(columns=6, height=560, scale=2, elem_id="pictures", **PICTURE)
            with gr.Column():
                caption = gr.Textbox(
                    label=t("caption"), lines=4, elem_id="caption", interactive=True
                )
                save = gr.Button(t("save_caption"), elem_id="save-caption")
                saved = gr.Markdown(elem_id="caption-message")
    found = gr.State([])  # a dictionary for each picture
    chosen = gr.State()  # its number

    def show(more, *texts, progress=gr.Progress(track_tqdm=True)):
        entries, preview, text = [], None, ""
        try:
            config = read_form(place, dict(zip(FRONT, texts)), more)
            for source in config.data_dir:
                for path, captions in prepare_data.read_source(
                    source, config, prepare_data.Findings()
                ):
                    files = [path.with_suffix(".txt"), path.with_suffix(".json")]  # there or not
                    entries.append(
                        dict(
                            picture=path,
                            captions=captions,
                            files=files,
                            stamps=[*map(stamp, files)],
                        )
                    )
            prepare_data.main(config)
            text, preview = (
                Path(config.output_dir) / name for name in ("report.md", "preview.jpg")
            )
            text = text.read_text(encoding="utf-8")
            summary = plain(text.split("\n")[2])
        except (UserError, OSError) as error:
            summary = said(error)
        entries = sorted(entries, key=lambda entry: bool(entry["captions"]))[:THUMBNAILS]
        images = [
            *in_parallel(
                lambda entry: (thumbnail(entry["picture"]), *(entry["captions"] or "⚠")[:1]),
                entries,
            )
        ]
        return (
            summary,
            gr.update(visible=bool(entries)),
            preview,
            text,
            entries,
            images,
            None,
            "",
            "",
        )

    def choose(entries, event: gr.SelectData):
        entry = entries[event.index]
        return event.index, "\n".join(entry["captions"]), plain(entry["picture"])

    @told
    def write(entries, i, text):
        captions = [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]
        if i is None or not captions:
            return t("no_caption")
        path, files = entries[i]["picture"], entries[i]["files"]
        if not all(is_inside(file, [place.output, *place.folders]) for file in files):
            raise UserError(f"{path}: its caption is a link out of this page's folders")
        if [*map(stamp, files)] != entries[i]["stamps"] or not path.exists():
            return f"{t('changed_meanwhile')} {plain(path)}"
        file = prepare_data.save_captions(path, captions)
        entries[i] |= {"captions": captions, "stamps": [*map(stamp, files)]}
        return f"{t('saved')} {plain(file)}"

    views = [message, shown, sheet, report, found, gallery, chosen, caption, saved]
    look.click(show, settings, views, show_progress_on=message)
    gallery.select(choose, found, [chosen, caption, saved], show_progress="hidden")
    save.click(write, [found, chosen, caption], saved, show_progress="hidden")


def thumbnail(path):
    """A picture, small and upright; red if it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (512, 512))
            return ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), (512, 512))
    except Exception:  # the report says why; Pillow's plugins raise many kinds
        return Image.new("RGB", (512, 512), "#cc0000")


def train_tab(place, settings):
    """Start, go on, stop, and what a run has come to."""
    start = gr.Button(t("start"), variant="primary", elem_id="start")
    message = gr.Markdown(elem_id="train-message")
    with gr.Row():
        chosen = gr.Dropdown(
            [*find_runs(place)],
            value=None,
            label=t("run"),
            info=t("newest"),
            elem_id="run",
            scale=3,
        )
        stop = gr.Button(t("stop"), variant="stop", elem_id="stop")
    state = gr.Markdown(elem_id="state")
    with gr.Row():
        look = dict(color="curve", color_map=CURVES, color_title=" ", y_title=" ", visible=False)
        plot = gr.LinePlot(None, "step", "value", label=t("curves"), elem_id="plot", **look)
        log = gr.Textbox(label=t("log"), elem_id="log", **LOG)
    preview = gr.Image(visible=False, elem_id="previews", **PICTURE)
    lora = gr.DownloadButton(t("download"), visible=False, elem_id="download")
    made = (
        gr.State()
    )  # the files of these three, with their stamps: they are shown again when one has changed

    @told
    def begin(more, *texts):
        start_job(place, "train_lora.py", read_form(place, dict(zip(FRONT, texts)), more))

    def refresh(run):
        run = run or newest(find_runs(place))
        name, text = state_of(place, "train_lora", run)
        files = [
            os.path.join(run, file)
            for file in ("metrics.jsonl", "validation/progress.png", LORA_FILE)
        ]
        files = [
            (file, stamp(file)) if is_inside(file, [place.output]) else (file, None)
            for file in files
        ]
        return f"{plain(run)}: **{t(name or 'elsewhere')}**" if run else t("no_run"), text, files

    def show(made):
        metrics, *files = [file if there else None for file, there in made]
        values = [metrics and curves(metrics), *files]
        return [gr.update(value=value, visible=value is not None) for value in values]

    start.click(begin, settings, message).then(lambda: None, None, chosen)  # the newest
    stop.click(lambda run: stop_job(place, "train_lora", run or newest(find_runs(place))), chosen)
    chosen.focus(
        lambda: gr.update(choices=[*find_runs(place)]), None, chosen, show_progress="hidden"
    )
    made.change(show, made, [plot, preview, lora], show_progress="hidden")
    gr.Timer(REFRESH_SECONDS).tick(refresh, chosen, [state, log, made], show_progress="hidden")


def try_tab(place):
    """Prompts drawn with the base and with a LoRA, side by side, by validate.py."""
    with gr.Row():
        with gr.Column():
            lora = gr.Dropdown(
                [*find_loras(place)], value=None, label=t("lora"), info=t("newest"), elem_id="lora"
            )
            form = [field(name, "", "try") for name in TRY]
            draw = gr.Button(t("draw"), variant="primary", elem_id="draw")
            message = gr.Markdown(elem_id="try-message")
        with gr.Column(scale=2):
            state = gr.Markdown(elem_id="try-state")
            pictures = gr.Gallery(columns=4, height=640, preview=True, elem_id="grid", **PICTURE)
            log = gr.Textbox(label=t("log"), **LOG)
    drawn = gr.State()  # the newest grid

    @told
    def begin(lora, *texts):
        loras = find_loras(place)
        if not loras:
            raise UserError("lora: none yet; train one first")
        lora = lora or newest(loras)
        typed = {name: text for name, text in zip(TRY, texts) if text.strip()}
        given = {
            name: value
            for name, value in read_json(find_runs(place)[loras[lora]]).items()
            if name not in typed
        }
        given |= {
            "data_dir": None,
            "output_dir": loras[lora],
            "lora": lora,
            "compare_checkpoints": False,
        }
        start_job(place, "validate.py", read_form(place, typed, given))

    def refresh(lora):
        loras = find_loras(place)
        name, text = state_of(place, "validate", loras.get(lora or newest(loras)))
        grid = re.findall(r"^base beside LoRA: (.+)$", text, re.MULTILINE)
        return (
            t(name) if name else "",
            text,
            grid[-1] if grid and is_inside(grid[-1], [place.output]) else None,
        )

    def show(grid):
        files = (
            sorted(Path(grid).parent.glob("*.png"), key=lambda path: path != Path(grid))
            if grid
            else []
        )
        return gr.update(
            value=[(path, path.stem) for path in files], selected_index=0 if files else None
        )

    draw.click(begin, [lora, *form], message)
    lora.focus(lambda: gr.update(choices=[*find_loras(place)]), None, lora, show_progress="hidden")
    drawn.change(show, drawn, pictures, show_progress="hidden")
    gr.Timer(REFRESH_SECONDS).tick(refresh, lora, [state, log, drawn], show_progress="hidden")


def make_page(place, start):
    """The page. `start`: the config file that it opens with."""
    with gr.Blocks(
        title="LongCat-Image LoRA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)
    ) as page:
        gr.Markdown(f"# {t('title')}")
        with gr.Tab(t("set_up")):
            gr.Markdown(t("about_set_up"))
            settings = set_up_tab(place, start)
        with gr.Tab(t("data")):
            gr.Markdown(t("about_data"))
            data_tab(place, settings)
        with gr.Tab(t("train")):
            gr.Markdown(t("about_train"))
            train_tab(place, settings)
        with gr.Tab(t("try_it")):
            gr.Markdown(t("about_try_it"))
            try_tab(place)
    for function in (
        page.fns.values()
    ):  # Gradio would describe public ones, with what the fields hold, to anybody
        function.api_visibility = "private"
    return page


# ---------------------------------------------------------------- the server


async def refuse_other_sites(request, call_next):
    """Another site's page, open in the same browser, must not use this one; it may link here. A browser names the
    origin with all that changes something, and with all that a script may read."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    own = (
        site == "same-origin"
        if site
        else origin and urlsplit(origin).netloc == request.headers.get("host")
    )
    if origin and not own:
        return PlainTextResponse("this page takes no orders from another site", 403)
    return await call_next(request)


def main(arguments=None):
    """Serves the page, until Ctrl-C; in a notebook it shows it and returns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others need a password"
    )
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument(
        "--password", default=os.environ.get("WEBUI_PASSWORD"), help="or as WEBUI_PASSWORD"
    )
    parser.add_argument(
        "--output", default="output", help="folder of all runs; nothing else is served as it is"
    )
    parser.add_argument(
        "--folders", nargs="+", default=[], help=f"folders open to the page, besides {FOLDERS}"
    )
    options = parser.parse_args(arguments)
    own_machine = options.host == "localhost" or options.host.startswith("127.")
    if (
        not own_machine and len(options.password or "") < 8
    ):  # nothing limits how often one may guess
        sys.exit(
            f"error: --host {options.host}: others could use this page; give it a --password of 8 letters or more"
        )
    place = SimpleNamespace(
        output=Path(options.output), folders=[Path(path) for path in (*FOLDERS, *options.folders)]
    )
    place.lock = place.output / ".webui" / "lock"
    os.environ["GRADIO_TEMP_DIR"] = str(
        (place.lock.parent / "shown").absolute()
    )  # what the page has shown
    # Names that lead to this machine; the last are Colab's. A site that gives its own name to 127.0.0.1 is turned away.
    hosts = (
        ["localhost", "127.0.0.1", options.host, "*.googleusercontent.com"]
        if own_machine
        else ["*"]
    )
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    guards.append(Middleware(BaseHTTPMiddleware, dispatch=refuse_other_sites))
    texts = json.loads((HERE / "webui_texts.json").read_text(encoding="utf-8"))
    languages = {"en": 0, "pt": 1, "pt-BR": 1, "zh": 2, "zh-CN": 2, "zh-TW": 2}
    translations = {
        language: {name: text[i] for name, text in texts.items()}
        for language, i in languages.items()
    }
    gpu, mac = torch.cuda.is_available(), torch.backends.mps.is_available()
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    print(
        f"open http://{'localhost' if options.host == '127.0.0.1' else options.host}:{options.port}",
        flush=True,
    )
    try:
        place.lock.parent.mkdir(parents=True, exist_ok=True)
        make_page(place, "24gb.json" if gpu else "mps.json" if mac else "tiny.json").launch(
            server_name=options.host, server_port=options.port, share=False, quiet=True, show_error=True,
            auth=options.password and (lambda _, guess: hmac.compare_digest(guess.encode(), options.password.encode())),
            auth_message="any name, and the password that webui.py was started with", app_kwargs={"middleware": guards},
            allowed_paths=[str(place.output.absolute())], i18n=gr.I18n(**translations), max_file_size=1, css=CSS,
            theme=gr.themes.Default(**fonts).set(block_info_text_color="*neutral_600"), footer_links=["settings"],
            ssr_mode=False, run_history=False,
        )  # fmt: skip
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
