"""Measuring generated images against the images a model was trained on."""

import torch
from torch import Tensor
from torch.nn.functional import pad


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

    Training images may be transparent. Seen on black they are their premultiplied colour p, and on white p + (1 − a),
    so that on the background b of the image they are compared with they are p + (1 − a) b.

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
