"""The look-up of the nearest training image, against brute force."""

import pytest
import torch

from diffusers_dualrate.evaluation import background_colour, nearest_training_image


def make_training_set(count=12, size=8):
    """Premultiplied colours and transparencies of pictures with a transparent margin of 2 pixels."""
    colour, alpha = torch.rand(count, 3, size, size), torch.rand(count, 1, size, size).round().expand(-1, 3, -1, -1)
    margin = torch.zeros(size, size)
    margin[2:-2, 2:-2] = 1
    alpha = alpha * margin
    return colour * alpha, 1 - alpha


def compose(p, see_through, background):
    return p + see_through * background[:, :, None, None]


def as_arguments(p, see_through):
    return 2 * p - 1, 2 * (p + see_through) - 1


def test_an_image_shifted_onto_another_background_finds_its_origin():
    p, see_through = make_training_set()
    images = compose(p, see_through, torch.rand(12, 3)) * 2 - 1
    images = images.roll((2, -1), dims=(2, 3))  # the margin makes a roll a shift
    assert nearest_training_image(images, *as_arguments(p, see_through), translation=2).tolist() == list(range(12))
    assert nearest_training_image(images, *as_arguments(p, see_through)).tolist() != list(range(12))


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_nearest_image_is_that_of_brute_force(batch_size):
    """Kills: any sign or factor 2 of the expanded square, background of the wrong image, `min` over the wrong axis."""
    p, see_through = make_training_set()
    images = torch.rand(20, 3, 8, 8) * 0.3 + 0.7 * compose(p, see_through, torch.rand(12, 3))[torch.arange(20) % 12]
    background = background_colour(images)
    expected = []
    for image, colour in zip(images, background, strict=True):
        candidates = compose(p, see_through, colour.expand(12, 3))
        distances = [
            (image - candidates.roll((down, right), dims=(2, 3))).square().sum((1, 2, 3))
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        ]
        expected.append(torch.stack(distances).min(dim=0).values.argmin().item())
    found = nearest_training_image(images * 2 - 1, *as_arguments(p, see_through), 1, batch_size=batch_size)
    assert found.tolist() == expected


def test_the_background_is_the_colour_of_most_of_the_border():
    image = torch.zeros(1, 3, 6, 6)
    image[:] = torch.tensor([0.1, 0.5, 0.9])[None, :, None, None]
    image[..., 2:4, 2:4] = 1.0
    image[..., 0, :3] = 0.0  # a picture that touches the border here and there does not matter
    torch.testing.assert_close(background_colour(image), torch.tensor([[0.1, 0.5, 0.9]]))
