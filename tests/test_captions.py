"""Captions are put back where they were read from, and all else stays."""

import json
import shutil

import pytest
from conftest import TINY

from longcat_common import Source, UserError, load_config
from prepare_data import Findings, read_source, write_captions

ROWS = '{"file_name": "a.png", "text": "one", "width": 5}\nno JSON\n{"file_name": "b.png", "text": "two"}\n{"file_name": "a.png", "text": "again"}\n'
# file: before, after, the new captions
FORMS = {
    "a.txt": ("an old caption", "a new caption\n", ["a new caption"]),
    "a.json": ('{"prompt": "old", "by": "me"}', '{"prompt": "a new caption", "by": "me"}\n', ["a new caption"]),
    "metadata.jsonl": (ROWS, '{"file_name": "a.png", "text": ["x", "红色", "y"], "width": 5}\nno JSON\n{"file_name": "b.png", "text": "two"}\n', ["x", "红色", "y"]),
    "metadata.csv": ("\ufefftext,file_name,by\r\none,a.png,me\r\n,b.png,\r\ntwo,./a.png,you\r\n", '\ufefftext,file_name,by\r\n"x, y",a.png,me\r\n,b.png,\r\nz,./a.png,you\r\n', ["x, y", "z"]),
    "captions.json": ('{\n    "b.png": {"caption": "two", "tag": 5},\n    "a.png": {"en": "one", "zh": "一"}\n}', '{\n    "b.png": {\n        "caption": "two",\n        "tag": 5\n    },\n    "a.png": {\n        "en": "x",\n        "zh": "y"\n    }\n}\n', ["x", "y"]),
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png"):
        shutil.copy(TINY / "pictures" / "zumi-00.png", tmp_path / name)
    return tmp_path


def captions_of(path):
    return {
        picture.name: (captions, file)
        for picture, captions, file in read_source(Source(path=str(path)), load_config(), Findings())
    }


@pytest.mark.parametrize("name", FORMS)
def test_captions_go_where_they_came_from(pictures, name):
    before, after, captions = FORMS[name]
    (pictures / name).write_bytes(before.encode())
    file = captions_of(pictures)["a.png"][1]
    assert file == pictures / name
    write_captions(file, pictures / "a.png", captions)
    assert file.read_bytes().decode() == after
    assert captions_of(pictures)["a.png"] == (captions, file)


def test_what_stands_beside_a_caption_stays(pictures):
    (pictures / "captions.json").write_text(
        '{"a.png": {"caption": {"en": "one", "zh": "一"}, "tag": 5}}', encoding="utf-8"
    )
    for captions, shown in (
        (["two", "二"], {"en": "two", "zh": "二"}),
        (["three"], "three"),
        (["four", "四"], ["four", "四"]),
    ):
        write_captions(pictures / "captions.json", pictures / "a.png", captions)
        assert json.loads((pictures / "captions.json").read_text(encoding="utf-8")) == {
            "a.png": {"caption": shown, "tag": 5}
        }


def test_several_rows_of_a_picture_keep_what_else_is_in_them(pictures):
    rows = [
        {"file_name": "a.png", "text": "one", "lang": "en"},
        {"file_name": "b.png", "text": "two"},
        {"file_name": "a.png", "text": "一", "lang": "zh"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_captions(pictures / "metadata.jsonl", pictures / "a.png", ["x", "y"])
    assert [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().split("\n")] == [
        {**rows[0], "text": "x"},
        rows[1],
        {**rows[2], "text": "y"},
    ]
    (pictures / "metadata.jsonl").unlink()
    (pictures / "metadata.csv").write_text(
        "file_name,text,lang\na.png,one,en\nb.png,two,\na.png,一,zh\n", encoding="utf-8"
    )
    for captions, rows in (
        (["x", "y"], "a.png,x,en\nb.png,two,\na.png,y,zh\n"),
        (["x", "y", "z"], "a.png,x,en\nb.png,two,\na.png,y,zh\na.png,z,zh\n"),
        (["x"], "a.png,x,en\nb.png,two,\n"),
    ):
        write_captions(pictures / "metadata.csv", pictures / "a.png", captions)
        assert (pictures / "metadata.csv").read_text(encoding="utf-8") == "file_name,text,lang\n" + rows
        assert captions_of(pictures)["a.png"][0] == captions


def test_a_caption_file_keeps_its_permissions(pictures):
    (pictures / "a.txt").write_text("one")
    (pictures / "a.txt").chmod(0o600)
    write_captions(pictures / "a.txt", pictures / "a.png", ["two"])
    assert (pictures / "a.txt").stat().st_mode & 0o777 == 0o600 and captions_of(pictures)["a.png"][0] == ["two"]


def test_a_linked_caption_file_stays_a_link(pictures):
    (pictures / "elsewhere").mkdir()
    (pictures / "elsewhere" / "text").write_text("one")
    (pictures / "a.txt").symlink_to(pictures / "elsewhere" / "text")
    write_captions(pictures / "a.txt", pictures / "a.png", ["two"])
    assert (pictures / "a.txt").is_symlink() and (pictures / "elsewhere" / "text").read_text() == "two\n"


def test_other_encodings_become_utf8(pictures):
    (pictures / "metadata.jsonl").write_bytes(
        '{"file_name": "a.png", "text": "红色"}\n{"file_name": "b.png", "text": "蓝色"}'.encode("utf-16")
    )
    write_captions(pictures / "metadata.jsonl", pictures / "a.png", ["绿色"])
    assert (pictures / "metadata.jsonl").read_text(
        encoding="utf-8"
    ) == '{"file_name": "a.png", "text": "绿色"}\n{"file_name": "b.png", "text": "蓝色"}'


REFUSED = {
    "metadata.jsonl": ('{"file_name": "b.png", "text": "two"}', ["x"], "names .*a.png no longer"),
    "metadata.csv": ("file_name,text\nb.png,x\n", ["x"], "names .*a.png no longer"),
    "a.json": ("{", ["x"], "not JSON"),
    "a.txt": ("one", ["x", "y"], "holds one caption"),
    "captions.json": ('{"a.png": "x", "b.png": "\\ud83d"}', ["x"], "half a character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_has_no_place_for_them_is_left_as_it_is(pictures, name):
    text, captions, said = REFUSED[name]
    (pictures / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}: .*({said})"):
        write_captions(pictures / name, pictures / "a.png", captions)
    assert (pictures / name).read_text(encoding="utf-8") == text and not list(pictures.glob(".*"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("file_name,text,x,x\na.png,one,1,2\n", "two columns of one name"),
        ("file_name,text\na.png,one\nb.png,two,three\n", "more fields than there are columns"),
    ],
)
def test_a_table_that_cannot_be_written_as_it_was_is_refused(pictures, text, said):
    (pictures / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        write_captions(pictures / "metadata.csv", pictures / "a.png", ["y"])
    assert (pictures / "metadata.csv").read_text() == text
