"""Measuring generated images against real ones.

Distribution metrics compare features of two sets of images. The Fréchet distance (arXiv 1706.08500) is that between
Gaussians with the features' means and covariances,

    d² = ‖m − m'‖² + tr(C + C' − 2 (C C')^½).

Its name depends on the features. Those of Inception give FID, and those of DINOv2 give FD-DINOv2. Those of a small
classifier, trained on the data at hand, give `fd_local`. There the features are scaled to mean variance 1 on the reference.
A distance grows as the count shrinks. So it is read beside its floor: the distance between as many real images and others.
"""

import hashlib
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

# What DINOv2 was trained with.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureStatistics:
    """Count, mean and covariance of features, streamed in float64 at constant memory.

    All are kept as one matrix, the sum of (1, f)(1, f)ᵀ over features f. The sum of two such matrices is that of both sets
    together. So `statistics.moments = accelerator.reduce(statistics.moments)` merges the statistics of all processes.

    Args:
        moments: The sum [D + 1, D + 1] so far; `None` for none.
    """

    def __init__(self, moments: Tensor | None = None):
        self.moments = moments

    @property
    def sums(self) -> Tensor:
        """The moments where there are some.

        Raises:
            ValueError: If no feature was seen.
        """
        if self.moments is None:
            raise ValueError("No features were seen.")
        return self.moments

    def update(self, features: Tensor) -> None:
        """Add features [B, D]."""
        features = features.cpu() if features.device.type == "mps" else features  # which has no float64
        extended = pad(features.double(), (1, 0), value=1.0)
        moments = extended.T @ extended
        self.moments = moments if self.moments is None else self.moments + moments

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.sums + other.sums)

    @property
    def count(self) -> int:
        """Number of features seen."""
        return 0 if self.moments is None else round(self.moments[0, 0].item())

    @property
    def mean(self) -> Tensor:
        """Mean [D]."""
        return self.sums[0, 1:] / self.sums[0, 0]

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D].

        Raises:
            ValueError: If fewer than two features were seen.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 features, and there are {self.count}.")
        return (self.sums[1:, 1:] - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    def save(self, path: str | Path, **tensors: Tensor) -> None:
        """Write into a safetensors file, with what else belongs there, under its name only when complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # another process may write the same
        save_file({"moments": self.sums.cpu(), **tensors}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "FeatureStatistics":
        """Read what `save` wrote."""
        return cls(load_file(path, device=str(device))["moments"])


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Squared Fréchet distance of the Gaussians with these statistics: what FID and its relatives report."""
    root, other_root = _root(one.covariance), _root(other.covariance)
    # tr (C C')^½ is the nuclear norm of C^½ C'^½: no product is squared, so small eigenvalues keep their digits.
    overlap = torch.linalg.matrix_norm(root @ other_root, "nuc")
    spread = root.square().sum() + other_root.square().sum() - 2 * overlap
    return ((one.mean - other.mean).square().sum() + spread).item()


def fd_local(statistics: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Fréchet distance in a local classifier's features, scaled to mean variance 1 on the reference."""
    return frechet_distance(statistics, reference) / reference.covariance.diagonal().mean().item()


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Energy distance of two distributions, 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖. It is 0 only if they are equal.

    Row i of one set may share its randomness with row i of the other. Pairs within a row are left out, so the mean stays
    that of independent draws. What both sets share then cancels.

    Args:
        one: Samples [N, ...], at least two.
        other: As many samples of the other distribution.
    """
    one, other = one.flatten(1).double(), other.flatten(1).double()
    apart = torch.cdist(one, other).fill_diagonal_(0)
    total = 2 * apart.sum() - torch.cdist(one, one).sum() - torch.cdist(other, other).sum()
    return (total / (len(one) * (len(one) - 1))).item()


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def precision_recall(
    generated: Tensor, real: Tensor, *, num_neighbours: int = 3, batch_size: int = 1000
) -> tuple[float, float]:
    """Share of generated images within the real ones' manifold, and the reverse (arXiv 1904.06991).

    A manifold is the union of balls about its features, each reaching to its k-th nearest neighbour.

    Args:
        generated: Features [N, D].
        real: Features [M, D].
        num_neighbours: k.
        batch_size: Rows compared at a time.

    Raises:
        ValueError: If a set has no k-th neighbour.
    """
    if min(len(generated), len(real)) <= num_neighbours:
        raise ValueError(f"{num_neighbours} neighbours need more than {len(generated)} and {len(real)} features.")
    generated, real = generated.double(), real.double()  # so that expanding the squares costs no digits

    def share_inside(features: Tensor, manifold: Tensor) -> float:
        # An image is its own nearest neighbour.
        radii = torch.cat(
            [torch.cdist(rows, manifold).kthvalue(num_neighbours + 1).values for rows in manifold.split(batch_size)]
        )
        inside = [(torch.cdist(rows, manifold) <= radii).any(1) for rows in features.split(batch_size)]
        return torch.cat(inside).double().mean().item()

    return share_inside(generated, real), share_inside(real, generated)


class ImageClassifier(nn.Module):
    """A small convolutional classifier, whose last features measure images of the data it was trained on.

    Args:
        in_channels: C.
        num_classes: Number of classes.
        level_channels: Width at each resolution, halved from level to level.
        num_features: D, width of the penultimate layer.
        stride: Pixels between the places that the first convolution looks at, to make large images cheap.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        level_channels: tuple[int, ...] = (32, 64, 96),
        num_features: int = 64,
        stride: int = 1,
    ):
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "level_channels": list(level_channels),
            "num_features": num_features,
            "stride": stride,
        }
        self.levels = nn.ModuleList()
        for before, width in pairwise([in_channels, *level_channels]):
            size, step = (3, 1) if self.levels else (stride + 2, stride)
            first = (nn.Conv2d(before, width, size, step, padding=1), nn.BatchNorm2d(width), nn.SiLU())
            second = (nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
            self.levels.append(nn.Sequential(*first, *second))
        self.penultimate = nn.Linear(level_channels[-1], num_features)
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W] in [-1, 1]."""
        for i, level in enumerate(self.levels):
            x = level(x if i == 0 else nn.functional.avg_pool2d(x, 2))
        return silu(self.penultimate(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.features(x))

    def save(self, path: str | Path, **facts) -> None:
        """Write weights, configuration and JSON-able facts about the training into one safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"config": json.dumps(self.config), "facts": json.dumps(facts)}
        save_file(self.state_dict(), path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "ImageClassifier":
        """Read what `save` wrote; the facts become the attribute `facts`.

        Raises:
            ValueError: If there is no such file, or it holds something else.
        """
        if not Path(path).is_file():
            raise ValueError(f"There is no classifier {str(path)!r}: examples/train_classifier.py trains one.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            metadata = {}
        if "config" not in metadata:
            raise ValueError(f"{str(path)!r} is not a classifier of examples/train_classifier.py.")
        classifier = cls(**json.loads(metadata["config"]))
        classifier.load_state_dict(load_file(path))
        classifier.facts = json.loads(metadata["facts"])
        return classifier.eval()


def load_dinov2(name: str | Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Feature function of DINOv2: images [B, C, H, W] in [-1, 1] to the class token [B, D].

    Args:
        name: Repository on the Hub, such as facebook/dinov2-large, or a local folder.
        device: Where it runs.

    Raises:
        ValueError: If the package or the weights are not at hand.
    """
    try:
        from transformers import AutoModel

        network = AutoModel.from_pretrained(name).eval().requires_grad_(False).to(device)
    except ModuleNotFoundError as error:
        raise ValueError("FD with DINOv2 needs the package transformers: `pip install transformers`.") from error
    except OSError as error:
        raise ValueError(
            f"The weights of DINOv2 {str(name)!r} are not at hand: `hf download facebook/dinov2-large` fetches them where "
            "there is a network, and a local folder of them does as well."
        ) from error
    patch = network.config.patch_size
    side = min(224, network.config.image_size) // patch * patch
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))

    def features(x: Tensor) -> Tensor:
        colours = (x.expand(-1, 3, -1, -1) + 1) / 2
        colours = interpolate(colours, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return network((colours - mean) / std).last_hidden_state[:, 0]

    return features


def load_inception(device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Feature function of the Inception network of FID: images [B, C, H, W] in [-1, 1] to features [B, 2048].

    Raises:
        ValueError: If torchmetrics or torch-fidelity, which bring it, is not installed, or the weights are not at hand.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = FrechetInceptionDistance(feature=2048).inception.to(device)
    except ModuleNotFoundError as error:
        raise ValueError("FID needs Inception, which `pip install torchmetrics torch-fidelity` brings.") from error
    except OSError as error:
        raise ValueError(
            f"The weights of Inception are not at hand, torch-fidelity fetches them once: {error}."
        ) from error

    def features(x: Tensor) -> Tensor:
        return network(((x.expand(-1, 3, -1, -1) + 1) * 127.5).round().byte())

    return features


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def background_colour(images: Tensor) -> Tensor:
    """Colour behind each image [B, C], estimated as the median of its border pixels.

    Args:
        images: Images [B, C, H, W].
    """
    edges = (images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1])
    return torch.cat(edges, dim=-1).median(dim=-1).values


def nearest_training_image(
    images: Tensor, on_black: Tensor, on_white: Tensor, translation: int = 0, *, batch_size: int = 256
) -> Tensor:
    """Index [B] of the training image nearest to each image in mean square distance, over shifts and backgrounds.

    Training images may be transparent. On black such an image is its premultiplied colour p; on white it is p + (1 − a).
    Both together give it on any background b, as p + (1 − a) b. Here b is that of the image which is looked up.

    Args:
        images: Images to look up [B, C, H, W] in [-1, 1].
        on_black: Training images [M, C, H, W] in [-1, 1] on a black background.
        on_white: The same on white.
        translation: Largest shift in pixels, in each direction.
        batch_size: Images compared at a time.
    """
    height, width = images.shape[-2:]
    colours = (on_black + 1) / 2
    see_through = (on_white - on_black) / 2
    found = []
    for chunk in images.split(batch_size):
        target = (chunk + 1) / 2
        background = background_colour(target)
        best = torch.full((len(chunk),), float("inf"), device=images.device)
        index = torch.zeros(len(chunk), dtype=torch.long, device=images.device)
        for down in range(-translation, translation + 1):
            for right in range(-translation, translation + 1):
                p, free = (_shift(part, down, right, height, width) for part in (colours, see_through))
                # ‖x − p − (1 − a) b‖² less ‖x‖², expanded so that it is a few matrix products.
                distance = (
                    (p.square().sum((1, 2, 3)) - 2 * torch.einsum("nchw,mchw->nm", target, p))
                    + torch.einsum("nc,mc->nm", 2 * background, (p * free).sum((2, 3)))
                    + torch.einsum("nc,mc->nm", background.square(), free.square().sum((2, 3)))
                    - 2 * torch.einsum("nchw,mchw->nm", target * background[:, :, None, None], free)
                )
                value, nearest = distance.min(dim=1)
                index = torch.where(value < best, nearest, index)
                best = torch.minimum(value, best)
        found.append(index)
    return torch.cat(found)


def _shift(images: Tensor, down: int, right: int, height: int, width: int) -> Tensor:
    margin = max(abs(down), abs(right))
    padded = pad(images, [margin] * 4, mode="replicate") if margin else images
    return padded[..., margin - down : margin - down + height, margin - right : margin - right + width]
