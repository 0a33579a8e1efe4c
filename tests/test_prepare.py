"""Stage 1: any folder of pictures. Real files in, the manifest, report and preview out."""

import builtins
import errno
import io
import json
import math
import os
import random
import shutil
import struct
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, TINY, run_python, run_script
from PIL import Image, ImageCms, ImageOps, features

import cache_latents
import prepare_data
import train_lora
import validate
from longcat_common import buckets, load_config, load_tokenizer, read_tensors
from prepare_data import token_counts


def picture(path, size=(192, 128), colour=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def prepare(tiny_config, data, sound=False, **overrides):
    """({picture's name: entry}, report) of a run on the folder `data`; a `sound` one finds nothing wrong."""
    config = tiny_config(
        **{
            "data_dir": data if isinstance(data, list) else str(data),
            "validation_prompts": [],
            "instance_prompt": None,
            **overrides,
        }
    )
    entries = prepare_data.main(config)
    manifest = (Path(config.output_dir) / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in manifest] == json.loads(json.dumps([asdict(entry) for entry in entries]))
    report = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    assert not sound or not {f"## {title}" for title in ("Left out", "Captions to look at")} & {
        line.split(":")[0] for line in report.splitlines()
    }
    return {Path(entry.path).name: entry for entry in entries}, report


# ---------------------------------------------------------------- captions

JSON_ROWS = '{"file_name": "a.jpg", "text": "a red field"}\n\n{"file_name": "a.jpg", "text": "一片红色"}\n'
BOTH = ["a red field", "一片红色"]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "a red\n field\n".encode(), ["a red field"]),
        ("a.TXT", b"\xef\xbb\xbfa red field", ["a red field"]),
        ("a.txt", "一片红色的田野，阳光很好".encode("gb18030"), ["一片红色的田野，阳光很好"]),
        ("a.txt", "a red 田野——列宁·可爱🦊".encode("gb18030"), ["a red 田野——列宁·可爱🦊"]),
        ("a.json", b'{"caption": "", "text": "a red field"}', ["a red field"]),
        ("metadata.csv", b'caption, text, file_name\r\n, "a red, wide\nfield", .\\a.jpg\r\n', ["a red, wide field"]),
        ("a.txt", "一片红色".encode("utf-16"), ["一片红色"]),
        ("a.json", b'{"text": "less", "caption": "a red field", "other": 3}', ["a red field"]),
        ("a.json", '{"text": ["a red field", "一片红色", "a red field"]}'.encode(), BOTH),
        ("a.json", '{"prompt": {"en": "a red field", "zh": "一片红色"}}'.encode(), BOTH),
        ("a.json", '{"caption": {"en": ["a red field"], "zh": "一片红色"}}'.encode("utf-8-sig"), BOTH),
        ("metadata.jsonl", JSON_ROWS.encode(), BOTH),
        (
            "metadata.jsonl",
            '{"img_path": "./a.jpg", "prompt": "a red field", "width": 1, "height": 1}'.encode(),
            ["a red field"],
        ),
        ("metadata.csv", 'text,file_name\n"a red field",a.jpg\n一片红色,a.jpg\n'.encode("utf-8-sig"), BOTH),
        ("metadata.csv", "file_name,text\na.jpg,一片红色的田野\n".encode("gb18030"), ["一片红色的田野"]),
        ("captions.json", b'{"a.jpg": "a red field"}', ["a red field"]),
        ("captions.json", '{"a.jpg": {"en": "a red field", "zh": "一片红色"}}'.encode(), BOTH),
        ("captions.json", '{"a.jpg": {"caption": ["a red field", "一片红色"]}}'.encode(), BOTH),
    ],
)
def test_every_caption_form(tiny_config, data, name, content, expected):
    picture(data / "a.jpg")
    (data / name).write_bytes(content)
    entries, report = prepare(tiny_config, data, sound=True)
    assert entries["a.jpg"].captions == expected
    assert ("GB18030" in report) == (b"\xce" in content or b"\xcc" in content) and (
        "UTF-16" in report
    ) == content.startswith(b"\xff\xfe")


def test_the_model_authors_list(tiny_config, data, monkeypatch):
    picture(data / "in list.jpg")
    picture(data / "not in it.jpg")
    elsewhere = picture(data.parent / "elsewhere" / "b.png")
    rows = [
        {"img_path": str(elsewhere), "prompt": "b", "width": 192, "height": 128},
        {"img_path": "in list.jpg", "prompt": ["a", "一"], "width": 1, "height": 2},
    ]
    (data / "list.txt").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    entries, report = prepare(tiny_config, data / "list.txt")
    assert {name: entry.captions for name, entry in entries.items()} == {"b.png": ["b"], "in list.jpg": ["a", "一"]}
    assert entries["in list.jpg"].size == (192, 128)
    (data / "list.txt").write_text(json.dumps({"img_path": "in list.jpg", "rest": 1}))
    assert prepare(tiny_config, data / "list.txt", instance_prompt="x")[0]["in list.jpg"].captions == ["x"]
    monkeypatch.chdir(data.parent)  # as the authors' scripts do: relative to the current directory
    (data / "list.txt").write_text(json.dumps({"img_path": "elsewhere/b.png", "prompt": "c"}))
    assert prepare(tiny_config, data / "list.txt")[0]["b.png"].captions == ["c"]


