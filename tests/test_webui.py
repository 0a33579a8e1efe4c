"""The page: its forms, its jobs, what it must not do; and a browser that goes through it as a user would."""

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

from longcat_common import GROUPS, KEYS, load_config

pytest.importorskip("gradio", reason="webui.py's tests need Gradio: pip install 'gradio>=6.31,<7'")
import webui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    return SimpleNamespace(
        output=tmp_path / "output", folders=[tmp_path / "data", TINY], jobs=tmp_path / "output" / ".webui" / "jobs"
    )


def texts_of(config):
    return {name: webui.to_text(name, getattr(config, name)) for name in KEYS}


# ---------------------------------------------------------------- the form


def test_every_text_is_there_in_portuguese_and_chinese():
    source = (ROOT / "webui.py").read_text(encoding="utf-8")
    used = (
        set(re.findall(r'\bt\("([^"]+)"\)', source))
        | set(re.findall(r'picture\("([^"]+)"', source))
        | {*webui.FRONT.values(), *webui.TRY.values()}
    )
    used |= {f"More: {group}" for group in GROUPS.values()} | {
        "Step",
        "waiting",
        "running",
        webui.STOPPING,
        "stopped",
        "failed",
        "finished",
        "cut off",
    }
    used -= {"a text"}
    assert used and not used - webui.TEXTS.keys()
    assert all(
        re.search("[\u4e00-\u9fff]|LoRA", chinese) and portuguese
        for portuguese, chinese in [*webui.TEXTS.values(), *webui.HELP.values()]
    )
    assert not [text for text in webui.TEXTS if "}" in text]  # Gradio's marks end there
    assert webui.HELP.keys() == KEYS.keys()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*.json")))
def test_a_form_gives_the_config_that_it_was_filled_from(file, place, monkeypatch):
    config = load_config(ROOT / "configs" / file)
    monkeypatch.chdir(ROOT)
    place = SimpleNamespace(output=Path("output"), folders=[Path("data"), Path("cache"), TINY])
    if file != "tiny.json":
        config.data_dir = str(TINY / "pictures")
    again, problems = webui.read_form(texts_of(config), place)
    assert not problems and again == config
    saved = webui.settings_of(config)
    assert load_config(**saved) == config and saved.keys() >= webui.FRONT.keys() and len(saved) < len(KEYS)


def test_what_is_wrong_is_told_by_key_in_the_words_of_load_config(place):
    texts = {
        "max_train_steps": "many",
        "learning_rate": "-1",
        "seed": "7",
        "output_dir": str(place.output / "run"),
        "cache_dir": str(place.output / "cache"),
    }
    config, problems = webui.read_form(texts, place)
    assert config is None and problems == {
        "max_train_steps": "max_train_steps: found 'many', must be a valid integer",
        "learning_rate": "learning_rate: found -1, must be greater than or equal to 0",
    }
    _, problems = webui.read_form(
        {**texts, "max_train_steps": "", "learning_rate": "1e-8", "lr_scheduler": "polynomial"},
        place,
    )
    assert list(problems) == ["learning_rate"] and "polynomial" in problems["learning_rate"]


@pytest.mark.parametrize(
    "name",
    [
        "data_dir",
        "output_dir",
        "cache_dir",
        "init_lora",
        "resume_from_checkpoint",
        "lora",
        "pretrained_model_name_or_path",
    ],
)
def test_a_path_cannot_leave_the_folders(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "private")
    (tmp_path / "data2").mkdir()
    good = {"output_dir": "output/run", "cache_dir": "output/cache"}
    for path in (
        "/etc",
        "data/../private",
        "output/../private",
        str(tmp_path / "private"),
        "data/link",
        "data2",
        "..",
        "/",
        "output/run/../../private",
        *(["output/.webui/jobs"] if name != "lora" else []),
    ):
        config, problems = webui.read_form({**good, name: path}, place)
        assert config is None and problems[name].startswith(f"{name}: found {path!r}, which is outside"), path
    inside = "data" if name not in ("output_dir", "cache_dir") else "output/other"
    assert webui.read_form({**good, name: inside}, place)[1] == {}
    if name == "data_dir":
        assert "'/etc'" in webui.read_form({}, place, {**good, "instance_data_dir": "/etc"})[1][name]
        sources = json.dumps([{"path": "data"}, {"path": "/etc"}])
        assert "'/etc'" in webui.read_form({**good, name: sources}, place)[1][name]


