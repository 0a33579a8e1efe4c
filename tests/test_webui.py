"""The page: its form, its jobs, what it must not do; and a browser that goes through it as a user would."""

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
TEXTS = json.loads((ROOT / "webui_texts.json").read_text(encoding="utf-8"))
PICTURES, PAGE = "tests/tiny_longcat/pictures", f"http://127.0.0.1:{20000 + os.getpid() % 10000}"
GOOD = {"output_dir": "output/run", "cache_dir": "output/cache"}
AT_WORK = """import json, pathlib, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: (print('stopping, told so', flush=True), told.append(1)))
print('at work', flush=True)
while not pathlib.Path(json.load(open(sys.argv[1]))['output_dir'], 'end').exists(): time.sleep(0.01)
print('told', len(told))"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with those that the page may use, and a secret beside them."""
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
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_every_text_is_there_in_three_languages():
    used = set(
        re.findall(r"""\bt\(["'](\w+)["']\)""", (ROOT / "webui.py").read_text(encoding="utf-8"))
    )
    used |= {*webui.FRONT, *webui.TRY, *(f"help_{name}" for name in webui.FRONT + webui.TRY)}
    assert (
        used | {"running", "stopping", "finished", "stopped", "failed", "elsewhere"} == TEXTS.keys()
    )
    for english, portuguese, chinese in TEXTS.values():
        assert english and portuguese and re.search("[\u4e00-\u9fff]|LoRA|[0-9]", chinese)
        assert "}" not in english + portuguese + chinese  # Gradio's marks end there


