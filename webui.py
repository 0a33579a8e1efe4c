"""A page in the browser for the scripts: settings, data, training, generated images.

    python webui.py                                            # then open http://localhost:8001
    python webui.py --folders /mnt/images                      # one more folder the page may use
    python webui.py --host 0.0.0.0 --password "a long one"     # open to other machines

It starts `train_lora.py` and `validate.py` and shows what they write. Each job is a separate
process: it keeps running when the page is closed and when this server ends.
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
        sys.exit("error: webui.py needs Linux or macOS; on Windows, run it in WSL")
    sys.exit("error: webui.py needs Gradio; install it with: pip install 'gradio>=6.31,<7'")
import pandas as pd
import torch
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

import prepare_data
from longcat_common import (
    KEYS, LORA_FILE, UserError, load_config, normalize_keys, parse_json, read_json, write_file,
)  # fmt: skip
from validate import read_metrics

HERE = Path(__file__).resolve().parent
# The page may use these folders, the --output folder and those named with --folders.
FOLDERS = ("data", "cache", "models", "configs", "tests/tiny_longcat")

# The keys that have a field in the Set up tab and in the Try it tab. Their labels and help texts
# are in webui_texts.json. All other keys are edited as JSON.
SETTINGS_FIELDS = [
    "data_dir", "trigger_words", "instance_prompt", "validation_prompts", "output_dir",
    "max_train_steps", "learning_rate", "lora_rank", "resolution", "validation_step_interval",
    "model_family", "model_flavour", "pretrained_model_name_or_path", "base_model_precision",
]  # fmt: skip
GENERATION_FIELDS = [
    "validation_prompts", "validation_negative_prompt", "validation_lora_strength",
    "validation_seed", "validation_num_inference_steps", "validation_guidance",
    "validation_resolution",
]  # fmt: skip
MULTILINE_FIELDS = ("trigger_words", "validation_prompts")  # one entry per line
# The keys that name a file or folder, besides data_dir and validation_prompts.
PATH_KEYS = (
    "output_dir", "cache_dir", "init_lora", "lora", "resume_from_checkpoint",
    "pretrained_model_name_or_path",
)  # fmt: skip

CURVE_COLORS = {"loss": "#9ca3af", "held_out_loss": "#ea580c", "held_out_base": "#2563eb"}
GALLERY_LIMIT = 200  # images in the Data tab
LOG_LINES = 14
REFRESH_SECONDS = 2
IMAGE_OPTIONS = dict(show_label=False, interactive=False, buttons=["download", "fullscreen"])
LOG_OPTIONS = dict(lines=LOG_LINES, max_lines=LOG_LINES, interactive=False, elem_classes=["log"])
# The log does not wrap its lines; on a phone, the names of all tabs fit side by side.
CSS = """
.log textarea {
    font-family: monospace; font-size: 12px; line-height: 1.4; white-space: pre; overflow-x: auto
}
@media (max-width: 600px) {
    button[role=tab] { padding: 0 8px !important; font-size: 14px !important }
}
"""


def load_translations():
    """{language: {key: text}} from webui_texts.json: {key: [English, Portuguese, Chinese]}."""
    texts = json.loads((HERE / "webui_texts.json").read_text(encoding="utf-8"))
    columns = {"en": 0, "pt": 1, "pt-BR": 1, "zh": 2, "zh-CN": 2, "zh-TW": 2}
    translations = {}
    for language, column in columns.items():
        translations[language] = {key: text[column] for key, text in texts.items()}
    return translations


# t("run") is a placeholder: the browser replaces it with the text "run" of webui_texts.json in the
# language of its user.
t = gr.I18n(**load_translations())


# ---------------------------------------------------------------- the form: settings as texts


def config_to_form(config):
    """The texts that a Config has in the form: all keys without a field as JSON, with their
    descriptions as comments; then the text of each field in SETTINGS_FIELDS."""
    values = config.model_dump()
    for key in MULTILINE_FIELDS:
        values[key] = "\n".join(values[key])

    # A single folder without options is shown as its path, anything else as JSON.
    sources = [source.model_dump(exclude_defaults=True) for source in config.data_dir]
    values["data_dir"] = sources or None
    if len(sources) == 1 and list(sources[0]) == ["path"]:
        values["data_dir"] = sources[0]["path"]

    json_lines = ["{"]
    for key, info in KEYS.items():
        if key not in SETTINGS_FIELDS:
            json_lines.append(f"  // {info.description}")
            json_lines.append(f'  "{key}": {json.dumps(values[key])},')
    json_lines.append("}")

    texts = ["\n".join(json_lines)]
    for key in SETTINGS_FIELDS:
        value = values[key]
        if value is None:
            value = ""
        elif not isinstance(value, str):
            value = json.dumps(value)
        texts.append(value)
    return texts


def form_to_config(workspace, field_texts, other_settings):
    """The Config that a form describes. `field_texts`: {key: text of its field}, where an empty
    text means the default; `other_settings`: the keys without a field, as a dictionary or as JSON.
    Raises UserError with everything that is wrong, one line per key."""
    if isinstance(other_settings, str):
        other_settings = parse_json(other_settings, "JSON")
    settings = dict(other_settings)
    for key, text in field_texts.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and key in MULTILINE_FIELDS:
            settings[f"--{key}"] = lines
        elif lines:
            settings[f"--{key}"] = text.strip()

    # load_config reads a .txt file of prompts, so its path is checked before.
    prompts = normalize_keys(settings).get("validation_prompts")
    if str(prompts).lower().endswith(".txt"):
        check_path(workspace, "validation_prompts", prompts)
    config = load_config(**settings)

    for key in PATH_KEYS:
        check_path(workspace, key, getattr(config, key))
    for source in config.data_dir:
        check_path(workspace, "data_dir", source.path)
        # A list of images could name images anywhere on this machine.
        if not os.path.isdir(source.path):
            raise UserError(
                f"data_dir: {source.path} is not a directory; lists of images can only be used "
                "on the command line"
            )
    return config


def read_settings(workspace, other_settings, texts):
    """The Config of the Set up tab's form, from its texts in the order of config_to_form."""
    return form_to_config(workspace, dict(zip(SETTINGS_FIELDS, texts)), other_settings)


