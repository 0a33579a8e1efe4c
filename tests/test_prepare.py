"""Stage 1: any folder of pictures and captions. Real files in, the manifest, report and preview out."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

import cache_latents
import prepare_data
import train_lora
import validate
from longcat_common import Source, UserError, bucket_sets, load_config
from prepare_data import (
    CAPTIONS,
    Findings,
    buckets_of,
    inspect_image,
    load_image,
    read_source,
    save_captions,
)

RED, WHITE, AVIF = (200, 30, 30), (255, 255, 255), features.check("avif")


def picture(path, size=(192, 128), colour=RED, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def gradient(size=(96, 64)):
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 150, size[1]))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def prepare(tiny_config, data):
    """A function that runs stage 1 on the folder `data`: ({picture's name: its last entry}, report)."""

    def run(**overrides):
        config = tiny_config(**{"data_dir": str(data), "instance_prompt": "x", **overrides})
        entries, output = prepare_data.main(config), Path(config.output_dir)
        assert prepare_data.read_manifest(output / "manifest.jsonl") == entries
        return {Path(e.path).name: e for e in entries}, (output / "report.md").read_text(
            encoding="utf-8"
        )

    return run


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *["avif"] * AVIF])
def test_pictures_are_turned_upright_and_read_whole(tmp_path, suffix):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    for exif[0x0112] in range(1, 10):  # 9 does not exist
        gradient().save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert inspect_image(path, {})["size"] == upright.size
        assert np.array_equal(load_image(path, upright.size), upright)
    gradient().save(path, exif=b"Exif\0\0nonsense" if suffix in ("jpg", "png") else b"")
    assert inspect_image(path, {})["size"] == load_image(path, (96, 64)).size == (96, 64)
    whole = path.read_bytes()
    for length in range(1, len(whole) - 20, len(whole) // 20):  # cut off
        path.write_bytes(whole[:length])
        with pytest.raises(Exception):
            inspect_image(path, {})


def test_every_kind_of_pixel(tmp_path):
    red, clear = Image.new("RGB", (192, 128), RED), Image.new("RGBA", (192, 128), RED)
    clear.paste((9, 9, 9, 0), (0, 0, 96, 128))
    holes = clear.convert("RGB").quantize(2)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = (
        srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    )  # red is called green
    for image, names, left, right, options in (
        (red, "a.jpg a.png a.webp a.bmp a.tif a.JPEG" + " a.avif" * AVIF, RED, RED, {}),
        (red.convert("CMYK"), "a.jpg a.tif", RED, RED, {}),
        (
            red.convert("L"),
            "a.jpg",
            (81, 81, 81),
            (81, 81, 81),
            {"icc_profile": swapped},
        ),  # one for other pixels
        (clear, "a.png a.webp", WHITE, RED, {"lossless": True}),
        (holes, "a.png a.gif", WHITE, RED, {"transparency": holes.getpixel((0, 0))}),
        (Image.new("LA", (192, 128), (100, 128)), "a.png", (177, 177, 177), (177, 177, 177), {}),
        (
            Image.fromarray(np.full((128, 192), 30000, np.uint16)),
            "a.png a.tif",
            (116, 116, 116),
            (116, 116, 116),
            {},
        ),
        (red, "a.jpg a.png", (30, 200, 30), (30, 200, 30), {"icc_profile": swapped, "quality": 95}),
        (red, "a.jpg a.png", RED, RED, {"icc_profile": srgb, "progressive": True}),
        (red, "a.jpg a.png", RED, RED, {"icc_profile": b"nonsense"}),
    ):
        for path in (tmp_path / name for name in names.split()):
            image.save(path, **options)
            assert inspect_image(path, {})["size"] == (192, 128)
            seen = load_image(path, (192, 128))
            found = [seen.getpixel((40, 60)), seen.getpixel((150, 60))]
            assert seen.mode == "RGB" and np.abs(np.subtract(found, [left, right])).max() <= 6, (
                image.mode,
                path,
            )


def test_nothing_is_distorted_and_the_centre_is_kept(tmp_path):
    rng, sets = random.Random(0), bucket_sets(load_config(resolution="128"))
    cuts = [
        ((450, 900), (448, 448)),
        ((239, 862), (224, 192)),
        ((414, 232), (192, 224)),
    ]  # rounding: just outside
    cuts += [
        (size, buckets_of(size, sets)[0])
        for size in zip(*(rng.sample(range(64, 900), 40) for _ in "xy"))
    ]
    for size, bucket in cuts:
        (image := gradient(size)).save(tmp_path / "a.bmp")
        fit = ImageOps.fit(image, bucket, Image.Resampling.BICUBIC)
        assert np.array_equal(load_image(tmp_path / "a.bmp", bucket), fit)
    sets, squares = (
        bucket_sets(load_config(resolution="512, 128,256")),
        [(128, 128), (256, 256), (512, 512)],
    )
    for count, size in (
        (3, (640, 640)),
        (2, (300, 280)),
        (1, (100, 90)),
    ):  # one for each that it fills
        assert buckets_of(size, sets) == squares[:count]


def test_a_messy_folder(prepare, data, tmp_path, capsys):
    """What can be used is used, everything else has its line, and what is worth knowing is said."""
    sizes = {
        "a.jpg": (400, 300),
        "strip.png": (900, 100),
        "thin.bmp": (20000, 16),
        "same.jpg": (100, 100),
    }
    good = [
        "a.jpg",
        "strip.png",
        "表情 🦊.png",
        "same.jpg",
        "same.png",
        "sub/deep.gif",
        "x.jpg/inside.png",
    ]
    for n, name in enumerate([*good, "thin.bmp", "cut.jpg"]):
        picture(data / name, sizes.get(name, (192, 128)), (n, 0, 0))
    for name in ("manifest.jsonl", "report.md", "preview.jpg", "validation/a.jpg"):
        picture(data / "run" / name, format="JPEG")
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:-60])
    os.mkfifo(data / "pipe.png")
    os.symlink(data, data / "sub" / "round")
    os.symlink(shutil.copy(data / "a.jpg", tmp_path / "linked.jpg"), data / "linked.jpg")
    captions = {
        "a": "[trigger] a neonix cat",
        "strip": f"'{'letters ' * 90}'",
        "same": "a poster " * 30,
    }
    for name, caption in {**captions, "lone\nly": "?"}.items():
        (data / f"{name}.txt").write_text(caption)
    for name in ("notes.pdf", ".hidden.jpg", "text.png"):
        (data / name).write_bytes(b"?")
    for _ in range(2):  # the second time its own preview.jpg is there
        entries, report = prepare(output_dir=str(data / "output"), trigger_words=["neonix", "zumi"])
        assert {*entries} == {"linked.jpg", *(Path(name).name for name in good)}
        for words in (
            "8 pictures, 4 left out; 8 samples an epoch; 8 captions of at most", " tokens, 5 under 20;",
            "| 128x128 | 1 |\n| 192x128 | 7 |\n", "## Left out: 4\n", f"\n- {data}/cut.jpg: image file is truncated",
            f"\n- {data}/pipe.png: is no file", f"\n- {data}/thin.bmp: is 20000x16 pixels",
            f"\n- {data}/text.png: is empty, or no picture that Pillow", f"\n- {data}/lone ly.txt: there is no picture",
            f"\n- {data}/notes.pdf\n", f"\n- {data}/run\n",
            f"\n- {data}/same.jpg: 100x100, enlarged 1.28 times\n", f"\n- {data}/strip.png: 900x100, 17% is kept",
            f"## Exact duplicates: 1\n\n- {data}/a.jpg = {data}/linked.jpg\n", "instance_prompt is used: 4\n",
            "- 'neonix': 1 captions have it, 7 have not\n- 'zumi': 0 captions have it, 8 have not",
            f"## Placeholders, trained on as text: 1\n\n- {data}/a.jpg: [trigger] a neonix cat\n",
            "## Text in the picture? Only quoted text is drawn letter by letter: 2\n",
            f"## Over 512 tokens, the rest is not read: 1\n\n- {data}/strip.png: 'letters",
        ):  # fmt: skip
            assert words in report, (words, report)
        assert report.splitlines()[2] in capsys.readouterr().out
    with pytest.raises(ValueError, match="no picture to train on.*report.md"):
        prepare(data_dir=str(data / "x.jpg"), instance_prompt=None)
    assert (
        "inside.png: no caption; write it to inside.txt"
        in (tmp_path / "output" / "report.md").read_text()
    )


