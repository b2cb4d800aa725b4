"""Training in the latents of an autoencoder: encoding, the cache, and the commands as a user runs them.

The autoencoders are tiny real ones. What is expected comes from them directly, image by image.
"""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train_classifier
import train_dual_rate
import train_single_rate
from conftest import draw_classes, fill_with_noise, reset_accelerate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTDenoiser, inventory, latent_cache
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.autoencoders import open_vae
from diffusers_dualrate.cards import make_card
from diffusers_dualrate.configuration import Data
from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.latent_cache import LatentImages
from diffusers_dualrate.latents import decode, encode, moments_of
from diffusers_dualrate.repositories import describe_origin
from diffusers_dualrate.sources import check_start, open_images, open_start

FLIPPED = Augmentation(flip=True)


def make_vae(kind=AutoencoderKL, **options):
    torch.manual_seed(2)
    if kind is AutoencoderTiny:
        shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        return kind(**shape, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **options).eval()
    if kind is AutoencoderDC:
        return kind(
            latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), **options,
        ).eval()  # fmt: skip
    shape = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.5}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return kind(**{**shape, **blocks, **options}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images with two classes."""
    return draw_classes(tmp_path_factory.mktemp("images"), 5, (16, 16))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of an autoencoder with both factors."""
    path = tmp_path_factory.mktemp("vae")
    make_vae(shift_factor=0.25).save_pretrained(path)
    return path


def pixels_of(folder, augmentation=Augmentation()):  # noqa: B008 (it is frozen)
    dataset = load_images(train_data_dir=folder, label_column="label")
    return LabelledImages(dataset, 16, label_column="label", augmentation=augmentation, seed=3)


def cached(folder, cache, vae=None, augmentation=FLIPPED):
    vae = make_vae(shift_factor=0.25) if vae is None else vae
    latents = LatentImages(pixels_of(folder), vae, cache, augmentation=augmentation, seed=3)
    latents.encode_all()
    return latents


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0.25), (3.0, None), (None, None)])
def test_latents_are_drawn_from_the_posterior_of_their_image_and_decode_by_the_same_factors(scale, shift):
    """z = (mean + deviation noise − shift) scale. Mutants: a sign, × for /, the variance, one seed for all rows."""
    vae = make_vae(scaling_factor=scale or 1.0, shift_factor=shift)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    z, noise = (
        encode(vae, images, [7, 8]),
        torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)]),
    )
    own = z / (scale or 1) + (shift or 0)
    torch.testing.assert_close(own, posterior.mean + posterior.var.sqrt() * noise, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(decode(vae, z), vae.decode(own).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [(AutoencoderTiny, "latents"), (AutoencoderDC, "latent")])
def test_an_autoencoder_without_posterior_gives_the_latents_themselves(kind, name, folder, tmp_path):
    vae = make_vae(kind, scaling_factor=0.5)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = 0.5 * getattr(vae.encode(images), name)
    torch.testing.assert_close(encode(vae, images, [7, 8]), expected)
    item = cached(folder, tmp_path, vae, Augmentation())[2]["pixel_values"]
    assert item.shape == expected.shape[1:]


def test_a_cache_holds_what_the_autoencoder_makes_of_each_image_as_it_is_mirrored_in_each_epoch(folder, tmp_path):
    """Mutants: latents that are mirrored themselves; mean and deviation exchanged; the sides exchanged."""
    latents, pixels, mirrored = cached(folder, tmp_path), pixels_of(folder, FLIPPED), set()
    plain = pixels_of(folder)
    for epoch in range(3):
        for index in (0, 4, 9):
            image, item = pixels[epoch, index], latents[epoch, index]
            mirrored.add(not torch.equal(image["pixel_values"], plain[index]["pixel_values"]))
            expected = moments_of(latents.vae, image["pixel_values"][None])[0]
            torch.testing.assert_close(item["pixel_values"], expected, atol=1e-5, rtol=1e-5)
            assert item["class_labels"] == image["class_labels"]
    assert mirrored == {True, False}
    assert latents.sample_shape == (4, 8, 8) and len(latents) == 10 and latents.id2label == {0: "cat", 1: "dog"}
    assert torch.equal(latents.class_labels, pixels.class_labels)


def files_of(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_a_cache_is_made_once_goes_on_where_it_was_and_is_refused_where_it_is_not_as_written(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(latent_cache, "_FILE_BYTES", 3 * 4096)  # three images
    cached(folder, tmp_path)
    files, times = files_of(tmp_path), [path.stat().st_mtime_ns for path in files_of(tmp_path)]
    assert len(files) == 4
    encoded = []
    monkeypatch.setattr(latent_cache, "moments_of", lambda vae, x: encoded.append(len(x)) or moments_of(vae, x))
    cached(folder, tmp_path)
    assert not encoded and times == [path.stat().st_mtime_ns for path in files_of(tmp_path)]

    kept = files[1].read_bytes()
    files[1].unlink()  # a run that was killed in the middle
    now = time.time()
    for name, age in ((".00001-7", 7200), (".00001-8", 0)):  # the second may be of a run that still writes it
        (files[1].parent / name).write_bytes(kept[:100])
        os.utime(files[1].parent / name, (now - age, now - age))
    cached(folder, tmp_path)
    assert [path.name for path in files[1].parent.glob(".*")] == [".00001-8"]
    remade = load_file(files[1])
    files[1].write_bytes(kept)
    assert encoded == [3, 3] and all(torch.equal(remade[name], tensor) for name, tensor in load_file(files[1]).items())

    files[1].write_bytes(kept[:-9])
    with pytest.raises(ValueError, match="^The latent cache .* is damaged, in 00001.safetensors: .*; delete it, and"):
        cached(folder, tmp_path)
    files[1].write_bytes(kept[:-9] + bytes([kept[-9] ^ 1]) + kept[-8:])
    with pytest.raises(
        ValueError, match="^The latent cache .* is damaged, in 00001.safetensors; delete it, and it is"
    ):
        cached(folder, tmp_path)
    files[1].write_bytes(kept)
    other = cached(folder, tmp_path, make_vae())
    assert other.folder != files[0].parent, "another autoencoder"
    shutil.copy(files_of(other.folder)[0], files[0])
    with pytest.raises(
        ValueError, match="00000.safetensors holds latents of other images or of another vae; delete it"
    ):
        cached(folder, tmp_path)
    assert cached(folder, tmp_path, augmentation=Augmentation()).folder not in (other.folder, files[0].parent)


def test_a_cache_is_another_one_under_another_limit_of_pixels(folder, tmp_path):
    """Where images above it are skipped, others stand in for them."""
    limited = pixels_of(folder)
    limited.max_image_pixels = 300
    vae = make_vae(shift_factor=0.25)
    other = LatentImages(limited, vae, tmp_path, augmentation=FLIPPED, seed=3)
    assert other.folder != cached(folder, tmp_path, vae).folder


def test_a_cache_is_another_one_for_a_file_of_rows_in_which_one_image_was_exchanged(folder, tmp_path, monkeypatch):
    """Also where the fingerprint of the data does not look into it. Mutant: it is the fingerprint alone."""
    monkeypatch.setattr(inventory, "_SAMPLED", 2)
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    paths, caches = sorted(folder.glob("*/*.png"))[:4], []
    for number, fourth in enumerate((paths[3], tmp_path / "black.png")):
        files = [{"bytes": path.read_bytes(), "path": f"{i}.png"} for i, path in enumerate([*paths[:3], fourth])]
        rows = {"image": files, "label": [0, 0, 1, 1]}
        data = Dataset.from_dict(rows, Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])}))
        data.to_parquet(str(tmp_path / f"{number}" / "train.parquet"))
        images = LabelledImages(
            load_images(str(tmp_path / f"{number}"), label_column="label"), 16, label_column="label"
        )
        caches.append(LatentImages(images, make_vae(), tmp_path, augmentation=FLIPPED, seed=3))
    assert caches[0].fingerprint == caches[1].fingerprint and caches[0].folder != caches[1].folder