def make_field(key, text, id_prefix):
    """The component of a key: a dropdown if it has a fixed set of values, else a text box."""
    options = dict(value=text, label=t(key), info=t(f"help_{key}"), min_width=320)
    options["elem_id"] = f"{id_prefix}-{key}"
    value_type = KEYS[key].annotation
    if get_origin(value_type) is Literal:
        return gr.Dropdown(get_args(value_type), **options)
    return gr.Textbox(lines=3 if key in MULTILINE_FIELDS else 1, max_lines=8, **options)


# ---------------------------------------------------------------- safety


def check_path(workspace, key, path):
    """Raises UserError if the path that this key holds is outside the folders of the page."""
    # Not a path: null, a word that the key accepts, a name on the Hugging Face Hub.
    if path is None:
        return
    if key in ("lora", "resume_from_checkpoint") and path in ("latest", "none"):
        return
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not os.path.exists(path)
    if key == "pretrained_model_name_or_path" and is_hub_name:
        return

    # Runs are only written to the output folder.
    folders = [workspace.output]
    flag = "--output"
    if key != "output_dir":
        folders += workspace.folders
        flag = "--folders"
    # The folders .webui hold the page's own files.
    if is_inside(path, folders) and ".webui" not in Path(os.path.realpath(path)).parts:
        return
    allowed = ", ".join(map(str, folders))
    raise UserError(
        f"{key}: found {path!r}, which is outside the folders of this page ({allowed}); "
        f"choose a path inside them, or restart webui.py with {flag} {path}"
    )


def is_inside(path, folders):
    """Whether a path, with its links resolved, is one of these folders or lies in one of them."""
    path = Path(os.path.realpath(os.path.expanduser(path)))
    return any(path.is_relative_to(os.path.realpath(folder)) for folder in folders)


def escape_markdown(text):
    """Text that Markdown shows unchanged."""
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", html.escape(str(text), quote=False))


def is_this_machine(host):
    """Whether only this machine can reach a server that listens on this address."""
    return host == "localhost" or host.startswith("127.")


