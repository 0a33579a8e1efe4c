"""Stage 1: any folder of pictures. Real files in, the manifest, report and preview out."""

import errno
import io
import json
import math
import os
import random
import shutil
import struct
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, run_script
from PIL import Image, ImageCms, ImageOps, features

import cache_latents
import prepare_data
import train_lora
import validate
from longcat_common import buckets, load_config, load_tokenizer, read_tensors
from prepare_data import inspect_picture, load_picture, token_counts


def picture(path, size=(192, 128), colour=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def captioned(data, captions, size=(192, 128)):
    """Pictures {name without suffix: caption}, of one colour each."""
    for n, (name, caption) in enumerate(captions.items()):
        picture(data / f"{name}.png", size, (n, 0, 0)).with_suffix(".txt").write_text(caption, encoding="utf-8")


def prepare(tiny_config, data, **overrides):
    """({picture's name: entry}, report) of a run on the folder `data`."""
    overrides = {"instance_prompt": "x", "validation_prompts": [], **overrides}
    config = tiny_config(data_dir=data if isinstance(data, list) else str(data), **overrides)
    entries = prepare_data.main(config)
    manifest = (Path(config.output_dir) / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in manifest] == json.loads(json.dumps([asdict(entry) for entry in entries]))
    report = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    return {Path(entry.path).name: entry for entry in entries}, report


# ---------------------------------------------------------------- pictures


def gradient(size=(96, 64)):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([2 * x, 3 * y, x + y], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_pictures_are_turned_upright(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("no AVIF")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        gradient().save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert inspect_picture(path, {})["size"] == upright.size
        assert np.array_equal(load_picture(path, upright.size), upright)


def test_odd_exif_blocks(tmp_path):
    """After the pixels, where some programs write it in a PNG; an orientation that does not exist; and damaged."""
    exif, whole = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    gradient().save(whole, "PNG")
    chunk = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    late = tmp_path / "late.png"
    late.write_bytes(whole.getvalue()[:-12] + chunk + whole.getvalue()[-12:])
    assert inspect_picture(late, {})["size"] == (64, 96)
    turned = gradient().transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(load_picture(late, (64, 96)), turned)
    exif[0x0112] = 9
    for suffix, block in (("jpg", b"Exif\0\0nonsense"), ("png", b"Exif\0\0nonsense"), ("webp", exif.tobytes())):
        path = picture(tmp_path / f"a.{suffix}", exif=block)
        assert inspect_picture(path, {})["size"] == (192, 128) and load_picture(path, (96, 64)).size == (96, 64)


def test_every_kind_of_pixel(tmp_path):
    red, tones = Image.new("RGB", (192, 128), (200, 30, 30)), {}
    clear = Image.new("RGBA", (192, 128), (200, 30, 30, 255))
    clear.paste((9, 9, 9, 0), (0, 0, 96, 128))
    holes = Image.new("P", (192, 128), 0)
    holes.putpalette([9, 9, 9, 200, 30, 30])
    holes.paste(1, (96, 0, 192, 128))
    deep = Image.fromarray(np.full((128, 192), 30000, dtype=np.uint16))

    def save(image, names, left, right=None, **options):
        for name in names.split():
            image.save(tmp_path / name, **options)
            tones[name] = (left, right or left)

    save(red, "red.jpg red.png red.webp red.bmp red.tif red.jpeg", (200, 30, 30))
    save(red, "red.JFIF", (200, 30, 30), format="JPEG")
    save(red, "red.avif" * features.check("avif"), (200, 30, 30))
    save(red.convert("CMYK"), "cmyk.jpg cmyk.tif", (200, 30, 30))
    save(red.convert("L"), "grey.jpg", (81, 81, 81))
    save(Image.new("1", (192, 128), 1), "bit.png", (255, 255, 255))
    save(red.quantize(4), "palette.png palette.gif", (200, 30, 30))
    save(clear, "clear.png", (255, 255, 255), (200, 30, 30))
    save(clear, "clear.webp", (255, 255, 255), (200, 30, 30), lossless=True)
    save(Image.new("LA", (192, 128), (100, 128)), "half.png", (177, 177, 177))
    save(holes, "holes.png holes.gif", (255, 255, 255), (200, 30, 30), transparency=0)
    save(deep, "deep.png deep.tif", (116, 116, 116))
    save(red, "moving.gif", (200, 30, 30), save_all=True, append_images=[Image.new("RGB", (192, 128), (0, 0, 255))])
    for name, (left, right) in tones.items():
        assert inspect_picture(tmp_path / name, {})["size"] == (192, 128)
        seen = load_picture(tmp_path / name, (192, 128))
        assert seen.mode == "RGB"
        for x, colour in ((40, left), (150, right)):
            assert np.abs(np.subtract(seen.getpixel((x, 60)), colour)).max() <= 6, name
    for kind in (np.float32, np.int32):
        Image.fromarray(np.zeros((128, 192), dtype=kind)).save(tmp_path / "deeper.tif")
        with pytest.raises(ValueError, match="32-bit pixels are not supported"):
            inspect_picture(tmp_path / "deeper.tif", {})


def test_colour_profiles_are_turned_to_srgb(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    curve = b"para" + b"\0" * 4 + struct.pack(">HH", 3, 0) + struct.pack(">i", round(2.4 * 65536))
    linear = srgb.replace(curve, b"para" + b"\0" * 8 + struct.pack(">i", 65536))
    assert linear != srgb  # the same colours and the same name, other brightness
    swapped = bytearray(srgb)  # sRGB with red and green exchanged: what it calls red is green
    for start in range(132, 132 + 12 * struct.unpack(">I", srgb[128:132])[0], 12):
        name = srgb[start : start + 4]
        swapped[start : start + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    swapped = bytes(swapped).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))

    def seen(name, mode, colour, profile):
        Image.new(mode, (192, 128), colour).save(tmp_path / name, icc_profile=profile, quality=95)
        return load_picture(tmp_path / name, (192, 128)).getpixel((9, 9))

    for name in ("swapped.jpg", "swapped.png"):
        assert np.abs(np.subtract(seen(name, "RGB", (200, 30, 30), swapped), (30, 200, 30))).max() <= 6
    assert min(seen("linear.png", "RGB", (200, 30, 30), linear)) > 80
    for profile in (srgb, b"nonsense"):
        assert seen("same.png", "RGB", (200, 30, 30), profile) == (200, 30, 30)
    assert seen("clear.png", "RGBA", (200, 30, 30, 0), swapped) == (255, 255, 255)
    assert seen("grey.png", "L", 100, swapped) == (100,) * 3  # a profile for other pixels


def camera_like(size):
    """Amplitude falls with frequency, as in photographs."""
    rng, total = np.random.default_rng(3), np.zeros((size[1], size[0], 3))
    for octave in range(1, 9):
        small = rng.normal(size=(3, max(2, size[1] >> octave), max(2, size[0] >> octave))) * 2 * 1.3**octave
        layers = [Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC) for layer in small.astype(np.float32)]
        total += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(1600, 1200), (1601, 1203), (2403, 801)])