def test_a_runs_config_cannot_name_another_file_or_break_the_form(place):
    good = {"output_dir": str(place.output / "run"), "cache_dir": str(place.output / "cache")}
    config, problems = webui.read_form({}, place, {**good, "path": str(ROOT / "configs" / "24gb.json")})
    assert config is None and "unknown keys: 'path'" in "".join(problems.values())
    assert webui.read_form({}, place, {**good, "init_lora": str(place.output) + "/\ud83d"})[0] is None
    assert webui.to_text("data_dir", [None]) == "[null]" and webui.to_text("data_dir", [3]) == "[3]"
    assert webui.settings_of(load_config(gradient_checkpointing=1))["gradient_checkpointing"] == 1


def test_files_that_name_files_are_not_read(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "list.jsonl").write_text('{"img_path": "/etc/hostname"}')  # could name anything
    given = {"output_dir": "output/run", "cache_dir": "output/cache"}
    assert "the page takes folders" in webui.read_form({**given, "data_dir": "data/list.jsonl"}, place)[1]["data_dir"]
    for odd in ('["/etc"]', "[3]", '[{"path": ["x"]}]', '[{"path": "data", "repeat": 2}]', "[1", "data/\0", "~"):
        config, problems = webui.read_form({**given, "data_dir": odd}, place)
        assert config is None and problems["data_dir"].startswith("data_dir"), odd
    for path in ("/etc/hosts.txt", "data/../private.txt"):
        assert "outside" in webui.read_form({**given, "validation_prompts": path}, place)[1]["validation_prompts"]
    for name in ("prompts.txt", "my prompts.TXT"):
        (tmp_path / "data" / name).write_text("a cat\n一只猫\n", encoding="utf-8")
    for text, prompts in (
        ("data/prompts.txt", ["a cat", "一只猫"]),
        ("data/my prompts.TXT", ["a cat", "一只猫"]),
        ("/etc/hosts.txt\na cat", ["/etc/hosts.txt", "a cat"]),
    ):
        config, problems = webui.read_form({**given, "validation_prompts": text}, place)
        assert not problems and config.validation_prompts == prompts


def test_a_default_outside_the_folders_is_no_way_out(place):
    assert "cache_dir" in webui.read_form({"output_dir": str(place.output / "run")}, place)[1]
    assert "output_dir" in webui.read_form({"cache_dir": str(place.output / "cache")}, place)[1]
    assert (
        webui.read_form(
            {
                "output_dir": str(place.output / "run"),
                "cache_dir": str(place.output / "c"),
                "pretrained_model_name_or_path": "someone/a-model",
            },
            place,
        )[1]
        == {}
    )


def test_the_log_shows_of_a_bar_what_it_shows_last(tmp_path):
    (tmp_path / "log").write_bytes(
        "begun\n\rsteps:   0%|  | 0/9\n\rpictures:   0%|  | 0/2\x1b[A\r\n\x1b[A\rsteps:  11%|█ | 1/9\rsteps:  22%|█ | 2/9\n\rgone:   0%|  | 0/9\r                  \rended\n".encode()
    )
    assert webui.log_tail(tmp_path / "log").splitlines() == [
        "begun",
        "pictures:   0%|  | 0/2",
        "steps:  22%|█ | 2/9",
        "ended",
    ]


# ---------------------------------------------------------------- jobs


@pytest.fixture
def script(tmp_path):
    """A script that begins when it has a line for itself, and ends as its config's `license` says."""
    path = tmp_path / "script.py"
    path.write_text(
        "import json, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "config = json.load(open(sys.argv[1]))\n"
        "folder = pathlib.Path(config['output_dir'])\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "(folder / 'begun').write_text(str(time.time()))\n"
        "print('at work', flush=True)\n"
        "while not (folder / 'end').exists(): time.sleep(0.01)\n"
        "(folder / 'ended').write_text(str(time.time()))\n"
        "sys.exit(int(config['license']))\n"
    )
    return path


def start(place, script, name, device="CPU", code=0):
    return webui.start_job(
        place, "training", script, load_config(output_dir=str(place.output / name), license=str(code)), device
    )