def request_guards(host):
    """The middleware that refuses requests from other websites open in the same browser."""
    # Names that lead to this machine, in a Colab notebook too. Without this list, a website could
    # point its own name at 127.0.0.1.
    host_names = ["*"]
    if is_this_machine(host):
        host_names = ["localhost", "127.0.0.1", host, "*.googleusercontent.com"]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=host_names),
        Middleware(BaseHTTPMiddleware, dispatch=refuse_other_sites),
    ]


async def refuse_other_sites(request, call_next):
    """Answers 403 to the scripts and forms of other websites; plain links to this page work. A
    browser names the origin of each request that changes something or that a script may read."""
    origin = request.headers.get("origin")
    fetch_site = request.headers.get("sec-fetch-site")
    if origin:
        if fetch_site:
            is_same_origin = fetch_site == "same-origin"
        else:
            is_same_origin = urlsplit(origin).netloc == request.headers.get("host")
        if not is_same_origin:
            return PlainTextResponse("error: requests from other websites are refused", 403)
    return await call_next(request)


# ---------------------------------------------------------------- jobs

# At most one job runs at a time. It holds a lock on the lock file, which describes it as
# {"name": script, "run": output_dir, "pid": process id, or null after the signal to stop}.
# The file lock keeps other processes out, THREAD_LOCK the other threads of this server.
THREAD_LOCK = threading.RLock()


