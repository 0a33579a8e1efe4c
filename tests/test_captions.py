"""Captions that are corrected are saved beside their picture, and count before what they were read from."""

import json
import shutil

import pytest
from conftest import TINY

from longcat_common import Source, UserError, load_config
from prepare_data import Findings, read_source, save_captions


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png"):
        shutil.copy(TINY / "pictures" / "zumi-00.png", tmp_path / name)
    return tmp_path


def captions_of(path, findings=None):
    findings = Findings() if findings is None else findings
    return {
        picture.name: captions for picture, captions in read_source(Source(path=str(path)), load_config(), findings)
    }


TABLES = {
    "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\nno JSON\n{"file_name": "b.png", "text": "two"}\n',
    "metadata.csv": "file_name,text\na.png,one\nb.png,two\n",
    "captions.json": '{"a.png": "one", "b.png": {"en": "two", "zh": "二"}}',
}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_saved_counts_before_a_table_which_stays(pictures, name):
    (pictures / name).write_text(TABLES[name], encoding="utf-8")
    before = captions_of(pictures)
    assert before["a.png"] == ["one"] and before["b.png"][0] == "two"
    for captions, file in ((["a new one"], "a.txt"), (["x, y", "红色", "z"], "a.json"), (["one again"], "a.json")):
        assert save_captions(pictures / "a.png", captions) == pictures / file
        findings = Findings()
        assert captions_of(pictures, findings) == {"a.png": captions, "b.png": before["b.png"]}
        assert not any("something else" in line for lines in findings.values() for line in lines)
        assert not (pictures / "a.txt").exists() or file == "a.txt"
    assert (pictures / name).read_text(encoding="utf-8") == TABLES[name]


def test_other_keys_of_a_pictures_own_json_stay(pictures):
    (pictures / "a.json").write_text('{"by": "me", "prompt": {"en": "one", "zh": "一"}, "width": 5}', encoding="utf-8")
    save_captions(pictures / "a.png", ["two"])
    written = (pictures / "a.json").read_text(encoding="utf-8")
    assert json.loads(written) == {"caption": ["two"], "by": "me", "width": 5}
    (pictures / "a.json").write_text('{"by": ')
    with pytest.raises(UserError, match="a.json: is not JSON"):
        save_captions(pictures / "a.png", ["x", "y"])
    assert (pictures / "a.json").read_text() == '{"by": '


def test_a_caption_file_keeps_its_permissions_and_a_link_stays_one(pictures):
    (pictures / "elsewhere").mkdir()
    (pictures / "elsewhere" / "text").write_text("one")
    (pictures / "elsewhere" / "text").chmod(0o600)
    (pictures / "a.txt").symlink_to(pictures / "elsewhere" / "text")
    save_captions(pictures / "a.png", ["two"])
    file = pictures / "elsewhere" / "text"
    assert (pictures / "a.txt").is_symlink() and file.read_text() == "two\n" and file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"en": "a cat", "zh": "一只猫"}', ["a cat", "一只猫"]),
        ('["one", "two"]', ["one", "two"]),
        ('{"caption": "", "text": "used"}', ["used"]),
        ('{"caption": {"en": "a", "zh-CN": "一"}}', ["a", "一"]),
    ],
)
def test_forms_of_a_pictures_own_json(pictures, content, expected):
    (pictures / "a.json").write_text(content, encoding="utf-8")
    assert captions_of(pictures)["a.png"] == expected
