"""Training on captions, as a user does it: folders with metadata.jsonl, tiny real text encoders."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import distill
import evaluate
import generate
import train_dual_rate
import train_single_rate
from conftest import PRESET, make_text_encoder, make_tokenizer, reset_accelerate
from diffusers_dualrate import DualRatePipeline, UViTDenoiser
from diffusers_dualrate.arguments import configure
from diffusers_dualrate.captions import CaptionEmbeddings, TrainingConditions
from diffusers_dualrate.data import LabelledImages, load_images
from diffusers_dualrate.evaluation import ImageClassifier
from diffusers_dualrate.image_sets import shown_by
from diffusers_dualrate.inventory import caption_to_bytes, captions_from_bytes, check_captions
from diffusers_dualrate.metrics import make_nearest_judge
from diffusers_dualrate.prompt_lists import TextJudge, judges_of_captions, read_prompts
from diffusers_dualrate.sources import open_captions
from diffusers_dualrate.streams import StreamedImages
from diffusers_dualrate.text_encoding import TextEncoding, load_text_encoding

CAPTIONS = [["a red apple", "apple"], ["two green fish", "fish"], ["a blue bird", "bird"], ["a star", "small star"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images with captions, a text encoder with its tokenizer, and a preset with guidance."""
    root = tmp_path_factory.mktemp("text")
    (root / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": CAPTIONS[i % 4]})
    (root / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in (make_text_encoder(), make_tokenizer()):
        part.save_pretrained(root / "encoder")
    preset = json.loads(json.dumps(PRESET))
    preset["training"]["label_dropout"] = 0.3
    preset["distillation"] |= {"guidance_scale": 2.0, "pretraining_steps": 0, "max_train_steps": 2}
    (root / "tiny.json").write_text(json.dumps(preset))
    return root


def train(module, root, name, *more, encoder=True):
    flags = ["--preset", str(root / "tiny.json"), "--train_data_dir", str(root / "images"), "--caption_column", "text"]
    flags += ["--cache_dir", str(root / "cache"), "--output_dir", str(root / name), "--validation_steps", "0"]
    flags += ["--text_encoder", str(root / "encoder")] if encoder else []
    reset_accelerate()
    assert module.main(module.parse_args([*flags, *more])) == 0
    return DualRatePipeline.from_pretrained(root / name)


def weights_of(pipe):
    networks = [pipe.denoiser] if pipe.context_encoder is None else [pipe.denoiser, pipe.context_encoder]
    return {f"{i}.{name}": weight for i, net in enumerate(networks) for name, weight in net.state_dict().items()}


def open_set(root, kind=LabelledImages, **options):
    dataset = load_images(train_data_dir=root / "images", caption_column="text", streaming=kind is StreamedImages)
    return kind(dataset, 16, caption_column="text", **options)


def test_a_pair_learns_from_captions_draws_prompts_and_goes_on_bit_for_bit(root):
    pipe = train(train_dual_rate, root, "pair", "--validation_steps", "4", "--guidance_scale", "2")
    config = pipe.denoiser.config
    assert (config.cross_attention_dim, config.text_length, config.num_classes) == (8, 6, None)
    assert pipe.text_encoder.state_dict().keys() == make_text_encoder().state_dict().keys()
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red apple").images[0].size == (16, 16) and pipe.config.guidance_scale == 2.0
    assert (root / "pair" / "samples" / "0000004.png").is_file()
    record = json.loads((root / "pair" / "configuration.json").read_text())
    assert record["data"]["caption_column"] == "text" and "text_encoder" in record["found"]["models"]

    half = ("--guidance_scale", "2", "--checkpointing_steps", "2")
    train(train_dual_rate, root, "halves", *half, "--max_train_steps", "2")
    again = train(train_dual_rate, root, "halves", *half, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(weight, weights_of(again)[name]) for name, weight in weights_of(pipe).items())


def test_a_run_does_not_go_on_with_another_tokenizer(root, tmp_path):
    """Two words have changed their numbers, and the text encoder is the same."""
    flags = ("--checkpointing_steps", "2", "--max_train_steps", "2", "--network", "heavy")
    train(train_single_rate, root, "words", *flags)
    shutil.copytree(root / "encoder", tmp_path / "encoder")
    path = tmp_path / "encoder/tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["apple"], vocab["fish"] = vocab["fish"], vocab["apple"]
    path.write_text(json.dumps(content))
    flags += ("--resume_from_checkpoint", "latest", "--max_train_steps", "3", "--text_encoder", tmp_path / "encoder")
    with pytest.raises(ValueError, match="tokenizer"):
        train(train_single_rate, root, "words", *map(str, flags), encoder=False)


def test_a_text_encoder_beside_a_trained_model_reads_as_that_model_learned(root, make_text_pipe):
    """Saved without its text encoder, it still says how it read texts."""
    pipe = make_text_pipe(text_encoder=None, tokenizer=None)
    for network in (pipe.denoiser, pipe.context_encoder):
        network.register_to_config(text_is_masked=False, text_is_lowered=True)
    flags = ["--preset", str(root / "tiny.json"), "--train_data_dir", str(root / "images"), "--caption_column", "text"]
    flags += ["--text_encoder", str(root / "encoder"), "--output_dir", str(root / "none")]
    config, images = configure(train_dual_rate.parse_args(flags), "train_dual_rate"), open_set(root)
    encoding = open_captions(config, images, pipe).encoding
    assert (encoding.is_masked, encoding.is_lowered) == (False, True)
    told = dataclasses.replace(config.networks, denoiser=config.networks.denoiser | {"text_is_lowered": True})
    encoding = open_captions(dataclasses.replace(config, networks=told), images).encoding
    assert (encoding.is_masked, encoding.is_lowered) == (True, True)
    pipe.denoiser.register_to_config(text_is_lowered=False)
    with pytest.raises(ValueError, match="text_is_lowered is True in the encoder and False in the denoiser"):
        DualRatePipeline(**pipe.components, **pipe.parameters)


def test_what_stands_for_no_caption_is_the_empty_prompt_of_sampling(root, monkeypatch):
    """Mutants: another text in its place; `drop_condition` left out; a row dropped that should not be."""
    encoding, images = load_text_encoding(str(root / "encoder")), open_set(root)
    conditions = TrainingConditions(images, CaptionEmbeddings(encoding, 6), "cpu")
    empty = encoding.encode([""], 6, "cpu")
    torch.testing.assert_close(conditions.null.tokens[conditions.null.mask], empty.tokens[empty.mask])
    assert torch.equal(conditions.null.mask, empty.mask)
    num_dropped, forward = [], UViTDenoiser.forward

    def count(self, sample, log_snr, condition=None, *args, **kwargs):
        if self.training:
            null = condition.mask.sum(1) == empty.mask.sum()
            num_dropped.append((int(null.sum()), len(null)))
        return forward(self, sample, log_snr, condition, *args, **kwargs)

    monkeypatch.setattr(UViTDenoiser, "forward", count)
    train(train_single_rate, root, "dropped", "--network", "heavy", "--override", "training.label_dropout=0.999")
    assert num_dropped and all(dropped == of for dropped, of in num_dropped)
    num_dropped.clear()
    train(train_single_rate, root, "kept", "--network", "heavy", "--override", "training.label_dropout=0")
    assert num_dropped and not any(dropped for dropped, _ in num_dropped)


def test_kept_embeddings_hold_no_more_than_they_count(root):
    encoding = dataclasses.replace(load_text_encoding(str(root / "encoder")), is_masked=False)
    captions = CaptionEmbeddings(encoding, 6)
    captions.embed(["a red apple"], "cpu"), captions.embed(["two fish"], "cpu")
    held = sum(tokens.untyped_storage().nbytes() for tokens, _ in captions._kept.values())
    assert held == captions._num_bytes


def test_the_digest_of_a_tokenizer_does_not_know_what_it_was_last_asked_for(root):
    encoding = load_text_encoding(str(root / "encoder"))
    before = encoding.tokenizer_digest
    for length in (4, 6):
        encoding.embed(["a red apple"], length, "cpu")
        assert encoding.tokenizer_digest == before
    assert load_text_encoding(str(root / "encoder")).tokenizer_digest == before


def test_captions_that_are_cut_are_warned_of(root):
    encoding = load_text_encoding(str(root / "encoder"))
    with pytest.warns(UserWarning, match="6 of 16 captions have more than 3 tokens, and what follows is not learned"):
        CaptionEmbeddings(encoding, 3).warn_of_cuts(open_set(root).captions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaptionEmbeddings(encoding, 4).warn_of_cuts(open_set(root).captions)


def test_samples_are_asked_for_every_caption_of_an_image_as_real_images_show_them(root):
    images = open_set(root)
    first, other = zip(*images.captions[:4], strict=True)
    shown = shown_by(images, [[repeat, 0] for repeat in range(40)])
    assert {*shown} == {first[0], other[0]} and min(shown.count(first[0]), shown.count(other[0])) > 8
    assert shown_by(images, [[0, index] for index in range(8)]) != [own[0] for own in images.captions]


def test_a_caption_that_no_batch_could_carry_is_named(root):
    long = "word " * 2000
    with pytest.raises(
        ValueError, match="The row 1 has a caption of 10000 bytes in the column 'text'; one may have 8192"
    ):
        check_captions(["a star", long], "text", 1)
    caption = "ü" * 4096
    assert captions_from_bytes(caption_to_bytes(caption)[None]) == [caption]


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_judge_needs_a_text_encoder_with_a_pooled_output_of_the_width_of_the_image_encoder(kind):
    encoding = TextEncoding(make_text_encoder(kind), make_tokenizer())
    said = (
        "A T5EncoderModel has no pooled output"
        if kind == "t5"
        else "directions of 8 values, and the image encoder of 7"
    )
    with pytest.raises(ValueError, match=said):
        TextJudge(encoding, ImageClassifier(3, 7), "cpu")


def test_a_list_of_prompts_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "list.txt").write_text("a red apple\n", encoding="utf-8-sig")
    assert read_prompts("--prompt_lists", tmp_path / "list.txt") == ["a red apple"]


def test_the_light_network_of_the_preset_of_text_can_do_without_attention_to_it():
    preset = Path(train_dual_rate.__file__).with_name("presets") / "emoji64.json"
    flags = [
        "--preset",
        str(preset),
        "--train_data_dir",
        "images",
        "--output_dir",
        "runs/none",
        "--caption_column",
        "text",
    ]
    flags += ["--resolution", "64", "--override", "denoiser.attends_to_text=false"]
    told = configure(train_dual_rate.parse_args(flags), "train_dual_rate")
    assert told.networks.denoiser["attends_to_text"] is False
    assert told.networks.context_encoder.get("attends_to_text", True)


def test_a_picture_of_prompts_is_drawn_by_their_model_alone(make_text_pipe, make_pipe, tmp_path):
    make_text_pipe(num_context_steps=2).save_pretrained(tmp_path / "text")
    make_pipe(num_inference_steps=2).save_pretrained(tmp_path / "classes")
    make_text_pipe(text_encoder=None, tokenizer=None).save_pretrained(tmp_path / "bare")
    flags = ["--num_images_per_class", "1", "--output", str(tmp_path / "picture.png"), "--model"]
    generate.main(generate.parse_args([*flags, str(tmp_path / "text"), "--prompt", "a red apple", "two fish"]))
    assert Image.open(tmp_path / "picture.png").width == 2 * (24 + generate.GAP) + generate.GAP
    for model, more, said in (
        ("text", [], "is a model of text: give --prompt"),
        ("text", ["--prompt", "a", "--class_labels", "1"], "no --class_labels"),
        ("classes", ["--prompt", "a"], "takes no text"),
        ("text", ["--prompt", "a", "--distilled", str(tmp_path / "bare")], "bare has no text_encoder to embed"),
        ("bare", ["--prompt", "a"], "bare has no text_encoder to embed"),
    ):
        with pytest.raises(ValueError, match=said):
            generate.main(generate.parse_args([*flags, str(tmp_path / model), *more]))


def test_a_sample_shows_its_prompt_if_the_nearest_caption_is_one_of_the_same_image(root):
    encoding, images = load_text_encoding(str(root / "encoder")), open_set(root)
    texts = ["a red apple", "apple", "two green fish", "a star"]
    inputs = encoding.tokenizer(texts, padding=True, return_tensors="pt")
    directions = encoding.text_encoder(**inputs).pooler_output.detach()
    judge = TextJudge(encoding, lambda x: 3 * directions, "cpu")
    judges = judges_of_captions(judge, images.captions)
    asked = ["apple", "apple", "a star", "a star"]  # the second name of the first image, itself, another's, itself
    x = torch.zeros(4, 3, 16, 16)
    assert judges["caption_of_nearest_text"](x, asked).tolist() == [True, True, False, True]
    one = torch.nn.functional.cosine_similarity(directions[0], directions[1], dim=0)
    torch.testing.assert_close(judges["image_text_score"](x, asked)[:2], torch.stack([one, torch.tensor(1.0)]))
    # Among prompts alone, of which the second is of no image, another caption of the image does not count.
    few = judges_of_captions(judge, images.captions, ["apple", "two red fish", "a star"])
    assert few["prompt_of_nearest_prompt"](x[[0, 0, 0, 3]], ["a star"] * 4).tolist()[3]
    seen = few["caption_of_nearest_text"](x, ["two red fish", "apple", "a star", "a star"])
    assert seen.tolist() == [False, True, False, True]
    nearest = make_nearest_judge(images, images, 0)
    x = torch.stack([images[0]["pixel_values"], images[1]["pixel_values"]])
    assert nearest(x, ["apple", "apple"]).tolist() == [True, False]


def test_the_nearest_of_large_images_is_found_at_half_their_size_over_shifts_of_whole_pixels():
    class Blocks:
        height = width = 64
        class_labels, captions = torch.tensor([0, 1, 2]), None
        pixels = torch.rand(3, 3, 16, 16).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"pixel_values": self.pixels[i]}

    x, labels = Blocks.pixels.roll((2, -2), (2, 3)), torch.tensor([0, 1, 1])
    assert make_nearest_judge(Blocks(), Blocks(), 2)(x, labels).tolist() == [True, True, False]


def test_a_model_of_text_is_measured_on_captions_of_its_data_and_on_lists_of_prompts(root, make_text_pipe, capsys):
    make_text_pipe(num_context_steps=2, networks={"sample_size": 16}).save_pretrained(root / "measured")
    ImageClassifier(3, 8, (8, 8), num_features=8).save(root / "judge.safetensors")
    shutil.copytree(root / "images", root / "splits" / "train")
    (root / "splits" / "test").mkdir()
    Image.new("RGB", (16, 16)).save(root / "splits" / "test" / "9.png")
    (root / "splits" / "test" / "metadata.jsonl").write_text('{"file_name": "9.png", "text": ["a red bird"]}\n')
    flags = [
        "--floor_split",
        "test",
        "--train_data_dir",
        str(root / "splits"),
        "--caption_column",
        "text",
        "--num_samples",
        "4",
        "--seeds",
        "0",
    ]
    flags += ["--classifier", str(root / "judge.safetensors"), "--text_encoder", str(root / "encoder")]
    flags += ["--num_noises", "4", "--output", str(root / "evaluation.json"), "--cache_dir", str(root / "references")]
    (root / "seen.txt").write_text("a red apple\ntwo green fish\n")
    (root / "novel.txt").write_text("a green apple\n")
    (root / "held.txt").write_text("a red bird\n")  # a caption of the other split alone
    lists = ["--prompt_lists", str(root / "seen.txt"), str(root / "novel.txt"), str(root / "held.txt")]
    model = ["--model", str(root / "measured")]
    report = evaluate.main(evaluate.parse_args([*model, *flags, *lists, "--grid", str(root / "g.png")]))
    found = report["samples"][0]
    lists = found["prompts"]
    assert lists.keys() == {"seen", "novel", "held"} and report["prompt_lists"]["held"]["images"] == 1
    assert report["prompt_lists"]["novel"] is None
    for name, count, real in (("seen", 2, 2), ("novel", 1, None)):
        metrics = {
            f"{start}_{count}" for start in ("prompt_of_nearest_prompt", "caption_of_nearest_text", "image_text_score")
        }
        metrics |= {"caption_of_nearest_2"} if real else set()
        assert lists[name].keys() == metrics | {"prompts", "seconds_per_image"} and lists[name]["prompts"] == count
        assert real is None or report["prompt_lists"][name].keys() == metrics | {"images"}
    assert report["prompt_lists"]["seen"]["caption_of_nearest_2"] == 1
    assert lists["novel"]["prompt_of_nearest_prompt_1"]["mean"] == 1  # there is no other
    assert Image.open(root / "g-seen.png").width > Image.open(root / "g-novel.png").width
    out = capsys.readouterr().out
    assert "recognised in the list" in out and "seen, 2" in out
    assert {"caption_of_nearest_text_4", "image_text_score_4", "caption_of_nearest_4", "fd_local_4"} <= found.keys()
    assert report["floor"]["caption_of_nearest_4"]["mean"] == 0.0  # no image of the reference has that caption
    assert report["v_loss"]["model"] > 0 and (root / "g.png").is_file()
    make_text_pipe(text_encoder=None, tokenizer=None, networks={"sample_size": 16}).save_pretrained(root / "blind")
    for more, said in (
        (["--model", str(root / "blind")], "blind has no text_encoder to embed prompts"),
        ([*model, "--prompt_lists", str(root / "absent.txt")], "absent.txt cannot be read"),
        ([*model, "--prompt_lists", str(root / "seen.txt"), str(root / "seen.txt")], "must have different names"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate.main(evaluate.parse_args([*flags, *more]))


def test_a_single_rate_model_of_text_is_distilled_under_its_own_encoder(root):
    heavy = train(train_single_rate, root, "heavy", "--network", "heavy")
    student = train(distill, root, "student", "--teacher", str(root / "heavy"), encoder=False)
    assert student.context_encoder is not None and student.config.num_inference_steps == 4
    ours, theirs = student.text_encoder.state_dict(), heavy.text_encoder.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    (root / "prompts.txt").write_text("a red apple\n\ntwo fish\n")
    alone = ["--teacher", str(root / "heavy"), "--student", str(root / "student"), "--full_rollout"]
    alone = [
        "--preset",
        str(root / "tiny.json"),
        *alone,
        "--validation_steps",
        "0",
        "--output_dir",
        str(root / "alone"),
    ]
    reset_accelerate()
    assert distill.main(distill.parse_args([*alone, "--prompt_list", str(root / "prompts.txt")])) == 0
    taught = weights_of(DualRatePipeline.from_pretrained(root / "alone"))
    assert any(not torch.equal(weight, taught[name]) for name, weight in weights_of(student).items())
    (root / "empty.txt").write_text("\n")
    for path, said in (("empty.txt", "holds no prompt"), ("absent.txt", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            distill.main(distill.parse_args([*alone, "--prompt_list", str(root / path)]))
    with pytest.raises(ValueError, match="The teacher takes text: give its prompts by --prompt_list"):
        distill.main(distill.parse_args(alone))
    bare = DualRatePipeline(heavy.denoiser, heavy.scheduler, num_inference_steps=4)
    bare.save_pretrained(root / "bare")
    without = ["--teacher", str(root / "bare"), "--prompt_list", str(root / "prompts.txt")]
    with pytest.raises(ValueError, match="bare has no text_encoder to embed prompts: save it with text_encoder"):
        distill.main(distill.parse_args([*alone, *without]))
    start = ("--pretrained_model_name_or_path", str(root / "heavy"))
    followed = train(train_dual_rate, root, "followed", *start, "--freeze_encoder", encoder=False)
    kept = followed.context_encoder.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in heavy.denoiser.state_dict().items() if name in kept)


@pytest.mark.parametrize("kind", [LabelledImages, StreamedImages])
def test_each_look_at_an_image_draws_one_of_its_captions_by_seed_epoch_and_number(root, kind):
    images = open_set(root, kind, seed=3)
    if kind is LabelledImages:
        drawn = {
            (epoch, i): captions_from_bytes(images[epoch, i]["caption"][None])[0]
            for epoch in range(9)
            for i in range(8)
        }
        again = captions_from_bytes(open_set(root, seed=3)[8, 7]["caption"][None])[0]
        assert again == drawn[8, 7] and all(caption in CAPTIONS[i % 4] for (_, i), caption in drawn.items())
    else:
        items = [item for item, _ in zip(images.read_from(0, 0), range(72), strict=False)]
        drawn = dict(enumerate(captions_from_bytes(item["caption"][None])[0] for item, _ in items))
    assert set(drawn.values()) == {caption for row in CAPTIONS for caption in row}
    assert images.list_captions(3)[0] == "a red apple" and len(images.list_captions(3)) == 3


def test_captions_are_embedded_once_as_prompts_are_and_alike_in_any_company():
    encoding = TextEncoding(make_text_encoder("t5"), make_tokenizer())
    captions, calls = CaptionEmbeddings(encoding, 6), []
    encoding.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    first = captions.embed(["a red apple", "a star"], "cpu")
    captions.embed(["a star", "a red apple", "a star"], "cpu")
    assert len(calls) == 1
    whole = encoding.encode(["a red apple", "a star"], 6, "cpu")
    assert torch.equal(first.mask, whole.mask)
    torch.testing.assert_close(first.tokens[first.mask], whole.tokens[whole.mask])
    others = CaptionEmbeddings(encoding, 6).embed(["fish", "a blue bird", "a star"], "cpu")
    assert torch.equal(others.tokens[2], first.tokens[1])


def test_a_text_encoder_is_found_alone_or_in_a_pipeline_and_named_where_it_is_missing(root, make_text_pipe, tmp_path):
    make_text_pipe("t5").save_pretrained(tmp_path / "pipe")
    assert type(load_text_encoding(str(tmp_path / "pipe")).text_encoder).__name__ == "T5EncoderModel"
    alone = load_text_encoding(str(root / "encoder"))
    assert type(alone.text_encoder).__name__ == "CLIPTextModel"
    assert alone.tokenizer("a star").input_ids == AutoTokenizer.from_pretrained(root / "encoder")("a star").input_ids
    for flags, said in (
        (["--text_encoder", str(root / "images")], "holds no text encoder"),
        (["--label_column", "text"], "of text or of classes"),
    ):
        with pytest.raises(ValueError, match=said):
            train(train_single_rate, root, "none", "--network", "light", *flags)
    with pytest.raises(ValueError, match="Captions need --text_encoder"):
        train(train_single_rate, root, "none", "--network", "light", encoder=False)
    with pytest.raises(ValueError, match="two text encoders"):
        train(
            train_dual_rate,
            root,
            "none",
            "--pretrained_model_name_or_path",
            str(tmp_path / "pipe"),
            "--override",
            "denoiser.sample_size=8",
            "context_encoder.sample_size=8",
        )
    assert not (root / "none").exists()


@pytest.mark.parametrize("value", [3, [], ["a", 3], None])
def test_a_row_without_a_caption_is_named(root, tmp_path, value):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="The row 1 must hold a caption .*'text'"):
        check_captions(value, "text", 1)
