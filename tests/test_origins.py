"""Pairs whose encoder is published elsewhere: what their repositories hold, and where the encoder comes from.

One process does what users do, with a Hub of its own and fresh caches, and reports; each test looks at a part of that.
Weights are noise: a network that ends in zeros would give the same image whatever was loaded.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_dualrate
from diffusers_dualrate.origins import Origin

ROOT = Path(__file__).parents[1]

USERS = '''
import copy, json, os, shutil, sys, warnings
from pathlib import Path

root = Path(sys.argv[1])
from loopback_hub import LoopbackHub

hub = LoopbackHub()
hub.__enter__()
os.environ.update(hub.environment(root / "home"))

import diffusers, torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, HostNetwork, NoiseProcess, UViTContextEncoder, UViTDenoiser
from diffusers_dualrate.modular import DualRateBlocks

diffusers.utils.logging.disable_progress_bar()
told = {}
SHAPE = {"sample_size": 8, "level_channels": (16, 32), "level_types": ("res", "res"), "level_blocks": (1, 1),
         "embedding_dim": 16, "attention_head_dim": 8}
STEPS = {"num_inference_steps": 4, "num_context_steps": 2}


def fill_with_noise(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(generator=torch.Generator().manual_seed(0), output_type="latent").images.float()


def note(name, run):
    """What went wrong, or whether the image is the one expected, as far as there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            told[name] = run()
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    told[name + ", warnings"] = [str(w.message) for w in caught if "encoder" in str(w.message)]


def publish(pipe, name, **options):
    pipe.save_pretrained(root / name, **options)
    files = {str(path.relative_to(root / name)): path.stat().st_size for path in (root / name).rglob("*") if path.is_file()}
    told[f"{name} holds"] = {file: size for file, size in files.items() if file.startswith("context_encoder")}
    return hub.add_repo(name, root / name)


def same(name, expected, **options):
    return torch.equal(sample(DualRatePipeline.from_pretrained(name, **options)), expected)


def fresh(**options):
    """A cache that nobody used."""
    fresh.count += 1
    return {"cache_dir": str(root / f"cache{fresh.count}"), **options}