def test_a_form_gives_the_config_that_it_was_filled_from(place, monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in (ROOT / "configs").glob("*.json"):
        config = load_config(file, cache_dir="output/cache")
        config.data_dir = config.data_dir if file.name == "tiny.json" else str(TINY / "pictures")
        more, *texts = webui.texts_of(config)
        assert webui.read_form(place, dict(zip(webui.FRONT, texts)), more) == config


def test_all_that_is_wrong_is_told(place):
    for fields, others, wrong in (
        (
            {"max_train_steps": "a"},
            {"seed": -1, "no": 2},
            "(?s)(?=.*keys: 'no')(?=.*max_train_steps: )(?=.*seed: )",
        ),
        ({}, '{"seed": 1', "JSON: invalid JSON"),
        ({"lora_rank": "4"}, {"lora_rank": 8}, "'lora_rank' appears 2 times"),
        (
            {"data_dir": "data/My prompts.TXT"},
            GOOD,
            "lists of pictures are for the command line",
        ),  # it could name any
        (
            {"data_dir": '[{"path": "data"}, {"path": "/etc"}]'},
            GOOD,
            "data_dir: found '/etc', which is outside",
        ),
        (
            {},
            {"output_dir": "output"},
            "cache_dir: found 'cache', which is outside",
        ),  # a default is no way out
    ):
        with pytest.raises(UserError, match=wrong):
            webui.read_form(place, fields, others)
    with pytest.raises(SystemExit, match="error: --host 0.0.0.0: .* --password of 8"):
        webui.main(["--host", "0.0.0.0", "--password", "short"])


@pytest.mark.parametrize("name", ["data_dir", "validation_prompts", *webui.PATHS])
def test_a_path_cannot_leave_the_folders(name, place):
    ending = "/prompts.txt" * (name == "validation_prompts")
    for path in (
        "/etc",
        "data/../private",
        os.path.abspath("private"),
        "data/link",
        "data2",
        "~/x",
        "output/.webui/x",
    ):
        for key in (
            name,
            f"--{name}",
            f"----{name}",
            *(other for other, ours in RENAMED.items() if ours == name),
        ):
            with pytest.raises(
                UserError, match="unknown keys" if key[2:4] == "--" else f"{name}: found .* outside"
            ):
                webui.read_form(
                    place, {}, {n: v for n, v in GOOD.items() if n != name} | {key: path + ending}
                )
    inside = {"output_dir": "output/other", "validation_prompts": "data/My prompts.TXT"}.get(
        name, "data"
    )
    config = webui.read_form(
        place, {}, {"pretrained_model_name_or_path": "a/model"} | GOOD | {name: inside}
    )
    assert name != "validation_prompts" or config.validation_prompts == ["a cat", "一只猫"]


def start(place, name="run", code=AT_WORK):
    Path("train_lora.py").write_text(code)
    script = Path("train_lora.py").absolute()
    webui.start_job(
        place,
        script,
        load_config(output_dir=f"output/{name}", instance_prompt="'; touch hacked; '"),
    )


def state(place, name="run"):
    return webui.state_of(place, "train_lora", f"output/{name}")


def test_one_job_at_a_time_outlives_the_server_and_is_told_once_to_stop(place):
    other = "$(touch hacked); `touch hacked` && touch hacked --x"  # a value, no command
    assert state(place) == (None, "")
    server = os.fork()
    if not server:
        os.setsid()
        start(place)
        os.killpg(0, 9)
    assert os.waitpid(server, 0)[1] == 9
    wait_for(lambda: state(place) == ("running", "at work"))
    with pytest.raises(UserError, match="at work in output/run; stop that, or wait"):
        start(place, other)
    for run in ("output/other", "output/run", "output/run"):
        webui.stop_job(place, "train_lora", run)
        time.sleep(0.1)  # a signal that waits for another of its kind is lost
        assert state(place)[0] == ("running" if run == "output/other" else "stopping")
    Path("output/run/end").touch()
    wait_for(lambda: state(place)[0] == "stopped")
    assert state(place)[1].splitlines()[-1] == "told 1"
    for code, ending in (("print('LoRA: here')", "finished"), ("1 / 0", "failed")):
        start(place, other, code)
        wait_for(lambda: state(place, other)[0] == ending)
    assert [*webui.find_runs(place)] == [f"output/{other}", "output/run"] and not [
        *Path().rglob("hacked")
    ]


def test_runs_with_what_is_half_written_or_not_ours(place):
    made, step = "output/made", "checkpoints/step-000005"
    log = "begun\n\rn:  0%| |\n\rn:  2%| |\rn:  9%|█|\n\x1b[A\r  \rLoRA: x"  # with a progress bar
    metrics = '{"step": 5, "loss": 0.5}\n{"step": 6, "held_out_loss": 1}\n{"step": 6, "lo'
    for name, text in {
        "config.json": "{}", "deep/config.json": "no JSON", "deep/er/config.json": "", "metrics.jsonl": metrics,
        LORA_FILE: "", f"{step}/{LORA_FILE}": "", f"checkpoints/.x.tmp/{LORA_FILE}": "", ".webui/train_lora.log": log,
    }.items():  # fmt: skip
        Path(made, name).parent.mkdir(parents=True, exist_ok=True)
        Path(made, name).write_text(text, newline="")
    Path("output/link").symlink_to(Path.cwd())
    assert {*webui.find_runs(place)} == {made, f"{made}/deep"}
    assert [*webui.find_loras(place)] == [f"{made}/{LORA_FILE}", f"{made}/{step}/{LORA_FILE}"]
    assert state(place, "made") == ("finished", "begun\nn:  9%|█|\nLoRA: x")
    curves = webui.curves(f"{made}/metrics.jsonl").dropna()
    assert curves.values.tolist() == [["loss", 5, 0.5], ["held_out_loss", 6, 1]]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_from_an_empty_browser_to_a_lora(place, request):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    playwright.expect.set_options(timeout=240_000)
    driver = playwright.sync_playwright().start()
    request.addfinalizer(driver.stop)
    browser = driver.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
    )
    for path in [*ROOT.glob("*.py"), ROOT / "webui_texts.json", ROOT / "configs", TINY]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, path.relative_to(ROOT))
    asked, errors, port, join = (
        [],
        [],
        PAGE.split(":")[2],
        dict(data={"data": [], "fn_index": 0, "session_hash": "x"}),
    )
    server = subprocess.Popen(
        [sys.executable, "webui.py", "--host=0.0.0.0", f"--port={port}", "--password=a-long-one"]
    )
    request.addfinalizer(server.terminate)
    page = browser.new_page(base_url=PAGE, locale="en", viewport={"width": 1280, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    status = lambda path, **options: page.request.fetch(path, **options).status

    # Nothing without the password, nothing but what is in output, and nothing for another site's page.
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", int(port))) == 0, 120)
    Path("output/a.txt").write_text("a text")
    Path("output/link").symlink_to("/etc/passwd")
    file, order = f"/gradio_api/file={Path.cwd()}/", "/gradio_api/queue/join"
    assert [status(f"{file}output/a.txt"), status(order, method="POST", **join)] == [401] * 2
    for password, right in (("wrong", 400), ("a-long-one", 200)):
        assert (
            status("/login", method="POST", form={"username": "me", "password": password}) == right
        )
    assert status(f"{file}output/a.txt") == 200
    for path in ("webui.py", "output/..%2fwebui.py", "output/link"):
        assert status(file + path) in (403, 404), path
    for origin, right in (("http://evil.example", 403), (PAGE, 200)):
        assert status(order, method="POST", headers={"Origin": origin}, **join) == right

    def fill(form, **texts):
        for name, text in texts.items():
            field(form + name).fill(text)
        field(form + name).blur()

    field = lambda name: page.locator(f"#{name} textarea, #{name} input").first
    see = lambda name, text: playwright.expect(page.locator(f"#{name}")).to_contain_text(
        TEXTS.get(text, [text])[0]
    )
    holds = lambda name, text: playwright.expect(field(name)).to_have_value(re.compile(text))
    tabs = ["set_up", "data", "train", "try_it"]
    tab = lambda name: page.locator("button[role=tab]:visible").nth(tabs.index(name)).click()

    # Set up: what is wrong is told with its field's label.
    page.goto("/")
    holds("key-output_dir", "output/tiny")
    page.locator("#more-box button").first.click()
    page.locator("#more .cm-content").click()
    page.keyboard.press("Control+A")
    more = dict(
        cache_dir="output/cache", validation_resolution="128x128", checkpoint_step_interval=20
    )
    page.keyboard.insert_text(
        json.dumps(more | dict(validation_num_inference_steps=4, validation_split=0.1))
    )
    fill("key-", output_dir="output/page", validation_step_interval="20", max_train_steps="many")
    see("set-up-message", "Steps – max_train_steps: found 'many', must be a valid integer")
    fill("key-", max_train_steps="40")

    # Data: a caption corrected where it stands, and not over somebody else's.
    tab("data")
    Path(PICTURES, "zumi-05.txt").write_text(
        "![a](http://outside.invalid/a) <img src=http://outside.invalid/b>"
    )
    page.click("#look")
    see("data-message", "35 images, 0 left out")
    page.locator("#pictures button.thumbnail-item").nth(1).click()
    holds("caption", "zumi on a blue background")
    fill("", caption="a corrected caption\n改过的描述")
    page.click("#save-caption")
    see("caption-message", "saved")
    caption = Path(PICTURES, "zumi-01.json")
    assert json.loads(caption.read_text("utf-8")) == {
        "caption": ["a corrected caption", "改过的描述"]
    }
    caption.write_text('{"caption": "changed elsewhere"}')
    page.click("#save-caption")
    see("caption-message", "changed_meanwhile")
    assert caption.read_text() == '{"caption": "changed elsewhere"}'

    # Train: start, stop, and go on from a page where nothing typed is left but the run itself.
    tab("train")
    page.click("#start")
    holds("log", r"training: .* [1-9]\d*/40 ")
    page.click("#stop")
    see("state", "stopped")
    assert [*Path("output/page/checkpoints").iterdir()] and not Path(
        "output/page", LORA_FILE
    ).exists()
    page.reload()
    page.click("#config input")
    page.get_by_role("option", name="output/page").click()
    holds("key-output_dir", "output/page")
    tab("train")
    page.click("#start")
    see("state", "finished")
    playwright.expect(page.locator("#plot svg")).to_be_visible()
    playwright.expect(page.locator("#previews img")).to_be_visible()
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes() == Path("output/page", LORA_FILE).read_bytes()

    # Try it: base and LoRA side by side.
    tab("try_it")
    fill("try-", validation_prompts="zumi，粉色背景", validation_lora_strength="0.5, 1")
    page.click("#draw")
    for name in ("comparison", "base", "lora-x0.5", "lora-x1"):
        playwright.expect(page.locator(f"#grid img[src*='{name}.png']").first).to_be_visible()

    # On a phone, in Chinese: every tab fits, and no text is left out.
    cookies = page.context.storage_state()
    page = browser.new_page(
        locale="zh-CN", viewport={"width": 390, "height": 900}, storage_state=cookies
    )
    page.goto(PAGE)
    for name in tabs:
        tab(name)
        playwright.expect(page.get_by_text(TEXTS[f"about_{name}"][2])).to_be_visible()
        page.wait_for_timeout(2500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not re.search("__i18n__|translation_metadata", page.locator("body").inner_text())
    assert not errors and not [url for url in asked if not url.startswith((PAGE, "data:", "blob:"))]
