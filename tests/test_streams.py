"""Tests of images that are read as a stream."""

import itertools

import datasets
import pytest
import torch

from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.streams import DealtBatches, StreamedImages, Stretch
from test_data import EVERYTHING, encode, make_pixels


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a data set on disk with twelve images in three classes, of which the fourth is corrupt."""
    images = [{"bytes": encode(make_pixels(seed=row)), "path": None} for row in range(12)]
    images[3]["bytes"] = b"no image"
    dataset = datasets.Dataset.from_dict({"image": images, "label": [row % 3 for row in range(12)]})
    dataset = dataset.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=[*"abc"]))
    folder = tmp_path_factory.mktemp("saved")
    dataset.save_to_disk(str(folder))
    return str(folder)


def stream(saved, **options):
    dataset = load_images(saved, label_column="label", streaming=True)
    options = {"label_column": "label", "on_corrupt": "skip", "buffer_size": 5} | options
    return StreamedImages(dataset, 8, augmentation=EVERYTHING, **options)


def read(images, count, position=(0, 0)):
    return list(itertools.islice(images.read_from(*position), count))


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in ("pixel_values", "class_labels"))


@pytest.mark.filterwarnings("ignore:The image row:UserWarning")
def test_an_epoch_of_a_stream_holds_every_sound_image_once_and_epochs_differ(saved):
    plain = LabelledImages(load_images(saved, label_column="label"), 8, label_column="label", on_corrupt="skip")
    images = StreamedImages(
        load_images(saved, label_column="label", streaming=True),
        8,
        label_column="label",
        on_corrupt="skip",
        buffer_size=5,
    )
    items = [item for item, _ in read(images, 22)]
    orders = []
    for epoch in (items[:11], items[11:]):
        orders.append([next(i for i, one in enumerate(plain) if same(item, one)) for item in epoch])
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] != orders[1] and orders[0] != list(range(11))
    assert images.num_corrupt == 1


@pytest.mark.filterwarnings("ignore:The image row:UserWarning")
def test_a_stream_goes_on_from_any_position_as_if_it_had_not_stopped(saved):
    whole = read(stream(saved), 30)
    for stopped in (1, 4, 11, 12, 17):
        rest = read(stream(saved), 30 - stopped, whole[stopped - 1][1])
        assert len(rest) == 30 - stopped
        assert all(same(a[0], b[0]) and a[1] == b[1] for a, b in zip(rest, whole[stopped:], strict=True))
    assert not same(read(stream(saved, seed=1), 1)[0][0], whole[0][0])


@pytest.mark.filterwarnings("ignore:The image row:UserWarning")
def test_a_stretch_deals_its_batches_out_and_tells_where_each_ends(saved):
    whole = read(stream(saved), 16)
    items = list(Stretch(stream(saved), (0, 0), 2, 8, 4))
    dealt = [row for batch in DealtBatches(range(16), 2, 4) for row in batch]
    assert all(same(item, whole[row][0]) for item, row in zip(items, dealt, strict=True))
    assert [item["position"].tolist() for item in items] == [list(whole[7][1])] * 8 + [list(whole[15][1])] * 8


@pytest.mark.filterwarnings("ignore:The image row:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [(0, 0), (0, 6)])
def test_a_stretch_counts_a_corrupt_image_once_however_often_it_comes_and_whoever_reads_it(saved, workers, start):
    stretch = Stretch(stream(saved, buffer_size=1), start, 5, 6, 1)  # row 3 is the corrupt one
    counts = [batch["num_corrupt"].tolist() for batch in torch.utils.data.DataLoader(stretch, 6, num_workers=workers)]
    first = 0 if start == (0, 0) else 1  # the first batch that tells of it
    assert counts == [[0] * 6] * first + [[1] * 6] * (5 - first)


def test_a_corrupt_image_of_a_stream_is_fatal_by_default(saved):
    with pytest.raises(ValueError, match=r"The image row \d+ cannot be decoded: its format is unknown"):
        read(stream(saved, on_corrupt="raise"), 12)


def test_a_stream_without_a_sound_image_does_not_go_round_for_ever():
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": b"no", "path": None}]})
    dataset = dataset.cast_column("image", datasets.Image()).to_iterable_dataset()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="None of the 1 images can be decoded"):
        read(StreamedImages(dataset, 8, on_corrupt="skip"), 1)


def test_what_a_stream_lacks_is_said_before_anything_is_read(saved):
    with pytest.raises(ValueError, match="The data set is empty"):
        StreamedImages(load_images(saved, streaming=True).take(0), 8)
    numbers = load_images(saved).cast_column("label", datasets.Value("int64")).to_iterable_dataset()
    with pytest.raises(ValueError, match="names no classes: give their number"):
        StreamedImages(numbers, 8, label_column="label")
    with pytest.raises(ValueError, match="no column 'kind'; it has image, label"):
        load_images(saved, label_column="kind", streaming=True)


def test_a_label_of_a_stream_outside_of_the_classes_is_named(saved):
    numbers = load_images(saved).cast_column("label", datasets.Value("int64")).to_iterable_dataset()
    images = StreamedImages(numbers, 8, label_column="label", num_classes=2, on_corrupt="skip", buffer_size=1)
    with pytest.raises(ValueError, match="row 2 has the label 2 in the column 'label', outside of the 2 classes"):
        read(images, 3)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_shuffle_buffer_that_holds_nothing_is_refused(saved, size):
    with pytest.raises(ValueError, match=f"`buffer_size` is {size}, but --shuffle_buffer must be a positive integer"):
        stream(saved, buffer_size=size)
