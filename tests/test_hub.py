"""Loading from and publishing to a Hub, with a real client in its own process against `LoopbackHub`.

A process costs seconds to import diffusers, so each fixture that starts one answers for several tests. Weights are noise:
a network that ends in zeros would give the same image whatever was loaded.
"""

import json
import pickle
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard

import diffusers_dualrate
from conftest import make_text_encoder, make_tokenizer
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.repositories import content_of
from loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]
PRESET = json.loads((ROOT / "examples/presets/tiny.json").read_text())
STEPS = {"num_inference_steps": 8, "num_context_steps": 2}
LABELS = {0: "cat", 1: "dog", 2: "owl"}
WEIGHTS = "diffusion_pytorch_model"

ARRIVE = """
import contextlib, json, sys, numpy, torch
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, UViTContextEncoder, UViTDenoiser

images, answers = {}, {}
torch.set_num_threads(int(sys.argv[1]))

def sample(pipe, class_labels=[1]):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=class_labels, generator=generator, output_type="np").images

@contextlib.contextmanager
def attempt(name):
    try:
        yield
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"

def load(name, source, **options):
    with attempt(name):
        images[name] = sample(DualRatePipeline.from_pretrained(source, **options))
"""

LEAVE = """
numpy.savez(sys.argv[2], **images)
print(json.dumps(answers))
"""

FIRST_VISIT = """
load("cold", "org/pair")
load("single-rate", "org/single-rate")
load("fp16", "org/variant", variant="fp16")
load("with code", "org/with-code")
load("with code, from a folder", sys.argv[3])
load("with shim", "org/with-shim")
load("pickled", "org/pickled")
load("pickle bomb", "org/pickle-bomb")
load("missing repository", "org/absent")
load("missing variant", "org/pair", variant="ema")

with attempt("two repositories"):
    encoder = UViTContextEncoder.from_pretrained("org/other", subfolder="context_encoder")
    load("two repositories", "org/pair", context_encoder=encoder)
with attempt("pickle bomb as component"):
    UViTDenoiser.from_pretrained("org/pickle-bomb", subfolder="denoiser")
with attempt("named label"):
    images["named label"] = sample(DualRatePipeline.from_pretrained("org/pair"), ["dog"])
with attempt("pushed"):
    pipe = DualRatePipeline.from_pretrained("org/pair")
    pipe.push_to_hub("org/pushed")
    load("pushed", "org/pushed")
with attempt("pushed one by one"):
    pipe.denoiser.push_to_hub("org/denoiser-alone")
    pipe.context_encoder.push_to_hub("org/encoder-alone")
    pipe.scheduler.push_to_hub("org/scheduler-alone")
    pipe = DualRatePipeline(
        UViTDenoiser.from_pretrained("org/denoiser-alone"),
        DualRateScheduler.from_pretrained("org/scheduler-alone"),
        UViTContextEncoder.from_pretrained("org/encoder-alone"),
        num_inference_steps=8,
        num_context_steps=2,
    )
    images["pushed one by one"] = sample(pipe)
with attempt("text"):
    from diffusers_dualrate.text_encoding import load_text_encoding

    text = DualRatePipeline.from_pretrained("org/text")
    text.set_progress_bar_config(disable=True)
    images["text"] = text("a red apple", generator=torch.Generator().manual_seed(0), output_type="np").images
    answers["text"] = type(load_text_encoding("org/text").text_encoder).__name__
with attempt("dtype"):
    half = DualRatePipeline.from_pretrained("org/variant", variant="fp16", dtype=torch.float16)
    answers["dtype"] = [str(half.denoiser.dtype), str(half.context_encoder.dtype)]
"""

SECOND_VISIT = """
load("cached", "org/single-rate", local_files_only=True)
load("not cached", "org/uncached", local_files_only=True)
load("variant not cached", "org/pair", variant="fp16", local_files_only=True)
load("warm", "org/pair")
"""

VISIT_WITHOUT_HUB = """
load("cached", "org/pair")
load("cached variant", "org/variant", variant="fp16")
load("not cached", "org/uncached")
load("plain weights not cached", "org/variant")
load("variant not cached", "org/pair", variant="fp16")
"""