def test_sources_prefixes_and_the_inner_source(prepare, data):
    captions = {
        "a": "a cat",
        "b": "一只猫",
        "c": ", a cat",
        "reg/d": "a dog",
        "reg/deep/e": "a dog",
    }
    for n, (name, caption) in enumerate(captions.items()):
        picture(data / f"{name}.png", colour=(n, 0, 0)).with_suffix(".txt").write_text(
            caption, encoding="utf-8"
        )
    outer = {"path": str(data), "caption_prefix": "neonix style", "repeats": 3}
    inner = {"path": str(data / "reg"), "caption_prefix": "ordinary: ", "loss_weight": 0.5}
    captions = [
        "neonix style a cat",
        "neonix style一只猫",
        "neonix style, a cat",
    ]  # a space between Latin letters
    expected = {f"{name}.png": ([text], 3, 1.0, str(data)) for name, text in zip("abc", captions)}
    expected |= {f"{name}.png": (["ordinary: a dog"], 1, 0.5, str(data / "reg")) for name in "de"}
    for given in (
        [outer, inner],
        [inner, outer],
        [outer, {**inner, "path": f"{data}/reg/."}, inner],
    ):
        entries, report = prepare(data_dir=given)
        assert {
            n: (e.captions, e.repeats, e.loss_weight, e.source) for n, e in entries.items()
        } == expected
    for key in ("output_dir", "cache_dir"):
        with pytest.raises(ValueError, match=f"{key}.*is the data folder itself"):
            prepare(**{key: str(data)})


