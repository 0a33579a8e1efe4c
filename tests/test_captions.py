"""Captions: every form is read, what is wrong with one is named, and what is corrected is saved beside its picture."""

import json

import pytest

from longcat_common import Source, UserError, load_config
from prepare_data import CAPTIONS, Findings, read_source, save_captions


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for path in ("data/a.jpg", "data/b.jpg", "outside.jpg"):
        (tmp_path / path).touch()
    return tmp_path / "data"


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(path):
    """({picture's name: captions}, findings) of a source."""
    findings = Findings()
    found = read_source(Source(path=str(path)), load_config(), findings)
    return {picture.name: captions for picture, captions in found}, findings


RED, BOTH = ["a red field"], ["a red field", "一片红色"]
ROWS = "\n\n".join(json.dumps({"file_name": "a.jpg", "text": text}) for text in BOTH)
CHINESE = "一片红色的田野——阳光·很好"
FORMS = [
    ("a.txt", "a red\n field\n", RED),
    ("a.TXT", b"\xef\xbb\xbfa red field", RED),
    ("a.txt", CHINESE.encode("gb18030"), [CHINESE]),
    ("a.txt", "一片红色".encode("utf-16"), ["一片红色"]),
    ("a.json", '{"caption": "", "text": "a red field"}', RED),
    ("a.json", '{"text": "less", "caption": "a red field", "other": 3}', RED),
    ("a.json", '{"text": ["a red field", "一片红色", "a red field"]}', BOTH),
    ("a.json", '["a red field", "一片红色"]', BOTH),
    ("a.json", '{"en": "a red field", "zh": "一片红色"}', BOTH),
    ("a.json", '{"prompt": {"en": "a red field", "zh-CN": "一片红色"}}', BOTH),
    ("a.json", '{"caption": {"en": ["a red field"], "zh": "一片红色"}}'.encode("utf-8-sig"), BOTH),
    ("metadata.jsonl", ROWS, BOTH),
    ("metadata.jsonl", '{"img_path": "./a.jpg", "prompt": "a red field", "width": 1, "height": 1}', RED),
    ("metadata.csv", 'caption, text, file_name\r\n, "a red, wide\nfield", .\\a.jpg\r\n', ["a red, wide field"]),
    ("metadata.csv", 'text,file_name\n"a red field",a.jpg\n一片红色,a.jpg\n'.encode("utf-8-sig"), BOTH),
    ("metadata.csv", f"file_name,text\na.jpg,{CHINESE}\n".encode("gb18030"), [CHINESE]),
    ("captions.json", '{"a.jpg": "a red field"}', RED),
    ("captions.json", '{"a.jpg": {"en": "a red field", "zh": "一片红色"}}', BOTH),
    ("captions.json", '{"a.jpg": {"caption": ["a red field", "一片红色"]}}', BOTH),
]  # fmt: skip


@pytest.mark.parametrize("name, content, expected", FORMS)
def test_every_form(folder, name, content, expected):
    write(folder / name, content)
    found, findings = read(folder)
    assert found == {"a.jpg": expected, "b.jpg": []} and not findings[CAPTIONS]
    assert findings["Not UTF-8, read as GB18030"] == [folder / name] * (expected == [CHINESE])


