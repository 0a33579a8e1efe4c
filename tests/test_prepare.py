"""Stage 1: any folder of pictures. Real files in, the manifest, report and preview out."""

import errno
import io
import json
import math
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LongCatImagePipeline
from PIL import Image, ImageCms, ImageOps, features

import cache_latents
import prepare_data
import train_lora
import validate
from longcat_common import buckets, load_config, load_tokenizer
from prepare_data import buckets_of, inspect_picture, load_picture, token_counts

RED, WHITE, AVIF = (200, 30, 30), (255, 255, 255), features.check("avif")


def picture(path, size=(192, 128), colour=RED, caption=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def gradient(size=(96, 64)):
    """Its colours are coordinates."""
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
        lines = (output / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == json.loads(json.dumps([asdict(entry) for entry in entries]))
        return {Path(e.path).name: e for e in entries}, (output / "report.md").read_text(encoding="utf-8")

    return run


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *["avif"] * AVIF])
def test_pictures_are_turned_upright(tmp_path, suffix):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    for exif[0x0112] in range(1, 10):  # 9 does not exist
        gradient().save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert inspect_picture(path, {})["size"] == upright.size
        assert np.array_equal(load_picture(path, upright.size), upright)
    if suffix in ("jpg", "png"):
        gradient().save(path, exif=b"Exif\0\0nonsense")
        assert inspect_picture(path, {})["size"] == (96, 64) and load_picture(path, (96, 64)).size == (96, 64)


def test_every_kind_of_pixel(tmp_path):
    red, clear = Image.new("RGB", (192, 128), RED), Image.new("RGBA", (192, 128), (*RED, 255))
    clear.paste((9, 9, 9, 0), (0, 0, 96, 128))
    holes = Image.new("P", (192, 128), 0)
    holes.putpalette([9, 9, 9, *RED])
    holes.paste(1, (96, 0, 192, 128))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")  # red is called green
    for image, names, left, right, options in (
        (red, "a.jpg a.png a.webp a.bmp a.tif a.JPEG" + " a.avif" * AVIF, RED, RED, {}),
        (red.convert("CMYK"), "a.jpg a.tif", RED, RED, {}),
        (red.convert("L"), "a.jpg", (81, 81, 81), (81, 81, 81), {"icc_profile": swapped}),  # one for other pixels
        (Image.new("1", (192, 128), 1), "a.png", WHITE, WHITE, {}),
        (red.quantize(4), "a.png a.gif", RED, RED, {}),
        (clear, "a.png a.webp", WHITE, RED, {"lossless": True}),
        (Image.new("LA", (192, 128), (100, 128)), "a.png", (177, 177, 177), (177, 177, 177), {}),
        (holes, "a.png a.gif", WHITE, RED, {"transparency": 0}),
        (Image.fromarray(np.full((128, 192), 30000, np.uint16)), "a.png a.tif", (116, 116, 116), (116, 116, 116), {}),
        (red, "a.gif", RED, RED, {"save_all": True, "append_images": [Image.new("RGB", (192, 128))]}),
        (red, "a.jpg a.png", (30, 200, 30), (30, 200, 30), {"icc_profile": swapped, "quality": 95}),
        (red, "a.jpg a.png", RED, RED, {"icc_profile": srgb}),
        (red, "a.jpg a.png", RED, RED, {"icc_profile": b"nonsense"}),
    ):
        for name in names.split():
            image.save(tmp_path / name, **options)
            assert inspect_picture(tmp_path / name, {})["size"] == (192, 128)
            seen = load_picture(tmp_path / name, (192, 128))
            found = [seen.getpixel((40, 60)), seen.getpixel((150, 60))]
            assert seen.mode == "RGB" and np.abs(np.subtract(found, [left, right])).max() <= 6, (image.mode, name)


