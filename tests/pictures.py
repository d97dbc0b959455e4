"""Image folders for tests: sound ones, and one with every kind of broken and odd file."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"daisy": (230, 220, 40), "rose": (200, 30, 60)}


def noisy(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A picture of about that colour: classes can be told apart, and no two pictures are alike."""
    draw = np.random.default_rng(seed)
    pixels = np.array(colour) + draw.integers(-25, 26, (*size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sound(root: Path, train: int = 4, val: int = 2) -> Path:
    """`root/train` and `root/val`, with so many pictures of each class."""
    for split, count in (("train", train), ("val", val)):
        for number, (name, colour) in enumerate(COLOURS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noisy(colour, 100 * number + index + 1000 * (split == "val")).save(folder / f"{index}.png")
    return root


def odd(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Writes pictures that are fine but unusual; by name the first pixel that a viewer shows."""
    grey16 = np.full((20, 24), 40_000, np.uint16)
    Image.fromarray(grey16).save(folder / "sixteen.png")
    Image.fromarray(grey16).save(folder / "sixteen.tif")
    Image.fromarray((grey16 >> 8).astype(np.uint8)).save(folder / "grey.png")
    Image.new("1", (24, 20), 1).save(folder / "bits.png")
    Image.new("CMYK", (24, 20), (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=95)
    Image.new("RGB", (24, 20), (10, 200, 30)).quantize(4).save(folder / "palette.png")
    Image.new("RGBA", (24, 20), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("LA", (24, 20), (0, 127)).save(folder / "half.png")
    clear = Image.new("P", (24, 20), 0)
    clear.putpalette([255, 0, 0, 0, 255, 0])
    clear.save(folder / "palette_clear.png", transparency=0)
    turned = Image.new("RGB", (24, 20), (0, 0, 255))
    turned.paste((255, 255, 0), (0, 0, 24, 10))  # the upper half is yellow; turned by 180 degrees the lower
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    noisy((9, 9, 9), 1).save(folder / "LOUD.JPG")
    Image.new("RGB", (24, 20), (1, 2, 3)).save(folder / "named_wrong.jpg", format="PNG")
    Image.new("RGB", (24, 20), (4, 5, 6)).save(folder / "still.gif")
    frames = [Image.new("RGB", (24, 20), (0, 90 * n, 0)) for n in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    return {
        "sixteen.png": (156, 156, 156),
        "sixteen.tif": (156, 156, 156),
        "grey.png": (156, 156, 156),
        "bits.png": (255, 255, 255),
        "cmyk.jpg": (255, 0, 0),
        "palette.png": (10, 200, 30),
        "clear.png": (255, 255, 255),
        "half.png": (128, 128, 128),
        "palette_clear.png": (255, 255, 255),
        "turned.jpg": (0, 0, 255),
        "LOUD.JPG": (9, 9, 9),
        "named_wrong.jpg": (1, 2, 3),
        "still.gif": (4, 5, 6),
        "moving.gif": (0, 0, 0),
        "moving.webp": (0, 0, 0),
    }


def broken(folder: Path) -> dict[str, str]:
    """Writes files that are no whole pictures; what is to be said of each, by name."""
    held = io.BytesIO()
    noisy((90, 90, 90), 2, (200, 200)).save(held, "JPEG")
    (folder / "cut.jpg").write_bytes(held.getvalue()[: len(held.getvalue()) // 2])
    held = io.BytesIO()
    noisy((90, 90, 90), 3, (200, 200)).save(held, "PNG")
    (folder / "cut.png").write_bytes(held.getvalue()[: len(held.getvalue()) // 2])
    (folder / "text.jpg").write_text("see you at noon")
    (folder / "page.png").write_text("<!DOCTYPE html><html></html>")
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "zeros.jpg").write_bytes(bytes(4000))
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (folder / "gone.jpg").symlink_to(folder / "was_here.jpg")
    Image.fromarray(np.full((20, 24), 0.5, np.float32)).save(folder / "float.tif")
    head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 70, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 1, 1, 0, 0)
    (folder / "huge.bmp").write_bytes(head + bytes(16))
    return {
        "cut.jpg": "is truncated",
        "cut.png": "is truncated",
        "text.jpg": "is no image: it begins with b'see you at noon'",
        "page.png": "is no image: it begins with b'<!DOCTYPE html>",
        "nothing.jpg": "is empty",
        "zeros.jpg": "is no image: it begins with b'\\x00",
        "phone.heic": "is a HEIC, which Pillow does not read",
        "gone.jpg": "is a link to nothing",
        "float.tif": "have no known range",
        "huge.bmp": "decompression bomb",
    }


def clutter(root: Path) -> None:
    """What systems and tools leave between pictures."""
    folder = root / "train" / "daisy"
    (folder / "._001.jpg").write_bytes(b"\0\5\x16\7" + bytes(80))
    (folder / ".DS_Store").write_bytes(bytes(10))
    (folder / ".ipynb_checkpoints").mkdir()
    noisy((0, 0, 0), 4).save(folder / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "Thumbs.db").write_bytes(bytes(10))
    (folder / "notes.txt").write_text("blurred ones are from Tuesday")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (root / "train" / name).mkdir()
    (root / "train" / "labels.csv").write_text("file,class\n")
    (folder / "circle").symlink_to(folder)