def test_processes_encode_a_share_of_the_files_each_and_together_what_one_does(folder, tmp_path, monkeypatch):
    """Here a process is a thread, which waits for the other one. Kills: a share of what is missing by then."""
    monkeypatch.setattr(latent_cache, "_FILE_BYTES", 3 * 4096)  # three images
    vae, barrier, made = make_vae(shift_factor=0.25), threading.Barrier(2, timeout=60), {}
    alone = cached(folder, tmp_path / "one", vae)

    def state():
        rank = int(threading.current_thread().name)
        return SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, device=torch.device("cpu"),
            wait_for_everyone=barrier.wait,
        )  # fmt: skip

    def encode_share():
        made[threading.current_thread().name] = cached(folder, tmp_path / "two", vae)

    monkeypatch.setattr(latent_cache, "PartialState", state)
    processes = [threading.Thread(target=encode_share, name=str(rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert made.keys() == {"0", "1"} and len(files_of(tmp_path / "two")) == 4
    for index in range(10):
        expected = alone[1, index]["pixel_values"]
        assert all(torch.equal(latents[1, index]["pixel_values"], expected) for latents in made.values())


def test_latents_that_are_not_finite_are_refused_and_not_kept(folder, tmp_path):
    vae = make_vae()
    vae.encoder.conv_in.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="makes latents of the images 0 to 9 that are not finite"):
        cached(folder, tmp_path, vae)
    assert not files_of(tmp_path)


def arguments(folder, output_dir, *more):
    return [
        *("--preset", "examples/presets/tiny.json", "--train_data_dir", str(folder), "--label_column", "label"),
        *("--output_dir", str(output_dir), "--cache_dir", str(Path(output_dir).parent / "cache")),
        *("--resolution", "16", "--validation_steps", "0"),
        *map(str, more),
    ]


def run(script, *given):
    try:
        return script.main(script.parse_args(arguments(*given)))
    finally:
        reset_accelerate()


@pytest.fixture(scope="module")
def trained(folder, vae, tmp_path_factory):
    """A single-rate model of latents, with a grid of samples."""
    path = tmp_path_factory.mktemp("trained") / "single"
    assert run(train_single_rate, folder, path, "--vae", vae, "--validation_steps", "4") == 0
    return path


def weights(path):
    return load_file(Path(path) / "denoiser/diffusion_pytorch_model.safetensors")


def test_a_model_of_latents_is_trained_drawn_decoded_and_described_in_pixels(trained, vae):
    pipe = DualRatePipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.denoiser.config.in_channels == 4 and pipe.denoiser.config.sample_size == 8
    assert not pipe.scheduler.config.clip_sample
    assert pipe([1]).images[0].size == (16, 16)
    theirs = AutoencoderKL.from_pretrained(vae).state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in pipe.vae.state_dict().items())
    card = (trained / "README.md").read_text()
    assert "for images of 16x16" in card and "latent-space" in card and "pixel-space" not in card
    grid = Image.open(next((trained / "samples").glob("*.png")))
    assert min(grid.size) > 16 * 4


def test_a_run_of_latents_goes_on_bit_for_bit_and_on_the_fly_learns_the_same_to_rounding(
    trained, folder, vae, tmp_path
):
    run(train_single_rate, folder, tmp_path / "two", "--vae", vae, "--max_train_steps", 2)
    run(train_single_rate, folder, tmp_path / "two", "--vae", vae, "--resume_from_checkpoint", "latest")
    run(train_single_rate, folder, tmp_path / "fly", "--vae", vae, "--no_latent_cache")
    expected, resumed, flown = weights(trained), weights(tmp_path / "two"), weights(tmp_path / "fly")
    assert all(torch.equal(weight, resumed[name]) for name, weight in expected.items())
    for name, weight in expected.items():
        torch.testing.assert_close(flown[name], weight, atol=1e-4, rtol=1e-3)
    assert len(files_of(tmp_path / "cache")) == 1
    make_vae().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to a run with another configuration: images.vae is"):
        run(
            train_single_rate,
            folder,
            tmp_path / "two",
            "--vae",
            tmp_path / "other",
            "--resume_from_checkpoint",
            "latest",
        )


def test_a_pair_takes_the_autoencoder_of_the_model_it_starts_from_and_is_measured_in_pixels(trained, folder, tmp_path):
    start = (
        "--pretrained_model_name_or_path",
        trained,
        "--freeze_encoder",
        "--max_train_steps",
        1,
        "--lr_warmup_steps",
        0,
    )
    assert run(train_dual_rate, folder, tmp_path / "pair", *start) == 0
    pair = DualRatePipeline.from_pretrained(tmp_path / "pair")
    assert pair.vae.config.latent_channels == 4 and pair.context_encoder is not None
    told = json.loads((tmp_path / "pair/configuration.json").read_text())
    assert told["start"]["vae"] and told["denoiser"]["sample_size"] == 8
    file = str(tmp_path / "classifier.safetensors")
    train_classifier.main(train_classifier.parse_args([
        "--preset", str(tmp_path / "pair/configuration.json"), "--train_data_dir", str(folder), "--label_column", "label",
        "--max_train_steps", "1", "--train_batch_size", "4", "--held_out", "0.25", "--output", file,
    ]))  # fmt: skip
    args = evaluate.parse_args([
        "--classifier", file, "--cache_dir", str(tmp_path / "references"), "--model", str(tmp_path / "pair"), "--train_data_dir", str(folder), "--label_column", "label", "--num_samples", "4",
        "--num_noises", "4", "--seeds", "0", "--num_inference_steps", "2", "--num_context_steps", "1",
        "--output", str(tmp_path / "evaluation.json"), "--grid", str(tmp_path / "grid.png"),
    ])  # fmt: skip
    report = evaluate.main(args)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.vae.decode(torch.zeros(1, 4, 8, 8))
    assert report["vae"] == {"compression": 2, "decode_flops": counter.get_total_flops()}
    assert report["v_loss"]["model"] > 0 < report["vae"]["decode_flops"]
    index, decoding = json.loads((tmp_path / "pair/model_index.json").read_text()), counter.get_total_flops() / 1e9
    card = make_card(report, index, {}, presets=None)
    assert f"Decoding, which GFLOP leaves out, takes {decoding:.3g} GFLOP." in card
    assert report["samples"][0]["fd_local_4"]["mean"] > 0
    assert report["parameters"].keys() == {"context_encoder", "denoiser"} and (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--override", 'training.augmentation={"translation":2}'), "augmentation translation=2 needs pixels, but latents are encoded once"),
        (("--override", 'training.augmentation={"background":[0,9]}'), r"augmentation background=\(0, 9\) needs pixels"),
        (("--streaming",), "--streaming reads images as they come, which no cache can hold: add --no_latent_cache"),
        (("--resolution", "17"), "--resolution must be divisible by 2 with --vae .*, got 17"),
        (("--override", "scheduler.clip_sample=true"), "clip_sample=true would clip latents, which have no bounds"),
    ],
)  # fmt: skip
def test_what_latents_cannot_be_learned_with_is_refused_before_any_image_is_read(more, message, folder, vae, tmp_path):
    args = train_single_rate.parse_args(arguments(folder, tmp_path / "run", "--vae", vae, *more))
    with pytest.raises(ValueError, match=message):
        configure(args, "train_single_rate")
    assert not files_of(tmp_path)


