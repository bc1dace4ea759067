"""Image folders: what is read, how it is decoded, and hostile or careless folders."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aerogel.data import load
from aerogel.data.folder import read_image
from aerogel.errors import DataError

SIZE = (3, 8, 8)


def save(path: Path, colour: Any = (200, 30, 60), size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def fill(root: Path, part: str, n: int, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    """n images a class; the red channel tells the class, the green one the number."""
    for index, name in enumerate(classes):
        for i in range(n):
            save(root / part / name / f"{i:03}.png", (100 * index, i, 7))


def test_splits_classes_and_labels(tmp_path: Path) -> None:
    fill(tmp_path, "train", 20)
    fill(tmp_path, "test", 3)
    fill(tmp_path, "val", 5)
    dataset = load(f"folder:{tmp_path}", size=SIZE)
    assert dataset.name == f"folder:{tmp_path}"
    assert dataset.classes == ("cat", "dog")
    assert dataset.input_shape == SIZE
    assert dataset.bad_files == ()
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (36, 4, 6)
    seen = {}
    for name in ("train", "val", "test"):
        part = getattr(dataset, name)
        assert torch.equal(part.images[:, 0, 0, 0], (100 * part.labels).to(torch.uint8))
        seen[name] = set(zip(part.labels.tolist(), part.images[:, 1, 0, 0].tolist(), strict=True))
    assert len(seen["train"] | seen["val"]) == 40  # disjoint, and together the whole of train/
    assert torch.bincount(dataset.val.labels).tolist() == [2, 2]


def test_val_folder_is_the_test_split_when_there_is_no_test_folder(tmp_path: Path) -> None:
    fill(tmp_path, "train", 10)
    fill(tmp_path, "val", 4)
    dataset = load(f"folder:{tmp_path}", size=SIZE)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (18, 2, 8)


def test_test_split_is_carved_without_a_held_out_folder(tmp_path: Path) -> None:
    fill(tmp_path, "train", 20)
    dataset = load(f"folder:{tmp_path}", size=SIZE)
    assert len(dataset.test) == 8
    assert torch.bincount(dataset.test.labels).tolist() == [4, 4]
    assert len(dataset.val) == 3  # a tenth of 32
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 40


def test_default_size_is_224(tmp_path: Path) -> None:
    fill(tmp_path, "train", 5)
    assert load(f"folder:{tmp_path}").input_shape == (3, 224, 224)


def test_every_suffix_is_read_and_clutter_is_ignored(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp", "f.gif", "g.tif", "h.tiff"]
    for name in names:
        save(tmp_path / "train" / "cat" / name)
        save(tmp_path / "train" / "dog" / name)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.jpg"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "train" / "dog" / "more").mkdir()
    (tmp_path / "train" / "loose.png").write_bytes(b"x")
    dataset = load(f"folder:{tmp_path}", size=SIZE)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 16
    reasons = {Path(path).name: reason for path, reason in dataset.bad_files}
    assert reasons == {
        "notes.txt": "not an image suffix",
        "more": "a folder inside a class folder",
        "loose.png": "not in a class folder",
    }


def bomb(path: Path, side: int) -> None:
    """A PNG whose header claims side x side pixels."""
    save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    header = bytes(content[12:29])
    content[29:33] = zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(content)


def test_unreadable_files_are_listed_with_a_reason(tmp_path: Path) -> None:
    fill(tmp_path, "train", 60)
    folder = tmp_path / "train" / "cat"
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    noise.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bomb(folder / "bomb.png", 60_000)
    dataset = load(f"folder:{tmp_path}", size=SIZE)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 120
    reasons = {Path(path).name: reason for path, reason in dataset.bad_files}
    assert reasons.keys() == {"cut.jpg", "empty.png", "page.jpg", "script.jpg", "gone.png", "bomb.png"}
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["empty.png"] == "an empty file"
    assert reasons["page.jpg"].startswith("its content is none of JPEG, PNG")
    assert reasons["script.jpg"].startswith("its content is none of JPEG, PNG")  # Ghostscript was never asked
    assert reasons["gone.png"] == "a broken link or not a regular file"
    assert reasons["bomb.png"].startswith("more pixels than the limit of")
    assert all("\n" not in reason for reason in reasons.values())


def test_pillow_only_warns_of_a_smaller_bomb_and_it_is_refused_too(tmp_path: Path) -> None:
    fill(tmp_path, "train", 20)
    bomb(tmp_path / "train" / "cat" / "bomb.png", 11_000)
    ((_, reason),) = load(f"folder:{tmp_path}", size=SIZE).bad_files
    assert reason.startswith("more pixels than the limit of")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    fill(tmp_path, "train", 20)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.jpg")
    dataset = load(f"folder:{tmp_path}", size=SIZE)
    assert dataset.bad_files[0][1] == "a broken link or not a regular file"


def test_more_than_five_percent_unreadable_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train", 9)
    (tmp_path / "train" / "cat" / "a.png").touch()
    with pytest.raises(DataError, match=r"1 of 19 images .* more than 5%: .*a.png \(an empty file\); mend"):
        load(f"folder:{tmp_path}", size=SIZE)


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_fewer_than_two_classes_are_refused(classes: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    fill(tmp_path, "train", 3, classes)
    with pytest.raises(
        DataError, match=f"must hold two class folders or more, got {classes[0] if classes else 'none'}"
    ):
        load(f"folder:{tmp_path}", size=SIZE)


def test_missing_train_folder_names_the_layout(tmp_path: Path) -> None:
    fill(tmp_path, ".", 3)
    with pytest.raises(
        DataError,
        match=r"cannot list .*train \(No such file or directory\); images must lie in PATH/train/<class>/",
    ):
        load(f"folder:{tmp_path}", size=SIZE)


def test_class_without_a_readable_image_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "train", 30)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(DataError, match="train/eel has no readable image"):
        load(f"folder:{tmp_path}", size=SIZE)
    (tmp_path / "train" / "eel" / "a.png").touch()
    with pytest.raises(DataError, match="train/eel has no readable image"):
        load(f"folder:{tmp_path}", size=SIZE)


def test_held_out_folder_must_fit_train(tmp_path: Path) -> None:
    fill(tmp_path, "train", 5)
    (tmp_path / "test" / "fox").mkdir(parents=True)
    with pytest.raises(DataError, match=r"test/fox is no class of .*train"):
        load(f"folder:{tmp_path}", size=SIZE)
    (tmp_path / "test" / "fox").rename(tmp_path / "test" / "dog")
    with pytest.raises(DataError, match="test has no readable image of a class"):
        load(f"folder:{tmp_path}", size=SIZE)
    save(tmp_path / "test" / "dog" / "a.png")
    assert load(f"folder:{tmp_path}", size=SIZE).test.labels.tolist() == [1]


def test_too_few_images_to_hold_any_out(tmp_path: Path) -> None:
    fill(tmp_path, "train", 1)
    with pytest.raises(DataError, match="no class has two images"):
        load(f"folder:{tmp_path}", size=SIZE)


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname != "Linux", reason="names are text elsewhere")
def test_name_that_is_no_utf8_can_be_printed(tmp_path: Path) -> None:
    fill(tmp_path, "train", 20)
    Path(os.fsdecode(os.fsencode(tmp_path / "train" / "cat") + b"/\xff.png")).touch()
    ((path, _),) = load(f"folder:{tmp_path}", size=SIZE).bad_files
    assert path.encode("utf-8")


# decoding


def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 16), (255, 0, 0))  # red, with a green middle square
    image.paste((0, 255, 0), (24, 0, 40, 16))
    image.save(tmp_path / "wide.png")
    image.rotate(90, expand=True).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        found = read_image(tmp_path / name, (3, 8, 8))
        assert found.dtype == torch.uint8
        assert found.shape == (3, 8, 8)
        assert (found.int() - torch.tensor([0, 255, 0]).view(3, 1, 1)).abs().max() <= 40  # a blurred edge
    wide = read_image(tmp_path / "wide.png", (3, 16, 64))
    assert torch.equal(wide.permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.parametrize("name", ["turned.png", "turned.jpg", "turned.tif"])
def test_orientation_of_exif_is_applied(name: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (320, 320), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 320, 160))  # the stored top is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to see it upright: white goes to the right
    image.save(tmp_path / name, exif=exif)
    found = read_image(tmp_path / name, (1, 32, 32))[0]
    assert found[:, 17:].min() > 250
    assert found[:, :15].max() < 5


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for name, kind in (("a.png", np.uint16), ("b.tif", np.uint16)):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / name)
        for channels in (1, 3):
            found = read_image(tmp_path / name, (channels, 8, 8)).double().numpy()
            assert np.abs(found - ramp / 257).max() <= 0.51


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_without_a_defined_white_are_refused(kind: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="has no defined white; save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif", SIZE)


def test_palette_cmyk_and_bilevel_become_rgb(tmp_path: Path) -> None:
    save(tmp_path / "palette.png", (10, 200, 30))
    Image.open(tmp_path / "palette.png").convert("P").save(tmp_path / "palette.gif")
    save(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK")
    save(tmp_path / "bilevel.png", 1, mode="1")
    for name, expected, slack in (
        ("palette.gif", (10, 200, 30), 30),
        ("cmyk.jpg", (255, 0, 0), 3),
        ("bilevel.png", (255, 255, 255), 0),
    ):
        found = read_image(tmp_path / name, SIZE).int()
        assert (found - torch.tensor(expected).view(3, 1, 1)).abs().max() <= slack, name


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    save(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    save(tmp_path / "half.png", (0, 0, 0, 128), mode="RGBA")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "key.png", transparency=0)
    assert read_image(tmp_path / "clear.png", SIZE).min() == 255
    assert abs(int(read_image(tmp_path / "half.png", SIZE).float().mean()) - 127) <= 1
    assert read_image(tmp_path / "key.png", SIZE).min() == 255


def test_one_channel_is_luma(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", (200, 30, 60))
    assert read_image(path, (1, 4, 4)).unique().tolist() == [round(0.299 * 200 + 0.587 * 30 + 0.114 * 60)]


def test_large_jpeg_is_close_to_the_full_decoding(tmp_path: Path) -> None:
    y, x = np.mgrid[0:600, 0:600]
    pixels = np.stack((x * 255 // 599, y * 255 // 599, (x + y) * 255 // 1198), axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    found = read_image(tmp_path / "a.jpg", (3, 32, 32)).int()
    whole = Image.open(tmp_path / "a.jpg").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert (found - torch.from_numpy(np.array(whole)).permute(2, 0, 1).int()).abs().max() <= 3


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif", SIZE)[:, 0, 0].tolist() == [255, 0, 0]
