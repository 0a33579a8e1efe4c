import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_longcat"
MODEL = os.environ.get("TINY_MODEL", str(TINY / "model"))
sys.path[:0] = [str(ROOT), str(TINY)]


def run_script(*arguments, check=True, **options):
    """Runs `python script ...` from the repository's root, as a user does; returns the finished process."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", **options)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


@pytest.fixture
def tiny_config(tmp_path):
    """A function that gives the demo's configuration, with this test's own output and cache."""
    from longcat_common import load_config

    def make(**overrides):
        paths = {"output_dir": str(tmp_path / "output"), "cache_dir": str(tmp_path / "cache"), "pretrained_model_name_or_path": MODEL}
        return load_config(ROOT / "configs" / "tiny.json", **{**paths, **overrides})

    return make
