"""Tests of the images, their labels and their augmentation."""

import io
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dualrate import data
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.streams import DealtBatches, ShuffledIndices

EMOJI32 = Path(__file__).parents[1] / "examples" / "data" / "emoji32"
EVERYTHING = Augmentation(translation=3, scale=(0.8, 1.2), background=(0, 255), flip=True)


def make_pixels(height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(pixels):
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    return png.getvalue()


def make_dataset(images, names=None, **columns):
    files = [
        {"bytes": image if image is None or isinstance(image, bytes) else encode(image), "path": names and names[row]}
        for row, image in enumerate(images)
    ]
    return datasets.Dataset.from_dict({"image": files, **columns}).cast_column("image", datasets.Image())


def write_folder(folder, images):
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image if isinstance(image, bytes) else encode(image))


def to_levels(item):
    """Returns the pixels of an item as levels 0 to 255, [H, W, C]."""
    return (item["pixel_values"].permute(1, 2, 0).double().numpy() + 1) * 127.5


def shift_with_edges(pixels, down, right):
    """Shifts by plain loops, continuing the edges."""
    height, width, _ = pixels.shape
    shifted = np.empty_like(pixels)
    for y in range(height):
        for x in range(width):
            shifted[y, x] = pixels[min(max(y - down, 0), height - 1), min(max(x - right, 0), width - 1)]
    return shifted


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return load_images(str(EMOJI32), label_column="label", cache_dir=tmp_path_factory.mktemp("cache"))


