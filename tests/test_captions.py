"""Captions: every form is read, what is wrong with one is named, and what is corrected is saved beside its picture."""

import json

import pytest

from longcat_common import Source, UserError, load_config
from prepare_data import CAPTIONS, Findings, read_source, save_captions


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    write(tmp_path / "data", {"a.jpg": "", "b.jpg": "", "../outside.jpg": ""})
    return tmp_path / "data"


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def read(path):
    """({picture's name: captions}, findings) of a source."""
    findings = Findings()
    found = read_source(Source(path=str(path)), load_config(), findings)
    return {picture.name: captions for picture, captions in found}, findings


RED, BOTH, CHINESE = ["a red field"], ["a red field", "一片红色"], "一片红色的田野——阳光·很好"
FORMS = [
    ("a.txt", "a red\n field\n", RED),
    ("a.TXT", b"\xef\xbb\xbfa red field", RED),
    ("a.txt", "一片红色".encode("utf-16"), ["一片红色"]),
    ("a.txt", CHINESE.encode("gb18030"), [CHINESE]),
    ("a.json", '{"caption": "", "text": "a red field"}', RED),
    ("a.json", '{"text": ["a red field", "一片红色", "a red field"]}', BOTH),
    ("a.json", '["a red field", "一片红色"]', BOTH),
    ("a.json", '{"en": "a red field", "zh": "一片红色"}', BOTH),
    ("a.json", '{"prompt": {"en": ["a red field"], "zh-CN": "一片红色"}}'.encode("utf-8-sig"), BOTH),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n\n{"img_path": "./a.jpg", "prompt": "y"}', ["x", "y"]),
    ("metadata.csv", 'caption, text, file_name\r\n, "a red\nfield", .\\a.jpg\r\n', RED),
    ("metadata.csv", 'text,img_path\n"a red field",a.jpg\n一片红色,a.jpg\n'.encode("utf-8-sig"), BOTH),
    ("metadata.csv", f"file_name,text\na.jpg,{CHINESE}\n".encode("gb18030"), [CHINESE]),
    ("captions.json", '{"a.jpg": {"caption": {"en": "a red field", "zh": "一片红色"}}}', BOTH),
    ("a.txt", "\u200b \u2060\u200d", ": holds no caption"),
    ("a.txt", "一隻紅色的貓在屋頂上".encode("big5"), ": its text or its name is not UTF-8"),
    ("a.txt", "a cat".encode("utf-16-le"), ": is no text"),
    ("a.json", '{"title": "a"}', ": is no object with one of caption, text, prompt"),
    ("a.json", '{"caption": 5}', ": holds '5' where a caption"),
    ("a.json", '{"caption": "\\ud83d"}', ": its text or its name is not UTF-8"),
    ("a.json", '{"caption": ' + "[" * 100000, ": maximum recursion depth exceeded"),
    ("metadata.csv", "file_name,text\n../outside.jpg,x", ", line 2: there is no picture '../outside.jpg'"),
    ("metadata.csv", "file_name,text\na.jpg,a cat, on a mat", ", line 2: has more fields than there"),
    ("metadata.csv", 'file_name,text\na.jpg,"a cat\nb.jpg,a dog\n', ": unexpected end of data"),
    ("metadata.jsonl", '{"file_name": "a.jpg"', ", line 1: is not JSON"),
    ("metadata.jsonl", '\n["a.jpg", "x"]', ", line 2: names no picture"),
    ("captions.json", '{"a.jpg": "one", "a.jpg": "two"}', ": the key 'a.jpg' is there 2 times"),
    ("captions.json", '["a.jpg"]', ": is no object of file names"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, expected", FORMS)
def test_every_form_is_read_and_what_is_wrong_with_one_named(folder, name, content, expected):
    write(folder, {name: content, "b.txt": "a good one"})
    found, findings = read(folder)
    good = isinstance(expected, list)
    assert found == {"a.jpg": expected if good else [], "b.jpg": ["a good one"]}
    assert [line.startswith(f"{folder / name}{expected}") for line in findings[CAPTIONS]] == [True] * (not good)
    assert findings["Not UTF-8, read as GB18030"] == [folder / name] * (expected == [CHINESE])


def test_a_list_names_pictures_anywhere(folder, tmp_path, monkeypatch):
    rows = [json.dumps({"img_path": str(tmp_path / "outside.jpg"), "prompt": "b"}), "no JSON", '{"file_name": "a.jpg"}']
    write(folder, {"list.txt": "\n".join(rows), "list.csv": "file_name,text\noutside.jpg,c\nb.jpg,d"})
    assert read(folder / "list.txt")[0] == {"outside.jpg": ["b"], "a.jpg": []}
    assert read(folder / "list.csv")[0] == {"b.jpg": ["d"]}
    monkeypatch.chdir(tmp_path)  # as the model authors' scripts do: relative to the current directory
    assert read(folder / "list.csv")[0] == {"outside.jpg": ["c"], "b.jpg": ["d"]}


def test_the_first_that_there_is_counts(folder):
    names = ["txt.jpg", "json.jpg", "jsonl.jpg", "csv.jpg", "map.jpg", "above.jpg", "none.jpg"]
    rows = [json.dumps({"file_name": name, "text": "by jsonl"}) for name in names[:3]]
    table = lambda rows: "file_name,text\n" + "".join(rows)
    tables = {"metadata.jsonl": "\n".join(rows), "metadata.csv": table(f"{name},by csv\n" for name in names[:4])}
    tables["captions.json"] = json.dumps(dict.fromkeys(names[:5], "by map"))
    tables |= {"txt.txt": "by txt", "txt.json": '"less"', "json.json": '"by json"', **dict.fromkeys(names, "")}
    write(folder / "sub", tables)
    write(folder, {"metadata.csv": table(f"sub/{name},from above\n" for name in names[:6])})
    texts = [["by txt"], ["by json"], ["by jsonl"], ["by csv"], ["by map"], ["from above"], []]
    write(folder, {"cafe\u0301.jpg": "", "caf\u00e9.txt": "coffee", "a.png": "", "a.txt": "both"})  # as from a Mac
    texts = dict(zip(names, texts)) | {"cafe\u0301.jpg": ["coffee"], "a.jpg": ["both"], "a.png": ["both"], "b.jpg": []}
    assert read(folder)[0] == texts


def test_what_is_saved_counts_and_the_rest_stays(folder, tmp_path):
    write(folder, {"captions.json": '{"a.jpg": "one", "b.jpg": "two"}', "b.json": '{"by": '})
    for captions, file in ((["a new one"], "a.txt"), (["x, y", "红色", "z"], "a.json"), (["one again"], "a.json")):
        assert save_captions(folder / "a.jpg", captions) == folder / file
        assert read(folder)[0] == {"a.jpg": captions, "b.jpg": ["two"]}
    write(folder, {"a.json": '{"by": "me", "prompt": {"en": "one", "zh": "一"}}', "../text": "one"})
    save_captions(folder / "a.jpg", ["two"])
    assert json.loads((folder / "a.json").read_text())["by"] == "me" and read(folder)[0]["a.jpg"] == ["two"]
    with pytest.raises(UserError, match="b.json: not JSON"):
        save_captions(folder / "b.jpg", ["x", "y"])
    (folder / "c.txt").symlink_to(tmp_path / "text")
    save_captions(folder / "c.jpg", ["two"])
    assert (tmp_path / "text").read_text() == "two\n"