def lock_or_get_job(lock_file, mode):
    """Locks the open lock file with `mode`. If a job holds it, returns that job, else None."""
    try:
        fcntl.flock(lock_file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        lock_file.seek(0)
        return json.load(lock_file)


def start_job(workspace, script, config):
    """Starts a script as a process that outlives this server and inherits the file lock. Its config
    and log are in `<output_dir>/.webui`. Raises UserError if a job is running."""
    name = Path(script).stem
    job_folder = Path(config.output_dir, ".webui")
    config_file = job_folder / f"{name}.json"
    with THREAD_LOCK, open(workspace.lock, "a+") as lock_file:
        other_job = lock_or_get_job(lock_file, fcntl.LOCK_EX)
        if other_job:
            raise UserError(
                f"another job is running in {other_job['run']}; stop it, or wait until it ends"
            )
        write_file(config_file, config.model_dump_json(indent=2) + "\n")

        # The process gets a session of its own: Ctrl-C here does not reach it.
        with open(job_folder / f"{name}.log", "wb") as log_file:
            process = subprocess.Popen(
                [sys.executable, str(HERE / script), str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                pass_fds=[lock_file.fileno()],
                env={**os.environ, "PYTHONUTF8": "1", "TQDM_MININTERVAL": "1"},
            )
        lock_file.truncate(0)
        json.dump({"name": name, "run": config.output_dir, "pid": process.pid}, lock_file)


def running_job(workspace, name, run):
    """The job of this script in this run, as the lock file has it; None if it is not running."""
    with THREAD_LOCK, open(workspace.lock, "a+") as lock_file:
        job = lock_or_get_job(lock_file, fcntl.LOCK_SH)
    if job and job["name"] == name and Path(job["run"]) == Path(run):
        return job
    return None


def stop_job(workspace, name, run):
    """Sends SIGTERM to a job, and only once: training finishes its step and saves a checkpoint,
    but a second signal would end it immediately."""
    with THREAD_LOCK:
        job = running_job(workspace, name, run)
        if job and job["pid"]:
            os.kill(job["pid"], signal.SIGTERM)
            job["pid"] = None
            workspace.lock.write_text(json.dumps(job))


def job_state(workspace, name, run):
    """(state, last lines of the log) of this script's job in this run. The state is None if this
    page has never started it; otherwise it is a key of webui_texts.json."""
    if not run:
        return None, ""
    log_file = Path(run, ".webui", f"{name}.log")
    if not log_file.is_file():
        return None, ""

    # Looked up before the log is read: if the job ends in between, its log is complete.
    job = running_job(workspace, name, run)
    log = last_lines(log_file)
    if job and job["pid"]:
        state = "running"
    elif job:
        state = "stopping"
    elif re.search(r"(?m)^(LoRA|base beside LoRA): ", log):
        state = "finished"
    elif re.search(r"(?m)^stopp", log):
        state = "stopped"
    else:
        state = "failed"
    return state, log


def last_lines(log_file):
    """The last lines of a log as a terminal would show them, each progress bar only once."""
    text = log_file.read_bytes().decode("utf-8", "replace")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    lines = {}
    for line in text.split("\n"):
        line = line.rstrip().rpartition("\r")[2]
        title = re.sub(r": +\d+%\|.*", "", line)  # the same in every line of a progress bar
        if line:
            lines.pop(title, None)
            lines[title] = line
    return "\n".join(list(lines.values())[-LOG_LINES:])


def find_runs(workspace):
    """{folder of a run: its config file} in the output folder, up to two levels deep, the newest
    run first."""
    runs = {}
    for depth in ("", "*/", "*/*/"):
        for name in ("config.json", ".webui/train_lora.json"):
            for file in workspace.output.glob(depth + name):
                run = str(Path(str(file).removesuffix(name)))
                if run.isprintable() and is_inside(file, [workspace.output]):
                    runs[run] = file
    by_time = sorted(runs, key=lambda run: runs[run].stat().st_mtime, reverse=True)
    return {run: runs[run] for run in by_time}


def find_loras(workspace):
    """{LoRA file: folder of its run}, the newest run first; in each run the final LoRA, then those
    of its checkpoints, the last one first."""
    loras = {}
    for run in find_runs(workspace):
        checkpoints = Path(run).glob(f"checkpoints/step-*/{LORA_FILE}")
        for file in [Path(run, LORA_FILE), *sorted(checkpoints, reverse=True)]:
            if file.is_file():
                loras[str(file)] = run
    return loras


def newest(paths):
    """The first path from find_runs or find_loras; an empty string if there is none."""
    return next(iter(paths), "")


# ---------------------------------------------------------------- what is shown


def error_markdown(error):
    """An error as Markdown, one paragraph per line. If a line is about a key that has a field, it
    starts with the label of the field."""
    paragraphs = []
    for line in str(error).splitlines():
        key = re.split(r"[:.\[]", line)[0]
        label = ""
        if key in SETTINGS_FIELDS + GENERATION_FIELDS:
            label = f"**{t(key)}** – "
        paragraphs.append(f"⚠ {label}{escape_markdown(line)}")
    return "\n\n".join(paragraphs)


def show_errors(action):
    """Decorator: the action returns its message for the page or, if it fails, the error."""

    def run_action(*values):
        """The action's message, or its error as Markdown."""
        try:
            return action(*values) or ""
        except (UserError, OSError) as error:
            return error_markdown(error)

    return run_action


def update_on_focus(dropdown, list_choices):
    """Updates the choices of a dropdown whenever it is opened."""

    def update():
        """The update of the dropdown."""
        return gr.update(choices=list(list_choices()))

    dropdown.focus(update, None, dropdown, show_progress="hidden")


def file_stamp(path):
    """The size and time of a file, which tell whether it has changed; None if there is no file."""
    if os.path.isfile(path):
        return prepare_data.file_stamp(os.stat(path))
    return None


def loss_table(metrics_file):
    """The table of the loss plot, with the columns curve, step and value, from a metrics.jsonl."""
    metrics = pd.DataFrame(read_metrics(Path(metrics_file)), columns=["step", *CURVE_COLORS])
    points = metrics.melt("step", var_name="curve").dropna()
    # Each curve has a row from the start: the plot does not accept new curves later.
    return pd.concat([pd.DataFrame({"curve": list(CURVE_COLORS)}), points])


def run_status(workspace, run):
    """What the Train tab shows of a run ("": of the newest): its state, its log, result_files."""
    run = run or newest(find_runs(workspace))
    state, log = job_state(workspace, "train_lora", run)
    status = t("no_run")
    if run:
        status = f"{escape_markdown(run)}: **{t(state or 'elsewhere')}**"
    return status, log, result_files(workspace, run)


def result_files(workspace, run):
    """[(file, stamp)] of a run's metrics, preview images and LoRA. The stamp is None if the file
    does not exist or is a link out of the output folder."""
    results = []
    for name in ("metrics.jsonl", "validation/progress.png", LORA_FILE):
        file = os.path.join(run, name)
        stamp = None
        if is_inside(file, [workspace.output]):
            stamp = file_stamp(file)
        results.append((file, stamp))
    return results


def show_results(results):
    """The updates of the loss plot, the preview image and the download button, each of which is
    hidden without its file. `results`: what result_files returns."""
    values = [file if stamp else None for file, stamp in results]
    if values[0]:
        values[0] = loss_table(values[0])
    return [gr.update(value=value, visible=value is not None) for value in values]


def thumbnail(path):
    """A small upright version of an image; red if the image cannot be read."""
    size = (512, 512)
    try:
        with Image.open(path) as image:
            image.draft("RGB", size)
            return ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), size)
    except Exception:  # Pillow's plugins raise many kinds; the data report gives the reason
        return Image.new("RGB", size, "#cc0000")