def test_a_gpu_is_chosen_among_those_that_are_there(place, script, monkeypatch):
    script.write_text("import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'])")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    start(place, script, "run0", "GPU 0")
    start(place, script, "run1", "GPU 1")
    wait_for(lambda: states(place) == {1: "finished", 2: "finished"})
    assert [webui.log_tail(job.folder / "log.txt") for job in webui.read_jobs(place)] == ["3", "5"]


@pytest.mark.parametrize(
    "ending, state",
    [
        ("sys.exit()", "finished"),
        ("sys.exit('a text')", "failed"),
        ("1 / 0", "failed"),
        ("os.kill(os.getpid(), 9)", "cut off"),
        ("", "finished"),
    ],
)
def test_every_ending_of_a_job_is_told(place, script, ending, state):
    script.write_text(f"import os, sys\n{ending}")
    start(place, script, "run0")
    assert wait_for(lambda: not webui.read_jobs(place)[0].alive and states(place)) == {1: state}


def test_a_job_that_has_hardly_begun_is_stopped(place, script):
    for i in range(5):
        start(place, script, f"run{i}")
        webui.stop_job(webui.read_jobs(place)[-1])
    wait_for(lambda: set(states(place).values()) == {"stopped"})
    assert not list(place.output.glob("run*"))


def test_a_second_stop_is_not_sent(place, script):
    script.write_text(
        "import json, pathlib, signal, sys, time\nfolder, count = pathlib.Path(json.load(open(sys.argv[1]))['output_dir']), []\n"
        "signal.signal(signal.SIGTERM, lambda *_: count.append(1))\nfolder.mkdir(parents=True)\n(folder / 'begun').touch()\n"
        "while not (folder / 'end').exists(): time.sleep(0.01)\nsys.exit(100 + len(count))\n"
    )
    start(place, script, "run0")
    wait_for(lambda: (place.output / "run0" / "begun").exists())
    for _ in range(3):
        webui.stop_job(webui.read_jobs(place)[0])
        time.sleep(0.1)  # a signal that waits for another of its kind is lost
        assert states(place) == {1: webui.STOPPING}
    finish(place, "run0")
    wait_for(lambda: not webui.read_jobs(place)[0].alive)
    assert (place.jobs / "1" / "lock").read_text().split()[1] == "101"


def test_what_is_no_job_or_run_is_passed_over(place, script):
    for name, text in (
        ("5/job.json", '{"what": "tra'),
        ("6/job.json", '{"what": "training"}'),
        ("7/other", ""),
        ("8.bak/job.json", "{}"),
        ("9/job.json", "[]"),
        ("4/job.json", '{"what": "a", "output_dir": "\\ud83d", "device": "CPU", "time": ""}'),
    ):
        (place.jobs / name).parent.mkdir(parents=True)
        (place.jobs / name).write_text(text)
        (place.jobs / name).with_name("lock").touch()
    assert webui.read_jobs(place) == []
    assert start(place, script, "run0") == 10  # nothing is overwritten
    finish(place, "run0")
    wait_for(lambda: states(place) == {10: "finished"})
    for name, text in (
        ("made/config.json", "{}"),
        ("odd/config.json", "no JSON"),
        ("no/run.txt", ""),
        (
            "made/metrics.jsonl",
            f'[1]\n{{"loss": 1}}\n{{"step": 5, "loss": 0.5}}\n{{"step": 5, "loss": "high"}}\n{{"step": NaN, "loss": 1}}\n{"[" * 9999}\n{{"step": 6, "lo',
        ),
        ("deep/config.json", "[" * 9999),
        ("huge/config.json", '{"max_train_steps": 1e999, "num_train_epochs": 0}'),
    ):
        (place.output / name).parent.mkdir(parents=True, exist_ok=True)
        (place.output / name).write_text(text)
    jobs = webui.read_jobs(place)
    listed = dict(map(reversed, webui.choices(place, jobs)))
    assert set(listed) == {
        "10",
        f"run:{place.output / 'made'}",
        *(f"run:{place.output / name}" for name in ("odd", "deep", "huge")),
    }
    assert webui.find(place, jobs, f"run:{place.output / 'made'}") == (None, place.output / "made")
    assert webui.find(place, jobs, "run:/etc") == webui.find(place, jobs, None) == (None, None)
    assert webui.read_metrics(place.output / "made") == [{"step": 5, "loss": 0.5}] and {
        webui.total_steps(place.output / name) for name in ("odd", "deep", "huge")
    } == {0}
    for name in ("metrics.jsonl", "log.txt"):
        (place.output / "folders" / name).mkdir(parents=True)
    assert (
        webui.read_metrics(place.output / "folders") == []
        and webui.log_tail(place.output / "folders" / "log.txt") == ""
    )


