"""Draws the README's picture, `demo.png`, from a finished run of the demo:

    python tests/tiny_longcat/make_demo.py

after `python train_lora.py configs/tiny.json`.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
from longcat_common import load_config
from prepare_data import label

CELL, GAP, LINE = 160, 8, 20


def main():
    config = load_config(ROOT / "configs" / "tiny.json")
    columns = [
        Image.open(path)
        for path in sorted((ROOT / config.output_dir / "validation").glob("step-*.png"))
    ]
    size, prompts = columns[0].width, config.validation_prompts
    cut = lambda column: [
        column.crop((0, i * size, size, (i + 1) * size)) for i in range(len(prompts))
    ]
    pictures = [
        Image.open(path) for path in sorted((HERE / "pictures").iterdir()) if path.suffix != ".json"
    ]
    square = [picture for picture in pictures if picture.width == picture.height][: len(prompts)]
    rows = {"six of its pictures": square, "before": cut(columns[0]), "after": cut(columns[-1])}

    height = sum(LINE + CELL + GAP for _ in rows) + 2 * LINE
    image = Image.new("RGB", (len(prompts) * (CELL + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(image)

    def write(text, x, y, anchor):
        text, font = label(text, 13)
        draw.text((x, y), text, "#444444", font=font, anchor=anchor)

    for row, (name, images) in enumerate(rows.items()):
        top = row * (LINE + CELL + GAP)
        write(name, GAP, top + LINE / 2, "lm")
        for i, picture in enumerate(images):
            small = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            image.paste(small, (GAP + i * (CELL + GAP), top + LINE))
    for i, prompt in enumerate(prompts):  # in two lines, where it is long
        left, _, right = prompt.partition(" on ")
        for line, text in enumerate([left, f"on {right}"] if right else [prompt]):
            write(text, GAP + i * (CELL + GAP) + CELL / 2, height - (1.5 - line) * LINE, "mm")
    image.save(HERE / "demo.png", optimize=True)
    print(f"wrote {HERE / 'demo.png'}")


if __name__ == "__main__":
    main()
