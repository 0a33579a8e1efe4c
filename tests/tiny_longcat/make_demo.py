"""Makes the README's figure, `demo.png`, from a finished run of the demo:

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

# Pixels: the side of an image, the gap between two, the height of a line of text.
CELL = 160
GAP = 8
LINE = 20


def previews(folder, step):
    """The images of a step's validation prompts, in their order."""
    return [Image.open(path) for path in sorted(folder.glob(f"step-{step:06d}-*.png"))]


def square_images(folder, count):
    """The first `count` square images in a folder."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    images = [Image.open(path) for path in paths]
    return [image for image in images if image.width == image.height][:count]


def main():
    """Rows: images of the data set, previews before training, previews after it. Below, the
    prompts."""
    config = load_config(ROOT / "configs" / "tiny.json")
    prompts = config.validation_prompts
    folder = ROOT / config.output_dir / "validation"
    rows = {
        "six of its images": square_images(HERE / "pictures", len(prompts)),
        "before": previews(folder, 0),
        "after": previews(folder, config.max_train_steps),
    }

    width = len(prompts) * (CELL + GAP) + GAP
    height = len(rows) * (LINE + CELL + GAP) + 2 * LINE
    figure = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(figure)

    def write(text, x, y, anchor):
        text, font = label(text, 13)
        draw.text((x, y), text, "#444444", font=font, anchor=anchor)

    for row, (name, images) in enumerate(rows.items()):
        top = row * (LINE + CELL + GAP)
        write(name, GAP, top + LINE / 2, "lm")
        for i, image in enumerate(images):
            small = image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            figure.paste(small, (GAP + i * (CELL + GAP), top + LINE))

    # Long prompts go on two lines.
    for i, prompt in enumerate(prompts):
        left, _, right = prompt.partition(" on ")
        lines = [left, f"on {right}"] if right else [prompt]
        for number, line in enumerate(lines):
            y = height - (1.5 - number) * LINE
            write(line, GAP + i * (CELL + GAP) + CELL / 2, y, "mm")
    figure.save(HERE / "demo.png", optimize=True)
    print(f"wrote {HERE / 'demo.png'}")


if __name__ == "__main__":
    main()