def test_the_figures_of_a_run(tmp_path):
    metrics = [
        {"step": 0, "held_out_loss": 0.5, "held_out_base": 0.5},
        {"step": 10, "loss": 0.4, "seconds_per_step": 2.0, "peak_memory_gib": 9.96},
        {"step": 10, "held_out_loss": 0.25, "held_out_base": 0.5},
    ]
    assert webui.figures(metrics, 100, True) == ["10 / 100", "0.4000", "0.2500 / 0.5000", "2", "10.0 GiB", "0:03:00"]
    assert webui.figures(metrics, 100, False)[-1] == "" and webui.figures([], 100, True) == [
        "0 / 100",
        "",
        "",
        "",
        "",
        "",
    ]
    table = webui.curves(metrics).dropna()
    assert table[table.curve == "held_out_loss"].value.tolist() == [0.5, 0.25] and table[
        table.curve == "loss"
    ].step.tolist() == [10]
    (tmp_path / "config.json").write_text('{"max_train_steps": 100, "num_train_epochs": 3}')
    assert webui.total_steps(tmp_path) == 100
    (tmp_path / "log.txt").write_text("said\n42 steps of 1 x 1: each picture\n")
    assert webui.total_steps(tmp_path) == 42


def test_a_run_is_not_gone_on_with_by_mistake(tmp_path):
    config = load_config(output_dir=str(tmp_path), data_dir="data/cat", max_train_steps=100)
    assert webui.why_not(config) == {} and "not set" in webui.why_not(load_config())["data_dir"]
    (tmp_path / "config.json").write_text('{"data_dir": [{"path": "data/cat"}, {"path": "data/plain"}]}')
    (tmp_path / "checkpoints" / "step-000050").mkdir(parents=True)
    assert webui.why_not(config) == {}
    config.max_train_steps = 50
    assert "has 50 steps already" in webui.why_not(config)["max_train_steps"]
    config.data_dir = "data/dog"
    assert "other pictures (data/cat, data/plain)" in webui.why_not(config)["output_dir"]


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def states(place):
    return {job.number: job.state for job in webui.read_jobs(place)}


def finish(place, *names):
    for name in names:
        (place.output / name).mkdir(parents=True, exist_ok=True)
        (place.output / name / "end").touch()


def test_one_job_a_device_the_others_wait_in_line(place, script):
    for i, device in enumerate(["GPU 0", "GPU 0", "GPU 1", "GPU 0"]):
        assert start(place, script, f"run{i}", "CPU" if device == "GPU 0" else "Mac GPU") == i + 1
    wait_for(lambda: (place.output / "run0" / "begun").exists() and (place.output / "run2" / "begun").exists())
    assert states(place) == {1: "running", 2: "waiting", 3: "running", 4: "waiting"}
    assert not (place.output / "run1" / "begun").exists()
    finish(place, "run0", "run1")
    wait_for(lambda: states(place) == {1: "finished", 2: "finished", 3: "running", 4: "running"})
    finish(place, "run2", "run3")
    wait_for(lambda: set(states(place).values()) == {"finished"})
    when = lambda name, what: float((place.output / name / what).read_text())
    assert when("run0", "ended") <= when("run1", "begun") and when("run1", "ended") <= when("run3", "begun")


def test_a_job_is_stopped_in_line_and_at_work_and_by_its_own_error(place, script):
    for name, code in (("run0", 0), ("run1", 0), ("run2", 2)):
        start(place, script, name, code=code)
    wait_for(lambda: (place.output / "run0" / "begun").exists())
    jobs = {job.number: job for job in webui.read_jobs(place)}
    webui.stop_job(jobs[2])
    wait_for(lambda: states(place)[2] == "stopped")
    assert states(place)[1] == "running" and not (place.output / "run1" / "begun").exists()
    webui.stop_job(jobs[1])
    finish(place, "run2")
    wait_for(lambda: states(place) == {1: "stopped", 2: "stopped", 3: "failed"})
    assert webui.log_tail(jobs[1].folder / "log.txt") == "at work"