def test_precedence_and_conflicts(tiny_config, data):
    names = ["txt.jpg", "json.jpg", "jsonl.jpg", "csv.jpg", "map.jpg", "upper.jpg", "none.jpg"]
    for name in names:
        picture(data / "sub" / name)
    (data / "sub" / "txt.txt").write_text("by txt")
    for name in names[:2]:
        (data / "sub" / name).with_suffix(".json").write_text('{"caption": "by json"}')
    rows = lambda n, text: "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name in names[:n])
    (data / "sub" / "metadata.jsonl").write_text(rows(3, "by jsonl"))
    (data / "sub" / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},by csv\n" for name in names[:4]))
    (data / "sub" / "captions.json").write_text(json.dumps({name: "by map" for name in names[:5]}))
    (data / "metadata.csv").write_text("file_name,text\n" + "".join(f"sub/{name},from above\n" for name in names[:6]))
    entries, report = prepare(tiny_config, data, instance_prompt="by default")
    found = {name: entry.captions for name, entry in entries.items()}
    texts = ["by txt", "by json", "by jsonl", "by csv", "by map", "from above", "by default"]
    assert found == {name: [text] for name, text in zip(names, texts)}
    conflicts = [line for line in report.splitlines() if "says something else" in line]
    assert len(conflicts) == 1 + 3 + 2 + 1, "beside a file of its own a table may say what it likes"
    assert (
        f"- {data}/sub/txt.jpg: {data}/sub/json" not in report
        and f"{data}/sub/txt.json says something else than {data}/sub/txt.txt, which is used" in report
    )
    assert "instance_prompt is used: 1" in report


def test_training_draws_one_caption_an_epoch(tiny_config, data):
    for name in "abc":
        picture(data / f"{name}.jpg", colour=(ord(name), 0, 0))
        (data / f"{name}.json").write_text(
            '{"caption": {"en": "a red square", "zh": "一个红色的正方形"}}', encoding="utf-8"
        )
    config = tiny_config(data_dir=str(data), validation_prompts=[])
    entries, files = cache_latents.main(config)
    embeds = {prompt: read_tensors(file)["prompt_embeds"] for prompt, file in files.items()}
    drawn = []
    for epoch in range(12):
        batch = [(cache_latents.latents_file(config, entry).stem + ":0", entry) for entry in entries]
        load = lambda number: train_lora.load_batch(config, batch, files, epoch, number).prompt_embeds
        first, again = load(epoch), load(epoch + 100)
        assert torch.equal(first, again)
        drawn += [next(prompt for prompt, embed in embeds.items() if torch.equal(embed, found)) for found in first]
    assert set(drawn) == {"a red square", "一个红色的正方形"} and 9 < drawn.count("a red square") < 27
    assert len(set(zip(drawn[::3], drawn[1::3], drawn[2::3]))) > 2  # pictures draw on their own


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"", ["a.txt: is empty", "a.jpg: no caption"]),
        ("a.txt", b"\xef\xbb\xbf \n", ["a.jpg: no caption"]),
        ("a.txt", "\u200b \u2060\u200d".encode(), ["a.txt: is empty", "a.jpg: no caption"]),
        ("a.txt", "café señor".encode("latin-1"), ["a.txt: is not UTF-8, and not surely GB18030", "a.jpg: no caption"]),
        ("a.txt", "一隻紅色的貓在屋頂上".encode("big5"), ["a.txt: is not UTF-8, and not surely GB18030"]),
        ("a.txt", "Тихий вечер у моря".encode("cp1251"), ["a.txt: is not UTF-8, and not surely GB18030"]),
        ("a.txt", "a cat".encode("utf-16-le"), ["a.txt: is no text"]),
        ("a.json", b'{"caption": "a"', ["a.json: is not JSON at line 1"]),
        ("a.json", b'{"caption": " ", "tags": "red"}', ["a.json: is empty"]),
        ("a.json", b'{"title": "a"}', ["a.json: is no object with one of caption, text, prompt"]),
        ("a.json", b"5", ["a.json: holds '5' where a caption"]),
        ("a.json", b'{"caption": 5}', ["a.json: holds '5' where a caption"]),
        ("a.json", b'{"caption": "\\ud83d"}', ["a.json: holds half a character"]),
        ("a.json", b'{"caption": ' + b"[" * 100000, ["a.json: is nested too deeply"]),
        (
            "metadata.csv",
            b"name,text\na.jpg,x",
            ["metadata.csv: has no column file_name or img_path; its columns: 'name', 'text'"],
        ),
        (
            "metadata.csv",
            b"file_name,titel\na.jpg,x",
            ["metadata.csv: has no column caption or text or prompt; its columns: 'file_name', 'titel'"],
        ),
        ("metadata.csv", b"", ["metadata.csv: has no column"]),
        ("metadata.csv", b"file_name,text\nb.jpg,x", ["metadata.csv, line 2: there is no picture 'b.jpg'"]),
        ("metadata.csv", b"file_name,text\n../b.jpg,x", ["metadata.csv, line 2: '../b.jpg' is outside the folder"]),
        ("metadata.csv", b"file_name,text\nsub/../../b.jpg,x", ["metadata.csv, line 2: '../b.jpg' is outside"]),
        ("metadata.csv", b"file_name,text\n/etc/b.jpg,x", ["metadata.csv, line 2: '/etc/b.jpg' is outside the folder"]),
        (
            "metadata.csv",
            b"file_name,text\na.jpg,a cat, on a mat",
            ["metadata.csv, line 2: has more fields than there are columns"],
        ),
        ("metadata.csv", b'file_name,text\na.jpg,"a cat\nb.jpg,a dog\n', ["metadata.csv: unexpected end of data"]),
        (
            "metadata.csv",
            b"file_name,text\n%s.jpg,x\n" % (b"y" * 300),
            ["metadata.csv, line 2: there is no picture 'yyy"],
        ),
        ("metadata.csv", b"file_name,text\n.,x\n", ["metadata.csv, line 2: there is no picture '.'"]),
        ("metadata.csv", b"file_name,text\na.jpg,", ["metadata.csv, line 2: no caption for 'a.jpg'"]),
        ("metadata.jsonl", b'{"file_name": "a.jpg", "titel": "x"}', ["metadata.jsonl, line 1: no caption for 'a.jpg'"]),
        ("captions.json", b'{"a.jpg": "one", "a.jpg": "two"}', ["captions.json: the key 'a.jpg' is there 2 times"]),
        ("a.txt", "тихий вечер".encode("koi8-r"), ["a.txt: is not UTF-8, and not surely GB18030"]),
        ("a.txt", b"\xff\xfe\0\0a\0\0\0", ["a.txt: is no text"]),
        ("metadata.csv", b"file_name,text\n,x", ["metadata.csv, line 2: names no picture"]),
        ("metadata.csv", b'file_name,text\na.jpg,"' + b"x" * 200000, ["metadata.csv: field larger than"]),
        ("metadata.jsonl", b'{"file_name": "a.jpg"', ["metadata.jsonl, line 1: is not JSON"]),
        ("metadata.jsonl", b'\n["a.jpg", "x"]', ["metadata.jsonl, line 2: names no picture"]),
        ("metadata.jsonl", b'{"file_name": "a.jpg", "text": true}', ["metadata.jsonl, line 1: holds 'True'"]),
        ("captions.json", b'["a.jpg"]', ["captions.json: is no object of file names"]),
        ("captions.json", b'{"b.jpg": "x"}', ["captions.json, entry 1: there is no picture 'b.jpg'"]),
        ("other.txt", b"a caption", ["other.txt: there is no picture to this caption"]),
    ],
)
def test_bad_captions_are_named(tiny_config, data, name, content, words, capsys):
    picture(data / "a.jpg")
    picture(data.parent / "b.jpg")
    picture(data / "good.jpg")
    (data / "good.txt").write_text("a good one")
    (data / name).write_bytes(content)
    entries, report = prepare(tiny_config, data)
    assert list(entries) == ["good.jpg"] and "1 pictures, 1 left out" in report
    assert all(word in report for word in words), report
    assert report == capsys.readouterr().out.split("\nwhat the model")[0]