# ---------------------------------------------------------------- tab 1: Set up


def set_up_tab(workspace, start_config):
    """The settings. Returns the components of the form in the order of config_to_form."""
    config_files = {path.name: path for path in sorted((HERE / "configs").glob("[!.]*.json"))}
    other_settings, *texts = config_to_form(load_config(config_files[start_config]))

    def all_configs():
        """{name in the dropdown: config file}: the configs of this repository, then the runs."""
        return {**config_files, **find_runs(workspace)}

    # Layout: what to start from, the fields, all other settings as JSON.
    config_name = gr.Dropdown(
        list(all_configs()), value=start_config, label=t("start_from"), elem_id="config"
    )
    fields = []
    with gr.Row():
        for key, text in zip(SETTINGS_FIELDS, texts):
            fields.append(make_field(key, text, "key"))
    with gr.Accordion(t("more"), open=False, elem_id="more-box"):
        options = dict(show_label=False, wrap_lines=True, max_lines=30)
        json_box = gr.Code(other_settings, "javascript", elem_id="more", **options)
    message = gr.Markdown(elem_id="set-up-message")
    form = [json_box, *fields]

    def load_form(name):
        """The texts of the form for a config or an earlier run."""
        return config_to_form(load_config(all_configs()[name]))

    @show_errors
    def check_form(other_settings, *texts):
        """Reports what is wrong in the form."""
        read_settings(workspace, other_settings, texts)

    # The form is checked when a config is loaded into it and after a field is edited.
    edited = []
    for part in form:
        edited.append(part.input if isinstance(part, gr.Dropdown) else part.blur)
    quiet = dict(show_progress="hidden")
    gr.on(edited, check_form, form, message, trigger_mode="always_last", **quiet)
    config_name.input(load_form, config_name, form).then(check_form, form, message, **quiet)
    update_on_focus(config_name, all_configs)
    return form


# ---------------------------------------------------------------- tab 2: Data


def data_tab(workspace, form):
    """The report and preview of prepare_data.py, and an editor for the captions."""
    check_button = gr.Button(t("check_data"), variant="primary", elem_id="check-data")
    message = gr.Markdown(elem_id="data-message")
    with gr.Column(visible=False) as results:
        preview = gr.Image(elem_id="sheet", **IMAGE_OPTIONS)
        report = gr.Textbox(label=t("report"), elem_id="report", **LOG_OPTIONS)
        gr.Markdown(t("choose_image"))
        editor = caption_editor(workspace)

    def check(other_settings, *texts, progress=gr.Progress(track_tqdm=True)):
        """Runs check_data and fills the editor; no image is chosen in it yet. Because of the
        parameter `progress`, Gradio shows the progress bars of prepare_data.py on the page."""
        summary, preview_file, report_text, images = check_data(workspace, other_settings, texts)
        visibility = gr.update(visible=bool(images))
        items = list(prepare_data.in_parallel(gallery_item, images))
        return summary, visibility, preview_file, report_text, images, items, None, "", ""

    outputs = [message, results, preview, report, *editor]
    check_button.click(check, form, outputs, show_progress_on=message)