def test_two_jobs_do_not_train_in_one_folder(place, script):
    start(place, script, "run0")
    with pytest.raises(ValueError, match="output_dir: job 1 is at work in"):
        start(place, script, "other/../run0", "Mac GPU")
    webui.start_job(
        place, "pictures", script, load_config(output_dir=str(place.output / "run0"), license="0"), "Mac GPU"
    )
    finish(place, "run0")
    wait_for(lambda: states(place) == {1: "finished", 2: "finished"})
    assert start(place, script, "run0") == 3
    wait_for(lambda: states(place)[3] == "finished")


def test_a_killed_job_is_told_and_frees_the_device(place, script):
    start(place, script, "run0")
    start(place, script, "run1")
    wait_for(lambda: (place.output / "run0" / "begun").exists())
    os.kill(int((place.jobs / "1" / "lock").read_text()), signal.SIGKILL)
    wait_for(lambda: (place.output / "run1" / "begun").exists())
    assert states(place) == {1: "cut off", 2: "running"}
    finish(place, "run1")
    wait_for(lambda: states(place)[2] == "finished")


def test_jobs_outlive_the_server(place, script, tmp_path):
    arguments = f"sys.path[:0] = {sys.path[:2]!r}; from test_webui import *; place = SimpleNamespace(output=Path({str(place.output)!r}), jobs=Path({str(place.jobs)!r}))"
    code = f"import sys; {arguments}; script = Path({str(script)!r}); start(place, script, 'run0'); start(place, script, 'run1'); os.killpg(0, 9)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    wait_for(lambda: states(place) == {1: "running", 2: "waiting"} and (place.output / "run0" / "begun").exists())
    start(place, script, "run2")
    finish(place, "run0", "run1", "run2")
    wait_for(lambda: set(states(place).values()) == {"finished"})
    assert len(states(place)) == 3


def test_values_that_look_like_commands_are_values(place, script, tmp_path):
    config = load_config(
        output_dir=str(place.output / "$(touch hacked); `touch hacked` && touch hacked --x"),
        license="0",
        instance_prompt="'; touch hacked; '",
    )
    webui.start_job(place, "training", script, config, "CPU")
    (Path(config.output_dir)).mkdir(parents=True, exist_ok=True)
    (Path(config.output_dir) / "end").touch()
    wait_for(lambda: states(place) == {1: "finished"})
    assert not list(tmp_path.rglob("hacked")) and not (ROOT / "hacked").exists()


# ---------------------------------------------------------------- the server