fresh.count = 0
unet = fill_with_noise(UNet2DModel(
    sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")), 3)
DDPMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(root / "org/unet")
(root / "org/unet/README.md").write_text("---\\nlicense: apache-2.0\\n---\\n# A network\\n")
first = hub.add_repo("org/unet", root / "org/unet")
single = DualRatePipeline(fill_with_noise(UViTDenoiser(**SHAPE), 4), DualRateScheduler(), num_inference_steps=4)
publish(single, "org/single")

# A pair around the network of diffusers, whatever was published there since.
start = DualRatePipeline.from_pretrained("org/unet")
hub.add_repo("org/unet", root / "org/single")
hub.repositories["org/unet"].commits[first] = hub.repositories["org/unet"].commits[first]
encoder = HostNetwork(start.denoiser.network, start.denoiser.process, prediction_hand_over=True)
light = lambda seed, encoder, **options: fill_with_noise(
    UViTDenoiser(**SHAPE, context_channels=encoder.context_channels, **options), seed)
pair = DualRatePipeline(light(5, encoder, prediction_hand_over=True), DualRateScheduler(), encoder, **STEPS)
expected = sample(pair)
publish(pair, "you/unet")
publish(pair, "you/whole", include_encoder=True)
config = json.loads((root / "you/unet/context_encoder/config.json").read_text())
told["names"], told["commit"] = config["_origin"], first
note("light", lambda: same("you/unet", expected))
note("folder", lambda: same(str(root / "you/unet"), expected))
note("whole", lambda: same("you/whole", expected))
before = len(hub.requests)
note("whole, fresh", lambda: same("you/whole", expected, **fresh()))
told["whole asks for"] = [path for _, path in hub.requests[before:] if "org/unet" in path]
note("half precision", lambda: str(DualRatePipeline.from_pretrained("you/unet", dtype=torch.bfloat16).context_encoder.dtype))
note("its own class", lambda: type(UNet2DModel.from_pretrained("you/whole", subfolder="context_encoder")).__name__)
note("part by part", lambda: torch.equal(sample(DualRatePipeline(
    UViTDenoiser.from_pretrained("you/unet", subfolder="denoiser"), DualRateScheduler(),
    HostNetwork.from_pretrained("you/unet", subfolder="context_encoder"), **STEPS)), expected))
note("stranger", lambda: torch.equal(sample(DiffusionPipeline.from_pretrained(
    "you/unet", custom_pipeline="you/unet", trust_remote_code=True)), expected))


def modular():
    pipe = DualRateBlocks().init_pipeline("you/unet")
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    out = pipe(generator=torch.Generator().manual_seed(0), output_type="latent", output="images")
    return torch.equal(out, expected)


note("modular", modular)
again = DualRatePipeline.from_pretrained("you/unet")
publish(again, "you/again")
again.push_to_hub("you/pushed")
told["pushed"] = sorted(name for name in hub.repositories["you/pushed"].find("main")[1] if "context_encoder" in name)
again.save_pretrained(root / "pushed whole", push_to_hub=True, repo_id="you/pushed-whole", include_encoder=True)
told["pushed whole"] = sorted(name for name in hub.repositories["you/pushed-whole"].find("main")[1] if "context_encoder" in name)
before = len(hub.requests)
other = HostNetwork(copy.deepcopy(unet), start.denoiser.process, prediction_hand_over=True)
note("replaced", lambda: torch.allclose(  # weights at other addresses may be summed in another order
    sample(DualRatePipeline.from_pretrained("you/unet", **fresh(context_encoder=other))), expected, atol=1e-4))
told["replaced asks for"] = [path for _, path in hub.requests[before:] if "org/unet" in path]

# Trained further, it is no longer what is published.
with torch.no_grad():
    again.context_encoder.network.conv_in.weight[0, 0, 0, 0] += 1e-6
trained = sample(again)
publish(again, "you/trained")
note("trained", lambda: same("you/trained", trained))
again.save_pretrained(root / "you/again")  # over what was saved without it
note("trained, over light", lambda: same(str(root / "you/again"), trained))
pair.save_pretrained(root / "you/trained")
told["light, over whole"] = sorted(os.listdir(root / "you/trained/context_encoder"))

# Our own networks: the trunk is somebody's, the heads are new.
start = DualRatePipeline.from_pretrained("org/single")
encoder = UViTContextEncoder.from_denoiser(start.denoiser, (4, 8), True)
for name, weight in encoder.named_parameters():
    if name.startswith(("context_heads", "variance")):
        weight.data.normal_(std=0.3)
ours = DualRatePipeline(light(6, encoder, prediction_hand_over=True), DualRateScheduler(), copy.deepcopy(encoder).eval(), **STEPS)
publish(ours, "you/ours")
note("ours", lambda: same("you/ours", sample(ours)))
note("ours, whole", lambda: publish(ours, "you/ours-whole", include_encoder=True) and same("you/ours-whole", sample(ours)))
ours.save_pretrained(root / "you/ours-half", variant="fp16")
note("ours, variant", lambda: same(str(root / "you/ours-half"), sample(ours), variant="fp16"))
note("ours, half precision", lambda: str(DualRatePipeline.from_pretrained("you/ours", dtype=torch.float16).context_encoder.dtype))
elsewhere = UViTContextEncoder.from_pretrained("you/ours-whole", subfolder="context_encoder")
other = DualRatePipeline(light(7, elsewhere, prediction_hand_over=True), DualRateScheduler(), elsewhere, **STEPS)
publish(other, "you/other")
note("of a pair", lambda: same("you/other", sample(other)))
told["of a pair names"] = json.loads((root / "you/other/context_encoder/config.json").read_text())["_origin"]["subfolder"]
publish(DualRatePipeline.from_pretrained("you/ours-whole"), "you/copied")
with torch.no_grad():
    ours.context_encoder.trunk.patch_embed.weight[0, 0, 0, 0] += 1e-6
publish(ours, "you/ours-trained")

# A training that starts from somebody's model.
from datasets.utils.logging import disable_progress_bar
import train_dual_rate, train_single_rate

presets = Path(train_dual_rate.__file__).with_name("presets")
preset = json.loads((presets / "digits8.json").read_text())
shape = {name: value for name, value in preset["context_encoder"].items() if name not in ("context_channels", "prediction_hand_over")}
digits = fill_with_noise(UViTDenoiser(**shape), 8)
DualRatePipeline(digits, DualRateScheduler(**preset["scheduler"]), num_inference_steps=4).save_pretrained(root / "org/digits")
(root / "org/digits/README.md").write_text("---\\nlicense: mit\\n---\\n")
hub.add_repo("org/digits", root / "org/digits")
train_dual_rate.main(train_dual_rate.parse_args([
    "--preset", "digits8", "--dataset_name", "digits", "--pretrained_model_name_or_path", "org/digits", "--freeze_encoder",
    "--max_train_steps", "2", "--validation_steps", "0", "--output_dir", str(root / "run"), "--lr_warmup_steps", "0"]))
run = DualRatePipeline.from_pretrained(root / "run")
trunk = run.context_encoder.trunk.state_dict()
files = {str(path.relative_to(root / "run")): path.stat().st_size for path in (root / "run").glob("*/*.safetensors") if "checkpoint" not in str(path)}
told["run holds"] = files
told["run"] = {
    "loads": all(torch.equal(weight, trunk[name]) for name, weight in digits.trunk.state_dict().items()),
    "heavy": (root / "org/digits/denoiser/diffusion_pytorch_model.safetensors").stat().st_size,
    "size": sum(files.values()), "card": (root / "run/README.md").read_text()}

run.save_pretrained(root / "run, whole", push_to_hub=True, repo_id="you/run-whole", include_encoder=True)
told["run, whole"] = hub.repositories["you/run-whole"].find("main")[1]["README.md"].decode()
for name, start in {"tuned": "org/digits", "tuned again": str(root / "tuned")}.items():
    train_single_rate.main(train_single_rate.parse_args([
        "--preset", "digits8", "--dataset_name", "digits", "--pretrained_model_name_or_path", start, "--network", "heavy",
        "--max_train_steps", "2", "--validation_steps", "0", "--output_dir", str(root / name), "--lr_warmup_steps", "0"]))
    told[name] = (root / name / "README.md").read_text()

# What can be wrong. Every cache is fresh.
hub.private.add("org/unet")
note("private", lambda: same("you/unet", expected, **fresh()))
mine = fresh(token="hf_owner")
note("private, with a token", lambda: same("you/unet", expected, **mine))
note("from the cache", lambda: same("you/unet", expected, cache_dir=mine["cache_dir"], local_files_only=True))
note("folder, from that cache", lambda: same(str(root / "you/unet"), expected, cache_dir=mine["cache_dir"], local_files_only=True))
note("not in the cache", lambda: same(str(root / "you/unet"), expected, **fresh(local_files_only=True)))
hub.private.clear()


def with_origin(**changes):
    folder = Path(shutil.copytree(root / "you/unet", root / f"changed{fresh.count}"))
    path = folder / "context_encoder/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_origin": config["_origin"] | changes}))
    return same(str(folder), expected, **fresh())