def caption_editor(workspace):
    """A gallery, and beside it the captions of the chosen image, to be corrected and saved. Returns
    its components: images, gallery, index of the chosen image, captions, message."""
    with gr.Row():
        gallery = gr.Gallery(columns=6, height=560, scale=2, elem_id="images", **IMAGE_OPTIONS)
        with gr.Column():
            caption = gr.Textbox(label=t("caption"), lines=4, elem_id="caption", interactive=True)
            save_button = gr.Button(t("save_caption"), elem_id="save-caption")
            message = gr.Markdown(elem_id="caption-message")
    # Kept for each open page: the images from list_images, and the index of the chosen one.
    images_state = gr.State([])
    index_state = gr.State()

    def choose(images, event: gr.SelectData):
        """Shows the captions and the path of an image."""
        image = images[event.index]
        return event.index, "\n".join(image["captions"]), escape_markdown(image["path"])

    @show_errors
    def save(images, index, text):
        """Saves the edited captions."""
        return save_caption(workspace, images, index, text)

    chosen = [index_state, caption, message]
    gallery.select(choose, images_state, chosen, show_progress="hidden")
    edited = [images_state, index_state, caption]
    save_button.click(save, edited, message, show_progress="hidden")
    return [images_state, gallery, *chosen]


def check_data(workspace, other_settings, texts):
    """Runs prepare_data.py with the settings of the form. Returns its summary, or the error; its
    preview file; its report; and the images for the gallery, those without a caption first."""
    preview_file = None
    report = ""
    images = []
    try:
        config = read_settings(workspace, other_settings, texts)
        images.extend(list_images(config))
        prepare_data.main(config)
        preview_file = Path(config.output_dir, "preview.jpg")
        report = Path(config.output_dir, "report.md").read_text(encoding="utf-8")
        summary = escape_markdown(report.split("\n")[2])
    except (UserError, OSError) as error:
        summary = error_markdown(error)
    images.sort(key=lambda image: bool(image["captions"]))
    return summary, preview_file, report, images[:GALLERY_LIMIT]


def list_images(config):
    """Yields each image of data_dir as a dictionary: its path, its captions, and the files beside
    it that captions are saved to, which may not exist yet, with their stamps."""
    for source in config.data_dir:
        findings = prepare_data.Findings()
        for path, captions in prepare_data.read_source(source, config, findings):
            files = [path.with_suffix(".txt"), path.with_suffix(".json")]
            stamps = [file_stamp(file) for file in files]
            yield {"path": path, "captions": captions, "files": files, "stamps": stamps}


def gallery_item(image):
    """(thumbnail, first caption) of an image from list_images."""
    captions = image["captions"] or ["⚠"]
    return thumbnail(image["path"]), captions[0]


def save_caption(workspace, images, index, text):
    """Saves the captions in `text`, one per line, of images[index] (None: none is chosen) from
    list_images, and updates it there. Returns the message for the page. Raises UserError if a
    caption file is outside the folders of the page."""
    captions = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if index is None or not captions:
        return t("no_caption")

    # Nothing is written outside the folders of the page or over somebody else's changes.
    image = images[index]
    path = image["path"]
    folders = [workspace.output, *workspace.folders]
    for file in image["files"]:
        if not is_inside(file, folders):
            raise UserError(
                f"{file}: is a link out of the folders of this page; replace it with a file"
            )
    stamps = [file_stamp(file) for file in image["files"]]
    if stamps != image["stamps"] or not path.exists():
        return f"{t('changed_meanwhile')} {escape_markdown(path)}"

    saved_file = prepare_data.save_captions(path, captions)
    image["captions"] = captions
    image["stamps"] = [file_stamp(file) for file in image["files"]]
    return f"{t('saved')} {escape_markdown(saved_file)}"


# ---------------------------------------------------------------- tab 3: Train


