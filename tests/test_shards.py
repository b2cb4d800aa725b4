"""Tests of the files that a data set is read from: one that is missing, cut off, changed or slow is named."""

import io
import itertools
import shutil
import tarfile
import time

import datasets
import pytest

from diffusers_dualrate import shards
from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.inventory import describe_images
from diffusers_dualrate.shards import check_numbers, name_if_slow
from diffusers_dualrate.streams import StreamedImages
from test_data import encode, make_pixels

FILES, ROWS = 3, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two folders of twelve images of two classes: three Parquet shards, and three tar shards as of webdataset."""
    root = tmp_path_factory.mktemp("shards")
    for kind in ("parquet", "tar"):
        (root / kind).mkdir()
    datasets.disable_progress_bars()
    for shard in range(FILES):
        rows = [(encode(make_pixels(seed=row)), row % 2) for row in range(shard * ROWS, (shard + 1) * ROWS)]
        table = datasets.Dataset.from_dict(
            {"image": [{"bytes": image, "path": None} for image, _ in rows], "label": [label for _, label in rows]},
            datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"ab"])}),
        )
        table.to_parquet(str(root / f"parquet/train-{shard:05}-of-{FILES:05}.parquet"))
        with tarfile.open(root / f"tar/train-{shard:03}.tar", "w") as archive:
            for row, (image, label) in enumerate(rows):
                for ending, content in (("png", image), ("cls", str(label).encode())):
                    file = tarfile.TarInfo(f"{shard}{row}.{ending}")
                    file.size = len(content)
                    archive.addfile(file, io.BytesIO(content))
    datasets.enable_progress_bars()
    return root


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def stream(folder, **options):
    columns = {"label_column": "label"}
    if folder.name == "tar":
        columns, options = {"image_column": "png", "label_column": "cls"}, {"num_classes": 2} | options
    data = load_images(str(folder), streaming=True, **columns)
    return StreamedImages(data, 8, buffer_size=5, **columns, **options)


def read(images, count=FILES * ROWS):
    return [item["class_labels"].item() for item, _ in itertools.islice(images.read_from(0, 0), count)]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def second_image_of(path):
    """Where the second image of a tar file begins: cut there, it reads like a whole file of one image."""
    with tarfile.open(path) as archive:
        return archive.getmembers()[2].offset


def test_streams_of_parquet_and_of_tar_files_give_every_image_and_say_how_many_where_files_tell(folder):
    for name, said in (("parquet", "a stream of 12 images, number of classes: 2"), ("tar", "a stream of images,")):
        images = stream(folder / name)
        assert sorted(read(images)) == [0] * 6 + [1] * 6
        assert describe_images(images).startswith(said)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("shard", range(FILES))
def test_a_shard_that_is_missing_or_cut_off_from_the_start_is_named_before_anything_is_read(
    folder, tmp_path, shard, streaming
):
    """Kills: only the first shard looked at; only streams."""
    options = {"streaming": streaming, "cache_dir": tmp_path / "cache"}
    path = folder / f"parquet/train-{shard:05}-of-00003.parquet"
    cut(path, 500)
    with pytest.raises(ValueError, match=rf"{path.name}' is cut off or broken: .*footer"):
        load_images(str(path.parent), **options)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}' is missing: of the 3 that .* tell of, 1 are not there"):
        load_images(str(path.parent), **options)
    path = folder / f"tar/train-{shard:03}.tar"
    cut(path, second_image_of(path))
    with pytest.raises(ValueError, match=f"{path.name}' is cut off: a tar file ends with 1,024 zeros"):
        load_images(str(path.parent), image_column="png", **options)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00002-1a2b.parquet"], "train-00001-of-00002-1a2b.parquet' is missing: of the 2"),
        (["a-0-of-3-1a.x", "a-2-of-3-2b.x"], "a-1-of-3' is missing"),
        (["a-1-of-2.x"], "a-0-of-2.x"),
        (["a-2-of-2.x"], "a-1-of-2.x"),
        (["hf://datasets/org/name@main/a-0-of-2.x"], "hf://datasets/org/name@main/a-1-of-2.x"),
        (["a-1-of-2.x", "a-2-of-2.x"], None),
        (["a-0-of-1.x", "b-0-of-2.x", "b-1-of-2.x", "c.x", "part-of-it.x"], None),
    ],
)
def test_numbers_in_the_names_of_shards_tell_which_is_missing(names, missing):
    if missing is None:
        return check_numbers(f"data/{name}" for name in names)
    with pytest.raises(ValueError, match=missing):
        check_numbers(names)


def test_a_data_set_of_other_rows_than_its_readme_tells_is_refused(folder):
    (folder / "parquet/train-00002-of-00003.parquet").unlink()
    for shard in range(2):  # whose names tell nothing any more
        (folder / f"parquet/train-0000{shard}-of-00003.parquet").rename(folder / f"parquet/{shard}.parquet")
    told = "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 12\n---\n"
    (folder / "parquet/README.md").write_text(told)
    with pytest.raises(ValueError, match="parquet' has 8 rows, and its README tells of 12"):
        load_images(str(folder / "parquet"), streaming=True)
    (folder / "parquet/README.md").unlink()
    assert stream(folder / "parquet").fingerprint["images"] == 8


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("parquet/train-00001-of-00003.parquet", 500, r"it had [\d,]+ bytes when the run began, and has 500 now"),
        ("parquet/train-00001-of-00003.parquet", None, "No such file or directory"),
        ("tar/train-001.tar", 1024, "it had 10,240 bytes when the run began, and has 1,024 now"),
        ("tar/train-001.tar", None, "No such file or directory"),
    ],
)
def test_a_shard_that_is_lost_or_cut_off_while_a_run_reads_ends_it_by_name(folder, name, size, reason):
    images = stream((folder / name).parent)
    (folder / name).unlink() if size is None else cut(folder / name, size)
    with pytest.raises(ValueError, match=rf"The shard '{folder / name}' cannot be read: {reason}"):
        read(images)


def test_a_shard_that_breaks_while_a_run_reads_and_keeps_its_size_is_named(folder):
    path = folder / "parquet/train-00001-of-00003.parquet"
    images, content = stream(folder / "parquet"), path.read_bytes()
    path.write_bytes(bytes(200) + content[200:])  # headers of its pages
    with pytest.raises(ValueError, match=f"The shard '{path}' cannot be read: "):
        read(images)


def test_shards_that_were_lost_between_two_runs_change_the_fingerprint_of_a_stream(folder):
    known = {name: stream(folder / name).fingerprint for name in ("parquet", "tar")}
    assert known == {name: stream(folder / name).fingerprint for name in ("parquet", "tar")}
    (folder / "tar/train-002.tar").unlink()
    assert stream(folder / "tar").fingerprint != known["tar"]


def test_a_slow_shard_is_named_once_while_the_run_waits_and_not_while_the_run_is_busy(monkeypatch):
    monkeypatch.setattr(shards, "PATIENCE", 0.1)

    def give(seconds):
        yield 0
        time.sleep(seconds)
        yield 1

    with pytest.warns(UserWarning, match="'a.parquet' is slow: the run has waited for it for 0.1 s") as said:
        assert list(name_if_slow(give(0.5), "a.parquet")) == [0, 1]
    assert len(said) == 1
    for _ in name_if_slow(give(0), "b.parquet"):
        time.sleep(0.3)  # a warning would end the test


def test_a_set_from_tar_files_is_read_without_a_stream_as_well(folder, tmp_path):
    columns = {"image_column": "png", "label_column": "cls"}
    data = load_images(str(folder / "tar"), cache_dir=tmp_path / "cache", **columns)
    assert len(LabelledImages(data, 8, num_classes=2, **columns)) == FILES * ROWS