def test_tokens_quotes_and_languages_are_reported(tiny_config, data):
    captions = {
        "long": "word " * 10000,
        "quoted": "a sign that says 'open' and \"closed\"",
        "chinese": "招牌上写着“开业大吉”",
        "apostrophe": "the dog's bone",
    }
    for name, caption in captions.items():
        picture(data / f"{name}.jpg")
        (data / f"{name}.txt").write_text(caption, encoding="utf-8")
    entries, report = prepare(tiny_config, data, sound=True)
    config = tiny_config()
    count = token_counts(load_tokenizer(config), [" ".join(captions["long"].split())]).popitem()[1]
    assert (
        f"long.jpg: {count} tokens: word word" in report
        and count > 512
        and "over 512 tokens, the rest is not read: 1" in report
    )
    assert "4 captions: 1 with Chinese, 3 without" in report and f"{count} at most" in report
    assert (
        "drawn letter by letter: 2" in report
        and "quoted.jpg: 'open' \"closed\"\n" in report
        and "chinese.jpg: “开业大吉”\n" in report
    )
    assert "dog's" not in report
    entries, report = prepare(tiny_config, data, pretrained_model_name_or_path=str(data.parent))
    assert "tokens were not counted" in report and len(entries) == 4


def test_token_counts_are_the_pipelines(tiny_config):
    """Against the pipeline's own tokenization: where its attention mask ends."""
    from diffusers import LongCatImagePipeline

    seen = []

    class Encoder(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, input_ids, attention_mask, **options):
            seen.append(attention_mask.sum(dim=1))
            raise StopIteration

    tokenizer = load_tokenizer(tiny_config())
    pipe = LongCatImagePipeline(
        text_encoder=Encoder(), tokenizer=tokenizer, vae=None, transformer=None, scheduler=None, text_processor=None
    )
    prompts = ["", "a cat", "一只猫", "a sign: \"Grand Opening\", it's 'open'", "“开业大吉”"]
    with pytest.raises(StopIteration):
        pipe.encode_prompt(prompts)
    counts = token_counts(tokenizer, prompts)
    assert [counts[prompt] for prompt in prompts] == [int(n - seen[0][0]) for n in seen[0]]


# ---------------------------------------------------------------- pictures


def test_sources(tiny_config):
    sources = [
        {"path": str(TINY / "pictures"), "repeats": 3},
        {"path": str(TINY / "regularisation"), "caption_prefix": "ordinary: ", "loss_weight": 0.5},
    ]
    entries = prepare_data.main(tiny_config(data_dir=sources))
    assert {(e.repeats, e.loss_weight) for e in entries} == {(3, 1.0), (1, 0.5)}
    assert all(e.captions[0].startswith("ordinary: ") == (e.repeats == 1) for e in entries)


def gradient(size=(96, 64)):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([2 * x, 3 * y, x + y], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    "suffix",
    [
        "jpg",
        "png",
        "webp",
        "tif",
        pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
    ],
)
def test_pictures_are_turned_upright(tmp_path, suffix):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        gradient().save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert prepare_data.inspect_picture(path)["size"] == upright.size
        assert np.array_equal(prepare_data.load_picture(path, upright.size), upright)