def test_reduced_decoding_stays_within_45_db(tmp_path, size):
    camera_like(size).save(tmp_path / "a.jpg", quality=92)
    with Image.open(tmp_path / "a.jpg") as image:
        image.convert("RGB").save(tmp_path / "whole.png", compress_level=1)
    errors = []
    for bucket in ((1152, 896), (512, 384), (448, 320), (256, 192), (128, 128), (128, 64)):
        whole, seen = (np.asarray(load_picture(tmp_path / n, bucket)).astype(float) for n in ("whole.png", "a.jpg"))
        errors.append(np.square(whole - seen).mean())
    assert 0 < max(errors) and 10 * math.log10(255**2 / max(errors)) > 45


def test_nothing_is_distorted_and_the_centre_is_kept(tmp_path):
    """A picture of x and y coordinates: neighbours must be equally far apart both ways, the middle in the middle."""
    x, y = np.meshgrid(np.linspace(0, 250, 500), np.linspace(0, 150, 300))
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    for bucket in ((64, 64), (128, 64), (64, 128), (640, 320)):
        seen = np.asarray(load_picture(tmp_path / "a.png", bucket)).astype(float)
        step_x = (seen[:, -3, 0] - seen[:, 2, 0]).mean() / (bucket[0] - 5)
        step_y = (seen[-3, :, 1] - seen[2, :, 1]).mean() / (bucket[1] - 5)
        assert step_x == pytest.approx(step_y, rel=0.04)
        assert seen[..., 0].mean() == pytest.approx(125, abs=2) and seen[..., 1].mean() == pytest.approx(75, abs=2)
        assert step_x == pytest.approx(0.5 / max(bucket[0] / 500, bucket[1] / 300), rel=0.04)


