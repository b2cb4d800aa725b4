"""Train a small text encoder with its tokenizer on captioned images, and an image encoder that judges by them.

    python -m research.train_text_encoder --dataset_name examples/data/emoji64 --output_dir examples/text_encoders/emoji64

Both encoders learn to give an image and its captions the same direction, and other captions others (CLIP,
arXiv 2103.00020). An image has several captions, and a caption without a style is that of several images: the targets
are uniform over all that belong together. What is left beside the text encoder: the tokenizer, byte-level BPE as CLIP
has it, learned from the captions; and the image encoder, an `ImageClassifier` whose outputs are the axes of the
embedding. Only the split `train` is learned from; how well images of both splits find their names is printed and
written into the image encoder's file. About 10 minutes on an idle CPU core.

That image encoder is small, since every step trains both. With `--text_encoder`, that one and its tokenizer stay as they
are, and a larger image encoder is trained for them alone, against all captions at once: the judge that ships.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.evaluation import ImageClassifier

from . import EXAMPLES

START, END = "<|startoftext|>", "<|endoftext|>"
AUGMENTATION = Augmentation(translation=3, scale=(0.85, 1.1), background=(176, 255))
IMAGE_ENCODER = "image_encoder.safetensors"
SMALL = {"level_channels": (32, 64, 128), "num_features": 128, "stride": 4}
LARGE = {"level_channels": (32, 128, 256), "num_features": 256, "stride": 4}
# Standard deviation of the strongest noise on an image that is learned from alone.
MOST_NOISE = 0.1
HIGHEST_LOG_SCALE = 4.6


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default=str(EXAMPLES / "data" / "emoji64"))
    parser.add_argument("--output_dir", type=Path, default=EXAMPLES / "text_encoders" / "emoji64")
    parser.add_argument("--text_encoder", type=Path, help="Folder with text_encoder and tokenizer to be kept.")
    parser.add_argument("--vocab_size", type=int, default=1500)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=32, help="Tokens of the longest caption.")
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument(
        "--checkpoint", type=Path, help="File of the training's state, to go on from where it is there."
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train_tokenizer(captions, vocab_size, max_length):
    """Learns a tokenizer of CLIP's kind.

    Args:
        captions: The texts.
        vocab_size: Number of tokens.
        max_length: Tokens of the longest text that the encoder takes.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    clip = CLIPTokenizer()  # for its rules of where words end, so that they are learned as they will be read
    bpe.normalizer, bpe.pre_tokenizer = clip.backend_tokenizer.normalizer, clip.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab, merges = learned["vocab"], [tuple(pair) for pair in learned["merges"]]
    # Every byte may end a word, so that no text is unknown.
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(f"{byte}</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def make_text_encoder(tokenizer, hidden_size, num_hidden_layers):
    """An untrained `CLIPTextModel` for a tokenizer; a head has 32 channels."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class CaptionedImages:
    """The images of one split with their captions.

    Args:
        dataset: Rows with `image`, `captions`, `name` and `style`.
    """

    def __init__(self, dataset):
        self.pixels = np.stack([np.asarray(image.convert("RGBa")) for image in dataset["image"]])
        self.names, self.styles, self.captions = (
            list(dataset["name"]),
            list(dataset["style"]),
            list(dataset["captions"]),
        )

    def draw(self, rows, generator):
        """Augmented images [B, 3, H, W] of some rows, and a caption of each."""
        images = torch.stack([torch.from_numpy(AUGMENTATION.apply(self.pixels[row], generator)) for row in rows])
        return images, [self.captions[row][generator.integers(len(self.captions[row]))] for row in rows]

    def plain(self):
        """All images as they are [N, 3, H, W], on white."""
        generator = np.random.default_rng(0)  # which nothing uses
        return torch.stack([torch.from_numpy(Augmentation().apply(pixels, generator)) for pixels in self.pixels])


def belong(names, styles, captions):
    """Whether each image belongs to each caption of a batch [B, B].

    Args:
        names: What each image shows.
        styles: Its style.
        captions: A caption of each image. One that names no style belongs to all images of the name.
    """
    has_style = [caption.endswith(f", {style} style") for caption, style in zip(captions, styles, strict=True)]
    return torch.tensor([
        [
            name == other and (style == other_style or not styled)
            for other, other_style, styled in zip(names, styles, has_style, strict=True)
        ]
        for name, style in zip(names, styles, strict=True)
    ])  # fmt: skip


def contrastive_loss(images, texts, scale, pairs):
    """Mean cross-entropy of both directions, images to texts and texts to images.

    Args:
        images: Directions of the images [B, D].
        texts: Directions of the captions [B, D].
        scale: Inverse temperature.
        pairs: Whether image i belongs to caption j [B, B]; the target is uniform over those that do.
    """
    logits, targets = scale * images @ texts.T, pairs.float()
    forth = -(logits.log_softmax(1) * targets).sum(1) / targets.sum(1)
    back = -(logits.log_softmax(0) * targets).sum(0) / targets.sum(0)
    return (forth.mean() + back.mean()) / 2


def embed_texts(text_encoder, tokenizer, texts):
    """Directions of texts [B, D], with gradients where they are on."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return normalize(text_encoder(**inputs).pooler_output, dim=1)


@torch.no_grad()
def measure(text_encoder, tokenizer, image_encoder, images, names):
    """How often an image's nearest name is its own, among names with its style, and among the first five.

    Args:
        text_encoder: The text encoder.
        tokenizer: Its tokenizer.
        image_encoder: The image encoder.
        images: The images to be named.
        names: All names to choose from.
    """
    directions = torch.cat([normalize(image_encoder(part), dim=1) for part in images.plain().split(500)])
    places = {name: place for place, name in enumerate(names)}
    ranks = []
    for style in dict.fromkeys(images.styles):
        texts = embed_texts(text_encoder, tokenizer, [f"{name}, {style} style" for name in names])
        rows = [row for row, own in enumerate(images.styles) if own == style]
        found = directions[rows] @ texts.T
        own = torch.tensor([places[images.names[row]] for row in rows])
        ranks.append((found > found.gather(1, own[:, None])).sum(1))
    rank = torch.cat(ranks)
    return {"first": (rank == 0).float().mean().item(), "first_five": (rank < 5).float().mean().item()}


@torch.no_grad()
def measure_prompts(text_encoder, tokenizer, image_encoder, parts, prompts):
    """How often the nearest prompt of a list is an image's own, of all images that a prompt of the list belongs to.

    Args:
        text_encoder: The text encoder.
        tokenizer: Its tokenizer.
        image_encoder: The image encoder.
        parts: Sets of images.
        prompts: The list.
    """
    places, right = {prompt: place for place, prompt in enumerate(prompts)}, []
    texts = embed_texts(text_encoder, tokenizer, prompts)
    for images in parts:
        own = [[places[text] for text in captions if text in places] for captions in images.captions]
        rows = [row for row, known in enumerate(own) if known]
        x = images.plain()[rows]
        nearest = torch.cat([normalize(image_encoder(part), dim=1) @ texts.T for part in x.split(500)]).argmax(1)
        right += [place in own[row] for place, row in zip(nearest.tolist(), rows, strict=True)]
    return {"images": len(right), "first": sum(right) / max(1, len(right))}


def fit(args, encoders, loss_of):
    """Goes through the steps of a training, from its checkpoint on where there is one.

    Args:
        args: The flags.
        encoders: What is trained, as one module.
        loss_of: (generator of this step, scale) to the loss. Every draw is one of the seed and the step's number.

    Returns:
        The inverse temperature that the training came to.
    """
    log_scale = torch.nn.Parameter(torch.tensor(3.0))
    parameters = [parameter for parameter in encoders.parameters() if parameter.requires_grad]
    groups = [{"params": parameters}, {"params": [log_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.98))
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.max_train_steps, pct_start=0.1
    )
    parts = {"encoders": encoders, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    first = 0
    if args.checkpoint is not None and args.checkpoint.is_file():
        state = torch.load(args.checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        log_scale.data.copy_(state["log_scale"])
        first = state["step"]
    progress = tqdm(range(first, args.max_train_steps), unit="step", mininterval=10, initial=first)
    for step in progress:
        loss = loss_of(np.random.default_rng((args.seed, step)), log_scale.clamp(max=HIGHEST_LOG_SCALE).exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
            if args.checkpoint is not None:
                state = {name: part.state_dict() for name, part in parts.items()}
                partial = args.checkpoint.with_suffix(".partial")
                torch.save(state | {"log_scale": log_scale.data, "step": step + 1}, partial)
                partial.replace(args.checkpoint)
    return log_scale.clamp(max=HIGHEST_LOG_SCALE).exp().item()


def train_both(args, images, tokenizer, text_encoder, image_encoder):
    """Trains both encoders together, on the captions of a batch; returns the inverse temperature."""

    def loss_of(generator, scale):
        rows = generator.choice(len(images.names), args.train_batch_size, replace=False)
        x, captions = images.draw(rows, generator)
        pairs = belong([images.names[row] for row in rows], [images.styles[row] for row in rows], captions)
        directions = normalize(image_encoder(x), dim=1)
        return contrastive_loss(directions, embed_texts(text_encoder, tokenizer, captions), scale, pairs)

    return fit(args, torch.nn.ModuleList([text_encoder, image_encoder]), loss_of)


def train_image_encoder(args, images, tokenizer, text_encoder, image_encoder):
    """Trains an image encoder alone; returns the inverse temperature.

    The text encoder stays as it is, so all captions are embedded once, and each image is held against all of them.
    """
    texts = list(dict.fromkeys(caption for captions in images.captions for caption in captions))
    places = {text: place for place, text in enumerate(texts)}
    own = [torch.tensor([places[caption] for caption in captions]) for captions in images.captions]
    with torch.no_grad():
        directions = torch.cat([
            embed_texts(text_encoder, tokenizer, texts[first : first + 256]) for first in range(0, len(texts), 256)
        ])  # fmt: skip

    def loss_of(generator, scale):
        rows = generator.choice(len(images.names), args.train_batch_size, replace=False)
        x, _ = images.draw(rows, generator)
        # Samples have small errors of their own, which are not to decide.
        noise = generator.standard_normal(x.shape, dtype=np.float32)
        x = x + MOST_NOISE * torch.from_numpy(generator.random((len(x), 1, 1, 1), dtype=np.float32) * noise)
        logits = scale * normalize(image_encoder(x), dim=1) @ directions.T
        ours = torch.stack([row[own[place]].mean() for row, place in zip(logits, rows, strict=True)])
        return (logits.logsumexp(1) - ours).mean()

    return fit(args, image_encoder, loss_of)


def main(args):
    """Trains the encoders and saves them below `args.output_dir`."""
    splits = {split: load_dataset(args.dataset_name, split=split) for split in ("train", "test")}
    images = {split: CaptionedImages(dataset) for split, dataset in splits.items()}
    texts = [caption for captions in images["train"].captions for caption in captions]
    torch.manual_seed(args.seed)
    if args.text_encoder is None:
        tokenizer = train_tokenizer(texts, args.vocab_size, args.max_length)
        text_encoder = make_text_encoder(tokenizer, args.hidden_size, args.num_hidden_layers)
    else:
        tokenizer = CLIPTokenizer.from_pretrained(args.text_encoder / "tokenizer")
        folder = args.text_encoder / "text_encoder"
        text_encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    lengths = sorted(len(ids) for ids in tokenizer(texts).input_ids)
    print(f"{len(tokenizer)} tokens; captions have {lengths[len(lengths) // 2]} in the median, at most {lengths[-1]}")
    kind = SMALL if args.text_encoder is None else LARGE
    image_encoder = ImageClassifier(3, text_encoder.config.hidden_size, **kind)
    for name, encoder in (("text", text_encoder), ("image", image_encoder)):
        print(f"{name} encoder: {sum(parameter.numel() for parameter in encoder.parameters()):,} parameters")
    train = train_both if args.text_encoder is None else train_image_encoder
    scale = train(args, images["train"], tokenizer, text_encoder, image_encoder)

    text_encoder.eval(), image_encoder.eval()
    names = sorted({name for part in images.values() for name in part.names})
    held_out_names = set(images["test"].names) - set(images["train"].names)
    facts = {"scale": scale, "names": len(names)}
    parts = images | {
        "styles_held_out": pick(splits["test"], lambda name: name not in held_out_names),
        "combinations_held_out": pick(splits["test"], lambda name: name in held_out_names),
    }
    for split, part in parts.items():
        facts[split] = measure(text_encoder, tokenizer, image_encoder, part, names)
        print(split, len(part.names), "images:", facts[split])
    for path in sorted(Path(args.dataset_name, "prompts").glob("*.txt")):
        prompts = path.read_text(encoding="utf-8").splitlines()
        found = measure_prompts(text_encoder, tokenizer, image_encoder, images.values(), prompts)
        if found["images"]:
            facts[f"prompts_{path.stem}"] = found
            print(f"{found['images']} images among the {len(prompts)} prompts of {path.name}:", found)
    recipe = ("max_train_steps", "train_batch_size", "learning_rate", "weight_decay", "seed")
    if args.text_encoder is None:
        text_encoder.half().save_pretrained(args.output_dir / "text_encoder")
        tokenizer.save_pretrained(args.output_dir / "tokenizer")
    image_encoder.half().save(
        args.output_dir / IMAGE_ENCODER, **facts, **{name: getattr(args, name) for name in recipe}
    )


def pick(dataset, keeps):
    """The images of a data set whose names are kept."""
    return CaptionedImages(dataset.filter(lambda row: keeps(row["name"])))


if __name__ == "__main__":
    main(parse_args())
