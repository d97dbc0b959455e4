"""Folders of images as people have them: each kind of broken and odd file, by itself and all together."""

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pictures import broken, clutter, noisy, odd, sound
from PIL import Image

from surgeon import _recipes
from surgeon.errors import SurgeonError, UsageError


@pytest.fixture(scope="module")
def images() -> ModuleType:
    return _recipes.load("finetune_images")


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return _recipes.load("finetune_data")


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    return sound(tmp_path / "flowers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Heard:
    """A display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def bar(self, *_: Any) -> Any:
        import contextlib

        return contextlib.nullcontext(lambda: None)


def settings(**given: Any) -> Any:
    return _recipes.load("finetune_settings").Data(**{"kind": "folder", **given})


def test_odd_pictures_are_opened_as_a_viewer_shows_them(images: ModuleType, tmp_path: Path) -> None:
    for name, colour in odd(tmp_path).items():
        image = images.open_image(tmp_path / name)
        assert image.mode == "RGB"
        near = 30 if name == "LOUD.JPG" else 4
        assert np.abs(np.array(image.getpixel((0, 0))) - colour).max() <= near, (name, image.getpixel((0, 0)))
        grey = images.open_image(tmp_path / name, 1)
        assert (grey.mode, grey.size) == ("L", image.size)
        assert images.examine(tmp_path / name)[0] == "", name


def test_convert_alone_would_have_cut_off_16_bits(images: ModuleType, tmp_path: Path) -> None:
    odd(tmp_path)
    with Image.open(tmp_path / "sixteen.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_keep_their_order(images: ModuleType, tmp_path: Path) -> None:
    values = np.linspace(0, 65_535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    seen = np.asarray(images.open_image(tmp_path / "ramp.png"))[..., 0].reshape(-1)
    assert seen.tolist() == list(range(256))


def test_animated_files_are_told(images: ModuleType, tmp_path: Path) -> None:
    odd(tmp_path)
    for name in ("moving.gif", "moving.webp"):
        assert images.examine(tmp_path / name) == (
            "",
            "is animated or has several pages: the first of 3 is used",
        )
    assert images.examine(tmp_path / "still.gif") == ("", "")


def test_each_broken_file_has_its_fault(images: ModuleType, tmp_path: Path) -> None:
    for name, fault in broken(tmp_path).items():
        assert fault in images.examine(tmp_path / name)[0], (name, images.examine(tmp_path / name))


def test_whole_jpegs_of_any_size_pass(images: ModuleType, tmp_path: Path) -> None:
    """The control: decoding at an eighth finds no fault in small and uneven ones."""
    for size in ((1, 1), (7, 9), (8, 8), (33, 500)):
        path = tmp_path / f"{size[0]}.jpg"
        noisy((50, 60, 70), 1, size).save(path, progressive=size[0] > 8)
        assert images.examine(path) == ("", "")


def test_a_jpeg_cut_anywhere_is_truncated(images: ModuleType, tmp_path: Path) -> None:
    for progressive in (False, True):
        noisy((50, 60, 70), 1, (120, 90)).save(tmp_path / "whole.jpg", progressive=progressive)
        whole = (tmp_path / "whole.jpg").read_bytes()
        for share in (0.5, 0.9, 0.99):
            path = tmp_path / "cut.jpg"
            path.write_bytes(whole[: int(share * len(whole))])
            assert images.examine(path)[0] == "is truncated", (progressive, share)


def test_a_sound_folder_is_listed_in_order(data: ModuleType, flowers: Path) -> None:
    clutter(flowers)
    (flowers / "train" / "__MACOSX" / "x.png").write_bytes(b"")
    heard = Heard()
    found = data.find_images(settings(root=flowers), heard)
    assert found.classes == ("daisy", "rose")
    assert [path.name for path in found.train.files] == ["0.png", "1.png", "2.png", "3.png"] * 2
    assert found.train.targets == [0] * 4 + [1] * 4
    (line,) = heard.lines
    assert line.endswith("as they are no images by their names: 1 .db, 1 .txt")


def test_broken_files_stop_the_run_by_name(data: ModuleType, flowers: Path) -> None:
    faults = broken(flowers / "train" / "rose")
    (flowers / "train" / "tulip").mkdir()
    with pytest.raises(UsageError) as caught:
        data.find_images(settings(root=flowers), Heard())
    text = str(caught.value)
    assert f"{len(faults)} of {12 + len(faults)} files are broken, 1 classes empty" in text
    assert "data.broken=skip" in text
    for name, fault in faults.items():
        assert any(f"rose/{name} " in line and fault in line for line in text.splitlines()), name
    assert f"{flowers}/train/tulip holds no image" in text


def test_broken_files_are_left_out_aloud(data: ModuleType, flowers: Path) -> None:
    faults = broken(flowers / "train" / "rose")
    odd(flowers / "train" / "daisy")
    (flowers / "train" / "tulip").mkdir()
    (flowers / "val" / "tulip").mkdir()
    heard = Heard()
    found = data.find_images(settings(root=flowers, broken="skip"), heard)
    assert found.classes == ("daisy", "rose")
    assert len(found.train) == 8 + 15
    for name in faults:
        assert any(line.startswith("left out: ") and f"rose/{name}" in line for line in heard.lines)
    assert f"left out: {flowers}/train/tulip holds no image" in heard.lines
    assert sum("is animated" in line for line in heard.lines) == 2


def test_a_class_that_has_only_held_out_images_is_refused(data: ModuleType, flowers: Path) -> None:
    for path in (flowers / "train" / "rose").iterdir():
        path.write_text("no image")
    with pytest.raises(UsageError, match=r"same classes.*only in one of train and val: rose"):
        data.find_images(settings(root=flowers, broken="skip"), Heard())


def test_what_was_found_is_remembered_until_a_file_changes(
    images: ModuleType, data: ModuleType, flowers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    examine = images.examine
    monkeypatch.setattr(images, "examine", lambda path: asked.append(path.name) or examine(path))
    data.find_images(settings(root=flowers), Heard())
    assert len(asked) == 12
    asked.clear()
    data.find_images(settings(root=flowers), Heard())
    assert not asked
    (flowers / "train" / "rose" / "2.png").write_text("now it is text")
    with pytest.raises(UsageError, match=r"1 of 12 files are broken.*\n.*rose/2\.png is no image"):
        data.find_images(settings(root=flowers), Heard())
    assert asked == ["2.png"]


def test_a_home_that_cannot_be_written_is_no_error(
    data: ModuleType, flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    assert len(data.find_images(settings(root=flowers), Heard()).train) == 8


def test_a_file_that_breaks_later_is_named(data: ModuleType, flowers: Path) -> None:
    found = data.find_images(settings(root=flowers), Heard())
    (flowers / "train" / "daisy" / "1.png").unlink()
    with pytest.raises(UsageError, match=r"daisy/1\.png can no longer be read"):
        found.train[1]


def test_folders_that_are_not_there_have_their_remedy(data: ModuleType, flowers: Path) -> None:
    with pytest.raises(
        UsageError, match=r"data\.train: there is no folder .*nowhere/train; .*data\.root=PATH"
    ):
        data.find_images(settings(root=flowers / "nowhere"), Heard())
    (flowers / "val").rename(flowers / "valid")
    with pytest.raises(UsageError, match=r"data\.test: .*flowers holds train, valid\. .*data\.test=NAME"):
        data.find_images(settings(root=flowers), Heard())
    assert len(data.find_images(settings(root=flowers, test="valid"), Heard()).test) == 4
    with pytest.raises(
        UsageError, match=r"data\.train: .*/train holds daisy, rose\. .*data\.train=\. data\.test=null"
    ):
        data.find_images(settings(root=flowers / "train"), Heard())


def test_a_share_of_each_class_is_held_out(data: ModuleType, flowers: Path) -> None:
    found = data.find_images(settings(root=flowers / "train", train=".", test=None), Heard())
    assert (found.train.targets, found.test.targets) == ([0, 0, 0, 1, 1, 1], [0, 1])
    assert not set(found.train.files) & set(found.test.files)
    again = data.find_images(settings(root=flowers / "train", train=".", test=None), Heard())
    assert again.test.files == found.test.files
    for index in (1, 2, 3):
        (flowers / "train" / "rose" / f"{index}.png").unlink()
    with pytest.raises(UsageError, match=r"rose has one image only"):
        data.find_images(settings(root=flowers / "train", train=".", test=None), Heard())


@pytest.fixture
def prepared(data: ModuleType, flowers: Path) -> Any:
    config = settings(root=flowers, image_size=16, auto_augment="rand-m9", erase=0.5)
    return data.prepare_images(data.find_images(config, Heard()), config, {}, 0)


def test_augmentation_follows_from_seed_epoch_and_number_alone(
    data: ModuleType, prepared: Any, flowers: Path
) -> None:
    torch.manual_seed(1)
    first = [prepared.train[index][0] for index in (0, 1, 2)]
    torch.manual_seed(2)
    random.seed(5)
    assert torch.equal(prepared.train[2][0], first[2])
    assert torch.equal(prepared.train[0][0], first[0])
    data.set_epoch(prepared, 1)
    assert not torch.equal(prepared.train[0][0], first[0])
    data.set_epoch(prepared, 0)
    config = settings(root=flowers, image_size=16, auto_augment="rand-m9", erase=0.5)
    other = data.prepare_images(data.find_images(config, Heard()), config, {}, 1)
    assert not torch.equal(other.train[0][0], first[0])
    assert torch.equal(prepared.test[0][0], prepared.test[0][0])


def test_augmentation_leaves_the_generators_where_they_were(prepared: Any) -> None:
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(1), random.random()  # noqa: S311
    torch.manual_seed(3)
    random.seed(3)
    prepared.train[0]
    assert (torch.rand(1), random.random()) == expected  # noqa: S311


def test_workers_draw_as_the_main_process_does(prepared: Any) -> None:
    from torch.utils.data import DataLoader

    alone = torch.cat([batch for batch, _ in DataLoader(prepared.train, 4)])
    helped = torch.cat([batch for batch, _ in DataLoader(prepared.train, 4, num_workers=2)])
    assert torch.equal(alone, helped)


def test_means_must_fit_the_channels(data: ModuleType, flowers: Path) -> None:
    found = data.find_images(settings(root=flowers), Heard())
    grey = {"input_size": (1, 32, 32), "mean": (0.2, 0.4, 0.6), "std": (0.1, 0.1, 0.1)}
    known = data.prepare_images(found, settings(), grey, 0).known
    assert known["mean"] == pytest.approx((0.4,))
    with pytest.raises(UsageError, match=r"data\.mean: 2 numbers for images of 3 channels"):
        data.prepare_images(found, settings(mean=(0.1, 0.2)), {}, 0)


def test_a_set_by_name_is_read_from_the_disk(data: ModuleType, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        pixels, labels = bytes(784 * count), bytes(range(count))
        sizes = b"".join(number.to_bytes(4, "big") for number in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels)
    config = settings(kind="fashion_mnist", root=tmp_path, image_size=28, crop="padded", flip=0)
    found = data.prepare_images(data.find_images(config, Heard()), config, {"input_size": (1, 28, 28)}, 0)
    assert (len(found.train), len(found.test), found.classes[0]) == (6, 3, "T-shirt/top")
    assert found.train[2][0].shape == (1, 28, 28)
    assert [found.train[index][1] for index in range(6)] == list(range(6))


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("cifar10", r"cifar-10-python\.tar\.gz of https"),
        ("cifar100", r"cifar-100-python\.tar\.gz of https"),
        ("svhn", r"train_32x32\.mat and test_32x32\.mat of http"),
        ("fashion_mnist", r"FashionMNIST/raw/\{train,t10k\}-\{images-idx3,labels-idx1\}-ubyte\.gz of https"),
        ("flowers102", r"flowers-102/102flowers\.tgz, .* of https"),
        ("pets", r"oxford-iiit-pet/images\.tar\.gz and .* of https"),
        ("food101", r"food-101\.tar\.gz of https"),
    ],
)
def test_without_a_network_it_says_what_goes_where(
    data: ModuleType, tmp_path: Path, kind: str, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    message = rf"data\.kind={kind}: \w+ is not whole in .*/sets and could not be fetched \(.+\)\. .*{files}"
    with pytest.raises(UsageError, match=message):
        data.find_images(settings(kind=kind, root=tmp_path / "sets"), Heard())


def test_a_saved_set_of_datasets(data: ModuleType, flowers: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = {split: sorted((flowers / split).rglob("*.png")) for split in ("train", "val")}
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["daisy", "rose"])}
    )
    held = {
        split: datasets.Dataset.from_dict(
            {"picture": [str(p) for p in files], "kind": [p.parent.name for p in files]}, features=features
        )
        for split, files in paths.items()
    }
    datasets.DatasetDict(held).save_to_disk(str(tmp_path / "saved"))
    config = settings(kind="huggingface", root=tmp_path / "saved", image_size=16)
    found = data.prepare_images(data.find_images(config, Heard()), config, {}, 0)
    assert (found.classes, len(found.train), found.test[3][1]) == (("daisy", "rose"), 8, 1)
    with pytest.raises(UsageError, match=r"has no split 'test'; there are: train, val"):
        data.find_images(settings(kind="huggingface", root=tmp_path / "saved", test="test"), Heard())
    with pytest.raises(UsageError, match=r"is no data set on disk"):
        data.find_images(settings(kind="huggingface", root=tmp_path), Heard())


def test_datasets_that_is_not_installed_is_named(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SurgeonError, match=r"data\.kind=huggingface needs datasets: pip install"):
        data.find_images(settings(kind="huggingface"), Heard())


def test_a_split_is_parted_by_classes(data: ModuleType, flowers: Path) -> None:
    found = data.first_classes(data.find_images(settings(root=flowers), Heard()), 1)
    assert (len(found.train), len(found.test), found.classes) == (4, 2, ("daisy",))