def test_nothing_is_distorted_and_the_centre_is_kept(tmp_path):
    gradient((500, 300)).save(tmp_path / "a.png")
    for bucket in ((64, 64), (128, 64), (64, 128), (640, 320)):
        seen = np.asarray(load_picture(tmp_path / "a.png", bucket)).astype(float)
        step = 0.5 / max(bucket[0] / 500, bucket[1] / 300)
        assert (seen[:, -3, 0] - seen[:, 2, 0]).mean() / (bucket[0] - 5) == pytest.approx(step, rel=0.04)
        assert (seen[-3, :, 1] - seen[2, :, 1]).mean() / (bucket[1] - 5) == pytest.approx(step, rel=0.04)
        assert seen[..., 0].mean() == pytest.approx(125, abs=2) and seen[..., 1].mean() == pytest.approx(75, abs=2)
    rng, sizes = random.Random(0), buckets(load_config())
    cuts = [((450, 900), (448, 448)), ((1785, 2924), (832, 1280)), ((1676, 2714), (104, 160))]  # rounding: just outside
    for size in [(rng.randrange(64, 900), rng.randrange(64, 900)) for _ in range(60)]:
        cuts.append((size, tuple(side // 8 for side in buckets_of(size, [sizes])[0])))
    for size, bucket in cuts:
        Image.new("L", size).save(tmp_path / "a.bmp")
        assert load_picture(tmp_path / "a.bmp", bucket).size == bucket


def test_reduced_decoding_stays_within_45_db(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1201, 803), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=92)
    with Image.open(tmp_path / "a.jpg") as image:
        image.convert("RGB").save(tmp_path / "a.bmp")
    for bucket in ((256, 192), (128, 128), (128, 64)):
        whole, seen = (np.asarray(load_picture(tmp_path / name, bucket)).astype(float) for name in ("a.bmp", "a.jpg"))
        assert 45 < 10 * math.log10(255**2 / np.square(whole - seen).mean()) < 99


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_cut_off_pictures_are_noticed(tmp_path, form):
    rng, whole, path = random.Random(0), io.BytesIO(), tmp_path / "picture"
    Image.effect_noise((300, 200), 80).convert("RGB").save(whole, form, progressive=True)
    path.write_bytes(whole.getvalue() + b"\0" * 9 * (form == "JPEG"))
    assert inspect_picture(path, {})["size"] == (300, 200)
    for _ in range(20):
        path.write_bytes(whole.getvalue()[: rng.randrange(1, whole.tell() * 99 // 100)])
        with pytest.raises(Exception):
            inspect_picture(path, {})


# ---------------------------------------------------------------- folders


def test_a_messy_folder(prepare, data, tmp_path, monkeypatch):
    """What can be used is used, everything else has its line."""
    good = ["with space.jpg", "表情 🦊.png", "same.jpg", "same.png", "sub/deep.gif", "x.jpg/inside.png"]
    for n, name in enumerate([*good, "cut.jpg", "bad.png", "locked/a.png", "run/report.md", "run/preview.jpg"]):
        picture(data / name, colour=(n, 0, 0), format="JPEG" if "run" in name else None)
    shutil.copy(data / "run" / "report.md", data / "run" / "manifest.jsonl")  # another run's folder
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:-60])
    os.symlink(data / "gone.png", data / "dangling.png")
    os.symlink(data, data / "sub" / "round")
    os.symlink(picture(tmp_path / "elsewhere" / "linked.png").parent, data / "link")
    for name in ("notes.pdf", ".hidden.jpg", "lone\nly.txt", "text.png"):
        (data / name).write_bytes(b"?")

    def guarded(function):  # root may read everything
        def call(path, *arguments, **options):
            if Path(path) in (data / "bad.png", data / "locked"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return call

    for owner, name in ((os, "scandir"), (Path, "open")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    for _ in range(2):  # the second time its own preview.jpg is there
        entries, report = prepare(output_dir=str(data / "output"))
        assert {*entries} == {"linked.png", *(Path(name).name for name in good)}
        for words in (
            "7 pictures, 5 left out", "cut.jpg: image file is truncated", "dangling.png: No such file",
            "bad.png: Permission denied", "locked: Permission denied", "text.png: is empty, or no picture that Pillow",
            "lone ly.txt: there is no picture", "notes.pdf\n", "run\n",
        ):  # fmt: skip
            assert f"\n- {data}/{words}" in report or words[0] == "7" and words in report, (words, report)


def test_what_cannot_be_prepared_is_an_error(prepare, data, tmp_path):
    for key in ("output_dir", "cache_dir"):
        with pytest.raises(ValueError, match=f"{key}.*is the data folder itself"):
            prepare(**{key: str(data)})
    picture(data / "a.png")
    with pytest.raises(ValueError, match="no picture to train on.*report.md"):
        prepare(instance_prompt=None)
    report = (tmp_path / "output" / "report.md").read_text()
    assert "0 pictures, 1 left out" in report and "a.png: no caption; write a.txt beside it or set inst" in report


def test_sources_prefixes_and_the_inner_source(prepare, data):
    captions = {"a": "a cat", "b": "一只猫", "c": ", a cat", "reg/d": "a dog", "reg/deep/e": "a dog"}
    for n, (name, caption) in enumerate(captions.items()):
        picture(data / f"{name}.png", colour=(n, 0, 0), caption=caption)
    sources = [
        {"path": str(data), "caption_prefix": "neonix style", "repeats": 3},
        {"path": str(data / "reg"), "caption_prefix": "ordinary: ", "loss_weight": 0.5},
    ]
    captions = ["neonix style a cat", "neonix style一只猫", "neonix style, a cat"]  # a space between Latin letters
    expected = {f"{name}.png": ([text], 3, 1.0, str(data)) for name, text in zip("abc", captions)}
    expected |= {f"{name}.png": (["ordinary: a dog"], 1, 0.5, str(data / "reg")) for name in "de"}
    for given in (sources, sources[::-1]):
        entries, report = prepare(data_dir=given)
        assert {n: (e.captions, e.repeats, e.loss_weight, e.source) for n, e in entries.items()} == expected
        assert "5 pictures, 0 left out; 11 samples an epoch; 5 captions" in report


def test_what_the_scripts_draw_of_several_pictures_is_not_trained_on(quick_config, prepare, data):
    config = quick_config(output_dir=str(data / "run"), max_train_steps=1, validation_step_interval=1)
    train_lora.main(config)
    grid = validate.main(config)
    for path in [data / "run" / "preview.jpg", grid, *(data / "run" / "validation").glob("*.png")]:
        shutil.copy(path, data)
    shutil.rmtree(data / "run")
    picture(data / "good.png")
    entries, report = prepare()
    assert [*entries] == ["good.png"] and report.count("is a grid or a preview that these scripts have drawn") == 5


def test_unchanged_files_are_not_read_again(prepare, tiny_config, data, tmp_path):
    for n, name in enumerate("abc"):
        picture(data / f"{name}.bmp", colour=(n, 0, 0))
    first, _ = prepare()
    preview, manifest = tmp_path / "output" / "preview.jpg", tmp_path / "output" / "manifest.jsonl"
    drawn, time = preview.stat().st_mtime_ns, (data / "a.bmp").stat().st_mtime_ns
    assert prepare()[0] == first and preview.stat().st_mtime_ns == drawn
    os.utime(picture(data / "a.bmp", colour=(99, 0, 0)), ns=(1, time))  # same size and time: taken as unchanged
    os.utime(picture(data / "b.bmp", colour=(98, 0, 0)), ns=(1, time + 10**9))
    with pytest.raises(ValueError, match="b.bmp: .* has changed since"):
        cache_latents.main(tiny_config(data_dir=None))
    (data / "c.bmp").unlink()
    second, _ = prepare()
    assert second.keys() == {"a.bmp", "b.bmp"} and second["a.bmp"] == first["a.bmp"]
    assert second["b.bmp"].key != first["b.bmp"].key and preview.stat().st_mtime_ns > drawn
    manifest.write_bytes(manifest.read_bytes()[:-40])
    with pytest.raises(ValueError, match="manifest.jsonl: is damaged"):
        cache_latents.main(tiny_config(data_dir=None))
    assert prepare()[0]["a.bmp"].key != first["a.bmp"].key, "everything is read"


def test_a_picture_is_cut_to_every_resolution_that_it_fills(prepare, data, tmp_path):
    for name, size in {"large": (640, 640), "middle": (300, 280), "small": (100, 90), "wide": (800, 400)}.items():
        picture(data / f"{name}.png", size=size)
    prepare(resolution="512, 128,256")
    found = [(Path(p.path).stem, p.bucket) for p in prepare_data.read_manifest(tmp_path / "output" / "manifest.jsonl")]
    squares = [("large", 128), ("large", 256), ("large", 512), ("middle", 128), ("middle", 256), ("small", 128)]
    assert found[:6] == [(name, (side, side)) for name, side in squares]
    assert len(found) == 9 and all(width <= 800 and height <= 400 for _, (width, height) in found[6:])


# ---------------------------------------------------------------- what the user sees


def test_the_report(prepare, data, tmp_path, capsys):
    sizes = {"big": (400, 300), "small": (100, 100), "strip": (900, 100), "line": (20000, 16), "f": (128, 192)}
    captions = {"big": "[trigger] a poster", "f": "word " * 600 + "neonix style"}
    for n, (name, size) in enumerate(sizes.items()):
        picture(data / f"{name}.png", size, (n, 0, 0), captions.get(name))
    shutil.copy(data / "big.png", data / "copy.png")
    _, report = prepare(trigger_words=["neonix style", "zumi"])
    for words in (
        "5 pictures, 1 left out; 5 samples an epoch; 5 captions of at most",
        "tokens, 4 of them under 20; the model draws best from long descriptions.",
        "| 128x128 | 1 |\n| 128x192 | 1 |\n| 192x128 | 3 |\n",
        f"- {data}/line.png: is 20000x16 pixels, under 64 on a side",
        f"## Smaller than their bucket: 2\n\n- {data}/small.png: 100x100, enlarged 1.28 times\n",
        f"- {data}/strip.png: 900x100, 17% is kept",
        f"## Exact duplicates: 1\n\n- {data}/big.png = {data}/copy.png\n",
        "instance_prompt is used: 3\n",
        "- 'neonix style': 1 captions have it, 4 have not\n- 'zumi': 0 captions have it, 5 have not",
        f"## Placeholders, trained on as they stand: 1\n\n- {data}/big.png: [trigger] a poster\n",
        f"## Over 512 tokens, the rest is not read: 1\n\n- {data}/f.png: word word",
    ):
        assert words in report, (words, report)
    assert report.splitlines()[2] in capsys.readouterr().out
    assert "tokens were not counted" in prepare(pretrained_model_name_or_path=str(tmp_path))[1]


def test_token_counts_are_the_pipelines(tiny_config):
    """Against the pipeline's own tokenization: where its attention mask ends."""
    seen = []

    class Encoder(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, input_ids, attention_mask, **options):
            seen.append(attention_mask.sum(dim=1))
            raise StopIteration

    tokenizer, rest = load_tokenizer(tiny_config()), dict(vae=None, transformer=None, scheduler=None)
    pipe = LongCatImagePipeline(text_encoder=Encoder(), tokenizer=tokenizer, text_processor=None, **rest)
    prompts = ["", "a cat", "一只猫", "a sign: \"Grand Opening\", it's 'open'", "“开业大吉”"]
    with pytest.raises(StopIteration):
        pipe.encode_prompt(prompts)
    assert [*token_counts(tokenizer, prompts).values()] == [int(n - seen[0][0]) for n in seen[0]]


def test_the_preview_shows_what_the_model_will_see(prepare, tiny_config, data, tmp_path):
    for name, size in {"wide": (400, 200), "tall": (200, 400)}.items():
        gradient(size).save(data / f"{name}.png")
    for n in range(100):
        picture(data / f"{n:03d}.png", (128, 128), (2 * n, 255 - 2 * n, 0))
    raw = picture(data / "damaged.jpg", (1300, 140)).read_bytes()  # its end is there, so that it is not decoded
    (data / "damaged.jpg").write_bytes(raw.replace(b"\xff\xc4\0\x1f", b"\xff\xc4\0\x1f" + b"\xff" * 20, 1))
    prepare(instance_prompt="红色 field", resolution="128x128,256x128,128x256,1280x128")
    with Image.open(tmp_path / "output" / "preview.jpg") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape[1] == 1600 and pixels.shape[0] < 4000
    cells = [pixels[y + 4 :, x + 4 :] for y in range(0, pixels.shape[0], 260) for x in range(0, 1600, 200)]
    seen = {name: load_picture(data / f"{name}.png", s) for name, s in {"wide": (192, 96), "tall": (96, 192)}.items()}
    for part in [*seen.values(), Image.new("RGB", (192, 20), "#cc0000")]:
        found = [np.abs(cell[: part.height, : part.width] - np.asarray(part, int)).mean() for cell in cells]
        assert min(found) < 8 < np.median(found)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    shades = red[(np.abs(red + green - 255) < 8) & (blue < 8)] // 8
    assert len({*shades.tolist()}) > 20, "an even choice, not the first ones"
    with pytest.raises(ValueError, match="damaged.jpg: cannot be used"):
        cache_latents.main(tiny_config(data_dir=None))