def test_what_is_no_autoencoder_or_another_one_is_refused(trained, folder, vae, tmp_path):
    def refuse(message, *more):
        with pytest.raises(ValueError, match=message):
            configure(train_single_rate.parse_args(arguments(folder, tmp_path / "run", *more)), "train_single_rate")

    UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path / "unet")  # fmt: skip
    refuse(
        "--vae .*unet cannot be loaded: it holds a UNet2DModel, and must hold one of AutoencoderKL",
        "--vae",
        tmp_path / "unet",
    )
    refuse("--vae .*nowhere cannot be loaded", "--vae", tmp_path / "nowhere")
    refuse("--no_latent_cache has no effect where pixels are learned", "--no_latent_cache")
    pixels = DualRatePipeline(fill_with_noise(UViTDenoiser(
        sample_size=16, num_classes=2, level_channels=(8, 8), level_types=("res", "res"), level_blocks=(1, 1),
        embedding_dim=8), 0), DualRateScheduler(), num_inference_steps=2)  # fmt: skip
    pixels.save_pretrained(tmp_path / "pixels")
    refuse("--vae .*pixels is a model without an autoencoder", "--vae", tmp_path / "pixels")
    data = Data(train_data_dir=str(folder), label_column="label", cache_dir=str(tmp_path / "cache"))
    latents = open_images(data, 8, channels=4, vae=str(vae))
    with pytest.raises(ValueError, match="pixels draws pixels, and the images are learned as latents: see --vae"):
        check_start("pixels", open_start(str(tmp_path / "pixels")), latents)
    make_vae().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="draws latents of another vae than the one that --vae names"):
        images = open_images(data, 8, channels=4, vae=str(tmp_path / "other"), is_cached=False)
        check_start("trained", open_start(str(trained)), images)
    assert not (tmp_path / "cache/latents").exists(), "no image was encoded"