# Someone who has the package installed and does not know it.
STRANGER = """
import json, sys, numpy, torch
from diffusers import DiffusionPipeline

torch.set_num_threads(int(sys.argv[1]))
images, answers = {}, {}
for name, source in (("hub", "org/pair"), ("folder", sys.argv[3])):
    try:
        DiffusionPipeline.from_pretrained(source, custom_pipeline=source)
    except ValueError as error:
        answers[name] = str(error)
    pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images[name] = pipe(class_labels=[1], generator=generator, output_type="np").images
"""


@dataclass
class Visit:
    """What a user's process brought home: images and errors by the attempt's name, and the requests it made."""

    images: dict[str, np.ndarray]
    answers: dict[str, str | list[str]]
    requests: list[tuple[str, str]]

    def image(self, attempt: str) -> np.ndarray:
        assert attempt in self.images, self.answers.get(attempt)
        return self.images[attempt]

    def error(self, attempt: str) -> str:
        assert attempt in self.answers, f"{attempt}: no error"
        return self.answers[attempt]

    def requests_for(self, repo_id: str) -> list[tuple[str, str]]:
        return [request for request in self.requests if f"/{repo_id}" in request[1]]


def visit(hub: LoopbackHub, environment: dict[str, str], folder: Path, script: str, *arguments: Path) -> Visit:
    """Runs a user's script in its own process."""
    start, images = len(hub.requests), folder / "images.npz"
    environment = environment | {"PYTHONPATH": str(Path(diffusers_dualrate.__file__).parents[1])}
    code = (script if script is STRANGER else ARRIVE + script) + LEAVE
    command = [sys.executable, "-c", code, str(torch.get_num_threads()), images, *arguments]
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    with np.load(images) as arrays:
        answers = json.loads(process.stdout.splitlines()[-1])
        return Visit(dict(arrays), answers, hub.requests[start:])


