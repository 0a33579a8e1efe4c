"""The page: its form, its jobs, what it must not do; and a browser that goes through it as a user would."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY

from longcat_common import KEYS, RENAMED, load_config

pytest.importorskip("gradio", reason="webui.py's tests need Gradio: pip install 'gradio>=6.31,<7'")
import webui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
TEXTS = json.loads((ROOT / "webui_texts.json").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path):
    for folder in ("data", "output/.webui"):
        (tmp_path / folder).mkdir(parents=True)
    output = tmp_path / "output"
    return SimpleNamespace(output=output, folders=[tmp_path / "data", TINY], lock=output / ".webui" / "lock")


def read(place, others={}, **texts):
    """read_form of a form with these fields and these other keys, in folders that the page may use."""
    texts = {"output_dir": str(place.output / "run"), **texts}
    others = others if isinstance(others, str) else {"cache_dir": str(place.output / "cache"), **others}
    return webui.read_form(place, [*texts], [*texts.values()], others)


# ---------------------------------------------------------------- the form


def test_every_text_is_there_in_three_languages():
    source = (ROOT / "webui.py").read_text(encoding="utf-8")
    used = set(re.findall(r"""\bt\(["'](\w+)["']\)""", source)) | set(re.findall(r'picture\("(\w+)"', source))
    used |= {*webui.FRONT, *webui.TRY, *(f"help_{name}" for name in webui.FRONT + webui.TRY)}
    used |= {"running", "stopping", "finished", "stopped", "failed"}
    assert used == TEXTS.keys() and len(webui.FRONT) == 14 and {*webui.FRONT, *webui.TRY} <= KEYS.keys()
    for english, portuguese, chinese in TEXTS.values():
        assert english and portuguese and re.search("[\u4e00-\u9fff]|LoRA|[0-9]", chinese)
        assert "}" not in english + portuguese + chinese  # Gradio's marks end there


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*.json")))
def test_a_form_gives_the_config_that_it_was_filled_from(file, place, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = SimpleNamespace(output=Path("output"), folders=[Path("data"), Path("cache"), TINY])
    config = load_config(ROOT / "configs" / file)
    if file != "tiny.json":
        config.data_dir = str(TINY / "pictures")
    more, *texts = webui.texts_of(config)
    again, problems = webui.read_form(place, webui.FRONT, texts, more)
    assert not problems and again == config
    assert all(f'"{name}"' in more for name in KEYS if name not in (*webui.FRONT, *webui.OTHER_STAGES))


def test_all_that_is_wrong_is_told_at_once_by_key(place):
    config, problems = read(place, {"seed": -1, "nonsense": 2}, max_train_steps="many", learning_rate="-1")
    assert config is None and problems == {
        "unknown keys": "unknown keys: 'nonsense'; --help lists all",
        "learning_rate": "learning_rate: found -1, must be greater than or equal to 0",
        "max_train_steps": "max_train_steps: found 'many', must be a valid integer",
        "seed": "seed: found -1, must be greater than or equal to 0",
    }
    _, problems = read(place, {"lr_scheduler": "polynomial"}, max_train_steps="", learning_rate="1e-8")
    assert list(problems) == ["learning_rate"] and "polynomial" in problems["learning_rate"]
    assert "JSON: not JSON" in read(place, '{"seed": 1')[1]["JSON"]
    assert read(place, {"lora_rank": 8}, lora_rank="4")[1] == {"lora_rank": "lora_rank: has a field of its own"}


@pytest.mark.parametrize("name", ["data_dir", *webui.PATHS])
def test_a_path_cannot_leave_the_folders(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "private.txt").write_text("a secret")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "private")
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / "private.txt")
    (tmp_path / "data2").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a cat")
    good = {"output_dir": "output/run", "cache_dir": "output/cache"}
    outside = ["/etc", "data/../private", str(tmp_path / "private"), "data/link", "data2", "..", "~", "output/.webui/x"]
    for path in outside:
        path += ".txt" * (name == "validation_prompts")
        for key in (name, f"--{name}", *(other for other, ours in RENAMED.items() if ours == name)):
            others = {other: value for other, value in good.items() if other != name}
            config, problems = webui.read_form(place, [], [], {**others, key: path})
            assert config is None and "outside this page's folders" in problems[name], path
    inside = {"output_dir": "output/other", "validation_prompts": "data/prompts.txt"}.get(name, "data")
    assert webui.read_form(place, [], [], {**good, name: inside})[1] == {}
    assert webui.read_form(place, [], [], {**good, f"----{name}": "/etc"})[0] is None


def test_sources_and_files_of_prompts(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "list.jsonl").write_text('{"img_path": "/etc/hostname"}')  # could name anything
    assert "lists of pictures are for the command line" in read(place, data_dir="data/list.jsonl")[1]["data_dir"]
    for odd in ('["/etc"]', "[3]", '[{"path": ["x"]}]', '[{"path": "data", "repeat": 2}]', "[1", "data/\0", "latest"):
        config, problems = read(place, data_dir=odd)
        assert config is None and any(problem.startswith("data_dir") for problem in problems), odd
    two = json.dumps([{"path": "data"}, {"path": "/etc"}])
    assert "'/etc'" in read(place, data_dir=two)[1]["data_dir"]
    (tmp_path / "data" / "my prompts.TXT").write_text("a cat\n一只猫\n", encoding="utf-8")
    for text, prompts in (
        ("data/my prompts.TXT", ["a cat", "一只猫"]),
        ("/etc/hosts.txt\na cat", ["/etc/hosts.txt", "a cat"]),
        ("[a] cat", ["[a] cat"]),
    ):
        config, problems = read(place, validation_prompts=text)
        assert not problems and config.validation_prompts == prompts
    assert read(place, pretrained_model_name_or_path="someone/a-model")[1] == {}
    assert read(place, {"init_lora": "output/\ud83d"})[0] is None
    monkeypatch.chdir("/")
    config, problems = webui.read_form(place, [], [], {})  # a default is no way out
    assert config is None and problems.keys() == {"output_dir", "cache_dir"}


# ---------------------------------------------------------------- jobs


@pytest.fixture
def script(tmp_path):
    """A script that says it is at work, until there is a file `end` or it is told to stop."""
    path = tmp_path / "train_lora.py"
    path.write_text(
        "import json, pathlib, signal, sys, time\n"
        "def stop(*_):\n    print('stopping, told so', flush=True)\n    told.append(1)\n"
        "told = []\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "folder = pathlib.Path(json.load(open(sys.argv[1]))['output_dir'])\n"
        "print('at work', flush=True)\n"
        "while not (folder / 'end').exists(): time.sleep(0.01)\n"
        "print('told', len(told)) if told else print('LoRA: here')\n"
    )
    return path


def start(place, script, name="run", **settings):
    webui.start_job(place, script, load_config(output_dir=str(place.output / name), **settings))


def state(place, name="run"):
    return webui.state_of(place, "train_lora", str(place.output / name))


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def test_one_job_at_a_time(place, script):
    assert state(place) == (None, "")
    start(place, script)
    with pytest.raises(ValueError, match="at work in .*/output/run; stop that, or wait"):
        start(place, script, "other")
    wait_for(lambda: state(place) == ("running", "at work"))
    (place.output / "run" / "end").touch()
    wait_for(lambda: state(place)[0] == "finished")
    start(place, script, "other")
    wait_for(lambda: state(place, "other")[0] == "running" and state(place)[0] == "finished")
    assert list(webui.find_runs(place)) == [str(place.output / "other"), str(place.output / "run")]
    (place.output / "other" / "end").touch()
    wait_for(lambda: state(place, "other")[0] == "finished")


def test_stop_is_one_signal(place, script):
    start(place, script)
    wait_for(lambda: state(place) == ("running", "at work"))
    for _ in range(3):
        webui.stop_job(place, webui.at_work(place, "train_lora", str(place.output / "run")))
        time.sleep(0.1)  # a signal that waits for another of its kind is lost
        assert state(place)[0] == "stopping"
    (place.output / "run" / "end").touch()
    wait_for(lambda: state(place)[0] == "stopped")
    assert state(place)[1].splitlines()[-1] == "told 1"


@pytest.mark.parametrize("ending", ["sys.exit('a text')", "1 / 0", "os.kill(os.getpid(), 9)", ""])
def test_a_job_that_came_to_nothing_has_failed(place, script, ending):
    script.write_text(f"import os, sys\n{ending}")
    start(place, script)
    wait_for(lambda: state(place)[0] == "failed")
    start(place, script)  # the way is free
    wait_for(lambda: state(place)[0] == "failed")


def test_jobs_outlive_the_server(place, script):
    code = (
        f"import sys; sys.path[:0] = {sys.path[:2]!r}; from test_webui import *; output = Path({str(place.output)!r})\n"
        f"place = SimpleNamespace(output=output, lock=output / '.webui' / 'lock')\n"
        f"start(place, Path({str(script)!r})); os.killpg(0, 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, start_new_session=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for(lambda: state(place) == ("running", "at work"))
    (place.output / "run" / "end").touch()
    wait_for(lambda: state(place)[0] == "finished")


def test_values_that_look_like_commands_are_values(place, script, tmp_path):
    name = "$(touch hacked); `touch hacked` && touch hacked --x"
    start(place, script, name, instance_prompt="'; touch hacked; '")
    (place.output / name / "end").touch()
    wait_for(lambda: state(place, name)[0] == "finished")
    assert not list(tmp_path.rglob("hacked")) and not (ROOT / "hacked").exists()


def test_what_is_no_run_is_passed_over_and_metrics_that_are_half_written(place):
    for name, text in (
        ("made/config.json", "{}"),
        ("deep/er/config.json", "no JSON"),
        ("no/run.txt", ""),
        (
            "made/metrics.jsonl",
            '[1]\n{"loss": 1}\n{"step": 5, "loss": 0.5}\n{"step": 6, "loss": "high"}\n{"step": 6, "lo',
        ),
        ("made/pytorch_lora_weights.safetensors", ""),
        ("made/checkpoints/step-000005/pytorch_lora_weights.safetensors", ""),
    ):
        (place.output / name).parent.mkdir(parents=True, exist_ok=True)
        (place.output / name).write_text(text)
    (place.output / "link").symlink_to(place.output.parent)
    made = str(place.output / "made")
    assert set(webui.find_runs(place)) == {made, str(place.output / "deep" / "er")}
    assert webui.curves(made).dropna().values.tolist() == [[5, 0.5, "loss"]] and webui.curves(None).dropna().empty
    loras = webui.find_loras(place)
    assert [*loras.values()] == [made, made] and "step-000005" in [*loras][1] and "checkpoints" not in [*loras][0]
    before = webui.changed([], [("a", 1), ("b", 2)])
    assert before == [1, 2, ["a", "b"]] and webui.changed(before[-1], [("a", 1), ("c", 3)])[1:] == [3, ["a", "c"]]


def test_the_log_shows_of_a_bar_what_it_shows_last(tmp_path):
    text = "begun\n\rsteps:   0%|  | 0/9\n\rpictures:   0%|  | 0/2\x1b[A\r\n\x1b[A\rsteps:  11%|█ | 1/9\r"
    text += "steps:  22%|█ | 2/9\n\rgone:   0%|  | 0/9\r                  \rended\n"
    (tmp_path / "log").write_bytes(text.encode())
    shown = ["begun", "pictures:   0%|  | 0/2", "steps:  22%|█ | 2/9", "ended"]
    assert webui.log_tail(tmp_path / "log").splitlines() == shown


# ---------------------------------------------------------------- the server


class Server:
    """`python webui.py` in a folder, on a free port."""

    def __init__(self, folder, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command, self.folder = [sys.executable, "webui.py", "--port", str(self.port), *arguments], folder

    def __enter__(self):
        options = dict(cwd=self.folder, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": ""})
        self.process = subprocess.Popen(self.command, **options)
        wait_for(lambda: self.process.poll() is not None or self.get("/")[0] in (200, 401), 90)
        assert self.process.poll() is None
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def get(self, path, data=None, **headers):
        """(status, body) of a request."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""


@pytest.fixture
def clone(tmp_path):
    """The repository's scripts, configs and tiny model in a folder of their own."""
    folder = tmp_path / "clone"
    for path in [*ROOT.glob("*.py"), ROOT / "webui_texts.json", ROOT / "configs", TINY]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.relative_to(ROOT))
    return folder


@pytest.mark.slow
def test_the_server_serves_nothing_else_and_nobody_else(clone):
    for folder in ("output/run", "output-not"):
        (clone / folder).mkdir(parents=True)
        (clone / folder / "a.txt").write_text("of a run")
    (clone / "output" / "run" / "link").symlink_to("/etc/passwd")
    join, json_type = "/gradio_api/queue/join", {"Content_Type": "application/json"}
    order = b'{"data": [], "fn_index": 0, "session_hash": "x"}'
    with Server(clone) as server:
        assert server.get(f"/gradio_api/file={clone}/output/run/a.txt") == (200, b"of a run")
        outside = ["/etc/passwd", "../../../../etc/passwd", "webui.py", "configs/tiny.json", "output/../webui.py"]
        outside += ["output/run/link", "output-not/a.txt", "tests/tiny_longcat/pictures/zumi-00.json"]
        for path in outside:
            for name in (path, f"{clone}/{path}", path.replace("/", "%2f")):
                assert server.get(f"/gradio_api/file={name}")[0] in (403, 404), name
        assert server.get("/", Host="evil.example")[0] == 400
        assert server.get("/config", Origin="http://localhost:9999")[0] == 403
        assert server.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
        assert server.get(join, order, **json_type, Sec_Fetch_Site="cross-site")[0] == 403
        assert server.get(join, order, Content_Type="text/plain", Origin="http://evil.example")[0] == 403
        assert server.get(join, order, **json_type, Origin="null")[0] == 403
        assert server.get(join, order, **json_type, Origin=f"http://127.0.0.1:{server.port}")[0] not in (0, 403)
        upload = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n%s\r\n--b--\r\n' % (
            b"x" * 5000
        )
        assert server.get("/gradio_api/upload", upload, Content_Type="multipart/form-data; boundary=b")[0] == 413


@pytest.mark.slow
def test_other_machines_need_the_password(clone):
    (clone / "file").touch()
    for arguments, told in (("--output file/output", "cannot be written"), ("--host 0.0.0.0", "give it a --password")):
        command = [sys.executable, "webui.py", *arguments.split()]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {arguments}:") and told in done.stderr
        assert len(done.stderr.splitlines()) == 1
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    with Server(clone, "--host", "0.0.0.0", "--password", "right") as server:
        assert b"tests/tiny_longcat" not in server.get("/")[1]
        for path in ("/config", f"/gradio_api/file={clone}/output/run/a.txt", "/gradio_api/info"):
            assert server.get(path)[0] == 401, path
        order = b'{"data": [], "fn_index": 0, "session_hash": "x"}'
        assert server.get("/gradio_api/queue/join", order, Content_Type="application/json")[0] == 401
        began = time.monotonic()
        assert server.get("/login", b"username=me&password=wrong", **form)[0] == 400
        assert time.monotonic() - began >= 1
        assert server.get("/login", b"username=me&password=right", **form)[0] == 200


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\", name='gradio')")
    options = dict(capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    done = subprocess.run([sys.executable, ROOT / "webui.py"], **options)
    told = "error: the page needs Gradio; install it with: pip install 'gradio>=6.31,<7'"
    assert done.returncode == 1 and done.stderr.splitlines() == [told]


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("language, steps, width", [("en", 60, 1280), ("zh-CN", 40, 390)])
def test_from_an_empty_browser_to_a_lora(clone, tmp_path, language, steps, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    say = lambda name: TEXTS[name][0 if language == "en" else 2]
    with playwright.sync_playwright() as driver, Server(clone) as server:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        context = browser.new_context(locale=language, viewport={"width": width, "height": 900}, accept_downloads=True)
        asked, errors = [], []
        context.on("request", lambda request: asked.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = context.new_page()
        field = lambda name, form="key": page.locator(f"#{form}-{name} textarea, #{form}-{name} input").first
        text = lambda name: page.locator(f"#{name}").inner_text()
        log = lambda: page.locator("#log textarea").input_value()
        shot = lambda name: page.screenshot(path=shots / f"{language}-{name}.png", full_page=True)
        tab = lambda name: page.get_by_role("tab", name=say(name)).click()

        def until(condition, seconds=60):
            deadline = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < deadline, shot("failed")
                page.wait_for_timeout(200)

        # Set up: what is wrong is told at its field, or under the box.
        page.goto(f"http://127.0.0.1:{server.port}")
        until(lambda: page.locator("#key-output_dir").count() and field("output_dir").input_value() == "output/tiny")
        page.locator("#more-box button").first.click()
        box = page.locator("#more .cm-content")
        until(lambda: "checkpoint_step_interval" in box.inner_text() or box.inner_text().count("\n") > 10)
        field("max_train_steps").fill("many")
        field("output_dir").fill("/etc/run")
        box.click()
        page.keyboard.press("Control+A")
        keys = '{"cache_dir": "output/cache", "validation_resolution": "128x128", "validation_num_inference_steps": 4, '
        keys += '"lr_warmup_steps": 10, "checkpoint_step_interval": 20, "seed": "x"'
        page.keyboard.insert_text(keys + "}")
        field("lora_rank").fill("8")
        field("resolution").click()
        until(lambda: "must be a valid integer" in text("key-max_train_steps"))
        until(lambda: "outside this page's folders" in text("key-output_dir"))
        until(lambda: "seed: found 'x'" in text("set-up-message"))
        shot("1-wrong")
        box.click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(keys.replace('"x"', "7") + ', "validation_split": 0.1}')
        field("max_train_steps").fill(str(steps))
        field("output_dir").fill("output/page")
        field("validation_step_interval").fill(str(steps // 2))
        field("lora_rank").click()
        until(
            lambda: not any("⚠" in text(name) for name in ("key-output_dir", "key-max_train_steps", "set-up-message"))
        )
        shot("1-set-up")

        # Data: the report, the sheet, a caption corrected where it stands, and not over somebody else's.
        tab("data")
        pictures = clone / "tests" / "tiny_longcat" / "pictures"
        (pictures / "zumi-05.txt").write_text(
            'says "![a](http://outside.invalid/a.png) <img src=http://outside.invalid/b>"'
        )
        page.click("#look")
        until(lambda: "35 pictures, 0 left out" in text("data-message") and page.locator("#sheet img").count())
        page.locator("#report-box button").first.click()
        until(lambda: "<img src=http://outside.invalid/b>" in text("report") and "![a]" in text("report"))
        page.locator("#report-box button").first.click()
        caption, thumbnails = page.locator("#caption textarea"), page.locator("#pictures button.thumbnail-item")
        thumbnails.nth(1).click()
        until(lambda: caption.input_value().startswith("zumi on a blue background"))
        caption.fill("a corrected caption of zumi\nzumi，改过的描述")
        page.wait_for_timeout(1000)
        shot("2-data")
        page.click("#save-caption")
        until(lambda: say("saved") in text("caption-message"))
        written = json.loads((pictures / "zumi-01.json").read_text(encoding="utf-8"))
        assert written == {"caption": ["a corrected caption of zumi", "zumi，改过的描述"]}
        (pictures / "zumi-01.json").write_text('{"caption": "changed elsewhere"}')
        caption.fill("from the page")
        page.click("#save-caption")
        until(lambda: say("changed_meanwhile") in text("caption-message"))
        assert (pictures / "zumi-01.json").read_text() == '{"caption": "changed elsewhere"}'
        page.locator("#page input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        until(lambda: thumbnails.count() in (11, 22))  # in the grid, and below an open picture

        # Train: start, stop, go on, with a new server in between.
        tab("train")
        page.click("#start")
        until(lambda: say("running") in text("state"))
        page.click("#start")
        until(lambda: "at work in output/page" in text("train-message"))
        until(lambda: re.search(r"training: .* [1-9]\d*/\d+ ", log()), 120)
        page.click("#stop")
        until(lambda: say("stopped") in text("state"))
        (stopped,) = (clone / "output" / "page" / "checkpoints").iterdir()
        assert 1 <= int(stopped.name[5:]) < steps
        server.__exit__()
        server.__enter__()
        page.goto(f"http://127.0.0.1:{server.port}")  # nothing typed is left: the run itself is what to start from
        until(lambda: page.locator("#key-output_dir").count() and field("output_dir").input_value() == "output/tiny")
        page.click("#config input")
        page.get_by_role("option", name="output/page").click()
        until(lambda: field("output_dir").input_value() == "output/page")
        tab("train")
        page.click("#start")
        until(lambda: say("running") in text("state") and "training: " in log())
        page.wait_for_timeout(3000)
        shot("3-running")
        until(lambda: say("finished") in text("state"), 300)
        assert "LoRA: output/page" in log()
        assert json.loads((clone / "output/page/metrics.jsonl").read_text().splitlines()[-1])["step"] == steps
        until(
            lambda: (
                page.locator("#preview img, #previews img").count() and page.locator("#plot canvas, #plot svg").count()
            )
        )
        page.wait_for_timeout(1500)
        shot("3-finished")
        with page.expect_download() as download:
            page.click("#download")
        lora = clone / "output" / "page" / "pytorch_lora_weights.safetensors"
        assert Path(download.value.path()).read_bytes() == lora.read_bytes()

        # Try it: base and LoRA side by side, and a picture saved.
        tab("try_it")
        page.click("#lora input")
        until(lambda: page.get_by_role("option").count() > 3)
        page.get_by_role("option", name="output/page/pytorch_lora_weights.safetensors").click()
        page.click("#text-sheet")
        until(lambda: "茶馆" in field("validation_prompts", "try").input_value())
        field("validation_prompts", "try").fill("zumi，粉色背景")
        field("validation_num_inference_steps", "try").fill("4.5")
        page.click("#draw")
        until(lambda: "must be a valid integer" in text("try-validation_num_inference_steps"))
        field("validation_num_inference_steps", "try").fill("4")
        field("validation_lora_strength", "try").fill("0.5, 1")
        page.click("#draw")
        until(
            lambda: page.locator("#grid img").count() >= 5, 90
        )  # the grid, large; below it once more, and three pictures
        page.wait_for_timeout(1500)
        shot("4-try")
        with page.expect_download() as download:
            page.locator("#grid .icon-button-wrapper button").first.click()
        grid = clone / "output" / "page" / "validation" / "compare-001" / "comparison.png"
        assert Path(download.value.path()).read_bytes() == grid.read_bytes()
        assert not re.search("__i18n__|translation_metadata", page.locator("body").inner_text())
        browser.close()
    assert not errors and not [url for url in asked if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", url)]