note("no such revision", lambda: with_origin(revision="0" * 40))
note("no such folder", lambda: with_origin(subfolder="heavy"))
note("a path", lambda: with_origin(repository="/home/me/unet"))
note("no string", lambda: with_origin(subfolder=3))
note("other weights", lambda: with_origin(weights="0" * 32))
foreign = json.loads((root / "org/unet/unet/config.json").read_text()) | {"_class_name": "MyUNet", "auto_map": {}}
shutil.copytree(root / "org/unet", root / "org/foreign")
(root / "org/foreign/unet/config.json").write_text(json.dumps(foreign))
commit = hub.add_repo("org/foreign", root / "org/foreign")
note("needs trust", lambda: with_origin(repository="org/foreign", revision=commit))
del hub.repositories["org/unet"]
note("gone", lambda: same("you/unet", expected, **fresh()))
note("saved while it is gone", lambda: publish(DualRatePipeline.from_pretrained(
    "you/unet", cache_dir=mine["cache_dir"]), "you/still") and None)
hub.__exit__()
note("without the Hub", lambda: same("you/unet", expected))
print(json.dumps(told))
'''


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root, elsewhere = tmp_path_factory.mktemp("origins"), tmp_path_factory.mktemp("elsewhere")
    paths = [Path(diffusers_dualrate.__file__).parents[1], ROOT / "tests", ROOT / "examples"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    process = subprocess.run(
        [sys.executable, "-c", USERS, root],
        env=inherited | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def holds_weights(files):
    return any(file.endswith(".safetensors") for file in files)


def test_a_pair_around_a_published_network_is_saved_without_it_and_names_where_it_is(told):
    """Kills: a branch in place of the commit, since the branch has moved; the folder left out."""
    assert not holds_weights(told["you/unet holds"]) and not holds_weights(told["you/again holds"])
    names = told["names"]
    assert (names["repository"], names["subfolder"], names["revision"]) == ("org/unet", "unet", told["commit"])
    assert names["license"] == "apache-2.0"
    assert told["pushed"] == ["context_encoder/config.json", "context_encoder/diffusers_dualrate.py"]


@pytest.mark.parametrize(
    "way", ["light", "folder", "part by part", "stranger", "modular", "private, with a token", "from the cache",
            "folder, from that cache", "without the Hub", "replaced"],
)  # fmt: skip
def test_it_loads_to_the_same_image_wherever_the_encoder_may_be_had(told, way):
    assert told[way] is True
    assert not told["replaced asks for"], "an encoder that is given is not fetched"


def test_include_encoder_makes_it_whole(told):
    assert told["whole"] is told["whole, fresh"] is True and not told["whole asks for"]
    assert holds_weights(told["you/whole holds"]) and holds_weights(told["pushed whole"])
    assert told["its own class"] == "UNet2DModel"
    assert told["half precision"] == "torch.bfloat16"


def test_what_was_trained_is_never_left_out(told):
    """One weight has moved by a millionth. Kills: a comparison with a tolerance; a stale origin or stale weights."""
    assert holds_weights(told["you/trained holds"]) and holds_weights(told["you/ours-trained holds"])
    assert told["trained"] is told["trained, over light"] is True
    assert told["light, over whole"] == ["config.json", "diffusers_dualrate.py"]


def test_of_a_network_of_this_package_the_new_heads_are_held_and_the_trunk_is_not(told):
    assert told["ours"] is told["ours, whole"] is told["ours, variant"] is told["of a pair"] is True
    weights = "context_encoder/diffusion_pytorch_model.safetensors"
    assert told["you/ours holds"][weights] < told["you/ours-whole holds"][weights] / 20
    assert told["of a pair names"] == "context_encoder" and told["ours, half precision"] == "torch.float16"
    assert told["you/copied holds"][weights] == told["you/ours-whole holds"][weights], "a pair is no part of itself"


def test_a_training_with_a_frozen_encoder_leaves_a_repository_of_what_is_new_and_a_card_that_says_so(told):
    assert told["run holds"]["context_encoder/diffusion_pytorch_model.safetensors"] < told["run"]["heavy"] / 4
    assert told["run"]["loads"]
    card = " ".join(told["run"]["card"].split())
    assert "comes from elsewhere as the model is loaded: `denoiser` of [org/digits]" in card
    assert f"This repository holds {told['run']['size'] / 1e6:.1f} MB" in card and "licence is mit." in card


def test_a_copy_that_is_made_whole_has_a_card_that_says_so(told):
    assert "comes from elsewhere" not in told["run, whole"] and "This repository holds" not in told["run, whole"]
    assert "base_model: org/digits" in told["run, whole"]


@pytest.mark.parametrize("name", ["tuned", "tuned again"])
def test_a_model_made_of_a_published_one_names_it_and_its_licence(told, name):
    head, text = told[name].split("---")[1:3]
    assert "base_model: org/digits" in head and "license: mit" in head
    assert "It was made of [org/digits](" in text and "The model's licence is mit." in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("private", "^OriginError: you/unet holds no encoder: it names unet of org/unet at revision .*, which is not on the Hub, or is private and your token does not open it; give another by context_encoder=.$"),
        ("gone", "^OriginError: you/unet holds no encoder: .* is not on the Hub, or is private"),
        ("not in the cache", "is not in the cache, and the Hub is out of reach; give another"),
        ("no such revision", "at revision 000000000000, which is gone from the Hub: the repository has no such revision;"),
        ("no such folder", "it names heavy of org/unet .* is gone from the Hub: there is no config.json;"),
        ("a path", "ValueError: .* cannot be loaded: .*'/home/me/unet'"),
        ("no string", "ValueError: .* cannot be loaded: subfolder of an encoder's origin must be a string, got 3.$"),
        ("other weights", "which has other weights than those that the pair was trained with;"),
        ("needs trust", "which is a MyUNet: only UNet2DModel can be taken, and no code of a repository is run;"),
    ],
)  # fmt: skip
def test_an_encoder_that_cannot_be_had_is_one_sentence(told, wrong, message):
    assert re.search(message, told[wrong]), told[wrong]


def test_what_cannot_be_compared_any_more_is_still_saved_as_it_was_loaded(told):
    assert told["saved while it is gone"] is None and not holds_weights(told["you/still holds"])


def test_an_autoencoder_whose_folder_is_gone_since_comes_from_nowhere(tmp_path):
    assert Origin.behind(tmp_path / "moved" / "vae", "vae") is None