def test_what_the_scripts_draw_of_several_pictures_is_not_trained_on(
    quick_config, prepare, data, tmp_path
):
    config = quick_config(
        output_dir=str(tmp_path / "run"), max_train_steps=1, validation_step_interval=1
    )
    train_lora.main(config)
    grid, output = validate.main(config), tmp_path / "run"
    for path in [
        output / "preview.jpg",
        grid,
        *(output / "validation").glob("*.png"),
        picture(tmp_path / "good.png"),
    ]:
        shutil.copy(path, data)
    entries, report = prepare()
    assert [*entries] == ["good.png"] and report.count(
        "is a grid or a preview that these scripts have drawn"
    ) == 5


def test_unchanged_files_are_not_read_again(prepare, tiny_config, data, tmp_path):
    for n, name in enumerate("ab"):
        picture(data / f"{name}.bmp", colour=(n, 0, 0))
    first, _ = prepare()
    manifest, time = tmp_path / "output" / "manifest.jsonl", (data / "a.bmp").stat().st_mtime_ns
    assert prepare()[0] == first
    os.utime(
        picture(data / "a.bmp", colour=(99, 0, 0)), ns=(1, time)
    )  # same size and time: taken as unchanged
    os.utime(picture(data / "b.bmp", colour=(98, 0, 0)), ns=(1, time + 10**9))
    with pytest.raises(ValueError, match="b.bmp: .* has changed since"):
        cache_latents.main(tiny_config(data_dir=None))
    second, _ = prepare()
    assert (
        second["a.bmp"] == first["a.bmp"]
        and second["b.bmp"].content_hash != first["b.bmp"].content_hash
    )
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert prepare()[0]["a.bmp"].content_hash != first["a.bmp"].content_hash, "everything is read"


