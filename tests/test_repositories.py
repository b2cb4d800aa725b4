"""What loading and saving say when a folder, a name or a file of a model is not what it should be: one sentence."""

import json

import pytest
import safetensors.torch
from huggingface_hub import constants

from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.repositories import check_hub
from loopback_hub import LoopbackHub

CLASSES = [DualRatePipeline, UViTDenoiser, UViTContextEncoder, DualRateScheduler]


@pytest.fixture
def folder(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **entries):
    """Change entries of a JSON file; `...` takes one away."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./nowhere", "runs/nowhere/", "runs/nowhere/final", "my runs/last"]
)
def test_a_path_that_does_not_exist_is_named_as_a_folder(cls, name):
    """Mutants: a name that the Hub would refuse sent there; a path recognised by its first character alone."""
    with pytest.raises(OSError) as caught:
        cls.from_pretrained(name)
    assert str(caught.value) == f"{name} cannot be loaded: there is no such folder."


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["teacher", "org/teacher"])
def test_a_model_that_is_neither_a_folder_nor_in_the_cache_is_named_in_one_sentence(cls, name):
    with pytest.raises(OSError) as caught:
        cls.from_pretrained(name)
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be loaded: there is no such folder, and on the Hub or in its cache: ")
    assert "\n" not in message and ". " not in message and message.endswith(".")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", [5, None, ["org/model"]], ids=repr)
def test_a_name_that_is_no_name_is_refused(cls, name):
    with pytest.raises(ValueError, match="loaded by the name of a folder .*, got "):
        cls.from_pretrained(name)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"denoiser": ...}, "names no denoiser"),
        ({"scheduler": ...}, "names no scheduler"),
        ({"denoiser": [None, None]}, "names no denoiser"),
        ({"scheduler": [None, None]}, "names no scheduler"),
        ({"denoiser": None}, "must name a library and a class for denoiser, got None"),
        ({"context_encoder": None}, "must name a library and a class for context_encoder, got None"),
        ({"scheduler": "DualRateScheduler"}, "a library and a class for scheduler, got 'DualRateScheduler'"),
        ({"denoiser": ["diffusers_dualrate"]}, r"a class for denoiser, got \['diffusers_dualrate'\]"),
        ({"denoiser": ["diffusers_dualrate", 3]}, r"a class for denoiser, got \['diffusers_dualrate', 3\]"),
        (
            {"denoiser": ["diffusers_dualrate", "UVit"]},
            "names UVit as the class of denoiser, which diffusers_dualrate",
        ),
        ({"_class_name": ...}, "lacks _class_name"),
    ],
    ids=str,
)
def test_a_model_index_that_says_too_little_is_refused_by_its_file(folder, entries, message):
    """Kills: any check of `check_index` or of required components dropped; bare errors of keys and of unpacking."""
    change(folder / "model_index.json", **entries)
    with pytest.raises(ValueError, match=rf"model/model_index\.json .*{message}"):
        DualRatePipeline.from_pretrained(folder)


def test_a_model_of_a_library_that_is_not_installed_says_so(folder):
    change(folder / "model_index.json", text_encoder=["onnxruntime.training", "ORTModule"])
    with pytest.raises(ImportError, match=f"{folder} cannot be loaded: it needs onnxruntime, which is not installed"):
        DualRatePipeline.from_pretrained(folder)


def test_what_a_model_index_leaves_open_may_be_given(folder, make_networks):
    change(folder / "model_index.json", denoiser=[None, None], scheduler=..., context_encoder=...)
    encoder, denoiser = make_networks(num_classes=4)
    pipe = DualRatePipeline.from_pretrained(
        folder, denoiser=denoiser, scheduler=DualRateScheduler(), context_encoder=encoder
    )
    assert pipe.denoiser is denoiser and pipe.context_encoder is encoder


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no valid JSON"), ("[1]", "names and values in braces, got a li")]
)
@pytest.mark.parametrize("file", ["model_index.json", "denoiser/config.json", "scheduler/scheduler_config.json"])
def test_a_file_that_is_no_table_of_names_is_refused_by_its_path(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"{folder / file}.* {message}"):
        DualRatePipeline.from_pretrained(folder)


@pytest.mark.parametrize(("cls", "part"), [(UViTDenoiser, "denoiser"), (UViTContextEncoder, "context_encoder")])
def test_a_network_whose_file_holds_an_argument_that_it_does_not_know_is_refused(folder, cls, part):
    change(folder / part / "config.json", level_width=[8], blocks=3)
    for load in (lambda: cls.from_pretrained(folder / part), lambda: DualRatePipeline.from_pretrained(folder)):
        with pytest.raises(ValueError, match=f"{folder / part} cannot be loaded: .* holds blocks, level_width, which"):
            load()


@pytest.mark.parametrize(("cls", "part"), [(UViTDenoiser, "denoiser"), (UViTContextEncoder, "context_encoder")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_hold_nan_or_infinity_are_refused_by_their_name(folder, cls, part, bad):
    """Mutants: `isfinite` made `isnan`; `all` made `any`."""
    file = folder / part / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["trunk.patch_embed.weight"][0, 0, 0, 0] = bad
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    for load in (lambda: cls.from_pretrained(folder / part), lambda: DualRatePipeline.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"holds NaN or infinity in trunk\.patch_embed\.weight"):
            load()


def test_pickled_weights_are_refused_before_any_file_is_made(make_pipe, tmp_path):
    pipe = make_pipe()
    for thing in (pipe, pipe.denoiser, pipe.context_encoder):
        with pytest.raises(ValueError, match="safe_serialization=False writes pickled weights"):
            thing.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_classes_come_back_in_the_order_of_their_numbers(make_pipe, tmp_path):
    """JSON sorts keys as strings: 0, 1, 10, 11, 2."""
    names = {number: f"class {number}" for number in (11, 2, 0, 10, 1)}
    make_pipe(num_classes=12, id2label=names).save_pretrained(tmp_path)
    assert list(DualRatePipeline.from_pretrained(tmp_path).id2label) == [0, 1, 2, 10, 11]


def test_publishing_where_nothing_can_be_is_refused_with_the_reason_and_nothing_is_made(monkeypatch):
    def check(name="org/model"):
        check_hub("--push_to_hub", name)

    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_TOKEN", "hf_loopback")
        with pytest.raises(ValueError, match="^--push_to_hub needs the Hub, but HF_HUB_OFFLINE is set: publish"):
            check()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(ValueError, match="my model"):
            check("org/my model")
        check()
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(
            ValueError, match=f"^--push_to_hub needs the Hub at {hub.endpoint}, which .* used: .*[Tt]oken"
        ):
            check()
        assert not hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nobody listens
    with pytest.raises(ValueError, match="--push_to_hub needs the Hub at .*:1, which cannot be used: .*refused"):
        check()