def train_tab(workspace, form):
    """Start, resume and stop training, and the results of a run."""
    # Layout: the buttons and the run, its state, the loss beside the log, the preview, the LoRA.
    start_button = gr.Button(t("start"), variant="primary", elem_id="start")
    message = gr.Markdown(elem_id="train-message")
    with gr.Row():
        options = dict(label=t("run"), info=t("newest"), elem_id="run", scale=3)
        chosen_run = gr.Dropdown(list(find_runs(workspace)), value=None, **options)
        stop_button = gr.Button(t("stop"), variant="stop", elem_id="stop")
    status = gr.Markdown(elem_id="state")
    with gr.Row():
        options = dict(color="curve", color_map=CURVE_COLORS, color_title=" ", y_title=" ")
        options.update(label=t("curves"), elem_id="plot", visible=False)
        plot = gr.LinePlot(None, "step", "value", **options)
        log = gr.Textbox(label=t("log"), elem_id="log", **LOG_OPTIONS)
    preview = gr.Image(visible=False, elem_id="previews", **IMAGE_OPTIONS)
    download = gr.DownloadButton(t("download"), visible=False, elem_id="download")
    # What result_files returned last: plot, preview and download are updated if it changes.
    results_state = gr.State()

    @show_errors
    def start(other_settings, *texts):
        """Starts or resumes training with the settings of the form."""
        start_job(workspace, "train_lora.py", read_settings(workspace, other_settings, texts))

    def stop(run):
        """Stops training in the chosen or newest run."""
        stop_job(workspace, "train_lora", run or newest(find_runs(workspace)))

    def refresh(run):
        """The current status, every REFRESH_SECONDS."""
        return run_status(workspace, run)

    # After a start no run is chosen, which shows the newest.
    start_button.click(start, form, message).then(lambda: None, None, chosen_run)
    stop_button.click(stop, chosen_run)
    update_on_focus(chosen_run, lambda: find_runs(workspace))
    results = [plot, preview, download]
    results_state.change(show_results, results_state, results, show_progress="hidden")
    shown = [status, log, results_state]
    gr.Timer(REFRESH_SECONDS).tick(refresh, chosen_run, shown, show_progress="hidden")


# ---------------------------------------------------------------- tab 4: Try it


def try_it_tab(workspace):
    """Images that validate.py generates from prompts, with the base model and with a LoRA."""
    # Layout: the fields on the left, the generated images on the right.
    with gr.Row():
        with gr.Column():
            options = dict(label=t("lora"), info=t("newest"), elem_id="lora")
            chosen_lora = gr.Dropdown(list(find_loras(workspace)), value=None, **options)
            fields = []
            for key in GENERATION_FIELDS:
                fields.append(make_field(key, "", "try"))
            generate_button = gr.Button(t("generate"), variant="primary", elem_id="generate")
            message = gr.Markdown(elem_id="try-message")
        with gr.Column(scale=2):
            status = gr.Markdown(elem_id="try-state")
            options = dict(columns=4, height=640, preview=True, **IMAGE_OPTIONS)
            gallery = gr.Gallery(elem_id="grid", **options)
            log = gr.Textbox(label=t("log"), **LOG_OPTIONS)
    # The file of the newest grid: the gallery is updated if it changes.
    grid_state = gr.State()

    @show_errors
    def generate(lora, *texts):
        """Starts validate.py."""
        start_generation(workspace, lora, dict(zip(GENERATION_FIELDS, texts)))

    def refresh(lora):
        """The current status, every REFRESH_SECONDS."""
        return generation_status(workspace, lora)

    generate_button.click(generate, [chosen_lora, *fields], message)
    update_on_focus(chosen_lora, lambda: find_loras(workspace))
    grid_state.change(show_grid, grid_state, gallery, show_progress="hidden")
    shown = [status, log, grid_state]
    gr.Timer(REFRESH_SECONDS).tick(refresh, chosen_lora, shown, show_progress="hidden")


def start_generation(workspace, lora, field_texts):
    """Starts validate.py for a LoRA file ("": the newest) with the settings of its run, except for
    the fields that are filled in. Raises UserError."""
    loras = find_loras(workspace)
    if not loras:
        raise UserError("lora: there is no LoRA yet; train one first")
    lora = lora or newest(loras)
    run = loras[lora]
    settings = read_json(find_runs(workspace)[run])
    settings.update(data_dir=None, output_dir=run, lora=lora, compare_checkpoints=False)
    for key, text in field_texts.items():
        if text.strip():
            settings.pop(key, None)
    start_job(workspace, "validate.py", form_to_config(workspace, field_texts, settings))


