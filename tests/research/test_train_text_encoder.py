"""Tests of the text encoder for emoji64: its loss, its tokenizer, and the encoders that ship."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPTextModel

from diffusers_dualrate.evaluation import ImageClassifier
from research import EXAMPLES, train_text_encoder
from research.train_text_encoder import (
    CaptionedImages,
    belong,
    contrastive_loss,
    embed_texts,
    fit,
    measure,
    measure_prompts,
)

FOLDER = EXAMPLES / "text_encoders" / "emoji64"


@pytest.fixture(scope="module")
def shipped():
    encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    return encoder.eval(), AutoTokenizer.from_pretrained(FOLDER / "tokenizer")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return load_dataset(str(EXAMPLES / "data" / "emoji64"), split="test", cache_dir=cache, keep_in_memory=True)


def test_the_loss_is_that_of_two_directions_at_right_angles():
    images, texts = torch.eye(2), torch.eye(2)
    own, both = torch.eye(2).bool(), torch.ones(2, 2).bool()
    # -log(e^s / (e^s + 1)), and with uniform targets half of that and half of -log(1 / (e^s + 1)).
    assert contrastive_loss(images, texts, 3.0, own).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-5)
    expected = math.log1p(math.exp(-3)) + 1.5
    assert contrastive_loss(images, texts, 3.0, both).item() == pytest.approx(expected, rel=1e-5)
    # Images are compared with texts, and back: an image that two texts fit equally costs log 2 one way.
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    forth, back = math.log(2), (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert contrastive_loss(images, texts, 3.0, own).item() == pytest.approx((forth + back) / 2, rel=1e-5)


def test_a_caption_belongs_to_the_images_of_its_name_and_if_it_has_a_style_of_that():
    names, styles = ["apple", "apple", "pear"], ["flat", "blob", "flat"]
    captions = ["apple, flat style", "apple", "pear, fruit, flat style"]
    assert belong(names, styles, captions).tolist() == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]


def test_a_training_that_goes_on_from_its_checkpoint_ends_as_one_without_a_break(tmp_path):
    flags = ["--max_train_steps", "60", "--learning_rate", "0.1"]

    def train(stop, *more):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(3, 2)

        def loss_of(generator, scale):
            steps.append(generator.random())
            if len(steps) == stop:
                raise KeyboardInterrupt
            return scale * encoder(torch.full((1, 3), steps[-1])).square().sum()

        steps = []
        scale = fit(train_text_encoder.parse_args([*flags, *more]), encoder, loss_of)
        return encoder.weight, scale, len(steps)

    weight, scale, _ = train(None)
    kept = ["--checkpoint", str(tmp_path / "state")]
    with pytest.raises(KeyboardInterrupt):
        train(55, *kept)
    again, same, steps = train(None, *kept)
    assert steps == 10 and torch.equal(again, weight) and same == scale


def test_images_are_recognised_among_a_list_of_prompts_by_the_nearest_of_them():
    directions = torch.eye(3)
    images = SimpleNamespace(captions=[["apple"], ["pear"], ["fig"], ["plum"]], plain=lambda: torch.eye(4)[:, :3])
    encoder, prompts = lambda **_: SimpleNamespace(pooler_output=directions), ["apple", "fig", "pear"]
    found = measure_prompts(encoder, lambda *_, **__: {}, lambda x: x, [images], prompts)
    assert found == {"images": 3, "first": 1 / 3}  # the second image is nearest to fig, the third to pear


def test_a_tokenizer_learns_words_and_knows_every_text():
    tokenizer = train_text_encoder.train_tokenizer(["red apple, flat style", "green book"] * 5, 600, 16)
    ids = tokenizer("Red  apple").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == ["red</w>", "apple</w>"] and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in tokenizer("zebra’s 7 \N{RED APPLE} q").input_ids[:-1]


def test_the_shipped_tokenizer_gives_captions_back_and_the_encoder_takes_the_longest(shipped, held_out):
    encoder, tokenizer = shipped
    captions = [caption for row in held_out["captions"] for caption in row] + ["zebra’s \N{RED APPLE}"]
    for caption in captions:
        ids = tokenizer(caption).input_ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.replace(" ", "") == caption.lower().replace(" ", "")
        assert len(ids) <= encoder.config.max_position_embeddings == tokenizer.model_max_length
    assert len(tokenizer) == encoder.config.vocab_size


def test_padding_changes_no_direction_of_the_shipped_encoder(shipped):
    alone = embed_texts(*shipped, ["red apple"])
    beside = embed_texts(*shipped, ["red apple", "grinning face with big eyes, noto style"])
    torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=1e-5)


def test_the_shipped_encoders_name_emoji_in_styles_that_were_held_out(shipped, held_out):
    encoder, tokenizer = shipped
    image_encoder = ImageClassifier.load(FOLDER / train_text_encoder.IMAGE_ENCODER)
    names = held_out["name"][:]
    seen_elsewhere = [row for row in range(len(names)) if names.count(names[row]) == 1]
    images = CaptionedImages(held_out.select(seen_elsewhere))
    found = measure(encoder, tokenizer, image_encoder, images, sorted(set(names)))
    assert found["first_five"] > 0.6 and image_encoder.facts["train"]["first_five"] > 0.8
    x, captions = images.draw(np.arange(8), np.random.default_rng(0))
    assert (
        x.shape == (8, 3, 64, 64) and normalize(image_encoder(x), dim=1).shape == embed_texts(*shipped, captions).shape
    )
