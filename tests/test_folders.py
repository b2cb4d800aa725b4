"""Tests of folders of images: what is read from them, of which classes, and what is left out."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.folders import check_output_dir, image_endings, list_folder
from diffusers_dualrate.inventory import describe_images
from diffusers_dualrate.streams import StreamedImages
from test_data import encode, make_pixels


def write(root, *names):
    """Writes one image for each name, all of different content."""
    for seed, name in enumerate(names):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(encode(make_pixels(seed=seed)))


def open_labelled(root, **options):
    return LabelledImages(load_images(train_data_dir=root, label_column="label", **options), 8, label_column="label")


def counts_of(images):
    return {name: int((images.class_labels == number).sum()) for number, name in images.id2label.items()}


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["train/1.png", "test/1.png", "bus/1.png"], {"bus": 1, "test": 1, "train": 1}),
        (["cat/train_0.png", "cat/test_1.png", "cat/val-2.png"], {"cat": 3}),
        (["a[1]/x.png", "b*?/y.png", " c {d}/z.png"], {" c {d}": 1, "a[1]": 1, "b*?": 1}),
        (["été/ß.png", "日本/猫.png", "e\u0301/1.png"], {"é": 1, "été": 1, "日本": 1}),
        (["a\nb/c\nd.png", "x::y/zip:__a.png", "~/%20.png"], {"a\nb": 1, "x::y": 1, "~": 1}),
        (["caf\udce9/\udcff%.png", "b/1.png"], {"b": 1, "caf\\xe9": 1}),
        (["A/1.PNG", "a/1.JpG", "10/1.WebP", "9/1.png"], {"10": 1, "9": 1, "A": 1, "a": 1}),
        (["cat/2019/05/1.png", "cat/2.png", "dog/train/1.png"], {"cat": 2, "dog": 1}),
    ],
)
def test_each_folder_of_images_is_a_class_whatever_its_name_and_those_of_its_files(tmp_path, names, counts):
    root = tmp_path / "images [x] of *"
    write(root, *names)
    images = open_labelled(root)
    assert counts_of(images) == counts
    assert len({item["pixel_values"].numpy().tobytes() for item in images}) == len(names)


def test_every_format_that_pillow_writes_and_reads_is_an_image(tmp_path):
    source = Image.fromarray(make_pixels()).resize((16, 16))  # the least that an icon has
    Image.init()
    formats = {}
    for ending, name in sorted(Image.registered_extensions().items()):
        if ending in image_endings() and name in Image.SAVE and name not in ("BLP", "EPS", "IM", "MSP", "XBM"):
            formats.setdefault(name, ending)
    assert {"AVIF", "WEBP", "JPEG", "JPEG2000", "TIFF", "GIF", "BMP", "TGA", "DDS"} <= formats.keys()
    os.makedirs(tmp_path / "set")
    for name, ending in formats.items():
        source.save(tmp_path / "set" / f"{name}{ending.upper()}", format=name)
    listed = list_folder(tmp_path / "set")
    assert len(listed.files) == len(formats) and not listed.left_out
    assert len(LabelledImages(load_images(train_data_dir=tmp_path / "set"), 8)) == len(formats)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "RGBX", "RGBA"])
def test_an_image_of_any_mode_of_8_bits_is_what_it_shows(tmp_path, mode):
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / "0.tif")
    try:
        Image.open(tmp_path / "0.tif").load()
    except OSError:
        pytest.skip(f"this version of Pillow cannot read its own {mode}")
    item = LabelledImages(load_images(train_data_dir=tmp_path), 8)[0]
    assert item["pixel_values"].min() > 0.97


def test_of_an_animated_file_the_first_frame_counts(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 255)]
    for ending in ("gif", "apng", "tiff"):
        frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:])
    images = LabelledImages(load_images(train_data_dir=tmp_path), 8)
    assert len(images) == 3 and all((item["pixel_values"] == -1).all() for item in images)


def test_linked_class_folders_are_read_and_links_in_a_circle_end(tmp_path):
    root = tmp_path / "set"
    write(tmp_path, "elsewhere/cats/1.png", "elsewhere/cats/deep/2.png", "set/dog/1.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "again").symlink_to(root / "dog")
    (root / "self").symlink_to(root / "self")
    listed = list_folder(root)
    assert listed.classes == ("cat", "dog") and listed.labels == (0, 0, 1)
    assert listed.left_out == {
        "dog/again/": "a link to a folder that was read",
        "dog/up/": "a link to a folder that was read",
        "self": "a link to nothing",
    }
    assert counts_of(open_labelled(root)) == {"cat": 2, "dog": 1}


def test_every_file_that_is_no_image_is_named_with_the_reason_and_the_count_holds(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png", "cat/.hidden.png", ".cache/3.png")
    for name in ("cat/notes.txt", "cat/more.zip", ".DS_Store", "heic.HEIC"):
        (tmp_path / name).touch()
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "dog" / "pipe.png")  # opening one would wait for ever
    listed = list_folder(tmp_path)
    assert listed.left_out == {
        ".DS_Store": "hidden",
        ".cache/": "hidden",
        "cat/.hidden.png": "hidden",
        "cat/more.zip": "an archive",
        "cat/notes.txt": "no image by its ending",
        "dog/gone.png": "a link to nothing",
        "dog/pipe.png": "no regular file",
        "empty/": "a folder without images, hence no class",
        "heic.HEIC": "no image by its ending",
    }
    said = describe_images(open_labelled(tmp_path)).splitlines()
    assert said[0] == "images: 2, number of classes: 2"
    assert said[1].endswith("2 of 9 files are images")  # and of the seven others each is named
    assert "left out 2, no image by its ending: 'heic.HEIC', 'cat/notes.txt'" in said
    assert said[-1] == "classes: 'cat' 1, 'dog' 1"


def test_of_many_classes_the_first_are_named_and_the_smallest_and_the_largest(tmp_path):
    write(tmp_path, *(f"{name}/{row}.png" for number, name in enumerate("abcdefghijkl") for row in range(12 - number)))
    said = describe_images(open_labelled(tmp_path)).splitlines()[-1]
    assert said.endswith("'j' 3 and 2 more; the smallest is 'l' with 1, the largest 'a' with 12")


def test_train_and_test_are_splits_only_where_all_folders_are_called_like_splits(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "Val/dog/1.png")
    (tmp_path / "labels.json").touch()
    train, validation = open_labelled(tmp_path), open_labelled(tmp_path, split="validation")
    assert counts_of(train) == {"cat": 1, "dog": 2}
    assert counts_of(validation) == {"cat": 0, "dog": 1}  # numbered as in training
    assert "split train of validation, train: 3 of 4 files are images" in describe_images(train)
    with pytest.raises(ValueError, match="has no split 'test'; it has validation, train"):
        open_labelled(tmp_path, split="test")
    write(tmp_path, "bus/1.png")
    assert counts_of(open_labelled(tmp_path)) == {"Val": 1, "bus": 1, "train": 3}
    with pytest.raises(ValueError, match="has no split 'test': its folders are not called like splits"):
        open_labelled(tmp_path, split="test")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["cat/1.png", "stray.png"],
            r"holds images such as 'stray.png' \(1 in all\) beside class folders such as 'cat'",
        ),
        (["train/cat/1.png", "train/stray.png", "test/cat/1.png"], "such as 'stray.png' .* beside class folders"),
        (
            ["train/cat/1.png", "test/cat/1.png", "test/bird/1.png"],
            "class 'bird' .* in another split, but none in 'train'",
        ),
        (["train/1.png", "valid/1.png", "val/1.png"], "'val' and 'valid' .* are both the split 'validation'"),
        (["test/1.png"], "has no split 'train'; it has test"),
        (["images/cat/1.png", "images/dog/1.png"], "in folders within 'images': give the path of 'images'"),
        (["caf\u00e9/1.png", "cafe\u0301/1.png"], "called 'café' and differ in Unicode's form alone"),
        (["cat.zip", "dog.tar"], "holds no images; it holds archives such as 'cat.zip', to be unpacked first"),
        (
            ["data/0.parquet"],
            "holds no images; it holds tables such as 'data/0.parquet': give it as a data set's name",
        ),
        (["cat/notes.txt"], r"holds no images\.$"),
    ],
)
def test_what_can_be_read_in_two_ways_or_not_at_all_is_refused_in_one_sentence(tmp_path, names, sentence):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=sentence):
        load_images(train_data_dir=tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_asked_of_a_folder_that_shows_none_are_refused_with_what_to_do(tmp_path, streaming):
    """Two classes called like splits become classes by what the sentence says; so do those of other such names."""
    options = {"label_column": "label", "streaming": streaming}
    write(tmp_path / "flat", "1.png", "2.png")
    with pytest.raises(
        ValueError,
        match=r"no column 'label': all images lie in '.*flat' itself\. Move each class into a folder of its own",
    ):
        load_images(train_data_dir=tmp_path / "flat", **options)
    for names in (["train", "test"], ["Training", "val"], ["train", "validation"]):
        root = tmp_path / "-".join(names)
        write(root, *(f"{name}/{i}.png" for name in names for i in range(2)))
        sentence = (
            r"no column 'label': all folders in .* called like splits \(.*train.*\), so they were taken for splits"
        )
        with pytest.raises(ValueError, match=sentence + r".*move them into one new folder called 'train'\.$"):
            load_images(train_data_dir=root, **options)
        (root / "new").mkdir()
        for name in names:
            (root / name).rename(root / "new" / name)
        (root / "new").rename(root / "train")
        assert counts_of(open_labelled(root)) == dict.fromkeys(sorted(names), 2)


def test_a_file_given_as_a_folder_is_refused(tmp_path):
    write(tmp_path, "1.png")
    with pytest.raises(ValueError, match=r"1\.png' is no folder\."):
        load_images(train_data_dir=tmp_path / "1.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_class_folder_that_may_not_be_read_is_no_missing_class(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog").chmod(0)
    with pytest.raises(ValueError, match=r"dog' cannot be read: Permission denied"):
        load_images(train_data_dir=tmp_path)
    (tmp_path / "dog").chmod(0o700)


def test_a_file_that_vanishes_after_the_listing_is_named_like_a_corrupt_one(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png")
    dataset = load_images(train_data_dir=tmp_path, label_column="label")
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"cat/1\.png' .* No such file .* --on_corrupt skip leaves such images out"):
        LabelledImages(dataset, 8, label_column="label")
    with pytest.warns(UserWarning, match=r"cat/1\.png"):
        images = LabelledImages(dataset, 8, label_column="label", on_corrupt="skip")
    assert counts_of(images) == {"cat": 0, "dog": 1}
    assert "left out 1, corrupt: " in describe_images(images)


def test_a_folder_given_as_a_data_set_is_read_by_the_same_rules(tmp_path):
    write(tmp_path, "train/train_0.png", "test/test_1.png", "bus/1.png")
    images = LabelledImages(load_images(str(tmp_path), label_column="label"), 8, label_column="label")
    assert counts_of(images) == {"bus": 1, "test": 1, "train": 1}


def test_a_data_set_in_tables_beside_a_picture_is_read_from_its_tables(tmp_path):
    files = [{"bytes": encode(make_pixels(seed=row)), "path": None} for row in range(3)]
    dataset = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    os.makedirs(tmp_path / "set" / "data")
    dataset.to_parquet(tmp_path / "set" / "data" / "train-0.parquet")
    write(tmp_path / "set", "preview.png")
    assert len(load_images(str(tmp_path / "set"), cache_dir=tmp_path / "cache")) == 3


def test_a_table_beside_the_images_describes_them_all_or_is_refused(tmp_path):
    root = tmp_path / "set [1]"
    write(root, "a/1.png", "train_0.png", "test_1.png")
    rows = [{"file_name": name, "label": name[:1]} for name in ("a/1.png", "train_0.png", "test_1.png")]
    table = root / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_images(train_data_dir=root, label_column="label", cache_dir=tmp_path / "cache")
    assert sorted(dataset["label"]) == ["a", "t", "t"]
    table.write_text("\n".join(map(json.dumps, rows[:2])))
    with pytest.raises(ValueError, match="describes 2 of its 3 images: it must name each once"):
        load_images(train_data_dir=root, cache_dir=tmp_path / "cache2")


def test_a_streamed_class_folder_is_shuffled_first_so_that_a_small_buffer_sees_all_classes(tmp_path):
    write(tmp_path, *(f"{name}/{row:02}.png" for name in "ab" for row in range(40)))

    def read(seed, count=20):
        dataset = load_images(train_data_dir=tmp_path, label_column="label", streaming=True, seed=seed)
        images = StreamedImages(dataset, 8, label_column="label", buffer_size=2)
        return images, [int(item["class_labels"]) for (item, _), _ in zip(images.read_from(0, 0), range(count))]  # noqa: B905

    images, first = read(0)
    assert 4 <= sum(first) <= 16
    assert read(0)[1] == first != read(1)[1]
    assert sorted(read(0, 80)[1]) == [0] * 40 + [1] * 40
    assert "classes: 'a' 40, 'b' 40" in describe_images(images) and "80 of 80 files" in describe_images(images)


def test_images_are_known_again_in_a_moved_folder_but_not_when_classes_or_images_changed(tmp_path):
    first = tmp_path / "first"
    write(first, "cat/1.png", "dog/1.png", "dog/2.png")
    known = open_labelled(first).fingerprint
    assert known["classes"] == ["cat", "dog"] and known["images"] == 3 and json.loads(json.dumps(known)) == known
    moved = tmp_path / "second [x]"
    shutil.copytree(first, moved)
    assert open_labelled(f"{moved}/").fingerprint == known
    os.utime(moved / "dog" / "1.png", (0, 0))
    assert open_labelled(moved).fingerprint == known

    def changed(change):
        shutil.rmtree(moved)
        shutil.copytree(first, moved)
        change()
        return open_labelled(moved).fingerprint

    assert changed(lambda: (moved / "cat").rename(moved / "cow"))["classes"] == ["cow", "dog"]
    assert changed(lambda: write(moved, "cow/1.png")) != known
    assert changed(lambda: (moved / "dog" / "2.png").rename(moved / "cat" / "2.png"))["rows"] != known["rows"]
    assert changed(lambda: (moved / "dog" / "2.png").write_bytes(encode(make_pixels(seed=9))))["rows"] != known["rows"]
    assert LabelledImages(load_images(train_data_dir=first), 8).fingerprint["classes"] is None


def test_in_a_large_folder_a_changed_size_of_any_file_changes_the_fingerprint(tmp_path):
    write(tmp_path, *(f"{row:03}.png" for row in range(300)))
    known = LabelledImages(load_images(train_data_dir=tmp_path), 8).fingerprint
    Image.fromarray(make_pixels(9, 9)).save(tmp_path / "001.png")  # whose content is not sampled: 0, 1, 2, 3, 4, 5, 7
    Image.fromarray(make_pixels(9, 9)).save(tmp_path / "006.png")
    assert LabelledImages(load_images(train_data_dir=tmp_path), 8).fingerprint["rows"] != known["rows"]


def test_a_stream_is_known_by_its_classes_and_first_rows(tmp_path):
    def fingerprint(root):
        dataset = load_images(train_data_dir=root, label_column="label", streaming=True)
        return StreamedImages(dataset, 8, label_column="label").fingerprint

    write(tmp_path / "a", "cat/1.png", "dog/1.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    known = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == known and known["classes"] == ["cat", "dog"]
    (tmp_path / "b" / "cat" / "1.png").write_bytes(encode(make_pixels(seed=9)))
    assert fingerprint(tmp_path / "b")["rows"] != known["rows"]


def test_an_output_folder_within_the_images_is_refused_also_through_links(tmp_path):
    write(tmp_path, "set/cat/1.png", "dogs/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "dogs")
    for output in ("set", "set/", "set/run/1", "link/run", "other/../set/run", "dogs/run", "set/cat"):
        for data in ("set", "link"):
            with pytest.raises(ValueError, match="would add its own files to the data"):
                check_output_dir(tmp_path / output, tmp_path / data)
    for output in ("run", "set2", "settle/run", "."):
        check_output_dir(tmp_path / output, tmp_path / "set")
    check_output_dir(tmp_path, None)