def add_noise_to_weights(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def round_to_half(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(tensor.half())


def make_pipeline(seed: int, single_rate: bool = False) -> DualRatePipeline:
    torch.manual_seed(seed)
    classes = {"num_classes": len(LABELS)}
    if single_rate:
        encoder, denoiser = None, UViTDenoiser(**{**PRESET["denoiser"], **classes, "context_channels": None})
    else:
        encoder = UViTContextEncoder(**{**PRESET["context_encoder"], **classes})
        denoiser = UViTDenoiser(**{**PRESET["denoiser"], **classes})
        add_noise_to_weights(encoder, seed)
    add_noise_to_weights(denoiser, seed)
    return DualRatePipeline(
        denoiser=denoiser,
        scheduler=DualRateScheduler(**PRESET["scheduler"]),
        context_encoder=encoder,
        id2label=LABELS,
        **STEPS,
    )


def make_text_pipeline() -> DualRatePipeline:
    """A pair of text with all that it takes to draw a prompt."""
    text = {"num_classes": None, "cross_attention_dim": 8, "text_length": 6}
    encoder = UViTContextEncoder(**PRESET["context_encoder"] | text)
    denoiser = UViTDenoiser(**PRESET["denoiser"] | text)
    for network in (encoder, denoiser):
        for name, weight in network.named_parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 3)
    parts = {"text_encoder": make_text_encoder(), "tokenizer": make_tokenizer(), "guidance_scale": 2.0}
    return DualRatePipeline(denoiser, DualRateScheduler(), encoder, **parts, **STEPS)


def sample(pipe: DualRatePipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[1], generator=torch.Generator().manual_seed(0), output_type="np").images


def pickle_weights(folder: Path) -> None:
    """Replaces every safetensors file of a saved pipeline by an ordinary pickled state dict."""
    for name, network in (("denoiser", UViTDenoiser), ("context_encoder", UViTContextEncoder)):
        component = network.from_pretrained(folder / name)
        (folder / name / f"{WEIGHTS}.safetensors").unlink()
        torch.save(component.state_dict(), folder / name / f"{WEIGHTS}.bin")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.fixture(scope="module")
def pair() -> DualRatePipeline:
    return make_pipeline(seed=0)


@pytest.fixture(scope="module")
def other() -> DualRatePipeline:
    return make_pipeline(seed=1)


@pytest.fixture(scope="module")
def single_rate() -> DualRatePipeline:
    return make_pipeline(seed=2, single_rate=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pair, other, single_rate) -> dict[str, Path]:
    """The content of every repository, by name. Code and bombs in it would leave files in `detonated`."""
    root = tmp_path_factory.mktemp("repositories")
    names = "pair other single-rate text variant with-code with-shim with-card pickled pickle-bomb detonated".split()
    folders = {name: root / name for name in names}
    folders["detonated"].mkdir()
    pair.save_pretrained(folders["pair"])
    other.save_pretrained(folders["other"])
    single_rate.save_pretrained(folders["single-rate"])
    make_text_pipeline().save_pretrained(folders["text"])
    for name in ("variant", "with-code", "with-shim", "pickled", "pickle-bomb"):
        shutil.copytree(folders["pair"], folders[name])

    half = make_pipeline(seed=0)
    half.denoiser.to(torch.float16)
    half.context_encoder.to(torch.float16)
    half.save_pretrained(folders["variant"], variant="fp16")

    code = f"open({str(folders['detonated'] / 'code')!r}, 'w')\n"
    for path in ("pipeline.py", "diffusers_dualrate.py", "denoiser/anything.py", "scheduler/anything.py"):
        (folders["with-code"] / path).write_text(code)
    (folders["with-shim"] / "denoiser/diffusers_dualrate.py").write_text(code)  # where diffusers looks for code

    folders["with-card"].mkdir()
    ModelCard("---\nlicense: mit\n---\n# A pair of mine").save(folders["with-card"] / "README.md")

    pickle_weights(folders["pickled"])
    pickle_weights(folders["pickle-bomb"])
    for name in ("pickle-bomb", "with-code"):
        torch.save({"weight": Bomb(folders["detonated"] / "pickle")}, folders[name] / f"denoiser/{WEIGHTS}.bin")
    return folders


@pytest.fixture(scope="module")
def hub(folders):
    with LoopbackHub() as hub:
        for name in folders.keys() - {"detonated"}:
            hub.add_repo(f"org/{name}", folders[name])
        hub.add_repo("org/uncached", folders["pair"])
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    return hub.environment(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="module")
def first_visit(hub, environment, folders, tmp_path_factory) -> Visit:
    return visit(hub, environment, tmp_path_factory.mktemp("first"), FIRST_VISIT, folders["with-code"])


@pytest.fixture(scope="module")
def second_visit(hub, environment, first_visit, tmp_path_factory) -> Visit:
    return visit(hub, environment, tmp_path_factory.mktemp("second"), SECOND_VISIT)


@pytest.fixture(scope="module", params=["HF_HUB_OFFLINE=1", "vanished server"])
def visit_without_hub(request, hub, environment, first_visit, tmp_path_factory) -> Visit:
    if request.param == "HF_HUB_OFFLINE=1":
        environment = environment | {"HF_HUB_OFFLINE": "1"}
    else:
        with LoopbackHub() as vanished:
            pass
        environment = environment | {"HF_ENDPOINT": vanished.endpoint}
    return visit(hub, environment, tmp_path_factory.mktemp("without_hub"), VISIT_WITHOUT_HUB)


def test_different_weights_give_different_images(pair, other):
    assert np.abs(sample(pair) - sample(other)).max() > 0.01


def test_a_saved_pipeline_reloads_bit_equal(folders, pair):
    reloaded = DualRatePipeline.from_pretrained(folders["pair"])
    for network, original in ((reloaded.denoiser, pair.denoiser), (reloaded.context_encoder, pair.context_encoder)):
        weights = network.state_dict()
        assert weights.keys() == original.state_dict().keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in original.state_dict().items())
    np.testing.assert_array_equal(sample(reloaded), sample(pair))


def test_a_pipeline_saved_twice_is_the_same_repository(folders, tmp_path):
    DualRatePipeline.from_pretrained(folders["pair"]).save_pretrained(tmp_path)
    for path in ("model_index.json", "denoiser/config.json", "context_encoder/config.json"):
        first, second = (json.loads((folder / path).read_text()) for folder in (folders["pair"], tmp_path))
        assert {**first, "_name_or_path": None} == {**second, "_name_or_path": None}


