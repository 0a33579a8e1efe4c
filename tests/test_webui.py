"""The page: its form, its jobs, what it must refuse; and a browser that uses it like a person."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY

from longcat_common import LORA_FILE, RENAMED, UserError, load_config

pytest.importorskip("gradio", reason="webui.py's tests need Gradio: pip install 'gradio>=6.31,<7'")
import webui

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PORT = 20000 + os.getpid() % 10000
URL = f"http://127.0.0.1:{PORT}"
PASSWORD = "a-long-one"
TEXTS = json.loads((ROOT / "webui_texts.json").read_text(encoding="utf-8"))
TABS = ["set_up", "data", "train", "try_it"]
VALID = {"output_dir": "output/run", "cache_dir": "output/cache"}
# Stands in for train_lora.py: runs until <output_dir>/end exists, and counts the signals to stop.
LONG_JOB = """import json, pathlib, signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: (print('stopping', flush=True), signals.append(1)))
print('training', flush=True)
output_dir = json.load(open(sys.argv[1]))['output_dir']
while not pathlib.Path(output_dir, 'end').exists(): time.sleep(0.01)
print('signals:', len(signals))"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The folders of a page in an empty current directory, and beside them a private folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "data2", "private", "output/.webui"):
        (tmp_path / folder).mkdir(parents=True)
    Path("private/prompts.txt").write_text("a secret")
    Path("data/link").symlink_to(tmp_path / "private")
    Path("data/My prompts.TXT").write_text("a cat\n一只猫\n", encoding="utf-8")
    return SimpleNamespace(
        output=Path("output"), folders=[Path("data"), TINY], lock=Path("output/.webui/lock")
    )


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds} seconds"
        time.sleep(0.02)


# ---------------------------------------------------------------- texts and the form


def test_every_text_exists_in_three_languages():
    source = (ROOT / "webui.py").read_text(encoding="utf-8")
    used = set(re.findall(r"""\bt\(["'](\w+)["']\)""", source))
    used |= {"running", "stopping", "finished", "stopped", "failed", "elsewhere"}
    for key in webui.SETTINGS_FIELDS + webui.GENERATION_FIELDS:
        used |= {key, f"help_{key}"}
    assert used == TEXTS.keys()
    for english, portuguese, chinese in TEXTS.values():
        assert english and portuguese and re.search("[\u4e00-\u9fff]|LoRA|[0-9]", chinese)
        assert "}" not in english + portuguese + chinese  # ends a placeholder of Gradio


