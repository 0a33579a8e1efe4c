"""Captions are put back where they were read from, and all else stays."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY

from longcat_common import UserError, load_config
from prepare_data import Findings, read_source, write_captions

ROWS = '{"file_name": "a.png", "text": "one", "width": 5}\nno JSON\n{"file_name": "b.png", "text": "two"}\n{"file_name": "a.png", "text": "again"}\n'
FORMS = {
    "a.txt": ("an old caption", "a new caption\n", ["a new caption"]),
    "a.json": ('{"prompt": "old", "by": "me"}', '{"prompt": "a new caption", "by": "me"}', ["a new caption"]),
    "metadata.jsonl": (ROWS, '{"file_name": "a.png", "text": ["x", "红色"], "width": 5}\nno JSON\n{"file_name": "b.png", "text": "two"}\n', ["x", "红色"]),
    "metadata.csv": ("text,file_name,by\none,a.png,me\n,b.png,\ntwo,./a.png,you\n", 'text,file_name,by\n"x, y",a.png,me\nz,a.png,me\n,b.png,\n', ["x, y", "z"]),
    "captions.json": ('{"b.png": "two", "a.png": {"en": "one", "zh": "一"}}', '{\n  "b.png": "two",\n  "a.png": {\n    "en": "x",\n    "zh": "y"\n  }\n}\n', ["x", "y"]),
}


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png"):
        shutil.copy(TINY / "pictures" / "neonix-00.png", tmp_path / name)
    return tmp_path


def captions_of(path):
    return {picture.name: (captions, file) for picture, captions, file in read_source({"path": str(path)}, load_config(), Findings(False))}


@pytest.mark.parametrize("name", FORMS)
def test_captions_go_where_they_came_from(pictures, name):
    before, after, captions = FORMS[name]
    (pictures / name).write_text(before, encoding="utf-8")
    file = captions_of(pictures)["a.png"][1]
    assert file == pictures / name
    write_captions(file, pictures / "a.png", captions)
    assert file.read_text(encoding="utf-8") == after
    assert captions_of(pictures)["a.png"] == (captions, file)


def test_languages_keep_their_names_as_long_as_there_are_as_many(pictures):
    (pictures / "a.json").write_text('{"caption": {"en": "one", "zh": "一"}}', encoding="utf-8")
    write_captions(pictures / "a.json", pictures / "a.png", ["two", "二"])
    assert json.loads((pictures / "a.json").read_text(encoding="utf-8")) == {"caption": {"en": "two", "zh": "二"}}
    write_captions(pictures / "a.json", pictures / "a.png", ["three"])
    assert captions_of(pictures)["a.png"][0] == ["three"]


def test_a_list_of_pictures_anywhere(pictures):
    (pictures / "other").mkdir()
    line = json.dumps({"img_path": str(pictures / "a.png"), "prompt": "one"})
    (pictures / "other" / "list.json").write_text(line + '\n{"img_path": "../b.png", "prompt": "two"}\n', encoding="utf-8")
    for name in ("a.png", "b.png"):
        (picture,) = [p for p, _, _ in read_source({"path": str(pictures / "other" / "list.json")}, load_config(), Findings(False)) if p.name == name]
        write_captions(pictures / "other" / "list.json", picture, [f"new {name}"])
    assert {name: captions for name, (captions, _) in captions_of(pictures / "other" / "list.json").items()} == {"a.png": ["new a.png"], "b.png": ["new b.png"]}


@pytest.mark.parametrize("name, text", [("metadata.jsonl", '{"file_name": "b.png", "text": "two"}'), ("metadata.csv", "file_name,text\nb.png,x\n"), ("a.json", "{")])
def test_a_file_that_has_changed_meanwhile_is_left_as_it_is(pictures, name, text):
    (pictures / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=name):
        write_captions(pictures / name, pictures / "a.png", ["x"])
    assert (pictures / name).read_text(encoding="utf-8") == text and not list(Path(pictures).glob(".*"))