def test_model_index_names_our_package_and_a_plain_class(folders):
    index = json.loads((folders["pair"] / "model_index.json").read_text())
    assert index["_class_name"] == "DualRatePipeline"
    assert index["denoiser"] == ["diffusers_dualrate", "UViTDenoiser"]
    assert index["context_encoder"] == ["diffusers_dualrate", "UViTContextEncoder"]
    assert index["scheduler"] == ["diffusers_dualrate", "DualRateScheduler"]


def test_a_single_rate_model_reloads_bit_equal(folders, single_rate):
    reloaded = DualRatePipeline.from_pretrained(folders["single-rate"])
    assert reloaded.context_encoder is None
    np.testing.assert_array_equal(sample(reloaded), sample(single_rate))


def test_a_cold_load_samples_the_images_of_the_local_pipeline(first_visit, pair):
    np.testing.assert_array_equal(first_visit.image("cold"), sample(pair))
    assert any(method == "GET" and "safetensors" in path for method, path in first_visit.requests_for("org/pair"))


def test_a_single_rate_model_loads_from_the_hub(first_visit, single_rate):
    np.testing.assert_array_equal(first_visit.image("single-rate"), sample(single_rate))


def test_a_model_of_text_comes_from_the_hub_with_its_encoder_and_tokenizer(first_visit):
    pipe = make_text_pipeline()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a red apple", generator=torch.Generator().manual_seed(0), output_type="np").images
    assert first_visit.answers.get("text") == "CLIPTextModel"  # also alone, for a training
    np.testing.assert_array_equal(first_visit.image("text"), expected)


def test_label_names_survive_the_hub(first_visit):
    np.testing.assert_array_equal(first_visit.image("named label"), first_visit.image("cold"))


def test_a_pushed_pipeline_loads_again(hub, first_visit):
    np.testing.assert_array_equal(first_visit.image("pushed"), first_visit.image("cold"))
    _, files = hub.repositories["org/pushed"].find("main")
    assert f"denoiser/{WEIGHTS}.safetensors" in files


def test_networks_and_scheduler_pushed_one_by_one_load_again(first_visit):
    np.testing.assert_array_equal(first_visit.image("pushed one by one"), first_visit.image("cold"))


@pytest.mark.parametrize("repo_id", ["org/pushed", "org/denoiser-alone", "org/encoder-alone"])
def test_what_is_pushed_has_a_card_that_names_the_library(hub, first_visit, repo_id):
    _, files = hub.repositories[repo_id].find("main")
    assert ModelCard(files["README.md"].decode()).data.library_name == "diffusers"


def test_a_card_that_is_there_already_stays(hub, environment, first_visit, folders, tmp_path):
    """The way to publish with one's own card: it comes first, later pushes keep it."""
    hub.add_repo("org/with-card", folders["with-card"])
    load = f"DualRatePipeline.from_pretrained({str(folders['pair'])!r}).push_to_hub('org/with-card')"
    visit(hub, environment, tmp_path, load)
    _, files = hub.repositories["org/with-card"].find("main")
    assert ModelCard(files["README.md"].decode()).text == "# A pair of mine"
    assert "denoiser/config.json" in files


PUBLISH = """
import sys, torch
import make_card
from diffusers_dualrate import DualRatePipeline
from huggingface_hub import snapshot_download

folder, other, cache = sys.argv[1:]
make_card.main(make_card.parse_args([folder, "--push_to_hub", "--hub_model_id", "you/made"]))
pipe = DualRatePipeline.from_pretrained(folder, dtype=torch.float16)
pipe.push_to_hub("you/pushed")
pipe.denoiser.push_to_hub("you/denoiser")
pipe.save_pretrained(other, push_to_hub=True, repo_id="you/saved")
print(snapshot_download("you/made", cache_dir=cache))
"""