def test_an_exif_block_after_the_pixels(tmp_path):
    """Where some programs write it in a PNG."""
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    gradient().save(data, "PNG")
    chunk = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "late.png").write_bytes(data.getvalue()[:-12] + chunk + data.getvalue()[-12:])
    assert prepare_data.inspect_picture(tmp_path / "late.png")["size"] == (64, 96)
    assert prepare_data.load_picture(tmp_path / "late.png", (64, 96)).getpixel((0, 0)) == gradient().transpose(
        Image.Transpose.ROTATE_90
    ).getpixel((0, 0))


def test_every_kind_of_pixel(tiny_config, data):
    red = Image.new("RGB", (192, 128), (200, 30, 30))
    clear = Image.new("RGBA", (192, 128), (200, 30, 30, 255))
    clear.paste((9, 9, 9, 0), (0, 0, 96, 128))
    half = Image.new("LA", (192, 128), (100, 128))
    palette = red.quantize(4)
    holes = Image.new("P", (192, 128), 0)
    holes.putpalette([9, 9, 9, 200, 30, 30])
    holes.paste(1, (96, 0, 192, 128))
    deep = Image.fromarray(np.full((128, 192), 30000, dtype=np.uint16))
    expected = {}

    def save(image, name, left, right=None, **options):
        image.save(data / name, **options)
        expected[name] = (left, right or left)

    for suffix in ("jpg", "png", "webp", "bmp", "tif", "jpeg", "JFIF", *(["avif"] if features.check("avif") else [])):
        save(red, f"red.{suffix}", (200, 30, 30), **({"format": "JPEG"} if suffix == "JFIF" else {}))
    save(red.convert("CMYK"), "cmyk.jpg", (200, 30, 30))
    save(red.convert("CMYK"), "cmyk.tif", (200, 30, 30))
    save(red.convert("L"), "grey.jpg", (81, 81, 81))
    save(Image.new("1", (192, 128), 1), "bit.png", (255, 255, 255))
    save(palette, "palette.png", (200, 30, 30))
    save(palette, "palette.gif", (200, 30, 30))
    save(clear, "clear.png", (255, 255, 255), (200, 30, 30))
    save(clear, "clear.webp", (255, 255, 255), (200, 30, 30), lossless=True)
    save(half, "half.png", (177, 177, 177))
    save(holes, "holes.png", (255, 255, 255), (200, 30, 30), transparency=0)
    save(holes, "holes.gif", (255, 255, 255), (200, 30, 30), transparency=0)
    save(deep, "deep.png", (116, 116, 116))
    save(deep, "deep.tif", (116, 116, 116))
    save(red, "moving.gif", (200, 30, 30), save_all=True, append_images=[Image.new("RGB", (192, 128), (0, 0, 255))])
    entries, report = prepare(tiny_config, data, instance_prompt="x", sound=True)
    assert set(entries) == set(expected) and {e.bucket for e in entries.values()} == {(192, 128)}
    for name, (left, right) in expected.items():
        seen = prepare_data.load_picture(data / name, (192, 128))
        assert seen.mode == "RGB"
        for x, colour in ((40, left), (150, right)):
            assert np.abs(np.subtract(seen.getpixel((x, 60)), colour)).max() <= 6, name
    for title, names in {
        "With an alpha channel": ["clear.png", "clear.webp", "half.png", "holes.gif", "holes.png"],
        "Animated": ["moving.gif"],
    }.items():
        section = next(part for part in report.split("## ") if part.startswith(title))
        assert [Path(line).name for line in section.splitlines()[2:] if line] == names
    Image.fromarray(np.zeros((128, 192), dtype=np.float32)).save(data / "float.tif")
    Image.fromarray(np.zeros((128, 192), dtype=np.int32)).save(data / "long.tif")
    report = prepare(tiny_config, data, instance_prompt="x")[1]
    assert all(f"{name}.tif: cannot be read as a picture (32-bit pixels" in report for name in ("float", "long"))