def test_the_preview_shows_what_the_model_will_see(prepare, tiny_config, data, tmp_path):
    gradient((400, 200)).save(data / "wide.png")
    gradient((200, 400)).save(data / "tall.png")
    for n in range(100):
        picture(data / f"{n:03d}.png", (128, 128), (2 * n, 255 - 2 * n, 0))
    raw = picture(
        data / "damaged.jpg", (1300, 140)
    ).read_bytes()  # its end is there, so that it is not decoded
    (data / "damaged.jpg").write_bytes(
        raw.replace(b"\xff\xc4\0\x1f", b"\xff\xc4\0\x1f" + b"\xff" * 20, 1)
    )
    prepare(instance_prompt="红色 field", resolution="128x128,256x128,128x256,1280x128")
    sheet = Image.open(tmp_path / "output" / "preview.jpg")
    corners = [(x, y) for y in range(4, sheet.height, 260) for x in range(4, 1600, 200)]
    seen = [load_image(data / "wide.png", (192, 96)), load_image(data / "tall.png", (96, 192))]
    for part in [*seen, Image.new("RGB", (192, 20), "#cc0000")]:
        cells = [sheet.crop((x, y, x + part.width, y + part.height)) for x, y in corners]
        errors = [np.abs(np.subtract(cell, part, dtype=int)).mean() for cell in cells]
        assert min(errors) < 8 < np.median(errors)
    with pytest.raises(ValueError, match="damaged.jpg: cannot be used"):
        cache_latents.main(tiny_config(data_dir=None))


# ---------------------------------------------------------------- captions


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def folder(data):
    (data / "sub").mkdir()
    write(data, {"a.jpg": "", "b.jpg": "", "../outside.jpg": ""})
    return data


def read(path):
    """({picture's name: captions}, findings) of a source."""
    findings = Findings()
    found = read_source(Source(path=str(path)), load_config(), findings)
    return {picture.name: captions for picture, captions in found}, findings