def test_a_form_gives_the_config_that_it_was_filled_from(workspace, monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in (ROOT / "configs").glob("*.json"):
        config = load_config(file, cache_dir="output/cache")
        if file.name != "tiny.json":
            config.data_dir = str(TINY / "pictures")
        other_settings, *texts = webui.config_to_form(config)
        assert webui.read_settings(workspace, other_settings, texts) == config


@pytest.mark.parametrize(
    "field_texts, other_settings, error",
    [
        (
            {"max_train_steps": "a"},
            {"seed": -1, "no": 2},
            "(?s)(?=.*keys: 'no')(?=.*max_train_steps: )(?=.*seed: )",
        ),
        ({}, '{"seed": 1', "JSON: invalid JSON"),
        ({"lora_rank": "4"}, {"lora_rank": 8}, "'lora_rank' appears 2 times"),
        # A list of images could name any image.
        (
            {"data_dir": "data/My prompts.TXT"},
            VALID,
            "lists of images can only be used on the command line",
        ),
        (
            {"data_dir": '[{"path": "data"}, {"path": "/etc"}]'},
            VALID,
            "data_dir: found '/etc', which is outside",
        ),
        # A default is checked too.
        ({}, {"output_dir": "output"}, "cache_dir: found 'cache', which is outside"),
    ],
)
def test_every_mistake_in_a_form_is_reported(field_texts, other_settings, error, workspace):
    with pytest.raises(UserError, match=error):
        webui.form_to_config(workspace, field_texts, other_settings)


# ---------------------------------------------------------------- safety


def test_other_machines_need_a_password():
    error = "error: --host 0.0.0.0: .* --password of 8 or more"
    with pytest.raises(SystemExit, match=error):
        webui.main(["--host", "0.0.0.0", "--password", "short"])


OUTSIDE = ["/etc", "data/../private", "data/link", "data2", "~/x", "output/.webui/x"]


@pytest.mark.parametrize("key", ["data_dir", "validation_prompts", *webui.PATH_KEYS])
def test_a_path_cannot_be_outside_the_folders(key, workspace):
    others = {name: value for name, value in VALID.items() if name != key}
    names = [key, f"--{key}", f"----{key}"]
    names += [name for name, new_name in RENAMED.items() if new_name == key]
    for path in [*OUTSIDE, os.path.abspath("private")]:
        if key == "validation_prompts":
            path += "/prompts.txt"
        for name in names:
            error = f"{key}: found .* outside"
            if name.startswith("----"):
                error = "unknown keys"
            with pytest.raises(UserError, match=error):
                webui.form_to_config(workspace, {}, {**others, name: path})


@pytest.mark.parametrize("key", ["data_dir", "validation_prompts", *webui.PATH_KEYS])
def test_a_path_can_be_inside_the_folders(key, workspace):
    paths = {"output_dir": "output/other", "validation_prompts": "data/My prompts.TXT"}
    settings = {"pretrained_model_name_or_path": "a/model", **VALID, key: paths.get(key, "data")}
    config = webui.form_to_config(workspace, {}, settings)
    if key == "validation_prompts":
        assert config.validation_prompts == ["a cat", "一只猫"]


# ---------------------------------------------------------------- jobs


def start(workspace, name="run", code=LONG_JOB):
    Path("train_lora.py").write_text(code)
    script = Path("train_lora.py").absolute()
    config = load_config(output_dir=f"output/{name}", instance_prompt="'; touch hacked; '")
    webui.start_job(workspace, script, config)


def state(workspace, name="run"):
    return webui.job_state(workspace, "train_lora", f"output/{name}")


def test_one_job_at_a_time_outlives_the_server_and_gets_one_signal_to_stop(workspace):
    assert state(workspace) == (None, "")
    server = os.fork()
    if not server:
        os.setsid()
        start(workspace)
        os.killpg(0, 9)
    assert os.waitpid(server, 0)[1] == 9
    wait_for(lambda: state(workspace) == ("running", "training"))
    with pytest.raises(UserError, match="running in output/run; stop it, or wait until it ends"):
        start(workspace, "other")

    for run in ("output/other", "output/run", "output/run"):
        webui.stop_job(workspace, "train_lora", run)
        time.sleep(0.1)  # a signal that is pending hides another of its kind
        assert state(workspace)[0] == ("running" if run == "output/other" else "stopping")
    Path("output/run/end").touch()
    wait_for(lambda: state(workspace)[0] == "stopped")
    assert state(workspace)[1].splitlines()[-1] == "signals: 1"
    assert list(webui.find_runs(workspace)) == ["output/run"]


def test_a_job_finishes_or_fails_and_nothing_in_its_settings_is_a_command(workspace):
    start(workspace, "older", "")
    wait_for(lambda: state(workspace, "older")[0] == "failed")
    name = "$(touch hacked); `touch hacked` && touch hacked --x"
    for code, ending in (("print('LoRA: here')", "finished"), ("1 / 0", "failed")):
        start(workspace, name, code)
        wait_for(lambda: state(workspace, name)[0] == ending)
    assert list(webui.find_runs(workspace)) == [f"output/{name}", "output/older"]
    assert not list(Path().rglob("hacked"))


@pytest.fixture
def run(workspace):
    """A run that was killed while it wrote; a run inside it; files that look like runs or LoRAs."""
    metrics = '{"step": 5, "loss": 0.5}\n{"step": 6, "held_out_loss": 1}\n{"step": 6, "lo'
    files = {
        "config.json": "{}",
        "metrics.jsonl": metrics,
        LORA_FILE: "",
        f"checkpoints/step-000005/{LORA_FILE}": "",
        f"checkpoints/.x.tmp/{LORA_FILE}": "",
        # The log has a progress bar.
        ".webui/train_lora.log": "start\n\rn:  0%| |\n\rn:  2%| |\rn:  9%|█|\n\x1b[A\r  \rLoRA: x",
        "deep/config.json": "no JSON",
        "deep/er/config.json": "",
    }
    for name, text in files.items():
        file = Path("output/run", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, newline="")
    Path("output/link").symlink_to(Path.cwd())
    return "output/run"


def test_runs_and_their_loras_are_found_in_the_output_folder_only(workspace, run):
    checkpoint = f"{run}/checkpoints/step-000005/{LORA_FILE}"
    assert set(webui.find_runs(workspace)) == {run, f"{run}/deep"}
    assert list(webui.find_loras(workspace)) == [f"{run}/{LORA_FILE}", checkpoint]


def test_a_log_shows_each_progress_bar_once(workspace, run):
    assert state(workspace) == ("finished", "start\nn:  9%|█|\nLoRA: x")


def test_an_incomplete_line_of_metrics_is_not_plotted(workspace, run):
    points = webui.loss_table(f"{run}/metrics.jsonl").dropna()
    assert points.values.tolist() == [["loss", 5, 0.5], ["held_out_loss", 6, 1]]


# ---------------------------------------------------------------- the page in a browser

NEEDS_CHROMIUM = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    """Chromium, and what Playwright expects of a page."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    playwright.expect.set_options(timeout=240_000)
    driver = playwright.sync_playwright().start()
    browser = driver.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
    )
    yield SimpleNamespace(new_page=browser.new_page, expect=playwright.expect)
    driver.stop()


@pytest.fixture(scope="module")
def server_folder(tmp_path_factory):
    """The current directory of a running webui.py: a copy of the scripts and the tiny model."""
    folder = tmp_path_factory.mktemp("server")
    for path in [*ROOT.glob("*.py"), ROOT / "webui_texts.json", ROOT / "configs", TINY]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy(path, copied)
    options = ["--host=0.0.0.0", f"--port={PORT}", f"--password={PASSWORD}"]
    server = subprocess.Popen([sys.executable, "webui.py", *options], cwd=folder)
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", PORT)) == 0, 120)
    yield folder
    server.terminate()
    server.wait()


@pytest.fixture
def in_server_folder(server_folder, monkeypatch):
    monkeypatch.chdir(server_folder)


def status(page, path, **options):
    return page.request.fetch(path, **options).status


def log_in(page, password):
    return status(page, "/login", method="POST", form={"username": "me", "password": password})


def open_tab(page, name):
    page.locator("button[role=tab]:visible").nth(TABS.index(name)).click()


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_page_refuses_strangers_other_files_and_other_sites(browser, in_server_folder):
    page = browser.new_page(base_url=URL)
    Path("output/a.txt").write_text("a text")
    Path("output/link").symlink_to("/etc/passwd")
    file = f"/gradio_api/file={Path.cwd()}/"
    queue = "/gradio_api/queue/join"
    post = dict(method="POST", data={"data": [], "fn_index": 0, "session_hash": "x"})

    # Nothing without the password.
    assert status(page, f"{file}output/a.txt") == 401
    assert status(page, queue, **post) == 401
    assert log_in(page, "wrong") == 400
    assert status(page, f"{file}output/a.txt") == 401
    assert log_in(page, PASSWORD) == 200

    # No file outside the output folder.
    assert status(page, f"{file}output/a.txt") == 200
    for path in ("webui.py", "output/..%2fwebui.py", "output/link"):
        assert status(page, file + path) in (403, 404), path

    # No request from the page of another site.
    assert status(page, queue, headers={"Origin": "http://evil.example"}, **post) == 403
    assert status(page, queue, headers={"Origin": URL}, **post) == 200


class User:
    """What a person does with the page and sees on it."""

    def __init__(self, browser):
        self.expect = browser.expect
        self.page = browser.new_page(
            base_url=URL, locale="en", viewport={"width": 1280, "height": 900}
        )
        self.requests = []
        self.errors = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        assert log_in(self.page, PASSWORD) == 200

    def field(self, name):
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def fill(self, prefix, **texts):
        for name, text in texts.items():
            self.field(prefix + name).fill(text)
        self.field(prefix + name).blur()

    def fill_json(self, settings):
        self.page.locator("#more-box button").first.click()
        self.page.locator("#more .cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(json.dumps(settings))

    def sees(self, name, text):
        self.expect(self.page.locator(f"#{name}")).to_contain_text(TEXTS.get(text, [text])[0])

    def sees_value(self, name, pattern):
        self.expect(self.field(name)).to_have_value(re.compile(pattern))

    def sees_element(self, selector):
        self.expect(self.page.locator(selector).first).to_be_visible()


def set_up(user):
    """Fills in the form; a mistake is reported with the label of its field."""
    user.page.goto("/")
    user.sees_value("key-output_dir", "output/tiny")
    user.fill_json(
        {
            "cache_dir": "output/cache",
            "validation_resolution": "128x128",
            "checkpoint_step_interval": 20,
            "validation_num_inference_steps": 4,
            "validation_split": 0.1,
        }
    )
    user.fill(
        "key-", output_dir="output/page", validation_step_interval="20", max_train_steps="many"
    )
    user.sees(
        "set-up-message",
        "Training steps – max_train_steps: found 'many', must be a valid integer",
    )
    user.fill("key-", max_train_steps="40")


def correct_a_caption(user):
    """Corrects a caption in its file, but not over somebody else's change."""
    images = Path("tests/tiny_longcat/pictures")
    caption = images / "zumi-01.json"
    open_tab(user.page, "data")
    # Markdown and HTML in a caption must not load anything.
    Path(images, "zumi-05.txt").write_text(
        "![a](http://outside.invalid/a) <img src=http://outside.invalid/b>"
    )
    user.page.click("#check-data")
    user.sees("data-message", "35 images, 0 left out")
    user.page.locator("#images button.thumbnail-item").nth(1).click()
    user.sees_value("caption", "zumi on a blue background")

    user.fill("", caption="a corrected caption\n改过的描述")
    user.page.click("#save-caption")
    user.sees("caption-message", "saved")
    saved = json.loads(caption.read_text("utf-8"))
    assert saved == {"caption": ["a corrected caption", "改过的描述"]}

    caption.write_text('{"caption": "changed elsewhere"}')
    user.page.click("#save-caption")
    user.sees("caption-message", "changed_meanwhile")
    assert caption.read_text() == '{"caption": "changed elsewhere"}'


def train_and_stop(user):
    """Starts training and stops it: there is a checkpoint, but no LoRA."""
    open_tab(user.page, "train")
    user.page.click("#start")
    user.sees_value("log", r"training: .* [1-9]\d*/40 ")
    user.page.click("#stop")
    user.sees("state", "stopped")
    assert list(Path("output/page/checkpoints").iterdir())
    assert not Path("output/page", LORA_FILE).exists()


def resume_from_a_new_page(user):
    """Resumes in a page where nothing typed is left, from the settings of the run."""
    user.page.reload()
    user.page.click("#config input")
    user.page.get_by_role("option", name="output/page").click()
    user.sees_value("key-output_dir", "output/page")
    open_tab(user.page, "train")
    user.page.click("#start")
    user.sees("state", "finished")
    user.sees_element("#plot svg")
    user.sees_element("#previews img")
    with user.page.expect_download() as download:
        user.page.click("#download")
    lora = Path("output/page", LORA_FILE).read_bytes()
    assert Path(download.value.path()).read_bytes() == lora


def generate_images(user):
    """Generates images with the base model and with the LoRA, side by side."""
    open_tab(user.page, "try_it")
    user.fill("try-", validation_prompts="zumi，粉色背景", validation_lora_strength="0.5, 1")
    user.page.click("#generate")
    for name in ("comparison", "base", "lora-x0.5", "lora-x1"):
        user.sees_element(f"#grid img[src*='{name}.png']")


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_from_an_empty_browser_to_a_lora(browser, in_server_folder):
    user = User(browser)
    set_up(user)
    correct_a_caption(user)
    train_and_stop(user)
    resume_from_a_new_page(user)
    generate_images(user)
    assert not user.errors
    allowed = (URL, "data:", "blob:")
    assert not [url for url in user.requests if not url.startswith(allowed)]


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_every_tab_fits_on_a_phone_in_chinese(browser, in_server_folder):
    page = browser.new_page(base_url=URL, locale="zh-CN", viewport={"width": 390, "height": 900})
    assert log_in(page, PASSWORD) == 200
    page.goto("/")
    for name in TABS:
        open_tab(page, name)
        browser.expect(page.get_by_text(TEXTS[f"about_{name}"][2])).to_be_visible()
        page.wait_for_timeout(2500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not re.search("__i18n__|translation_metadata", page.locator("body").inner_text())