def test_importing_the_modules_does_not_import_datasets():
    code = (
        "import importlib, sys, types; package = types.ModuleType('package'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['package'] = package; importlib.import_module('package.streams'); "
        "sys.exit('datasets' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(data.__file__).parent)], check=True)


def test_without_augmentation_the_pixels_are_those_of_the_file_in_minus_one_to_one():
    pixels = make_pixels()
    item = LabelledImages(make_dataset([pixels]), 8)[0]
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(item["pixel_values"], expected, rtol=0, atol=1e-6)
    assert item["pixel_values"].dtype == torch.float32 and "class_labels" not in item


def test_black_is_minus_one_and_white_is_one():
    levels = np.zeros((4, 4, 3), np.uint8)
    levels[:, 2:] = 255
    values = LabelledImages(make_dataset([levels]), 4)[0]["pixel_values"]
    assert (values[:, :, :2] == -1).all() and (values[:, :, 2:] == 1).all()


def test_augmented_values_never_leave_minus_one_to_one():
    ramp = np.tile(np.array([0, 255], np.uint8), (16, 8))[..., None].repeat(4, -1)
    images = LabelledImages(make_dataset([ramp]), 16, augmentation=EVERYTHING)
    for epoch in range(50):
        assert images[epoch, 0]["pixel_values"].abs().max() <= 1


def test_an_augmentation_depends_on_seed_epoch_and_index_alone():
    dataset = make_dataset([make_pixels(channels=4, seed=row) for row in range(4)])

    def draw(seed, epoch, order):
        images = LabelledImages(dataset, 8, augmentation=EVERYTHING, seed=seed)
        return {index: images[epoch, index]["pixel_values"] for index in order}

    forwards, backwards = draw(5, 2, [0, 1, 2, 3]), draw(5, 2, [3, 1, 1, 0, 2])
    assert all(torch.equal(forwards[index], backwards[index]) for index in forwards)
    assert not torch.equal(forwards[0], draw(6, 2, [0])[0])
    assert not torch.equal(forwards[0], draw(5, 3, [0])[0])


def test_equal_images_at_different_indices_are_augmented_differently():
    images = LabelledImages(make_dataset([make_pixels(channels=4)] * 2), 8, augmentation=EVERYTHING)
    assert not torch.equal(images[0]["pixel_values"], images[1]["pixel_values"])


def test_a_shuffle_is_a_permutation_in_every_epoch_and_differs_between_epochs_and_seeds():
    first, second = (list(ShuffledIndices(10, 0, epoch * 10, epoch * 10 + 10)) for epoch in (0, 1))
    assert sorted(first) == [(0, index) for index in range(10)]
    assert sorted(second) == [(1, index) for index in range(10)]
    assert [index for _, index in first] != [index for _, index in second]
    assert first != list(ShuffledIndices(10, 1, 0, 10))


@pytest.mark.parametrize("start", [0, 3, 10, 17])
def test_a_shuffle_that_starts_late_continues_the_uninterrupted_one(start):
    whole = list(ShuffledIndices(7, 5, 0, 23))
    late = ShuffledIndices(7, 5, start, 23)
    assert list(late) == whole[start:] and len(late) == 23 - start


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_first_rows_of_all_parts_are_the_first_rows_of_the_global_batch(parts):
    batches = DealtBatches(range(19), 8 // parts, parts)
    dealt = list(batches)
    assert len(dealt) == len(batches) == 2 * parts
    for step in range(2):
        group = dealt[step * parts : (step + 1) * parts]
        assert sorted(row for batch in group for row in batch) == list(range(8 * step, 8 * step + 8))
        half = [row for batch in group for row in batch[: len(batch) // 2]]
        assert sorted(half) == list(range(8 * step, 8 * step + 4))


def test_workers_load_what_the_main_process_would():
    images = LabelledImages(make_dataset([make_pixels(channels=4)] * 4), 8, augmentation=EVERYTHING)
    order = ShuffledIndices(4, 0, 2, 10)
    loaded = torch.utils.data.DataLoader(images, batch_size=4, sampler=order, num_workers=1)
    expected = torch.stack([images[position]["pixel_values"] for position in order])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loaded]), expected)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_translation_moves_pixels_exactly_and_continues_the_edges(channels):
    pixels = make_pixels(6, 9, channels)
    pixels[..., 3:] = 255
    images = LabelledImages(make_dataset([pixels]), (6, 9), augmentation=Augmentation(translation=2))
    shifts = {
        (down, right): shift_with_edges(pixels[..., :3], down, right)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    seen = set()
    for epoch in range(250):
        levels = to_levels(images[epoch, 0])
        matches = [shift for shift, shifted in shifts.items() if np.abs(levels - shifted).max() < 1e-3]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == set(shifts)


def test_a_scale_of_one_changes_nothing():
    dataset = make_dataset([make_pixels(7, 5, 4)])
    plain = LabelledImages(dataset, (7, 5))[0]["pixel_values"]
    assert torch.equal(
        LabelledImages(dataset, (7, 5), augmentation=Augmentation(scale=(1, 1)))[0]["pixel_values"], plain
    )


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_a_scale_zooms_about_the_centre(zoom):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[12:20, 12:20] = 255
    images = LabelledImages(make_dataset([pixels]), 32, augmentation=Augmentation(scale=(zoom, zoom)))
    levels = to_levels(images[0])[..., 0]
    half = round(4 * zoom)
    expected = np.zeros((32, 32))
    expected[16 - half : 16 + half, 16 - half : 16 + half] = 255
    assert ((levels > 127) == (expected > 127)).all()
    np.testing.assert_array_equal(levels, levels[::-1])
    np.testing.assert_array_equal(levels, levels[:, ::-1])


@pytest.mark.parametrize("zoom", [0.9, 1.1])
def test_a_scaled_linear_ramp_is_the_ramp_of_the_scaled_slope(zoom):
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None] * 7, (32, 32))
    dataset = make_dataset([np.stack([ramp, ramp.T, ramp], -1)])
    levels = to_levels(LabelledImages(dataset, 32, augmentation=Augmentation(scale=(zoom, zoom)))[0])
    expected = 7 * ((np.arange(32) - 15.5) / zoom + 15.5)
    inner = slice(5, -5)  # the edges continue flat
    np.testing.assert_allclose(levels[inner, 16, 0], expected[inner], atol=1)
    np.testing.assert_allclose(levels[16, inner, 1], expected[inner], atol=1)


def test_a_scaled_transparent_image_never_outshines_its_alpha():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[...] = (0, 0, 0, 128)
    pixels[:, 5:11, 0] = 255
    augmentation = Augmentation(scale=(1.3, 1.3), background=(0, 0))
    levels = to_levels(LabelledImages(make_dataset([pixels]), 16, augmentation=augmentation)[0])
    assert levels[..., 0].max() == pytest.approx(128, abs=1e-3)