def test_every_size_can_be_cut(tmp_path):
    """Sizes for which rounding would put the crop outside the picture, and many others."""
    rng, sizes = random.Random(0), buckets(load_config())
    pairs = [((450, 900), (448, 448)), ((1785, 2924), (832, 1280))]
    pairs += [((1676, 2714), bucket) for bucket in ((832, 1280), (104, 160))]
    for size in [(rng.randrange(64, 900), rng.randrange(64, 900)) for _ in range(400)]:
        pairs.append((size, tuple(n // 8 for n in prepare_data.buckets_of(size, [sizes])[0])))
    for size, bucket in pairs:
        Image.new("L", size).save(tmp_path / "a.bmp")
        assert load_picture(tmp_path / "a.bmp", bucket).size == bucket


def test_cut_off_pictures_are_left_out(tmp_path):
    rng, noise = random.Random(0), Image.effect_noise((300, 200), 80).convert("RGB")
    for form, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        *((f, {}) for f in "PNG WEBP TIFF BMP".split()),
    ):
        whole, path = io.BytesIO(), tmp_path / "picture"
        noise.save(whole, form, **options)
        whole = whole.getvalue()
        path.write_bytes(whole + b"\0" * 9 * (form == "JPEG"))
        assert inspect_picture(path, {})["size"] == (300, 200)
        for _ in range(25):
            path.write_bytes(whole[: rng.randrange(1, len(whole) * 99 // 100)])
            with pytest.raises(Exception):
                inspect_picture(path, {})


# ---------------------------------------------------------------- folders


def test_a_messy_folder(tiny_config, tmp_path, data):
    """Everything at once, through the script: what can be used is used, everything else has its line."""
    good = ["with space.jpg", "表情 🦊.png", "中文.webp", "same.jpg", "same.png", "sub/deep.gif", "x.jpg/inside.png"]
    for n, name in enumerate([*good, "cut.jpg", "cut.png"]):
        picture(data / name, colour=(n, 0, 0)).with_suffix(".txt").write_text(f"caption {n}", encoding="utf-8")
    for name in ("cut.jpg", "cut.png"):
        (data / name).write_bytes((data / name).read_bytes()[:-60])
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    for name, content in {
        "zero.jpg": b"",
        "text.png": b"text",
        "bomb.png": bomb,
        "photo.heic": b"\0\0\0\x18ftyp",
    }.items():
        (data / name).write_bytes(content)
        (data / name).with_suffix(".txt").write_text("a caption")
    os.symlink(data / "loop.jpg", data / "loop.jpg")
    os.symlink(data / "gone.png", data / "dangling.png")
    os.mkfifo(data / "pipe.png")
    os.mkfifo(data / "sub" / "metadata.csv")
    bad = {
        **dict.fromkeys(("cut.jpg", "cut.png"), "image file is truncated"), "bomb.png": "Image size (3600000000",
        **dict.fromkeys(("zero.jpg", "text.png", "photo.heic"), "is empty, or no picture that Pillow can read"),
        **dict.fromkeys(("loop.jpg", "dangling.png", "pipe.png", "sub/metadata.csv"), "is no file, or a link to none"),
    }  # fmt: skip
    os.symlink(data, data / "sub" / "round")
    picture(tmp_path / "elsewhere" / "linked.png", colour=(77, 0, 0)).with_suffix(".txt").write_text("linked")
    os.symlink(tmp_path / "elsewhere", data / "link")
    for name in ("notes.pdf", ".hidden.jpg", "lone\nly.txt"):
        (data / name).write_bytes(b"?")
    (data / "same.TXT").write_text("another caption")
    for name in ("manifest.jsonl", "report.md", "preview.jpg", "validation/a.jpg"):  # another run's folder
        picture(data / "run" / name, format="JPEG")
    paths = ["--output_dir", data / "output", "--cache_dir", tmp_path / "cache"]
    flags = ["--data_dir", data, *paths, "--pretrained_model_name_or_path", MODEL, "--resolution", 128]
    done = run_script("prepare_data.py", *flags)
    manifest = (data / "output" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["path"] for line in manifest]
    assert sorted(found) == sorted(str(data / name) for name in [*good, "link/linked.png"])
    report = (data / "output" / "report.md").read_text(encoding="utf-8")
    for name, words in bad.items():
        assert f"\n- {data / name}: {words}" in report, (name, report)
    assert f"8 pictures, {len(bad)} left out" in report and f"## Left out: {len(bad)}" in report
    conflict = f"- {data}/same.jpg: {data}/same.txt says something else than {data}/same.TXT, which is used"
    for words in (f"- {data}/lone ly.txt: there is no picture", f"- {data}/notes.pdf\n", conflict, f"- {data}/run\n"):
        assert words in report
    assert done.stdout.startswith(report) and "Traceback" not in done.stderr

    again = run_script("prepare_data.py", *flags)  # its own preview.jpg is no training picture
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

    for owner, name in ((os, "scandir"), (Path, "open")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    _, report = prepare(tiny_config, data)
    assert "1 pictures, 2 left out" in report
    assert f"{data}/bad.png: Permission denied" in report and f"{data}/locked: Permission denied" in report


@pytest.mark.parametrize("fill", [False, True])
def test_nothing_to_train_on_is_an_error(tiny_config, data, fill, capsys):
    if fill:
        picture(data / "a.png")
    with pytest.raises(ValueError, match="no picture to train on.*report.md"):
        prepare(tiny_config, data, instance_prompt=None)
    report = (data.parent / "output" / "report.md").read_text()
    assert ("a.png: no caption; write a.txt beside it or set instance_prompt" in report) == fill
    assert f"0 pictures, {int(fill)} left out" in report and capsys.readouterr().out == report + "\n"
    assert not (data.parent / "output" / "manifest.jsonl").exists()


def test_the_data_folder_cannot_be_the_output(tiny_config, data):
    for key in ("output_dir", "cache_dir"):
        with pytest.raises(ValueError, match=f"{key}.*is the data folder itself"):
            prepare(tiny_config, data, **{key: str(data)})


def test_sources_prefixes_and_the_inner_source(tiny_config, data):
    captioned(data, {"a": "a cat", "b": "一只猫", "c": ", a cat", "reg/d": "a dog", "reg/deep/e": "a dog"})
    sources = [
        {"path": str(data), "caption_prefix": "neonix style", "repeats": 3},
        {"path": str(data / "reg"), "caption_prefix": "ordinary: ", "loss_weight": 0.5},
    ]
    captions = ["neonix style a cat", "neonix style一只猫", "neonix style, a cat"]  # a space between Latin letters
    expected = {f"{name}.png": ([text], 3, 1.0, str(data)) for name, text in zip("abc", captions)}
    expected |= {f"{name}.png": (["ordinary: a dog"], 1, 0.5, str(data / "reg")) for name in "de"}
    for given in (sources, sources[::-1]):
        entries, _ = prepare(tiny_config, given)
        assert {n: (e.captions, e.repeats, e.loss_weight, e.source) for n, e in entries.items()} == expected


def test_what_the_scripts_draw_of_several_pictures_is_not_trained_on(quick_config, data):
    steps = dict(max_train_steps=1, validation_step_interval=1, validation_split=0.2)
    config = quick_config(output_dir=str(data / "output"), **steps)
    train_lora.main(config)
    grid = validate.main(config)
    shutil.copy(Path(config.output_dir) / "preview.jpg", data / "sheet.jpg")
    for path in (Path(config.output_dir) / "validation").glob("*.png"):
        shutil.copy(path, data / path.name)
    for path in grid.parent.glob("*.png"):
        shutil.copy(path, data / f"drawn-{path.name}")
    shutil.rmtree(config.output_dir)
    pictures = prepare_data.main(quick_config(data_dir=str(data), instance_prompt="x", output_dir=str(data / "next")))
    assert [Path(p.path).name for p in pictures] == [f"drawn-00-128x128-seed42-{name}.png" for name in ("base", "lora")]
    report = (data / "next" / "report.md").read_text(encoding="utf-8")
    assert report.count("is a grid or a preview that these scripts have drawn") == 5


def test_unchanged_files_are_not_read_again(tiny_config, data):
    for n, name in enumerate("abc"):
        picture(data / f"{name}.bmp", colour=(n, 0, 0))
    first, _ = prepare(tiny_config, data)
    preview, manifest = (Path(tiny_config().output_dir) / name for name in ("preview.jpg", "manifest.jsonl"))
    drawn = preview.stat().st_mtime_ns
    assert prepare(tiny_config, data)[0] == first and preview.stat().st_mtime_ns == drawn
    status = (data / "a.bmp").stat()
    picture(data / "a.bmp", colour=(99, 0, 0))
    os.utime(data / "a.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))  # same size and time: taken as unchanged
    picture(data / "b.bmp", colour=(98, 0, 0))
    os.utime(data / "b.bmp", ns=(1, status.st_mtime_ns + 10**9))
    (data / "c.bmp").unlink()
    second, report = prepare(tiny_config, data)
    assert set(second) == {"a.bmp", "b.bmp"} and "2 pictures, 0 left out" in report
    assert second["a.bmp"] == first["a.bmp"] and second["b.bmp"].key != first["b.bmp"].key
    assert preview.stat().st_mtime_ns > drawn
    manifest.write_bytes(manifest.read_bytes()[:-40])  # damaged: everything is read
    assert prepare(tiny_config, data)[0]["a.bmp"].key != first["a.bmp"].key
    manifest.write_bytes(manifest.read_bytes()[:-40])
    with pytest.raises(ValueError, match="manifest.jsonl: is damaged"):
        cache_latents.main(tiny_config(data_dir=None))


def test_pictures_that_cannot_be_decoded_later_are_named(tiny_config, data):
    raw = picture(data / "a.jpg", quality=95).read_bytes()
    table = raw.index(b"\xff\xc4")
    (data / "a.jpg").write_bytes(raw[: table + 4] + b"\xff" * 20 + raw[table + 24 :])
    assert list(prepare(tiny_config, data)[0]) == ["a.jpg"]
    with pytest.raises(ValueError, match="a.jpg: cannot be used"):
        cache_latents.main(tiny_config(data_dir=str(data), instance_prompt="x"))


def test_a_picture_is_cut_to_every_resolution_that_it_fills(tiny_config, data):
    sizes = {"large.png": (640, 640), "middle.png": (300, 280), "small.png": (100, 90), "wide.png": (800, 400)}
    for name, size in sizes.items():
        picture(data / name, size=size)
    config = tiny_config(data_dir=str(data), instance_prompt="x", resolution="512, 128,256")
    pictures = prepare_data.main(config)
    found = {name: [entry.bucket for entry in pictures if Path(entry.path).name == name] for name in sizes}
    assert found["large.png"] == [(128, 128), (256, 256), (512, 512)]
    assert found["middle.png"] == [(128, 128), (256, 256)] and found["small.png"] == [(128, 128)]
    assert all(w <= 800 and h <= 400 for w, h in found["wide.png"]) and len(found["wide.png"]) == 3
    report = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    assert "4 pictures, 0 left out" in report and "| 256x256 | 2 | 2 |" in report and "duplicates" not in report
    assert buckets(config) == sorted({*buckets(config)}) and (512, 512) in buckets(config)


# ---------------------------------------------------------------- what the user sees


def test_the_report_on_pictures(tiny_config, data):
    sizes = {"big": (400, 300), "small": (100, 100), "strip": (900, 100), "dot": (1, 1), "line": (20000, 16)}
    sizes |= {"10_cat/a": (192, 128), "f_mask": (128, 192)}
    for n, (name, size) in enumerate(sizes.items()):
        picture(data / f"{name}.png", size, (n, 0, 0))
    shutil.copy(data / "big.png", data / "copy.png")
    entries, report = prepare(tiny_config, [{"path": str(data), "repeats": 2}])
    assert set(entries) == {f"{name}.png" for name in ("a", "big", "copy", "f_mask", "small", "strip")}
    assert entries["big.png"].key == entries["copy.png"].key
    for words in (
        "6 pictures, 2 left out",
        "| 192x128 | 4 | 8 |",
        "| 128x192 | 1 | 2 |",
        f"- {data}/dot.png: is 1x1 pixels, under 64 on a side",
        f"- {data}/line.png: is 20000x16 pixels",
        f"## Smaller than their bucket: 2\n\n- {data}/small.png: 100x100, enlarged 1.28 times\n",
        f"- {data}/strip.png: 900x100, 17% is kept",
        f"## Exact duplicates: 1\n\n- {data}/big.png = {data}/copy.png\n",
        f"## Named like masks, and trained on as pictures: 1\n\n- {data}/f_mask.png\n",
        f'- {data}/10_cat: a source {{"path": "{data}/10_cat", "repeats": 10}} does what the name says',
        "instance_prompt is used: 6",
    ):
        assert words in report, (words, report)


def test_the_report_on_captions(tiny_config, data, capsys):
    captions = {
        "a": "neonix style, the dog's bone on a mat in the sun, " + "with a long description of it, " * 5,
        "b": "a dog\nunder a tree",
        "c": "[trigger] a poster that says hello",
        "d": "一张海报，上面写着“你好”",
        "e": "街边的牌子上写着你好",
        "f": "word " * 10000 + "neonix style",
        "g": "a sign that says 'open' and \"closed\"",
    }
    captioned(data, captions)
    _, report = prepare(tiny_config, data, trigger_words=["neonix style", "zumi"])
    assert capsys.readouterr().out.startswith(report)
    counts = token_counts(
        load_tokenizer(tiny_config()), [" ".join(text.split()) for text in captions.values()]
    ).values()
    count, short = max(counts), sum(count < 20 for count in counts)
    assert count > 512 and 0 < short < 7
    for words in (
        "7 captions: 2 with Chinese, 5 without",
        f"{count} at most; {short} of under 20 tokens, and the model draws best from long descriptions",
        f"## Several lines in a .txt, joined to one caption: 1\n\n- {data}/b.txt\n",
        "- 'neonix style': 2 captions have it, 5 have not\n- 'zumi': 0 captions have it, 7 have not",
        f"## Placeholders, trained on as they stand: 1\n\n- {data}/c.png: [trigger] a poster that says hello\n",
        f"drawn letter by letter: 2\n\n- {data}/c.png: [trigger] a poster that says hello\n- {data}/e.png: ",
        f"## Over 512 tokens, the rest is not read: 1\n\n- {data}/f.png: {count}: word word",
        f"drawn letter by letter: 2\n\n- {data}/d.png: “你好”\n- {data}/g.png: 'open' \"closed\"\n",
    ):
        assert words in report, (words, report)
    entries, report = prepare(tiny_config, data, pretrained_model_name_or_path=str(data.parent))
    assert "tokens were not counted" in report and len(entries) == 7


def test_token_counts_are_the_pipelines(tiny_config):
    """Against the pipeline's own tokenization: where its attention mask ends."""
    from diffusers import LongCatImagePipeline

    seen = []

    class Encoder(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, input_ids, attention_mask, **options):
            seen.append(attention_mask.sum(dim=1))
            raise StopIteration

    tokenizer, others = (
        load_tokenizer(tiny_config()),
        dict(vae=None, transformer=None, scheduler=None, text_processor=None),
    )
    pipe = LongCatImagePipeline(text_encoder=Encoder(), tokenizer=tokenizer, **others)
    prompts = ["", "a cat", "一只猫", "a sign: \"Grand Opening\", it's 'open'", "“开业大吉”"]
    with pytest.raises(StopIteration):
        pipe.encode_prompt(prompts)
    assert [*token_counts(tokenizer, prompts).values()] == [int(n - seen[0][0]) for n in seen[0]]


def test_the_preview_shows_what_the_model_will_see(tiny_config, data):
    gradient((400, 200)).save(data / "wide.png")
    gradient((200, 400)).save(data / "tall.png")
    picture(data / "strip.png", (1300, 140))
    for n in range(200):
        picture(data / f"many-{n:03d}.png", (128, 128), (n, 255 - n, 0))
    resolution = "128x128,256x128,128x256,1280x128"
    entries, _ = prepare(tiny_config, data, instance_prompt="红色 field", resolution=resolution)
    with Image.open(Path(tiny_config().output_dir) / "preview.jpg") as sheet:
        assert sheet.width == 1600 and sheet.height < 4000
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    cells = [pixels[y + 4 :, x + 4 :] for y in range(0, pixels.shape[0], 260) for x in range(0, 1600, 200)]
    for name, size in {"wide.png": (192, 96), "tall.png": (96, 192), "strip.png": (192, 20)}.items():
        seen = np.asarray(load_picture(data / name, size)).astype(int)
        found = [np.abs(cell[: size[1], : size[0]] - seen).mean() for cell in cells]
        assert min(found) < 8 < np.median(found), name
    red, green, blue = np.moveaxis(pixels, -1, 0)
    shades = red[(np.abs(red + green - 255) < 8) & (blue < 8)] // 8
    assert len(entries) == 203 and len({*shades.tolist()}) > 20  # an even choice, not the first ones


def test_training_draws_one_caption_an_epoch(tiny_config, data):
    texts = {"en": "a red square", "zh": "一个红色的正方形"}
    for name in "abc":
        picture(data / f"{name}.jpg", colour=(ord(name), 0, 0)).with_suffix(".json").write_text(json.dumps(texts))
    config = tiny_config(data_dir=str(data), validation_prompts=[])
    entries, files = cache_latents.main(config)
    embeds = {prompt: read_tensors(file)["prompt_embeds"] for prompt, file in files.items()}
    batch, drawn = [(cache_latents.latents_file(config, entry).stem + ":0", entry) for entry in entries], []
    for epoch in range(12):
        load = lambda number: train_lora.load_batch(config, batch, files, epoch, number).prompt_embeds
        first, again = load(epoch), load(epoch + 100)
        assert torch.equal(first, again)
        drawn += [next(prompt for prompt, embed in embeds.items() if torch.equal(embed, found)) for found in first]
    assert {*drawn} == {*texts.values()} and 9 < drawn.count("a red square") < 27
    assert len({*zip(drawn[::3], drawn[1::3], drawn[2::3])}) > 2  # pictures draw on their own