def generation_status(workspace, lora):
    """What the Try it tab shows of a LoRA file ("": of the newest): the state and log of its job,
    and the file of the grid that it has generated, or None."""
    loras = find_loras(workspace)
    state, log = job_state(workspace, "validate", loras.get(lora or newest(loras)))
    grid = None
    grids = re.findall(r"(?m)^base beside LoRA: (.+)$", log)
    if grids and is_inside(grids[-1], [workspace.output]):
        grid = grids[-1]
    return t(state) if state else "", log, grid


def show_grid(grid):
    """The update of the gallery: the grid, then the single images beside it."""
    images = []
    if grid:
        images = sorted(Path(grid).parent.glob("[!.]*.png"), key=lambda path: path != Path(grid))
    items = [(path, path.stem) for path in images]
    return gr.update(value=items, selected_index=0 if images else None)


# ---------------------------------------------------------------- the page


def make_page(workspace, start_config):
    """The page with its four tabs. `start_config`: name of the config that it opens with."""
    cleanup = (3600, 24 * 3600)  # every hour, of the files it has shown, those older than a day
    with gr.Blocks(
        title="LongCat-Image LoRA", analytics_enabled=False, delete_cache=cleanup
    ) as page:
        gr.Markdown(f"# {t('title')}")
        with gr.Tab(t("set_up")):
            gr.Markdown(t("about_set_up"))
            form = set_up_tab(workspace, start_config)
        with gr.Tab(t("data")):
            gr.Markdown(t("about_data"))
            data_tab(workspace, form)
        with gr.Tab(t("train")):
            gr.Markdown(t("about_train"))
            train_tab(workspace, form)
        with gr.Tab(t("try_it")):
            gr.Markdown(t("about_try_it"))
            try_it_tab(workspace)
    # Gradio would describe public functions, with the values of the fields, to anybody.
    for function in page.fns.values():
        function.api_visibility = "private"
    return page


def default_config():
    """The name of the config that fits this machine."""
    if torch.cuda.is_available():
        return "24gb.json"
    if torch.backends.mps.is_available():
        return "mps.json"
    return "tiny.json"


# ---------------------------------------------------------------- the server


def parse_arguments(arguments):
    """The options of the command line. Exits if the page would be open to everybody."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; others need a --password")
    add("--port", type=int, default=8001, help="port to listen on")
    password = os.environ.get("WEBUI_PASSWORD")
    add("--password", default=password, help="password of the page; default: $WEBUI_PASSWORD")
    add("--output", default="output", help="folder of all runs, whose files the page serves")
    add("--folders", nargs="+", default=[], help=f"more folders, besides {', '.join(FOLDERS)}")
    options = parser.parse_args(arguments)

    # Nothing limits how often somebody may guess, so the password must not be short.
    if not is_this_machine(options.host) and len(options.password or "") < 8:
        sys.exit(
            f"error: --host {options.host}: other machines could use this page; "
            "set a --password of 8 or more characters"
        )
    return options


def main(arguments=None):
    """Serves the page until Ctrl-C; in a notebook, shows the page and returns."""
    options = parse_arguments(arguments)
    # The folders that the page may use, and the lock file of its jobs.
    workspace = SimpleNamespace(output=Path(options.output))
    workspace.folders = [Path(folder) for folder in (*FOLDERS, *options.folders)]
    workspace.lock = workspace.output / ".webui" / "lock"
    shown_files = workspace.output / ".webui" / "shown"
    os.environ["GRADIO_TEMP_DIR"] = str(shown_files.absolute())

    def check_password(user_name, password):
        """Whether somebody may use the page, in constant time."""
        return hmac.compare_digest(password.encode(), options.password.encode())

    address = options.host
    if address == "127.0.0.1":
        address = "localhost"
    print(f"open http://{address}:{options.port}", flush=True)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        workspace.lock.parent.mkdir(parents=True, exist_ok=True)
        page = make_page(workspace, default_config())
        page.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,
            show_error=True,
            auth=check_password if options.password else None,
            auth_message="Enter any user name and the password that webui.py was started with.",
            app_kwargs={"middleware": request_guards(options.host)},
            allowed_paths=[str(workspace.output.absolute())],
            i18n=t,
            max_file_size=1,  # in bytes: nothing is uploaded
            css=CSS,
            theme=theme.set(block_info_text_color="*neutral_600"),
            footer_links=["settings"],
            ssr_mode=False,
            run_history=False,
        )
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