def test_a_flip_mirrors_about_half_of_the_images():
    pixels = make_pixels()
    images = LabelledImages(make_dataset([pixels] * 200), 8, augmentation=Augmentation(flip=True))
    mirrored = 0
    for item in images:
        levels = to_levels(item)
        is_mirrored = np.abs(levels - pixels[:, ::-1]).max() < 1e-3
        assert is_mirrored or np.abs(levels - pixels).max() < 1e-3
        mirrored += is_mirrored
    assert 70 < mirrored < 130


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_a_transparent_pixel_mixes_with_the_background_by_its_alpha(alpha):
    pixels = np.full((4, 4, 4), (200, 100, 30, alpha), np.uint8)
    images = LabelledImages(make_dataset([pixels]), 4, augmentation=Augmentation(translation=1, background=(60, 60)))
    share = alpha / 255
    expected = share * np.array([200, 100, 30]) + (1 - share) * 60
    # Premultiplied levels are whole numbers.
    np.testing.assert_allclose(to_levels(images[0]), np.broadcast_to(expected, (4, 4, 3)), atol=0.501)


def test_the_background_is_white_by_default_and_drawn_per_channel_within_its_range():
    dataset = make_dataset([np.zeros((4, 4, 4), np.uint8)] * 300)
    assert (LabelledImages(dataset, 4)[0]["pixel_values"] == 1).all()
    images = LabelledImages(dataset, 4, augmentation=Augmentation(background=(10, 12)))
    colors = {tuple(to_levels(item)[0, 0].round(3)) for item in images}
    assert colors == {(r, g, b) for r in (10, 11, 12) for g in (10, 11, 12) for b in (10, 11, 12)}


def test_invisible_colours_do_not_bleed_into_a_resized_image():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[...] = (0, 255, 0, 0)
    pixels[:, 3:] = (255, 0, 0, 255)
    images = LabelledImages(make_dataset([pixels]), 4, augmentation=Augmentation(background=(0, 0)))
    assert to_levels(images[0])[..., 1].max() < 1e-3


def test_another_shape_is_resized_to_cover_and_cut_at_the_centre():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 10:50] = 255  # what a 2:1 cut keeps
    assert (LabelledImages(make_dataset([pixels]), (10, 20))[0]["pixel_values"][..., 2:-2] > 0.9).all()
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :10] = pixels[:, 50:] = 255  # what it drops
    item = LabelledImages(make_dataset([pixels]), (10, 20))[0]
    assert item["pixel_values"].shape == (3, 10, 20)
    assert (item["pixel_values"][..., 2:-2] < -0.9).all()


def test_one_channel_is_the_luma_of_the_image():
    pixels = make_pixels(4, 6)
    item = LabelledImages(make_dataset([pixels]), (4, 6), channels=1, augmentation=Augmentation(translation=0))[0]
    assert item["pixel_values"].shape == (1, 4, 6)
    luma = pixels.astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(to_levels(item)[..., 0], luma, atol=1)


def test_a_folder_of_class_folders_gives_labels_and_notices_a_new_image(tmp_path):
    images = {f"{name}/{row}.png": make_pixels(seed=row) for name in ("cat", "ant") for row in range(2)}
    write_folder(tmp_path / "set", images)
    dataset = load_images(train_data_dir=tmp_path / "set", label_column="label", cache_dir=tmp_path / "cache")
    labelled = LabelledImages(dataset, 8, label_column="label")
    assert len(labelled) == 4 and labelled.num_classes == 2 and labelled.id2label == {0: "ant", 1: "cat"}
    assert [item["class_labels"].item() for item in labelled] == [0, 0, 1, 1]
    assert labelled[0]["class_labels"].dtype == torch.int64 and labelled[0]["class_labels"].shape == ()
    write_folder(tmp_path / "set", {"cat/2.png": make_pixels()})
    assert len(load_images(train_data_dir=tmp_path / "set", cache_dir=tmp_path / "cache")) == 5


def test_a_flat_folder_has_images_without_labels(tmp_path):
    write_folder(tmp_path / "set", {"a.png": make_pixels()})
    images = LabelledImages(load_images(train_data_dir=tmp_path / "set", cache_dir=tmp_path / "cache"), 8)
    assert images.id2label is None and images.num_classes is None and set(images[0]) == {"pixel_values"}