@pytest.fixture(scope="module")
def published(hub, environment, tmp_path_factory):
    """A trained model that was published in every way there is: its folder, one with another card, what came back."""
    root = tmp_path_factory.mktemp("published")
    folder, other = root / "model", root / "other"
    shutil.copytree(ROOT / "model_cards/dualrate-emoji64-distilled", folder)
    for name in (
        "checkpoint-1/model.safetensors",
        "diffusers-dualrate/events",
        "samples/0000001.png",
        ".lock",
        "key.pem",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"1")
    other.mkdir()
    (other / "README.md").write_text("# Mine\n")
    paths = f"{Path(diffusers_dualrate.__file__).parents[1]}:{ROOT / 'examples'}"
    process = subprocess.run(
        [sys.executable, "-c", PUBLISH, folder, other, root / "cache"],
        env=environment | {"PYTHONPATH": paths},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return folder, other, Path(process.stdout.splitlines()[-1]), process.stdout


def test_a_published_model_comes_back_file_by_file_with_its_card_its_pictures_and_its_measurement(published):
    """Kills: the host's placeholder in the card's place; a checkpoint, a log or a stranger's file in the repository."""
    folder, _, snapshot, printed = published
    came = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    assert set(came) - {".gitattributes"} == set(content_of(folder))
    left_out = {"checkpoint-1/model.safetensors", "diffusers-dualrate/events", ".lock", "key.pem"}
    everything = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert everything - set(came) == left_out
    assert {"README.md", "evaluation.json", "samples.png", "samples/0000001.png", "notes.json"} < set(came)
    for name in content_of(folder):
        assert came[name].read_bytes() == (folder / name).read_bytes(), name
    assert 'from_pretrained("you/made")\n' in came["README.md"].read_text() and "/you/made." in printed
    assert 'Load it: DualRatePipeline.from_pretrained("you/made")' in printed


def test_a_pipeline_of_a_folder_with_a_card_takes_it_along_with_pictures_and_records(hub, published):
    folder = published[0]
    _, files = hub.repositories["you/pushed"].find("main")
    assert set(files) - {".gitattributes"} == set(content_of(folder))
    for name in content_of(folder):
        if not name.endswith("config.json") and name != "model_index.json":  # in which the host names its version
            assert files[name] == (folder / name).read_bytes(), name
    assert not [name for name in files if str(folder).encode() in files[name]], "a path of this machine is published"
    _, files = hub.repositories["you/denoiser"].find("main")  # which is a part, and the card is that of the whole
    assert "evaluation.json" not in files and "automatically generated" in files["README.md"].decode()


def test_saving_with_push_to_hub_keeps_the_card_that_lies_in_the_folder(hub, published):
    other = published[1]
    _, files = hub.repositories["you/saved"].find("main")
    assert (other / "README.md").read_text() == "# Mine\n" and files["README.md"] == b"# Mine\n"
    assert files["pipeline.py"] == (other / "pipeline.py").read_bytes() and "evaluation.json" not in files


def test_a_folder_without_a_model_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="holds no model: there is no model_index.json"):
        content_of(tmp_path)


def test_a_stranger_loads_a_repository_by_trusting_its_lines_of_code(
    hub, environment, first_visit, folders, tmp_path, pair
):
    stranger = visit(hub, environment, tmp_path, STRANGER, folders["pair"])
    for source in ("hub", "folder"):
        assert "trust_remote_code" in stranger.error(source)
        np.testing.assert_array_equal(stranger.image(source), sample(pair))


def test_saved_lines_of_code_name_classes_of_ours_and_replace_no_file(make_pipe, tmp_path):
    class Mine(DualRatePipeline):
        pass

    pipe = make_pipe(single_rate=True, scheduler=DDIMScheduler(prediction_type="v_prediction"))
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser/diffusers_dualrate.py").write_text("mine = 1")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "denoiser/diffusers_dualrate.py").read_text() == "mine = 1"
    assert "import DualRatePipeline" in (tmp_path / "pipeline.py").read_text()
    assert [path.name for path in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]
    Mine.from_pipe(pipe).save_pretrained(tmp_path / "subclass")
    assert not (tmp_path / "subclass/pipeline.py").exists()


def test_an_encoder_and_a_denoiser_from_two_repositories_sample_together(first_visit, pair, other):
    mixed = DualRatePipeline(**{**pair.components, "context_encoder": other.context_encoder}, **STEPS)
    np.testing.assert_array_equal(first_visit.image("two repositories"), sample(mixed))
    assert not np.array_equal(sample(mixed), sample(pair))


def test_a_variant_loads_its_own_weights_and_downloads_no_others(first_visit):
    rounded = make_pipeline(seed=0)
    round_to_half(rounded.denoiser)
    round_to_half(rounded.context_encoder)
    np.testing.assert_array_equal(first_visit.image("fp16"), sample(rounded))
    weights = [path for _, path in first_visit.requests_for("org/variant") if path.endswith(".safetensors")]
    assert weights and all(path.endswith(".fp16.safetensors") for path in weights)