def test_no_image_is_encoded_for_a_run_that_is_refused(trained, folder, vae, tmp_path):
    """In the folder of another run, and with a share of the batch that is no image; neither keeps its folder."""
    options = ("--vae", vae, "--cache_dir", tmp_path / "cache")
    with pytest.raises(ValueError, match="single already holds a run: give --resume_from_checkpoint latest"):
        run(train_single_rate, folder, trained, *options)
    with pytest.raises(ValueError, match="A share of 0.01 of 8 images is none: use larger batches, or 0"):
        run(train_dual_rate, folder, tmp_path / "run", *options, "--context_dropout", 0.01)
    assert not (tmp_path / "cache/latents").exists()
    assert run(train_dual_rate, folder, tmp_path / "run", *options, "--max_train_steps", 1) == 0
    assert len(files_of(tmp_path / "cache/latents")) == 1


def test_streamed_images_are_encoded_as_they_come(folder, vae, tmp_path):
    flags = ("--vae", vae, "--streaming", "--no_latent_cache", "--max_train_steps", 1, "--lr_warmup_steps", 0)
    assert run(train_single_rate, folder, tmp_path / "stream", *flags) == 0
    assert DualRatePipeline.from_pretrained(tmp_path / "stream").vae is not None


def test_an_autoencoder_of_somebody_keeps_its_origin_and_its_licence_in_every_model_that_holds_it(
    make_networks, tmp_path
):
    """Mutants: the folder of a model taken for its autoencoder's, an origin of the copy instead of the first."""
    first = tmp_path / "models--org--ae/snapshots" / ("a" * 40)
    make_vae().save_pretrained(first)
    (first / "README.md").write_text("---\nlicense: mit\n---\n")
    denoiser = make_networks(denoiser={"context_channels": None}, in_channels=4)[1]
    told = "Its autoencoder is a copy of another repository's: [org/ae](https://huggingface.co/org/ae) at revision `aaaaaaaaaaaa`."
    for name, vae in (("one", open_vae(str(first))), ("two", None), ("three", open_vae), ("four", make_vae())):
        if vae is None:
            pipe = DualRatePipeline.from_pretrained(tmp_path / "one")
        else:
            vae = vae(str(tmp_path / "two")) if vae is open_vae else vae
            pipe = DualRatePipeline(denoiser, DualRateScheduler(clip_sample=False), vae=vae, num_inference_steps=1)
        pipe.save_pretrained(tmp_path / name)
        expected = "" if name == "four" else f"{told} The autoencoder's licence is mit."
        assert describe_origin(tmp_path / name) == expected
        assert "_name_or_path" not in json.loads((tmp_path / name / "vae/config.json").read_text())
    AutoencoderKL.from_pretrained(tmp_path / "three/vae")


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny, AutoencoderDC])
def test_tiles_slices_and_offloading_serve_the_autoencoder_of_a_pipeline(kind, make_networks):
    denoiser = make_networks(denoiser={"context_channels": None}, in_channels=4)[1]
    pipe = DualRatePipeline(denoiser, DualRateScheduler(clip_sample=False), vae=make_vae(kind), num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        return pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images

    whole = draw()
    assert whole.shape == (2, 3, 16, 16) and draw(height=32, width=24).shape == (2, 3, 32, 24)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(draw(), whole, atol=1e-5, rtol=1e-4)
    if kind is not AutoencoderTiny:  # whose tiles have the size of the released one
        pipe.vae.enable_tiling()
    torch.testing.assert_close(draw(), whole, atol=1e-5, rtol=1e-4)  # one tile
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(draw(), whole, atol=1e-5, rtol=1e-4)
    assert pipe.vae._hf_hook.prev_module_hook.model is denoiser, "the autoencoder comes after the networks"


def test_a_changed_autoencoder_is_nobodys_copy(make_networks, tmp_path):
    first = tmp_path / "models--org--ae/snapshots" / ("a" * 40)
    make_vae().save_pretrained(first)
    denoiser = make_networks(denoiser={"context_channels": None}, in_channels=4)[1]
    vae = open_vae(str(first))
    next(vae.parameters()).data.add_(0.1)
    pipe = DualRatePipeline(denoiser, DualRateScheduler(clip_sample=False), vae=vae, num_inference_steps=1)
    pipe.save_pretrained(tmp_path / "changed")
    assert describe_origin(tmp_path / "changed") == ""


def test_an_autoencoder_with_factors_of_each_channel_is_refused(tmp_path):
    make_vae(latents_mean=[0.5] * 4, latents_std=[2.0] * 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its latents_mean and latents_std are not applied here"):
        open_vae(str(tmp_path))


def test_a_file_that_takes_the_place_of_another_of_its_size_is_encoded_anew(tmp_path):
    """The fingerprint looks into 256 images; this one is none of them."""
    (tmp_path / "images").mkdir()
    folder = draw_classes(tmp_path / "images", 150, (4, 4))
    dataset = load_images(train_data_dir=folder, label_column="label")
    images = LabelledImages(dataset, 16, label_column="label")
    vae = make_vae()
    name = LatentImages(images, vae, tmp_path / "cache", augmentation=FLIPPED, seed=0).name
    for path in sorted(folder.rglob("*.png")):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    changed = LabelledImages(dataset, 16, label_column="label")
    assert changed.fingerprint == images.fingerprint
    assert LatentImages(changed, vae, tmp_path / "cache", augmentation=FLIPPED, seed=0).name != name
