"""Captions: every form is read, what is wrong with one is named, and what is corrected is saved beside its picture."""

import json

import pytest

from longcat_common import Source, UserError, load_config
from prepare_data import CAPTIONS, Findings, read_source, save_captions


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (folder / "a.jpg", folder / "b.jpg", tmp_path / "outside.jpg"):
        path.touch()
    return folder


def read(path):
    """({picture's name: captions}, findings) of a source."""
    findings = Findings()
    found = read_source(Source(path=str(path)), load_config(), findings)
    return {picture.name: captions for picture, captions in found}, findings


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)


BOTH = ["a red field", "一片红色"]
ROWS = "\n\n".join(json.dumps({"file_name": "a.jpg", "text": text}) for text in BOTH)
FORMS = [
    ("a.txt", "a red\n field\n", ["a red field"]),
    ("a.TXT", b"\xef\xbb\xbfa red field", ["a red field"]),
    ("a.txt", "一片红色的田野——阳光·很好".encode("gb18030"), ["一片红色的田野——阳光·很好"]),
    ("a.txt", "一片红色".encode("utf-16"), ["一片红色"]),
    ("a.json", '{"caption": "", "text": "a red field"}', ["a red field"]),
    ("a.json", '{"text": "less", "caption": "a red field", "other": 3}', ["a red field"]),
    ("a.json", '{"text": ["a red field", "一片红色", "a red field"]}', BOTH),
    ("a.json", '["a red field", "一片红色"]', BOTH),
    ("a.json", '{"en": "a red field", "zh": "一片红色"}', BOTH),
    ("a.json", '{"prompt": {"en": "a red field", "zh-CN": "一片红色"}}', BOTH),
    ("a.json", '{"caption": {"en": ["a red field"], "zh": "一片红色"}}'.encode("utf-8-sig"), BOTH),
    ("metadata.jsonl", ROWS, BOTH),
    ("metadata.jsonl", '{"img_path": "./a.jpg", "prompt": "a red field", "width": 1, "height": 1}', ["a red field"]),
    ("metadata.csv", 'caption, text, file_name\r\n, "a red, wide\nfield", .\\a.jpg\r\n', ["a red, wide field"]),
    ("metadata.csv", 'text,file_name\n"a red field",a.jpg\n一片红色,a.jpg\n'.encode("utf-8-sig"), BOTH),
    ("metadata.csv", "file_name,text\na.jpg,一片红色的田野\n".encode("gb18030"), ["一片红色的田野"]),
    ("captions.json", '{"a.jpg": "a red field"}', ["a red field"]),
    ("captions.json", '{"a.jpg": {"en": "a red field", "zh": "一片红色"}}', BOTH),
    ("captions.json", '{"a.jpg": {"caption": ["a red field", "一片红色"]}}', BOTH),
]  # fmt: skip


@pytest.mark.parametrize("name, content, expected", FORMS)
def test_every_form(folder, name, content, expected):
    write(folder / name, content)
    found, findings = read(folder)
    assert found == {"a.jpg": expected, "b.jpg": []} and not findings[CAPTIONS]
    in_gb18030 = isinstance(content, bytes) and "红".encode("gb18030") in content
    assert findings["Not UTF-8, read as GB18030"] == [folder / name] * in_gb18030