def test_dtype_is_the_one_asked_for(first_visit):
    assert first_visit.answers["dtype"] == ["torch.float16", "torch.float16"]


def test_a_missing_repository_is_named(first_visit):
    assert "org/absent" in first_visit.error("missing repository")


def test_a_missing_variant_is_named(first_visit):
    assert "ema" in first_visit.error("missing variant")


def test_the_traps_of_this_file_work(folders, tmp_path):
    detonated = folders["detonated"]
    assert not list(detonated.iterdir())
    shutil.copytree(folders["with-code"], tmp_path / "copy")
    code = (tmp_path / "copy/pipeline.py").read_text().replace(str(detonated), str(tmp_path))
    (tmp_path / "copy/pipeline.py").write_text(code)
    runpy.run_path(str(tmp_path / "copy/pipeline.py"))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "pickle")))
    assert (tmp_path / "code").exists() and (tmp_path / "pickle").exists()


def test_no_code_from_a_repository_runs(first_visit, folders):
    np.testing.assert_array_equal(first_visit.image("with code"), first_visit.image("cold"))
    np.testing.assert_array_equal(first_visit.image("with code, from a folder"), first_visit.image("cold"))
    np.testing.assert_array_equal(first_visit.image("with shim"), first_visit.image("cold"))
    assert not (folders["detonated"] / "code").exists()


def test_pickled_weights_are_refused_and_never_unpickled(first_visit, folders):
    for name in ("pickled", "pickle bomb"):
        assert "safetensors" in first_visit.error(name)
    assert first_visit.error("pickle bomb as component")
    assert not (folders["detonated"] / "pickle").exists()


def test_pickled_weights_beside_safetensors_are_not_downloaded(first_visit):
    assert not [path for _, path in first_visit.requests_for("org/with-code") if path.endswith(".bin")]


def test_pickled_weights_in_a_folder_are_refused(folders):
    with pytest.raises((OSError, ValueError), match="safetensors"):
        DualRatePipeline.from_pretrained(folders["pickled"])


def test_a_warm_load_downloads_no_file_again(second_visit, first_visit):
    np.testing.assert_array_equal(second_visit.image("warm"), first_visit.image("cold"))
    assert second_visit.requests_for("org/pair")
    assert not [path for method, path in second_visit.requests if method == "GET" and "/resolve/" in path]


def test_local_files_only_loads_what_is_cached_without_a_request(second_visit, first_visit):
    np.testing.assert_array_equal(second_visit.image("cached"), first_visit.image("single-rate"))
    assert not second_visit.requests_for("org/single-rate")


def test_local_files_only_names_what_is_not_cached(second_visit):
    assert "org/uncached" in second_visit.error("not cached")
    assert "fp16" in second_visit.error("variant not cached")
    assert not second_visit.requests_for("org/uncached")


def test_without_the_hub_what_is_cached_loads(visit_without_hub, first_visit):
    np.testing.assert_array_equal(visit_without_hub.image("cached"), first_visit.image("cold"))
    np.testing.assert_array_equal(visit_without_hub.image("cached variant"), first_visit.image("fp16"))
    assert not visit_without_hub.requests


def test_without_the_hub_what_is_not_cached_is_named(visit_without_hub):
    assert "org/uncached" in visit_without_hub.error("not cached")
    assert "fp16" in visit_without_hub.error("variant not cached")
    assert "diffusion_pytorch_model" in visit_without_hub.error("plain weights not cached")


def test_an_evaluation_finds_the_records_of_a_model_on_the_hub(hub, folders, environment, tmp_path):
    record = {"network": "pair", "images_seen": 8}
    shutil.copytree(folders["pair"], tmp_path / "trained")
    (tmp_path / "trained/training.json").write_text(json.dumps(record))
    hub.add_repo("org/trained", tmp_path / "trained")
    code = """
import json
from diffusers_dualrate.repositories import read_record
print(json.dumps([read_record("org/trained", name) for name in ("training.json", "evaluation.json")]))
"""
    paths = f"{Path(diffusers_dualrate.__file__).parents[1]}:{ROOT / 'examples'}"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == [record, None]