@pytest.mark.parametrize(
    ("values", "id2label", "labels"),
    [([30, 7, 30], {0: "7", 1: "30"}, [1, 0, 1]), (["b", "a", "b"], {0: "a", 1: "b"}, [1, 0, 1])],
)
def test_plain_labels_are_numbered_in_sorted_order(values, id2label, labels):
    images = LabelledImages(make_dataset([make_pixels()] * 3, kind=values), 8, label_column="kind")
    assert images.id2label == id2label
    assert [item["class_labels"].item() for item in images] == labels


def test_given_a_number_of_classes_integers_are_taken_as_they_are():
    images = LabelledImages(make_dataset([make_pixels()] * 2, kind=[3, 0]), 8, label_column="kind", num_classes=5)
    assert images.num_classes == 5 and images.id2label[3] == "3"
    assert [item["class_labels"].item() for item in images] == [3, 0]


@pytest.mark.parametrize("names", [None, ["a", "b", "c", "d"]])
def test_a_label_outside_of_the_classes_is_named_with_its_row(names):
    dataset = make_dataset([make_pixels()] * 2, kind=[0, 3])
    if names:
        dataset = dataset.cast_column("kind", datasets.ClassLabel(names=names))
    with pytest.raises(ValueError, match="row 1 has the label 3 in the column 'kind', outside of the 3 classes"):
        LabelledImages(dataset, 8, label_column="kind", num_classes=3)


def test_a_data_set_saved_to_disk_is_opened_alone_or_by_its_split(tmp_path):
    dataset = make_dataset([make_pixels()] * 3)
    dataset.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")
    assert len(load_images(str(tmp_path / "alone"))) == len(load_images(str(tmp_path / "splits"))) == 3
    assert len(load_images(str(tmp_path / "splits"), split="test")) == 1
    with pytest.raises(ValueError, match="no split 'valid'; it has train, test"):
        load_images(str(tmp_path / "splits"), split="valid")
    with pytest.raises(ValueError, match="is saved without splits, and has no 'valid'"):
        load_images(str(tmp_path / "alone"), split="valid")


def test_digits_can_be_streamed():
    rows = list(load_images("digits", label_column="label", split="floor", streaming=True).take(3))
    assert [row["label"] for row in rows] == load_images("digits", split="floor")[:3]["label"]


def test_lists_from_json_describe_the_same_augmentation():
    assert Augmentation(scale=[0.9, 1.1], background=[0, 255]) == Augmentation(scale=(0.9, 1.1), background=(0, 255))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"translation": -1}, "`translation` is -1"),
        ({"translation": 1.5}, r"`translation` is 1\.5"),
        ({"scale": (1.1, 0.9)}, r"`scale` is \(1\.1, 0\.9\)"),
        ({"scale": (0, 1)}, r"`scale` is \(0, 1\)"),
        ({"scale": (1, float("inf"))}, r"`scale` is \(1, inf\)"),
        ({"scale": 1.0}, r"`scale` is 1\.0"),
        ({"background": (0, 256)}, r"`background` is \(0, 256\)"),
        ({"background": (0.0, 1.0)}, r"`background` is \(0\.0, 1\.0\)"),
        ({"flip": 1}, "`flip` is 1"),
    ],
)
def test_an_impossible_augmentation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_a_source_is_refused_unless_it_is_one_folder_with_images(tmp_path):
    with pytest.raises(ValueError, match="Images come from one source, dataset_name or train_data_dir: got neither"):
        load_images()
    with pytest.raises(ValueError, match="Images come from one source, .*: got "):
        load_images("a", "b")
    with pytest.raises(ValueError, match=r"absent' does not exist\."):
        load_images(train_data_dir=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no images\."):
        load_images(train_data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_a_missing_column_is_answered_with_those_there_are(tmp_path):
    write_folder(tmp_path / "set", {"a/1.png": make_pixels(), "b/1.png": make_pixels()})
    with pytest.raises(ValueError, match="no column 'kind'; it has image, label"):
        load_images(train_data_dir=tmp_path / "set", label_column="kind", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="no column 'picture'; it has image"):
        LabelledImages(make_dataset([make_pixels()]), 8, image_column="picture")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "`resolution` is 0"),
        ({"resolution": (8, 8, 3)}, r"`resolution` is \(8, 8, 3\)"),
        ({"channels": 4}, "`channels` is 4"),
        ({"on_corrupt": "ignore"}, "`on_corrupt` is 'ignore'"),
        ({"image_column": "name"}, "'name' holds .*string.*, not images"),
        ({"label_column": "size"}, "'size' of .*float.* must hold one integer or one string a row"),
        ({"label_column": "kind"}, "row 1 has no class in the column 'kind'"),
    ],
)
def test_an_impossible_data_set_is_refused(options, message):
    dataset = make_dataset([make_pixels()] * 2, name=["a", "b"], size=[1.0, 2.0], kind=[0, -1])
    dataset = dataset.cast_column("kind", datasets.ClassLabel(names=["only"]))
    with pytest.raises(ValueError, match=message):
        LabelledImages(dataset, **{"resolution": 8, **options})


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        LabelledImages(make_dataset([make_pixels()]).select([]), 8)


