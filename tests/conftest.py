"""What every test relies on: no network, a cache of its own, one thread, a fixed seed, tiny networks full of noise."""

import inspect
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

HF_HOME = tempfile.TemporaryDirectory(prefix="dualrate-hf-home-")
# Read once, when these libraries are first imported.
os.environ.update(
    HF_HOME=HF_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw_classes(root, count, size):
    """A folder of images with two classes, of noise, `count` in each; `size` is (height, width)."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def reset_accelerate():
    """Forget what the first `Accelerator` of a process fixes for all later ones: a script expects to be the first."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """No test inherits the precision or the device of the one before, whatever the order, nor do fixtures of a module."""
    reset_accelerate()
    yield
    reset_accelerate()


PRESET = json.loads((Path(__file__).parents[1] / "examples/presets/tiny.json").read_text())


def fill_with_noise(network, seed):
    """Give every weight a random value: a network that ends in zeros would make every test of its output vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.1 * noise) if weight.ndim == 1 else weight.copy_(noise * weight[0].numel() ** -0.5)
    return network.eval()


@pytest.fixture
def make_networks():
    """Builder of (encoder, denoiser) for images of side 8, with changes to either one's configuration."""
    from diffusers_dualrate import UViTContextEncoder, UViTDenoiser

    def make(encoder=None, denoiser=None, **both):
        both = {"sample_size": 8} | both
        return (
            fill_with_noise(UViTContextEncoder(**PRESET["context_encoder"] | both | (encoder or {})), seed=1),
            fill_with_noise(UViTDenoiser(**PRESET["denoiser"] | both | (denoiser or {})), seed=2),
        )

    return make


@pytest.fixture
def make_pipe(make_networks):
    """Builder of pipelines with such networks: a pair, or with `single_rate=True` the denoiser alone."""
    from diffusers_dualrate import DualRatePipeline, DualRateScheduler

    def make(single_rate=False, num_classes=4, scheduler=None, **options):
        encoder, denoiser = make_networks(num_classes=num_classes)
        if single_rate:
            encoder, denoiser = None, make_networks(denoiser={"context_channels": None}, num_classes=num_classes)[1]
        scheduler = scheduler or DualRateScheduler(**PRESET["scheduler"])
        options = {
            "num_inference_steps": 64
        } | options  # as the constructor has it, which says so where nobody else does
        pipe = DualRatePipeline(denoiser=denoiser, scheduler=scheduler, context_encoder=encoder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def watch():
    """Hooks that note every call of a pipeline's networks: a list of the arguments of each, by their names."""

    def attach(pipe):
        calls = SimpleNamespace(encoder=[], denoiser=[])
        for network, noted in ((pipe.context_encoder, calls.encoder), (pipe.denoiser, calls.denoiser)):
            if network is None:
                continue
            signature = inspect.signature(network.forward)

            def note(module, args, kwargs, noted=noted, signature=signature):
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                noted.append(SimpleNamespace(**bound.arguments, rows=len(bound.arguments["sample"])))

            network.register_forward_pre_hook(note, with_kwargs=True)
        return calls

    return attach


WORDS = "a an red green blue small apple bird fish star with two on ground flat style".split()


def make_tokenizer(length=6, ends=True):
    """A tokenizer of whole words that ends each text with a token, or with none, filled up to `length`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing("$0 <end>", special_tokens=[("<end>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def make_text_encoder(kind="clip", width=8):
    """A tiny text encoder of transformers with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    size = len(WORDS) + 3
    torch.manual_seed(5)
    if kind == "t5":
        config = T5Config(vocab_size=size, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
        return T5EncoderModel(config).eval()
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=size, max_position_embeddings=8, **sizes, **tokens)).eval()


@pytest.fixture
def make_text_pipe(make_networks):
    """Builder of a pair of text, with a real text encoder and tokenizer, or with what is given instead."""
    from diffusers_dualrate import DualRatePipeline, DualRateScheduler

    def make(kind="clip", networks=None, **options):
        text = {"num_classes": None, "cross_attention_dim": 8, "text_length": 6}
        encoder, denoiser = make_networks(**text | (networks or {}))
        parts = {"text_encoder": make_text_encoder(kind), "tokenizer": make_tokenizer(), "num_inference_steps": 4}
        pipe = DualRatePipeline(denoiser, DualRateScheduler(**PRESET["scheduler"]), encoder, **parts | options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