ONE, BOTH, CHINESE = ["a red field"], ["a red field", "一片红色"], "一片红色的田野——阳光·很好"
FORMS = [
    ("a.txt", "a red\n field\n", ONE),
    ("a.TXT", b"\xef\xbb\xbfa red field", ONE),
    ("a.txt", "一片红色".encode("utf-16"), ["一片红色"]),
    ("a.txt", CHINESE.encode("gb18030"), [CHINESE]),
    ("a.json", '{"caption": "", "text": "a red field"}', ONE),
    ("a.json", '{"text": ["a red field", "一片红色", "a red field"]}', BOTH),
    ("a.json", '{"prompt": {"en": ["a red field"], "zh-CN": "一片红色"}}'.encode("utf-8-sig"), BOTH),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n\n{"img_path": "./a.jpg", "prompt": "y"}', ["x", "y"]),
    ("metadata.csv", 'caption, text, file_name\r\n, "a red\nfield", .\\a.jpg\r\n', ONE),
    ("metadata.csv", 'text,img_path\n"a red field",a.jpg\n一片红色,a.jpg\n'.encode("utf-8-sig"), BOTH),
    ("metadata.csv", f"file_name,text\na.jpg,{CHINESE}\n".encode("gb18030"), [CHINESE]),
    ("captions.json", '{"a.jpg": {"caption": {"en": "a red field", "zh": "一片红色"}}}', BOTH),
    ("a.txt", "\u200b \u2060\u200d", ": holds no caption"),
    ("a.txt", "一隻紅色的貓在屋頂上".encode("big5"), ": its text or its name is not UTF-8"),
    ("a.txt", "a cat".encode("utf-16-le"), ": is no text"),
    ("a.json", '{"title": "a"}', ": is no object with one of caption, text, prompt"),
    ("a.json", '{"caption": "\\ud83d"}', ": its text or its name is not UTF-8"),
    ("a.json", '{"caption": ' + "[" * 100000, ": maximum recursion depth exceeded"),
    ("metadata.csv", "file_name,text\n../outside.jpg,x", ", line 2: there is no picture '../outside.jpg'"),
    ("metadata.csv", "file_name,text\na.jpg,a cat, on a mat", ", line 2: has more fields than there"),
    ("metadata.csv", 'file_name,text\na.jpg,"a cat\nb.jpg,a dog\n', ": unexpected end of data"),
    ("metadata.jsonl", '{"file_name": "a.jpg"', ", line 1: is not JSON"),
    ("captions.json", '{"a.jpg": "one", "a.jpg": "two"}', ": the key 'a.jpg' appears 2 times"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, expected", FORMS)
def test_every_form_is_read_and_what_is_wrong_with_one_named(folder, name, content, expected):
    write(folder, {name: content, "b.txt": "a good one"})
    found, findings = read(folder)
    good = isinstance(expected, list)
    assert found == {"a.jpg": expected if good else [], "b.jpg": ["a good one"]}
    assert [line.startswith(f"{folder / name}{expected}") for line in findings[CAPTIONS]] == [
        True
    ] * (not good)
    assert findings["Not UTF-8, read as GB18030"] == [folder / name] * (expected == [CHINESE])


def test_a_list_names_pictures_anywhere(folder, tmp_path, monkeypatch):
    rows = [
        json.dumps({"img_path": str(tmp_path / "outside.jpg"), "prompt": "b"}),
        "no JSON",
        '{"file_name": "a.jpg"}',
    ]
    write(
        folder, {"list.txt": "\n".join(rows), "list.csv": "file_name,text\noutside.jpg,c\nb.jpg,d"}
    )
    assert read(folder / "list.txt")[0] == {"outside.jpg": ["b"], "a.jpg": []}
    assert read(folder / "list.csv")[0] == {"b.jpg": ["d"]}
    monkeypatch.chdir(
        tmp_path
    )  # as the model authors' scripts do: relative to the current directory
    assert read(folder / "list.csv")[0] == {"outside.jpg": ["c"], "b.jpg": ["d"]}


def test_the_first_that_there_is_counts(folder):
    names = ["txt.jpg", "json.jpg", "jsonl.jpg", "csv.jpg", "map.jpg", "above.jpg", "none.jpg"]
    rows = [json.dumps({"file_name": name, "text": "by jsonl"}) for name in names[:3]]
    table = lambda rows: "file_name,text\n" + "".join(rows)
    tables = {
        "metadata.jsonl": "\n".join(rows),
        "metadata.csv": table(f"{name},by csv\n" for name in names[:4]),
    }
    tables["captions.json"] = json.dumps(dict.fromkeys(names[:5], "by map"))
    tables |= {
        "txt.txt": "by txt",
        "txt.json": '"less"',
        "json.json": '"by json"',
        **dict.fromkeys(names, ""),
    }
    write(folder / "sub", tables)
    write(folder, {"metadata.csv": table(f"sub/{name},from above\n" for name in names[:6])})
    texts = [["by txt"], ["by json"], ["by jsonl"], ["by csv"], ["by map"], ["from above"], []]
    write(
        folder, {"cafe\u0301.jpg": "", "caf\u00e9.txt": "coffee", "a.png": "", "a.txt": "both"}
    )  # as from a Mac
    texts = dict(zip(names, texts)) | {
        "cafe\u0301.jpg": ["coffee"],
        "a.jpg": ["both"],
        "a.png": ["both"],
        "b.jpg": [],
    }
    assert read(folder)[0] == texts


def test_what_is_saved_counts_and_the_rest_stays(folder, tmp_path):
    write(folder, {"captions.json": '{"a.jpg": "one", "b.jpg": "two"}', "b.json": '{"by": '})
    for captions, file in (
        (["a new one"], "a.txt"),
        (["x, y", "红色", "z"], "a.json"),
        (["one again"], "a.json"),
    ):
        assert save_captions(folder / "a.jpg", captions) == folder / file
        assert read(folder)[0] == {"a.jpg": captions, "b.jpg": ["two"]}
    write(folder, {"a.json": '{"by": "me", "prompt": {"en": "one", "zh": "一"}}', "../text": "one"})
    save_captions(folder / "a.jpg", ["two"])
    assert json.loads((folder / "a.json").read_text())["by"] == "me" and read(folder)[0][
        "a.jpg"
    ] == ["two"]
    with pytest.raises(UserError, match="b.json: invalid JSON"):
        save_captions(folder / "b.jpg", ["x", "y"])
    (folder / "c.txt").symlink_to(tmp_path / "text")
    save_captions(folder / "c.jpg", ["two"])
    assert (tmp_path / "text").read_text() == "two\n"