def test_an_index_beyond_the_end_is_refused():
    with pytest.raises(IndexError, match="index 1 is outside of the 1 images"):
        LabelledImages(make_dataset([make_pixels()]), 8)[1]


def break_files(tmp_path):
    whole = encode(make_pixels(32, 32))
    broken = {"a/0.png": whole, "a/1.png": whole[: len(whole) // 2], "b/2.png": b"no image", "b/3.png": whole}
    write_folder(tmp_path / "set", broken)
    return load_images(train_data_dir=tmp_path / "set", cache_dir=tmp_path / "cache")


def test_a_corrupt_file_is_named_and_fatal_by_default(tmp_path):
    dataset = break_files(tmp_path)
    with pytest.raises(ValueError, match=r"a/1\.png' \(row 1\) cannot be decoded"):
        LabelledImages(dataset, 8)


def test_corrupt_files_can_be_left_out_with_their_labels_before_training(tmp_path):
    dataset = break_files(tmp_path)
    with pytest.warns(UserWarning, match="is left out"):
        images = LabelledImages(dataset, 8, label_column="label", on_corrupt="skip")
    assert len(images) == 2 and [item["class_labels"].item() for item in images] == [0, 1]
    assert [Path(name.split("'")[1]).name for name in images.corrupt] == ["1.png", "2.png"]


def test_in_a_set_too_large_for_memory_the_next_image_replaces_a_corrupt_one(tmp_path, monkeypatch):
    dataset = break_files(tmp_path)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    images = LabelledImages(dataset, 8, label_column="label", on_corrupt="skip")
    assert len(images) == 4 and images.corrupt == []
    with pytest.warns(UserWarning, match="is left out") as warned:
        item = images[1]
    assert [Path(str(warning.message).split("'")[1]).name for warning in warned] == ["1.png", "2.png"]
    assert item["class_labels"] == 1 and torch.equal(item["pixel_values"], images[3]["pixel_values"])
    assert len(images.corrupt) == 2
    with pytest.raises(ValueError, match=r"1\.png' \(row 1\) cannot be decoded"):
        LabelledImages(dataset, 8)[1]


@pytest.mark.filterwarnings("ignore:The image:UserWarning")
def test_what_several_workers_find_corrupt_is_counted_once(tmp_path, monkeypatch):
    dataset = break_files(tmp_path)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    images = LabelledImages(dataset, 8, label_column="label", on_corrupt="skip")
    # Two batches an epoch, to each worker one, and each holds a corrupt image in one of the epochs.
    order = [[(0, 0), (0, 1)], [(0, 3), (0, 3)], [(1, 0), (1, 0)], [(1, 2), (1, 1)]]
    loader = torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=2)
    assert [len(batch["pixel_values"]) for batch in loader] == [2, 2, 2, 2]
    assert [Path(name.split("'")[1]).name for name in images.corrupt] == ["1.png", "2.png"]


def test_cached_and_uncached_images_are_the_same(monkeypatch):
    dataset = make_dataset([make_pixels(10, 12, 4)])
    cached = LabelledImages(dataset, 8, augmentation=EVERYTHING)[0]["pixel_values"]
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    assert torch.equal(LabelledImages(dataset, 8, augmentation=EVERYTHING)[0]["pixel_values"], cached)


@pytest.mark.parametrize("on_corrupt", ["raise", "skip"])
def test_a_row_without_a_file_is_named_by_its_number(on_corrupt):
    dataset = make_dataset([make_pixels(), None, b""])
    if on_corrupt == "raise":
        with pytest.raises(ValueError, match="The image row 1 cannot be decoded: the row is empty"):
            LabelledImages(dataset, 8)
    else:
        with pytest.warns(UserWarning):
            assert LabelledImages(dataset, 8, on_corrupt="skip").corrupt == ["row 1", "row 2"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("exif", [b"", b"Exif", b"MM\x00\x2a", b"II*\x00\xff\xff\xff\xff"])
def test_damaged_exif_data_do_not_make_an_image_corrupt(exif):
    png = encode(make_pixels())
    chunk = b"eXIf" + exif
    chunk = len(exif).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    damaged = png[:33] + chunk + png[33:]  # behind the header
    images = LabelledImages(make_dataset([png, damaged]), 8)
    assert torch.equal(images[0]["pixel_values"], images[1]["pixel_values"])


@pytest.mark.parametrize("path", ["https://example.invalid/0.png", "/mnt/0.png"])
def test_a_file_that_cannot_be_reached_is_no_corrupt_image(path, monkeypatch):
    dataset = datasets.Dataset.from_dict({"image": [path]}).cast_column("image", datasets.Image())

    def unreachable(path):
        raise ConnectionResetError("the peer left")

    monkeypatch.setattr(fsspec, "open", unreachable)
    monkeypatch.setattr(Path, "read_bytes", unreachable)
    with pytest.raises(RuntimeError, match=r"0\.png' cannot be read: the peer left"):
        LabelledImages(dataset, 8, on_corrupt="skip")


def test_a_set_of_which_nothing_can_be_decoded_is_refused():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"None of the 1 images .*'x\.png' \(row 0\)"):
        LabelledImages(make_dataset([b"no image"], names=["x.png"]), 8, on_corrupt="skip")


def test_sixteen_bit_images_are_refused_rather_than_clipped():
    with pytest.raises(ValueError, match="its mode is I;16, not 8 bits a channel"):
        LabelledImages(make_dataset([np.full((8, 8), 40_000, np.uint16)]), 8)


def test_emoji32_holds_1392_different_emoji_in_98_classes(emoji):
    images = LabelledImages(emoji, 32, label_column="label")
    assert len(images) == 1392 and images.num_classes == 98
    assert {item["class_labels"].item() for item in images} == set(range(98))
    assert all(item["pixel_values"].shape == (3, 32, 32) for item in images)
    assert len({item["pixel_values"].numpy().tobytes() for item in images}) == 1392
    assert images.id2label[emoji["label"][emoji["name"][:].index("frog")]] == "animal-amphibian"


def test_emoji32_is_transparent_with_a_margin_of_two_pixels(emoji):
    for image in emoji["image"]:
        assert image.mode == "RGBA" and image.size == (32, 32)
        left, top, right, bottom = image.getchannel("A").getbbox()
        assert left >= 2 and top >= 2 and right <= 30 and bottom <= 30


def test_the_digits_are_those_of_scikit_learn_and_their_halves_share_no_image_and_every_class():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = LabelledImages(load_images("digits", label_column="label"), 8, label_column="label", channels=1)
    assert len(images) == len(digits.images) and images.id2label[3] == "3"
    for row in (0, 900, 1796):
        pixels = (images[row]["pixel_values"][0].numpy() + 1) * 8
        np.testing.assert_allclose(pixels, digits.images[row], atol=8 / 255 + 1e-6)
        assert images[row]["class_labels"] == digits.target[row]
    halves = [load_images("digits", label_column="label", split=name) for name in ("reference", "floor")]
    assert [len(half) for half in halves] == [899, 898]
    first, second = ([np.asarray(image).tobytes() for image in half["image"]] for half in halves)
    everything = [np.asarray(image).tobytes() for image in load_images("digits")["image"]]
    assert sorted(first + second) == sorted(everything) and not set(first) & set(second)
    counts = [np.bincount(half["label"], minlength=10) for half in halves]
    assert abs(counts[0] - counts[1]).max() <= 1


def test_a_split_that_the_digits_do_not_have_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        load_images("digits", split="test")


@pytest.mark.parametrize("ending", ["avif", "dds"])
def test_what_a_decoder_raises_at_a_damaged_file_is_a_corrupt_image_and_names_the_flag(tmp_path, ending):
    whole = tmp_path / f"0.{ending}"
    Image.fromarray(make_pixels(32, 32)).save(whole)
    content = bytearray(whole.read_bytes())
    if ending == "avif":
        coded = content.index(b"mdat") + 4
        content[coded:] = bytes(len(content) - coded)  # a RuntimeError, once it is decoded
    else:
        content[84:88] = b"ABCD"  # a compression that does not exist: a NotImplementedError
        content[80:84] = (4).to_bytes(4, "little")
    dataset = make_dataset([make_pixels(), bytes(content)])
    with pytest.raises(ValueError, match="row 1 cannot be decoded: .*; --on_corrupt skip leaves such images out"):
        LabelledImages(dataset, 8)
    with pytest.warns(UserWarning, match="row 1 is left out"):
        assert len(LabelledImages(dataset, 8, on_corrupt="skip")) == 1


def test_an_image_of_too_many_pixels_is_refused_like_a_corrupt_one():
    dataset = make_dataset([make_pixels(10, 10), make_pixels(10, 11)])
    assert len(LabelledImages(dataset, 8, max_image_pixels=110)) == 2
    with pytest.raises(ValueError, match="row 1 .* it has 110 pixels, more than --max_image_pixels 109; --on_corrupt"):
        LabelledImages(dataset, 8, max_image_pixels=109)
    with pytest.warns(UserWarning, match="more than --max_image_pixels"):
        assert len(LabelledImages(dataset, 8, max_image_pixels=109, on_corrupt="skip")) == 1
    for limit in (0, -1, 1.5, True, 10**9):
        with pytest.raises(ValueError, match=f"`max_image_pixels` is {limit}"):
            LabelledImages(dataset, 8, max_image_pixels=limit)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0, None], "row 1 has no class in the column 'kind': its label is None"),
        (["a", None], "row 1 has no class in the column 'kind': its label is None"),
        (["a", ""], "row 1 has no class in the column 'kind': its label is ''"),
        ([0, -1], "row 1 has no class in the column 'kind': its label is -1"),
        ([0, -7], "row 1 has the label -7 in the column 'kind', but none is negative"),
        ([True, False], "'kind' of .*bool.* must hold one integer or one string a row"),
    ],
)
def test_a_label_that_is_none_is_named_with_its_row(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        LabelledImages(make_dataset([make_pixels()] * 2, kind=values), 8, label_column="kind")


def test_a_number_of_classes_is_positive_and_comes_with_a_column():
    dataset = make_dataset([make_pixels()], kind=[0])
    with pytest.raises(ValueError, match="`num_classes` is 0, but must be a positive integer"):
        LabelledImages(dataset, 8, label_column="kind", num_classes=0)
    with pytest.raises(ValueError, match="`num_classes` is 3, but no `label_column`"):
        LabelledImages(dataset, 8, num_classes=3)


def test_a_saved_data_set_that_is_empty_or_damaged_is_refused_in_one_sentence(tmp_path):
    dataset = make_dataset([make_pixels()] * 3)
    dataset.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty' is empty\."):
        load_images(str(tmp_path / "empty"))
    for name, content in (
        ("state.json", b"{"),
        ("state.json", b"{}"),
        ("dataset_info.json", None),
        ("*.arrow", b"no"),
    ):
        folder = tmp_path / "broken"
        dataset.save_to_disk(folder)
        (path,) = folder.glob(name)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match="as saved to disk, is damaged"):
            load_images(str(folder))


def test_a_data_set_that_does_not_exist_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(
        ValueError, match="'nowhere' cannot be opened: there is no such folder, and on the Hub: .*reach"
    ):
        load_images("nowhere", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="absent' cannot be opened"):
        load_images(str(tmp_path / "absent"), cache_dir=tmp_path / "cache")