class Server:
    """`python webui.py` in a folder, on a free port."""

    def __init__(self, folder, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.arguments, self.process = folder, arguments, None

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "webui.py", "--port", str(self.port), *self.arguments],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": ""},
        )
        wait_for(lambda: self.process.poll() is not None or self.get("/")[0] in (200, 401), 90)
        assert self.process.poll() is None
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def get(self, path, data=None, **headers):
        """(status, body) of a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's scripts, configs and tiny model in a folder of their own."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "configs", TINY]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.relative_to(ROOT))
    (folder / "configs" / "odd.json").write_text(
        '// An odd one.\n{"base_model_precision": "int7", "--enable_group_offload": "true", "torch_compile": "yes", "optimizer": "x", "lora": "y", "nonsense": 1, "data_dir": "tests/tiny_longcat/pictures", "output_dir": "output/odd"}'
    )
    return folder


@pytest.mark.slow
def test_the_server_serves_nothing_else_and_nobody_else(clone):
    (clone / "output" / "run").mkdir(parents=True)
    (clone / "output" / "run" / "a.txt").write_text("of a run")
    (clone / "output" / "run" / "link").symlink_to("/etc/passwd")
    (clone / "output-not").mkdir()
    (clone / "output-not" / "a.txt").write_text("not of a run")
    order, join = b'{"data": [], "fn_index": 0, "session_hash": "x"}', "/gradio_api/queue/join"
    with Server(clone) as server:
        assert server.get(f"/gradio_api/file={clone}/output/run/a.txt") == (200, b"of a run")
        for path in (
            "/etc/passwd",
            "../../../../etc/passwd",
            "webui.py",
            "configs/tiny.json",
            "output/../webui.py",
            "output/run/../../webui.py",
            "output/run/link",
            "output-not/a.txt",
            "tests/tiny_longcat/pictures/zumi-00.json",
        ):
            for name in (path, f"{clone}/{path}", path.replace("/", "%2f")):
                assert server.get(f"/gradio_api/file={name}")[0] in (403, 404), name
        assert server.get("/", Host="evil.example")[0] == 400
        assert server.get("/config", Origin="http://localhost:9999")[0] == 403
        assert server.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
        assert server.get(join, order, Content_Type="application/json", Sec_Fetch_Site="cross-site")[0] == 403
        assert server.get(join, order, Content_Type="text/plain", Origin="http://evil.example")[0] == 403
        assert server.get(join, order, Content_Type="application/json", Origin="null")[0] == 403
        assert server.get(join, order, Content_Type="application/json", Origin=f"http://127.0.0.1:{server.port}")[
            0
        ] not in (0, 403)
        upload = (
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
            + b"x" * 5000
            + b"\r\n--b--\r\n"
        )
        assert server.get("/gradio_api/upload", upload, Content_Type="multipart/form-data; boundary=b")[0] == 413


@pytest.mark.slow
def test_other_machines_need_the_password(clone):
    (clone / "file").touch()
    full = subprocess.run(
        [sys.executable, "webui.py", "--output", "file/output"], cwd=clone, capture_output=True, text=True
    )
    assert full.returncode == 1 and full.stderr.startswith("error: --output file/output: cannot be written")
    alone = subprocess.run([sys.executable, "webui.py", "--host", "0.0.0.0"], cwd=clone, capture_output=True, text=True)
    assert (
        alone.returncode == 1
        and alone.stderr.startswith("error: --host 0.0.0.0")
        and len(alone.stderr.splitlines()) == 1
    )
    with Server(clone, "--host", "0.0.0.0", "--password", "right") as server:
        assert b"tests/tiny_longcat" not in server.get("/")[1]
        for path in ("/config", f"/gradio_api/file={clone}/output/run/a.txt", "/gradio_api/info"):
            assert server.get(path)[0] == 401, path
        assert (
            server.get(
                "/gradio_api/queue/join",
                b'{"data": [], "fn_index": 0, "session_hash": "x"}',
                Content_Type="application/json",
            )[0]
            == 401
        )
        began = time.monotonic()
        assert (
            server.get("/login", b"username=me&password=wrong", Content_Type="application/x-www-form-urlencoded")[0]
            == 400
        )
        assert time.monotonic() - began >= 1
        assert (
            server.get("/login", b"username=me&password=right", Content_Type="application/x-www-form-urlencoded")[0]
            == 200
        )


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\", name='gradio')")
    done = subprocess.run(
        [sys.executable, ROOT / "webui.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "error: the page needs Gradio; install it with: pip install 'gradio>=6.31,<7'"
    ]


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_from_choosing_a_config_to_the_finished_lora(clone, tmp_path):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs playwright: pip install playwright"
    )
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver, Server(clone) as server:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(locale="en", viewport={"width": 1280, "height": 900}, accept_downloads=True)
        outside, errors = [], []
        context.on(
            "request",
            lambda request: (
                outside.append(request.url)
                if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", request.url)
                else None
            ),
        )
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = context.new_page()
        field = lambda name, form="key": page.locator(f"#{form}-{name} textarea, #{form}-{name} input").first
        text = lambda name: page.locator(f"#{name}").inner_text()
        tab = lambda number: page.get_by_role("tab").nth(number - 1).click()
        shot = lambda name: page.screenshot(path=shots / f"{name}.png", full_page=True)

        def until(condition, seconds=60):
            deadline = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < deadline, (
                    shot("failed"),
                    text("state") if page.locator("#state").count() else "",
                )
                page.wait_for_timeout(200)

        # Set up: what is wrong is told at the field; a config is saved, and not overwritten.
        page.goto(f"http://127.0.0.1:{server.port}")
        until(lambda: page.locator("#key-output_dir").count())
        until(lambda: field("output_dir").input_value() == "output/tiny")
        assert "on any CPU" in text("about")
        choose = lambda box, text: (page.click(f"#{box} input"), page.get_by_role("option", name=text).click())
        choose("config", "odd.json")
        until(lambda: "found 'int7', must be 'int8-quanto'" in text("key-base_model_precision"))
        for told in (
            "An odd one",
            "ignored: lora, nonsense, torch_compile: found 'yes'",
        ):
            assert told in text("about")
        page.locator("#more-memory button").first.click()
        assert (
            page.locator("#key-enable_group_offload input").is_checked()
            and not page.locator("#key-torch_compile input").is_checked()
        )
        choose("config", "tiny.json")
        until(lambda: field("output_dir").input_value() == "output/tiny" and "⚠" not in text("set-up-message"))
        field("max_train_steps").fill("many")
        field("output_dir").fill("/etc/run")
        field("lora_rank").fill("8")
        until(lambda: "found 'many', must be a valid integer" in text("key-max_train_steps"))
        until(lambda: "outside this page's folders" in text("key-output_dir"))
        shot("1-wrong")
        page.locator("#more-data button").first.click()
        for name, value in (
            ("max_train_steps", "120"),
            ("output_dir", "output/page"),
            ("validation_step_interval", "60"),
            ("validation_split", "0.1"),
        ):
            field(name).fill(value)
        page.locator("#more-output button").first.click()
        field("checkpoint_step_interval").fill("30")
        field("lora_rank").click()
        until(lambda: "⚠" not in text("key-output_dir") and "⚠" not in text("set-up-message"))
        page.locator("#save-name input, #save-name textarea").fill("mine")
        page.click("#save")
        until(lambda: "Saved" in text("save-message"))
        config = load_config(clone / "configs" / "mine.json")
        assert (config.max_train_steps, config.lora_rank, config.output_dir, config.validation_split) == (
            120,
            8,
            "output/page",
            0.1,
        )
        page.click("#save")
        until(lambda: "already" in text("save-message"))
        shot("1-set-up")

        # Data: the report, the sheet, a caption corrected where it stands.
        tab(2)
        pictures = clone / "tests/tiny_longcat/pictures"
        (pictures / "zumi-05.json").write_text(
            '{"caption": "it says \\"![a](http://outside.invalid/a.png) <img src=http://outside.invalid/b.png> 2*3*4\\""}'
        )
        page.click("#look")
        until(lambda: "35 pictures, 0 left out" in text("data-message") and page.locator("#sheet img").count())
        page.locator("#pictures button.thumbnail-item").nth(1).click()
        caption = page.locator("#caption textarea")
        until(lambda: caption.input_value().startswith("zumi on a blue background"))
        caption.fill("a corrected caption of zumi\nzumi，改过的描述")
        thumbnails = page.locator("#pictures button.thumbnail-item")
        thumbnails.nth(2).click()
        until(
            lambda: (
                "Not saved yet" in text("caption-message") and "zumi on a yellow background" in caption.input_value()
            )
        )
        thumbnails.nth(1).click()
        until(lambda: caption.input_value().startswith("a corrected caption"))
        page.click("#save-caption")
        until(lambda: "Saved" in text("caption-message"))
        page.locator("#report-box button").first.click()
        until(
            lambda: (
                "![a](http://outside.invalid/a.png) <img src=http://outside.invalid/b.png" in text("report")
                and "2*3*4" in text("report")
            )
        )
        page.locator("#report-box button").first.click()
        written = json.loads((pictures / "zumi-01.json").read_text(encoding="utf-8"))
        assert written == {"caption": ["a corrected caption of zumi", "zumi，改过的描述"]}
        thumbnails.nth(3).click()
        until(lambda: caption.input_value().startswith("zumi on a white background"))
        (pictures / "zumi-03.json").write_text('{"caption": "changed elsewhere"}')
        caption.fill("from the page")
        page.click("#save-caption")
        until(lambda: "changed meanwhile" in text("caption-message"))
        assert (pictures / "zumi-03.json").read_text() == '{"caption": "changed elsewhere"}'
        page.click("#look")  # what was typed is not lost
        until(lambda: "✎ changed elsewhere" in thumbnails.nth(3).inner_text())
        thumbnails.nth(3).click()
        until(lambda: caption.input_value() == "from the page")
        page.click("#save-caption")
        until(lambda: "Saved" in text("caption-message") and "✎" not in thumbnails.nth(3).inner_text())
        assert json.loads((pictures / "zumi-03.json").read_text()) == {"caption": ["from the page"]}
        page.locator("#page input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        until(lambda: thumbnails.count() == 11)
        thumbnails.nth(0).click()
        until(lambda: text("caption-file").strip() == "tests/tiny_longcat/regularisation/ordinary-09.png")
        page.wait_for_timeout(1000)
        shot("2-data")

        # Train: start, stop, go on, with a new server in between.
        tab(3)
        page.click("#start")
        until(lambda: "running" in text("state"))
        page.click("#start")
        until(lambda: "job 1 is at work in output/page" in text("jobs-message"))
        step = lambda: int(
            re.match(r"(\d+)", page.locator("#step input, #step textarea").first.input_value() or "0")[1]
        )
        until(lambda: step() >= 10, 120)
        page.click("#stop")
        until(lambda: "stopped" in text("state"))
        stopped_at = max(int(path.name[5:]) for path in (clone / "output/page/checkpoints").glob("step-*"))
        assert 10 <= stopped_at < 120
        shot("3-stopped")
        page.click("#resume")
        until(lambda: "running" in text("state"))
        page.close()
        server.__exit__()
        server.__enter__()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.port}")
        until(lambda: page.locator("#key-output_dir").count())
        until(lambda: field("output_dir").input_value() == "output/page")  # what was typed is still there
        tab(3)
        until(lambda: "running" in text("state"))
        until(lambda: step() > stopped_at)
        page.wait_for_timeout(1000)
        shot("3-running")
        until(lambda: "finished" in text("state"), 300)
        until(lambda: step() == 120 and page.locator("#preview img").count())
        assert (
            page.locator("#plot canvas, #plot svg").count()
            and f"resumed from output/page/checkpoints/step-{stopped_at:06d}"
            in page.locator("#log textarea").input_value()
        )
        jobs = [json.loads(path.read_text()) for path in (clone / "output/.webui/jobs").glob("*/job.json")]
        assert len(jobs) == 2 and (clone / "output/page/pytorch_lora_weights.safetensors").exists()
        page.wait_for_timeout(1500)
        shot("3-finished")
        page.click("#start")
        until(lambda: "has 120 steps already" in text("jobs-message"))
        with page.expect_download() as download:
            page.click("#download")
        assert (
            Path(download.value.path()).read_bytes()
            == (clone / "output/page/pytorch_lora_weights.safetensors").read_bytes()
        )

        # Try it: base and LoRA side by side, and a picture saved.
        tab(4)
        until(lambda: field("validation_guidance", "try").input_value() == "3.0")  # the run's own settings
        field("validation_prompts", "try").fill("zumi，粉色背景")
        field("validation_lora_strength", "try").fill("0.5, 1")
        field("validation_num_inference_steps", "try").fill("4.5")
        page.click("#draw")
        until(lambda: "must be a valid integer" in text("try-validation_num_inference_steps"))
        field("validation_num_inference_steps", "try").fill("4")
        page.click("#draw")
        until(lambda: page.locator("#grid img").count() and page.locator("#single img").count() == 3, 90)
        grid = clone / "output/page/validation/compare-001/comparison.png"
        page.wait_for_timeout(1500)
        shot("4-try")
        page.hover("#grid")
        with page.expect_download() as download:
            page.locator("#grid button[aria-label*=ownload], #grid a[download]").first.click()
        assert Path(download.value.path()).read_bytes() == grid.read_bytes()

        # A measurement, and a run that no job has made.
        tab(3)
        page.click("#measure")
        until(lambda: "finished" in text("state") and "steps take" in page.locator("#log textarea").input_value(), 120)
        shutil.copytree(clone / "output/page", clone / "output/elsewhere")
        until(lambda: (page.click("#job input"), page.get_by_role("option", name="output/elsewhere").count())[1])
        page.get_by_role("option", name="output/elsewhere").click()
        until(lambda: "not started from this page" in text("state") and step() == 120)

        # Portuguese and Chinese.
        for language, word in (("pt-BR", "Configurar"), ("zh-CN", "设置")):
            other = browser.new_context(locale=language, viewport={"width": 1280, "height": 900}).new_page()
            other.goto(f"http://127.0.0.1:{server.port}")
            other.wait_for_selector("#key-output_dir")
            assert word in other.get_by_role("tab").first.inner_text()
            for number, name in enumerate(("set-up", "data", "train", "try")):
                other.get_by_role("tab").nth(number).click()
                other.wait_for_timeout(2500)
                assert (
                    "__i18n__" not in other.locator("body").inner_text()
                    and "translation_metadata" not in other.locator("body").inner_text()
                )
                other.screenshot(path=shots / f"{language}-{number + 1}-{name}.png", full_page=True)
        browser.close()
    assert not outside and not errors