NOT_UTF8 = "a.txt: its text or its name is not UTF-8"
BAD = [
    ("a.txt", "", "a.txt: holds no caption"),
    ("a.txt", b"\xef\xbb\xbf \n", "a.txt: holds no caption"),
    ("a.txt", "\u200b \u2060\u200d", "a.txt: holds no caption"),
    ("a.txt", "café señor".encode("latin-1"), NOT_UTF8),
    ("a.txt", "一隻紅色的貓在屋頂上".encode("big5"), NOT_UTF8),
    ("a.txt", "Тихий вечер у моря".encode("cp1251"), NOT_UTF8),
    ("a.txt", "тихий вечер".encode("koi8-r"), NOT_UTF8),
    ("a.txt", "a cat".encode("utf-16-le"), "a.txt: is no text"),
    ("a.txt", b"\xff\xfe\0\0a\0\0\0", "a.txt: is no text"),
    ("a.json", '{"caption": "a"', "a.json: is not JSON: Expecting ',' delimiter: line 1"),
    ("a.json", '{"caption": " ", "tags": "red"}', "a.json: holds no caption"),
    ("a.json", '{"title": "a"}', "a.json: is no object with one of caption, text, prompt"),
    ("a.json", "5", "a.json: holds '5' where a caption"),
    ("a.json", '{"caption": 5}', "a.json: holds '5' where a caption"),
    ("a.json", '{"caption": "\\ud83d"}', "a.json: its text or its name is not UTF-8"),
    ("a.json", '{"caption": ' + "[" * 100000, "a.json: maximum recursion depth exceeded"),
    ("metadata.csv", "name,text\na.jpg,x", "metadata.csv: has no column file_name or img_path; its columns: ['name'"),
    ("metadata.csv", "file_name,titel\na.jpg,x", "metadata.csv: has no column caption or text or prompt; its columns"),
    ("metadata.csv", "", "metadata.csv: has no column"),
    ("metadata.csv", "file_name,text\nc.jpg,x", "metadata.csv, line 2: there is no picture 'c.jpg'"),
    ("metadata.csv", "file_name,text\n../outside.jpg,x", "metadata.csv, line 2: '../outside.jpg' is outside the"),
    ("metadata.csv", "file_name,text\nsub/../../outside.jpg,x", "metadata.csv, line 2: '../outside.jpg' is outside"),
    ("metadata.csv", "file_name,text\n/etc/b.jpg,x", "metadata.csv, line 2: '/etc/b.jpg' is outside the folder"),
    ("metadata.csv", "file_name,text\na.jpg,a cat, on a mat", "metadata.csv, line 2: has more fields than there"),
    ("metadata.csv", 'file_name,text\na.jpg,"a cat\nb.jpg,a dog\n', "metadata.csv: unexpected end of data"),
    ("metadata.csv", f"file_name,text\n{'y' * 300}.jpg,x\n", "metadata.csv, line 2: there is no picture 'yyy"),
    ("metadata.csv", "file_name,text\n.,x\n", "metadata.csv, line 2: there is no picture '.'"),
    ("metadata.csv", "file_name,text\na.jpg,", "metadata.csv, line 2: holds no caption"),
    ("metadata.csv", "file_name,text\n,x", "metadata.csv, line 2: names no picture"),
    ("metadata.csv", 'file_name,text\na.jpg,"' + "x" * 200000, "metadata.csv: field larger than"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "titel": "x"}', "metadata.jsonl, line 1: holds no caption"),
    ("metadata.jsonl", '{"file_name": "a.jpg"', "metadata.jsonl, line 1: is not JSON"),
    ("metadata.jsonl", '\n["a.jpg", "x"]', "metadata.jsonl, line 2: names no picture"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": true}', "metadata.jsonl, line 1: holds 'True'"),
    ("captions.json", '{"a.jpg": "one", "a.jpg": "two"}', "captions.json: the key 'a.jpg' is there 2 times"),
    ("captions.json", '["a.jpg"]', "captions.json: is no object of file names"),
    ("captions.json", '{"c.jpg": "x"}', "captions.json, c.jpg: there is no picture 'c.jpg'"),
    ("other.txt", "a caption", "other.txt: there is no picture 'other'"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", BAD)
def test_what_is_wrong_is_named(folder, name, content, words):
    write(folder / name, content)
    write(folder / "b.txt", "a good one")
    found, findings = read(folder)
    assert found == {"a.jpg": [], "b.jpg": ["a good one"]}
    assert len(findings[CAPTIONS]) == 1 and findings[CAPTIONS][0].startswith(f"{folder}/{words}"), findings


def test_a_list_names_pictures_anywhere(folder, tmp_path, monkeypatch):
    rows = [
        {"img_path": str(tmp_path / "outside.jpg"), "prompt": "b", "width": 192, "height": 128},
        {"img_path": ".\\a.jpg", "prompt": ["a", "一"], "width": 1, "height": 2},
        {"img_path": "not there.jpg", "prompt": "c"},
        {"img_path": "b.jpg", "rest": 1},
    ]
    write(folder / "list.txt", "\n".join(map(json.dumps, rows)) + "\nno JSON")
    found, findings = read(folder / "list.txt")
    assert found == {"outside.jpg": ["b"], "a.jpg": ["a", "一"], "b.jpg": []}
    said = ["line 3: there is no picture 'not there.jpg'", "line 4: holds no caption", "line 5: is not JSON"]
    assert all(f"list.txt, {words}" in line for words, line in zip(said, findings[CAPTIONS], strict=True))
    monkeypatch.chdir(tmp_path)  # as the model authors' scripts do: relative to the current directory
    write(folder / "list.csv", "file_name,text\noutside.jpg,c\n")
    assert read(folder / "list.csv")[0] == {"outside.jpg": ["c"]}
    with pytest.raises(UserError, match="data_dir: .*missing is no folder"):
        read(folder / "missing")


def test_precedence_and_conflicts(folder):
    names = ["txt.jpg", "json.jpg", "jsonl.jpg", "csv.jpg", "map.jpg", "upper.jpg", "none.jpg"]
    (folder / "sub").mkdir()
    for name in names:
        (folder / "sub" / name).touch()
    write(folder / "sub" / "txt.txt", "by txt")
    for name in names[:2]:
        write((folder / "sub" / name).with_suffix(".json"), '{"caption": "by json"}')
    rows = [json.dumps({"file_name": name, "text": "by jsonl"}) for name in names[:3]]
    write(folder / "sub" / "metadata.jsonl", "\n".join(rows))
    write(folder / "sub" / "metadata.csv", "file_name,text\n" + "".join(f"{name},by csv\n" for name in names[:4]))
    write(folder / "sub" / "captions.json", json.dumps({name: "by map" for name in names[:5]}))
    write(folder / "metadata.csv", "file_name,text\n" + "".join(f"sub/{name},from above\n" for name in names[:6]))
    found, findings = read(folder)
    texts = [["by txt"], ["by json"], ["by jsonl"], ["by csv"], ["by map"], ["from above"], []]
    assert found == {"a.jpg": [], "b.jpg": [], **dict(zip(names, texts))}
    assert len(findings[CAPTIONS]) == 1 + 3 + 2 + 1, "beside a file of its own a table may say what it likes"
    sub = folder / "sub"
    words = f"{sub}/txt.jpg: {sub}/txt.json says something else than {sub}/txt.txt, which is used"
    assert words in findings[CAPTIONS]


def test_names_in_either_unicode_form_and_files_that_share_a_name(folder):
    """As from a Mac: the file's name decomposed, the table's composed."""
    for name in ("cafe\u0301.jpg", "n\u0303.jpg", "a.png"):
        (folder / name).touch()
    write(folder / "caf\u00e9.txt", "coffee")
    write(folder / "a.txt", "both")
    write(folder / "captions.json", json.dumps({"\u00f1.jpg": "a letter"}))
    found, findings = read(folder)
    expected = {"cafe\u0301.jpg": ["coffee"], "n\u0303.jpg": ["a letter"], "a.jpg": ["both"], "a.png": ["both"]}
    assert found == {"b.jpg": [], **expected} and not findings[CAPTIONS]


TABLES = {
    "metadata.jsonl": '{"file_name": "a.jpg", "text": "one"}\nno JSON\n{"file_name": "b.jpg", "text": "two"}\n',
    "metadata.csv": "file_name,text\na.jpg,one\nb.jpg,two\n",
    "captions.json": '{"a.jpg": "one", "b.jpg": {"en": "two", "zh": "二"}}',
}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_saved_counts_before_a_table_which_stays(folder, name):
    write(folder / name, TABLES[name])
    before, _ = read(folder)
    assert before["a.jpg"] == ["one"] and before["b.jpg"][0] == "two"
    for captions, file in ((["a new one"], "a.txt"), (["x, y", "红色", "z"], "a.json"), (["one again"], "a.json")):
        assert save_captions(folder / "a.jpg", captions) == folder / file
        found, findings = read(folder)
        assert found == {"a.jpg": captions, "b.jpg": before["b.jpg"]}
        assert not any("something else" in line for line in findings[CAPTIONS])
        assert not (folder / "a.txt").exists() or file == "a.txt"
    assert (folder / name).read_text(encoding="utf-8") == TABLES[name]


def test_other_keys_of_a_pictures_own_json_stay(folder):
    write(folder / "a.json", '{"by": "me", "prompt": {"en": "one", "zh": "一"}, "width": 5}')
    save_captions(folder / "a.jpg", ["two"])
    written = (folder / "a.json").read_text(encoding="utf-8")
    assert json.loads(written) == {"caption": ["two"], "by": "me", "width": 5}
    write(folder / "a.json", '{"by": ')
    with pytest.raises(UserError, match="a.json: is not JSON"):
        save_captions(folder / "a.jpg", ["x", "y"])
    assert (folder / "a.json").read_text() == '{"by": '


def test_a_caption_file_keeps_its_permissions_and_a_link_stays_one(folder, tmp_path):
    write(tmp_path / "text", "one")
    (tmp_path / "text").chmod(0o600)
    (folder / "a.txt").symlink_to(tmp_path / "text")
    save_captions(folder / "a.jpg", ["two"])
    file = tmp_path / "text"
    assert (folder / "a.txt").is_symlink() and file.read_text() == "two\n" and file.stat().st_mode & 0o777 == 0o600