def other_profile():
    """sRGB with red and green exchanged: what it calls red is green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for start in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12):
        name = bytes(profile[start : start + 4])
        profile[start : start + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_colour_profiles_are_turned_to_srgb(tiny_config, data):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear = srgb.replace(
        b"para" + b"\0" * 4 + struct.pack(">HH", 3, 0) + struct.pack(">i", round(2.4 * 65536)),
        b"para" + b"\0" * 8 + struct.pack(">i", 65536),
    )
    assert linear != srgb  # the same colours and the same name, other brightness
    picture(data / "linear.png", icc_profile=linear)
    for name, profile in (
        ("swapped.jpg", other_profile()),
        ("swapped.png", other_profile()),
        ("srgb.png", srgb),
        ("broken.png", b"nonsense"),
    ):
        picture(data / name, icc_profile=profile, **({"quality": 95} if name.endswith("jpg") else {}))
    clear = Image.new("RGBA", (192, 128), (200, 30, 30, 0))
    clear.save(data / "clear.png", icc_profile=other_profile())
    picture(data / "grey.png").unlink()
    Image.new("L", (192, 128), 100).save(data / "grey.png", icc_profile=other_profile())  # a profile for other pixels
    entries, report = prepare(tiny_config, data, instance_prompt="x", sound=True)
    colours = {name: prepare_data.load_picture(data / name, (192, 128)).getpixel((9, 9)) for name in entries}
    for name in ("swapped.jpg", "swapped.png"):
        assert np.abs(np.subtract(colours[name], (30, 200, 30))).max() <= 6, colours
    assert (
        colours["srgb.png"] == colours["broken.png"] == (200, 30, 30)
        and colours["clear.png"] == (255, 255, 255)
        and colours["grey.png"] == (100,) * 3
    )
    assert min(colours["linear.png"]) > 80
    assert "turned to sRGB: 4" in report and "cannot be used, taken as sRGB: 2" in report


def camera_like(size):
    """Amplitude falls with frequency, as in photographs."""
    rng, total = np.random.default_rng(3), np.zeros((size[1], size[0], 3))
    for octave in range(1, 9):
        small = rng.normal(size=(max(2, size[1] >> octave), max(2, size[0] >> octave), 3)) * 2 * 1.3**octave
        total += np.stack(
            [
                np.asarray(Image.fromarray(small[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
                for c in range(3)
            ],
            axis=-1,
        )
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(1600, 1200), (1601, 1203), (2403, 801)])
def test_reduced_decoding_stays_within_45_db(tmp_path, size):
    camera_like(size).save(tmp_path / "a.jpg", quality=92)
    with Image.open(tmp_path / "a.jpg") as image:
        image.convert("RGB").save(tmp_path / "whole.png", compress_level=1)
    reduced_once = False
    for bucket in ((1152, 896), (512, 384), (448, 320), (256, 192), (128, 128), (128, 64)):
        whole = np.asarray(prepare_data.load_picture(tmp_path / "whole.png", bucket)).astype(float)
        seen = np.asarray(prepare_data.load_picture(tmp_path / "a.jpg", bucket)).astype(float)
        error = np.square(whole - seen).mean()
        reduced_once |= error > 0
        assert 10 * math.log10(255**2 / max(error, 1e-9)) > 45, bucket
    assert reduced_once


def test_nothing_is_distorted_and_the_centre_is_kept(tmp_path):
    """A picture of x and y coordinates: neighbours must be equally far apart both ways, the middle in the middle."""
    x, y = np.meshgrid(np.linspace(0, 250, 500), np.linspace(0, 150, 300))
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    for bucket in ((64, 64), (128, 64), (64, 128), (640, 320)):
        seen = np.asarray(prepare_data.load_picture(tmp_path / "a.png", bucket)).astype(float)
        step_x = (seen[:, -3, 0] - seen[:, 2, 0]).mean() / (bucket[0] - 5)
        step_y = (seen[-3, :, 1] - seen[2, :, 1]).mean() / (bucket[1] - 5)
        assert step_x == pytest.approx(step_y, rel=0.04)
        assert seen[..., 0].mean() == pytest.approx(125, abs=2) and seen[..., 1].mean() == pytest.approx(75, abs=2)
        assert step_x == pytest.approx(0.5 / max(bucket[0] / 500, bucket[1] / 300), rel=0.04)


def test_every_size_can_be_cut(tmp_path):
    """Sizes for which rounding would put the crop outside the picture, and many others."""
    rng, sizes = random.Random(0), buckets(load_config())
    pairs = [
        ((450, 900), (448, 448)),
        ((1785, 2924), (832, 1280)),
        ((1676, 2714), (832, 1280)),
        ((1676, 2714), (104, 160)),
    ]
    for width, height in [(rng.randrange(64, 900), rng.randrange(64, 900)) for _ in range(400)]:
        pairs.append(((width, height), tuple(n // 8 for n in prepare_data.buckets_of((width, height), [sizes])[0])))
    for (width, height), bucket in pairs:
        Image.new("L", (width, height)).save(tmp_path / "a.bmp")
        assert prepare_data.load_picture(tmp_path / "a.bmp", bucket).size == bucket


def test_a_damaged_exif_block_is_no_reason(tmp_path):
    for suffix in ("jpg", "png", "webp"):
        picture(tmp_path / f"a.{suffix}", exif=b"Exif\0\0nonsense")
        assert prepare_data.inspect_picture(tmp_path / f"a.{suffix}")["size"] == (192, 128)
        assert prepare_data.load_picture(tmp_path / f"a.{suffix}", (96, 64)).size == (96, 64)


def test_upscaled_small_and_narrow_pictures(tiny_config, data):
    sizes = {
        "big.png": (400, 300),
        "small.png": (100, 100),
        "strip.png": (900, 100),
        "dot.png": (1, 1),
        "line.png": (20000, 16),
    }
    for name, size in sizes.items():
        picture(data / name, size)
    entries, report = prepare(tiny_config, data, instance_prompt="x")
    assert set(entries) == {"big.png", "small.png", "strip.png"} and "3 pictures, 2 left out" in report
    assert "dot.png: is 1x1 pixels, under 64" in report and "line.png: is 20000x16 pixels" in report
    assert (
        "enlarged: 2" in report
        and "small.png: 100x100 to 128x128" in report
        and "strip.png: 900x100, 17% is kept" in report
    )
    assert "instance_prompt is used: 3" in report


def test_duplicates_and_thin_buckets_are_reported(tiny_config, data):
    picture(data / "a.png")
    shutil.copy(data / "a.png", data / "b.png")
    picture(data / "c.png", (128, 192), (0, 0, 9))
    entries, report = prepare(tiny_config, [{"path": str(data), "repeats": 2}], instance_prompt="x", train_batch_size=2)
    assert entries["a.png"].key == entries["b.png"].key and f"- {data}/a.png = {data}/b.png" in report
    assert "| 192x128 | 2 | 4 |" in report and "| 128x192 | 1 | 2 |" in report
    assert "do not fill a batch: 1" in report and "128x192: 1 pictures, train_batch_size is 2" in report


# ---------------------------------------------------------------- bad input


def test_cut_off_pictures_are_left_out(tmp_path):
    rng, noise = random.Random(0), Image.effect_noise((300, 200), 80).convert("RGB")
    for form, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("BMP", {}),
    ):
        data, path = io.BytesIO(), tmp_path / "picture"
        noise.save(data, form, **options)
        data = data.getvalue()
        path.write_bytes(data + b"\0" * 9 * (form == "JPEG"))
        assert prepare_data.inspect_picture(path)["size"] == (300, 200)
        for _ in range(25):
            path.write_bytes(data[: rng.randrange(1, len(data) * 99 // 100)])
            assert isinstance(prepare_data.facts_of(path, {}), str), (form, path.stat().st_size)


def test_a_messy_folder(tiny_config, tmp_path, data):
    """Everything at once, through the script: what can be used is used, everything else has its line."""
    bad = {}
    good = ["with space.jpg", "表情 🦊.png", "中文.webp", "same.jpg", "same.png", "sub/deep.gif", "x.jpg/inside.png"]
    for n, name in enumerate(good):
        picture(data / name, colour=(n, 0, 0))
        (data / name).with_suffix(".txt").write_text(f"caption {n}", encoding="utf-8")
    (data / "zero.jpg").write_bytes(b"")
    bad["zero.jpg"] = "cannot be read as a picture (the file is empty)"
    for suffix in ("jpg", "png"):
        whole = picture(data / f"cut.{suffix}", colour=(1, 2, 3))
        whole.write_bytes(whole.read_bytes()[:-60])
        bad[f"cut.{suffix}"] = "cannot be read as a picture"
    (data / "text.png").write_text("this is a text")
    bad["text.png"] = "is not a picture that Pillow can read"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (data / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )
    bad["bomb.png"] = "has more than 178 million pixels"
    (data / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    bad["photo.heic"] = "is not a picture that Pillow can read"
    os.symlink(data / "loop.jpg", data / "loop.jpg")
    bad["loop.jpg"] = "cannot be read as a picture (too many levels of symbolic links)"
    os.symlink(data / "gone.png", data / "dangling.png")
    bad["dangling.png"] = "cannot be read as a picture (no such file"
    os.mkfifo(data / "pipe.png")
    bad["pipe.png"] = "is no file"
    os.symlink(data, data / "sub" / "round")
    outside = picture(tmp_path / "elsewhere" / "linked.png", colour=(77, 0, 0))
    outside.with_suffix(".txt").write_text("linked")
    os.symlink(outside.parent, data / "link")
    (data / "notes.pdf").write_bytes(b"%PDF")
    (data / ".hidden.jpg").write_bytes(b"?")
    (data / "lonely.txt").write_text("no picture")
    (data / "same.TXT").write_text("another caption")
    os.mkfifo(data / "sub" / "metadata.csv")
    for name in ("manifest.jsonl", "report.md", "preview.jpg", "validation/a.jpg"):  # another run's folder
        picture(data / "run" / name, format="JPEG")
    for name in bad:
        (data / name).with_suffix(".txt").write_text("a caption", encoding="utf-8")
    flags = [
        "--output_dir",
        data / "output",
        "--cache_dir",
        tmp_path / "cache",
        "--pretrained_model_name_or_path",
        MODEL,
        "--resolution",
        "128",
    ]
    done = run_script("prepare_data.py", "--data_dir", data, *flags)
    entries = [
        json.loads(line) for line in (data / "output" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(e["path"] for e in entries) == sorted(str(data / name) for name in [*good, "link/linked.png"])
    report = (data / "output" / "report.md").read_text(encoding="utf-8")
    for name, words in bad.items():
        assert any(line.startswith(f"- {data / name}: {words}") for line in report.splitlines()), (name, report)
    assert (
        f"8 pictures, {len(bad)} left out" in report
        and f"## Left out: {len(bad)}" in report
        and report.split("\n\n")[1] in done.stdout
    )
    assert f"{data}/lonely.txt: there is no picture" in report and f"- {data}/notes.pdf" in report
    assert "same.TXT: same.jpg, same.png" in report and f"- {data}/same.txt: is not read, same.TXT is" in report
    assert (
        f"- {data}/sub/metadata.csv: is no file" in report
        and f"- {data}/run" in report
        and "Traceback" not in done.stderr
    )

    again = run_script("prepare_data.py", "--data_dir", data, *flags)  # its own preview.jpg is no training picture
    assert "As before" in again.stdout and len(again.stdout.splitlines()) == 2


def test_unreadable_files_and_folders(data, tiny_config, monkeypatch):
    picture(data / "good.png")
    (data / "locked").mkdir()
    unreadable = {str(picture(data / "bad.png")), str(data / "locked")}

    def guarded(function):  # root may read everything
        def call(path, *arguments, **options):
            if str(path) in unreadable:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return call

    for module, name in ((os, "scandir"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    _, report = prepare(tiny_config, data, instance_prompt="x")
    assert "1 pictures, 2 left out" in report
    assert (
        "bad.png: cannot be read as a picture (permission denied)" in report and "locked: permission denied" in report
    )


@pytest.mark.parametrize("fill, words", [(False, "no picture to train on"), (True, "1 left out")])
def test_nothing_to_train_on_is_an_error(tiny_config, data, fill, words, capsys):
    if fill:
        picture(data / "a.png")
    with pytest.raises(ValueError, match=words):
        prepare(tiny_config, data)
    assert ("a.png: no caption; write a.txt beside it or set instance_prompt" in capsys.readouterr().out) == fill
    assert not (data.parent / "output" / "manifest.jsonl").exists()
    assert f"0 pictures, {int(fill)} left out" in (data.parent / "output" / "report.md").read_text()


def test_the_data_folder_cannot_be_the_output(tiny_config, data):
    picture(data / "a.png")
    for key in ("output_dir", "cache_dir"):
        with pytest.raises(ValueError, match=f"{key}.*is the data folder itself"):
            prepare(tiny_config, data, instance_prompt="x", **{key: str(data)})


def test_names_in_either_unicode_form(tiny_config, data):
    """As from a Mac: the file's name decomposed, the table's composed."""
    for name in ("cafe\u0301.jpg", "n\u0303.jpg"):
        picture(data / name)
    (data / "caf\u00e9.txt").write_text("coffee")
    (data / "captions.json").write_text(json.dumps({"\u00f1.jpg": "a letter"}))
    entries, _ = prepare(tiny_config, data, sound=True)
    assert {name: entry.captions for name, entry in entries.items()} == {
        "cafe\u0301.jpg": ["coffee"],
        "n\u0303.jpg": ["a letter"],
    }


def test_very_wide_buckets_have_a_preview(tiny_config, data):
    picture(data / "a.png", (1300, 140))
    prepare(tiny_config, data, instance_prompt="x", resolution="1280x128")
    with Image.open(Path(tiny_config().output_dir) / "preview.jpg") as sheet:
        assert np.abs(np.asarray(sheet.convert("RGB"))[60, 800].astype(int) - (200, 30, 30)).max() < 8


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_the_manifest_as_it_was(tiny_config, data):
    for n in range(9):
        picture(data / f"{n}.png", colour=(n, 0, 0))
    prepare(tiny_config, data, instance_prompt="x")
    output = Path(tiny_config().output_dir)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (data / "8.png").unlink()

    def small_files():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    flags = [
        "--data_dir",
        data,
        "--instance_prompt",
        "x",
        "--output_dir",
        output,
        "--cache_dir",
        data.parent / "cache",
        "--resolution",
        "128",
    ]
    done = run_python(
        "prepare_data.py", *flags, "--pretrained_model_name_or_path", MODEL, check=False, preexec_fn=small_files
    )
    assert (
        done.returncode == 2 and "manifest.jsonl: cannot be written" in done.stderr and "Traceback" not in done.stderr
    )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


# ---------------------------------------------------------------- again, and what the user sees


def test_unchanged_files_are_not_read_again(tiny_config, data):
    for n, name in enumerate("abc"):
        picture(data / f"{name}.bmp", colour=(n, 0, 0))
    first, _ = prepare(tiny_config, data, instance_prompt="x")
    preview = Path(tiny_config().output_dir) / "preview.jpg"
    drawn = preview.stat().st_mtime_ns
    assert prepare(tiny_config, data, instance_prompt="x")[0] == first and preview.stat().st_mtime_ns == drawn
    status = (data / "a.bmp").stat()
    picture(data / "a.bmp", colour=(99, 0, 0))
    os.utime(data / "a.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))  # same size and time: taken as unchanged
    picture(data / "b.bmp", colour=(98, 0, 0))
    os.utime(data / "b.bmp", ns=(1, status.st_mtime_ns + 10**9))
    (data / "c.bmp").unlink()
    second, report = prepare(tiny_config, data, instance_prompt="x")
    assert set(second) == {"a.bmp", "b.bmp"} and "2 pictures, 0 left out" in report
    assert second["a.bmp"] == first["a.bmp"] and second["b.bmp"].key != first["b.bmp"].key
    assert preview.stat().st_mtime_ns > drawn
    manifest = Path(tiny_config().output_dir) / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])  # of an unknown kind: everything is read
    assert prepare(tiny_config, data, instance_prompt="x")[0]["a.bmp"].key != first["a.bmp"].key
    manifest.write_bytes(manifest.read_bytes()[:-40])
    with pytest.raises(ValueError, match="manifest.jsonl: is damaged"):
        cache_latents.main(tiny_config(data_dir=None))


def test_the_preview_shows_what_the_model_will_see(tiny_config, data):
    gradient((400, 200)).save(data / "wide.png")
    gradient((200, 400)).save(data / "tall.png")
    for n in range(200):
        picture(data / f"many-{n:03d}.png", (128, 128), (n, 255 - n, 0))
    entries, _ = prepare(tiny_config, data, instance_prompt="红色 field", resolution="128x128,256x128,128x256")
    with Image.open(Path(tiny_config().output_dir) / "preview.jpg") as sheet:
        assert sheet.width == 1600 and sheet.height < 4000
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for name, bucket in (("wide.png", (256, 128)), ("tall.png", (128, 256))):
        seen = prepare_data.load_picture(data / name, (round(bucket[0] * 160 / bucket[1]), 160))
        width, found = seen.width, []
        for y in range(pixels.shape[0] - 160):  # somewhere in the left column
            found.append(np.abs(pixels[y : y + 160, 8 : 8 + width] - np.asarray(seen)).mean())
        assert min(found) < 8 < np.median(found), name
    red, green, blue = np.moveaxis(pixels, -1, 0)
    assert (
        len(set((red[(np.abs(red + green - 255) < 8) & (blue < 8)] // 8).tolist())) > 20
    )  # an even choice, not the first ones


def test_pictures_that_cannot_be_decoded_later_are_named(tiny_config, data):
    picture(data / "a.jpg", quality=95)
    raw = (data / "a.jpg").read_bytes()
    table = raw.index(b"\xff\xc4")
    (data / "a.jpg").write_bytes(raw[: table + 4] + b"\xff" * 20 + raw[table + 24 :])
    assert list(prepare(tiny_config, data, instance_prompt="x")[0]) == ["a.jpg"]
    with pytest.raises(ValueError, match="a.jpg: cannot be used"):
        cache_latents.main(tiny_config(data_dir=str(data), instance_prompt="x"))


# ---------------------------------------------------------------- surprises


def test_a_prefix_is_set_off_between_latin_letters(tiny_config, data):
    for name, caption in (("a", "a cat"), ("b", "一只猫"), ("c", ", a cat")):
        picture(data / f"{name}.png")
        (data / f"{name}.txt").write_text(caption, encoding="utf-8")
    entries, _ = prepare(tiny_config, [{"path": str(data), "caption_prefix": "neonix style"}])
    captions = [entries[f"{name}.png"].captions[0] for name in "abc"]
    assert captions == ["neonix style a cat", "neonix style一只猫", "neonix style, a cat"]


def test_the_inner_source_owns_its_pictures(tiny_config, data):
    for path in (data / "a.png", data / "reg" / "b.png", data / "reg" / "deep" / "c.png"):
        picture(path)
    sources = [str(data), {"path": str(data / "reg"), "caption_prefix": "ordinary ", "loss_weight": 0.5}]
    for given in (sources, sources[::-1]):
        pictures = prepare_data.main(tiny_config(data_dir=given, instance_prompt="x"))
        found = sorted((Path(p.path).name, p.captions, p.loss_weight, Path(p.source).name) for p in pictures)
        inner = [(name, ["ordinary x"], 0.5, "reg") for name in ("b.png", "c.png")]
        assert found == [("a.png", ["x"], 1.0, data.name), *inner]


def test_a_picture_is_cut_to_every_resolution_that_it_fills(tiny_config, data):
    sizes = {"large.png": (640, 640), "middle.png": (300, 280), "small.png": (100, 90), "wide.png": (800, 400)}
    for name, size in sizes.items():
        picture(data / name, size=size)
    config = tiny_config(data_dir=str(data), instance_prompt="x", resolution="512, 128,256")
    pictures, found = prepare_data.main(config), {}
    for entry in pictures:
        found.setdefault(Path(entry.path).name, []).append(entry.bucket)
    assert found["large.png"] == [(128, 128), (256, 256), (512, 512)]
    assert found["middle.png"] == [(128, 128), (256, 256)] and found["small.png"] == [(128, 128)]
    assert all(w <= 800 and h <= 400 for w, h in found["wide.png"]) and len(found["wide.png"]) == 3
    report = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    assert "4 pictures, 0 left out" in report and "| 256x256 | 2 | 2 |" in report and "duplicates" not in report
    assert buckets(config) == sorted({*buckets(config)}) and (512, 512) in buckets(config)


def test_what_the_scripts_draw_of_several_pictures_is_not_trained_on(quick_config, data):
    config = quick_config(
        output_dir=str(data / "output"), max_train_steps=1, validation_step_interval=1, validation_split=0.2
    )
    train_lora.main(config)
    grid = validate.main(config)
    shutil.copy(Path(config.output_dir) / "preview.jpg", data / "sheet.jpg")
    for path in (Path(config.output_dir) / "validation").glob("*.png"):
        shutil.copy(path, data / path.name)
    for path in grid.parent.glob("*.png"):
        shutil.copy(path, data / f"drawn-{path.name}")
    shutil.rmtree(config.output_dir)
    pictures = prepare_data.main(quick_config(data_dir=str(data), instance_prompt="x", output_dir=str(data / "next")))
    assert [Path(p.path).name for p in pictures] == [
        "drawn-00-128x128-seed42-base.png", "drawn-00-128x128-seed42-lora.png",
    ]  # fmt: skip
    report = (data / "next" / "report.md").read_text(encoding="utf-8")
    assert report.count("is a grid or a preview that these scripts have drawn") == 5


def test_what_the_report_says_unasked(tiny_config, data):
    captions = {
        "10_cat/a": "neonix style, a cat on a mat in the sun, " + "with a long description of it, " * 5,
        "10_cat/b": "a dog\nunder a tree",
        "c": "[trigger] a poster that says hello",
        "d": '一张海报，上面写着"你好"',
        "e": "街边的牌子上写着你好",
        "f_mask": "neonix style",
    }
    for name, caption in captions.items():
        picture(data / f"{name}.png", colour=(len(name), len(caption), 9))
        (data / f"{name}.txt").write_text(caption, encoding="utf-8")
    _, report = prepare(tiny_config, data, trigger_words=["neonix style", "zumi"])
    for words in (
        f'- {data}/10_cat: a source {{"path": "{data}/10_cat", "repeats": 10}} does what the name says',
        f"## Several lines in a .txt, joined to one caption: 1\n\n- {data}/10_cat/b.txt",
        f"- {data}/f_mask.png",
        "- 'neonix style': 2 captions have it, 4 have not\n- 'zumi': 0 captions have it, 6 have not",
        f"## Placeholders, trained on as they stand: 1\n\n- {data}/c.png: [trigger] a poster that says hello",
        f"stands in quotes is drawn letter by letter: 2\n\n- {data}/c.png: [trigger] a poster that says hello\n- {data}/e.png",
        f"## Quoted text, drawn letter by letter: 1\n\n- {data}/d.png",
        "of under 20 tokens, and the model draws best from long descriptions",
    ):
        assert words in report, (words, report)