NOT_UTF8 = "its text or its name is not UTF-8"
BAD = [
    ("a.txt", "\u200b \u2060\u200d", ": holds no caption"),
    ("a.txt", "café señor".encode("latin-1"), f": {NOT_UTF8}"),
    ("a.txt", "Тихий вечер у моря".encode("cp1251"), f": {NOT_UTF8}"),
    ("a.txt", "a cat".encode("utf-16-le"), ": is no text"),
    ("a.json", '{"caption": "a"', ": is not JSON: Expecting ',' delimiter: line 1"),
    ("a.json", '{"title": "a"}', ": is no object with one of caption, text, prompt"),
    ("a.json", '{"caption": 5}', ": holds '5' where a caption"),
    ("a.json", '{"caption": "\\ud83d"}', f": {NOT_UTF8}"),
    ("a.json", '{"caption": ' + "[" * 100000, ": maximum recursion depth exceeded"),
    ("metadata.csv", "file_name,text\n../outside.jpg,x", ", line 2: there is no picture '../outside.jpg'"),
    ("metadata.csv", "file_name,text\na.jpg,a cat, on a mat", ", line 2: has more fields than there"),
    ("metadata.csv", 'file_name,text\na.jpg,"a cat\nb.jpg,a dog\n', ": unexpected end of data"),
    ("metadata.csv", "name,text\na.jpg,x", ", line 2: names no picture: 'file_name' is missing"),
    ("metadata.jsonl", '{"file_name": "a.jpg"', ", line 1: is not JSON"),
    ("metadata.jsonl", '\n["a.jpg", "x"]', ", line 2: names no picture"),
    ("captions.json", '{"a.jpg": "one", "a.jpg": "two"}', ": the key 'a.jpg' is there 2 times"),
    ("captions.json", '["a.jpg"]', ": is no object of file names"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", BAD)
def test_what_is_wrong_is_named(folder, name, content, words):
    write(folder / name, content)
    write(folder / "b.txt", "a good one")
    found, findings = read(folder)
    assert found == {"a.jpg": [], "b.jpg": ["a good one"]}
    assert len(findings[CAPTIONS]) == 1 and findings[CAPTIONS][0].startswith(f"{folder / name}{words}"), findings


def test_a_list_names_pictures_anywhere(folder, tmp_path, monkeypatch):
    rows = [
        {"img_path": str(tmp_path / "outside.jpg"), "prompt": "b", "width": 192, "height": 128},
        {"img_path": ".\\a.jpg", "prompt": ["a", "一"], "width": 1, "height": 2},
        {"img_path": "not there.jpg", "prompt": "c"},
    ]
    write(folder / "list.txt", "\n".join(map(json.dumps, rows)) + "\nno JSON")
    found, findings = read(folder / "list.txt")
    assert found == {"outside.jpg": ["b"], "a.jpg": ["a", "一"]}
    said = ["line 3: there is no picture 'not there.jpg'", "line 4: is not JSON"]
    assert all(f"list.txt, {words}" in line for words, line in zip(said, findings[CAPTIONS], strict=True))
    monkeypatch.chdir(tmp_path)  # as the model authors' scripts do: relative to the current directory
    write(folder / "list.csv", "file_name,text\noutside.jpg,c\n")
    assert read(folder / "list.csv")[0] == {"outside.jpg": ["c"]}


def test_the_first_that_there_is_counts(folder):
    names = ["txt.jpg", "json.jpg", "jsonl.jpg", "csv.jpg", "map.jpg", "above.jpg", "none.jpg"]
    rows = [json.dumps({"file_name": name, "text": "by jsonl"}) for name in names[:3]]
    for name, content in {
        **dict.fromkeys(names, ""), "txt.txt": "by txt", "txt.json": '"by json"', "json.json": '{"caption": "by json"}',
        "metadata.jsonl": "\n".join(rows), "captions.json": json.dumps(dict.fromkeys(names[:5], "by map")),
        "metadata.csv": "file_name,text\n" + "".join(f"{name},by csv\n" for name in names[:4]),
    }.items():  # fmt: skip
        write(folder / "sub" / name, content)
    write(folder / "metadata.csv", "file_name,text\n" + "".join(f"sub/{name},from above\n" for name in names[:6]))
    texts = [["by txt"], ["by json"], ["by jsonl"], ["by csv"], ["by map"], ["from above"], []]
    assert read(folder)[0] == {"a.jpg": [], "b.jpg": [], **dict(zip(names, texts))}


def test_names_in_either_unicode_form_and_files_that_share_a_name(folder):
    """As from a Mac: the file's name decomposed, the table's composed."""
    for name in ("cafe\u0301.jpg", "n\u0303.jpg", "a.png"):
        write(folder / name, "")
    write(folder / "caf\u00e9.txt", "coffee")
    write(folder / "a.txt", "both")
    write(folder / "captions.json", json.dumps({"\u00f1.jpg": "a letter"}))
    expected = {"cafe\u0301.jpg": ["coffee"], "n\u0303.jpg": ["a letter"], "a.jpg": ["both"], "a.png": ["both"]}
    assert read(folder)[0] == {"b.jpg": [], **expected}


def test_what_is_saved_counts_before_a_table_which_stays(folder):
    table = folder / "metadata.jsonl"
    write(table, '{"file_name": "a.jpg", "text": "one"}\nno JSON\n{"file_name": "b.jpg", "text": "two"}\n')
    before = table.read_bytes()
    for captions, file in ((["a new one"], "a.txt"), (["x, y", "红色", "z"], "a.json"), (["one again"], "a.json")):
        assert save_captions(folder / "a.jpg", captions) == folder / file
        assert read(folder)[0] == {"a.jpg": captions, "b.jpg": ["two"]}
        assert (folder / "a.txt").exists() == (file == "a.txt") and table.read_bytes() == before


def test_other_keys_and_links_stay(folder, tmp_path):
    write(folder / "a.json", '{"by": "me", "prompt": {"en": "one", "zh": "一"}}')
    save_captions(folder / "a.jpg", ["two"])
    assert json.loads((folder / "a.json").read_text())["by"] == "me" and read(folder)[0]["a.jpg"] == ["two"]
    write(folder / "a.json", '{"by": ')
    with pytest.raises(UserError, match="a.json: not JSON"):
        save_captions(folder / "a.jpg", ["x", "y"])
    assert (folder / "a.json").read_text() == '{"by": '
    write(tmp_path / "text", "one")
    (tmp_path / "text").chmod(0o600)
    (folder / "b.txt").symlink_to(tmp_path / "text")
    save_captions(folder / "b.jpg", ["two"])
    assert (folder / "b.txt").is_symlink() and (tmp_path / "text").read_text() == "two\n"
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o600
