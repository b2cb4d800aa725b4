"""Measures of image sets, against closed forms, torchmetrics, scikit-learn's neighbours and brute force."""

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import Dinov2Config, Dinov2Model

from diffusers_dualrate.evaluation import (
    FeatureStatistics,
    ImageClassifier,
    background_colour,
    energy_distance,
    fd_local,
    frechet_distance,
    load_dinov2,
    nearest_training_image,
    precision_recall,
)


def statistics_of(features, batch_size=1000):
    statistics = FeatureStatistics()
    for rows in features.split(batch_size):
        statistics.update(rows)
    return statistics


def exact_statistics(mean, covariance):
    """Statistics of 1001 features that have exactly this mean and covariance."""
    count, mean = 1001, torch.as_tensor(mean, dtype=torch.float64)
    moments = torch.empty(len(mean) + 1, len(mean) + 1, dtype=torch.float64)
    moments[0, 0], moments[0, 1:], moments[1:, 0] = count, count * mean, count * mean
    moments[1:, 1:] = (count - 1) * torch.as_tensor(covariance, dtype=torch.float64) + count * torch.outer(mean, mean)
    return FeatureStatistics(moments)


def test_streamed_statistics_are_those_of_the_whole_set_however_it_is_cut_and_merged():
    features = torch.randn(200, 5) @ torch.randn(5, 5) + 300  # a mean so large that float32 would lose the spread
    whole = features.double()
    merged = statistics_of(features[:70], 7) + statistics_of(features[70:71]) + statistics_of(features[71:])
    for statistics in (statistics_of(features, 1), merged):
        assert statistics.count == 200
        torch.testing.assert_close(statistics.mean, whole.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(statistics.covariance, whole.T.cov(), rtol=1e-7, atol=1e-7)


def test_statistics_come_back_from_a_file(tmp_path):
    statistics = statistics_of(torch.randn(20, 3))
    statistics.save(tmp_path / "cache" / "real.safetensors")
    back = FeatureStatistics.load(tmp_path / "cache" / "real.safetensors")
    assert torch.equal(back.moments, statistics.moments)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["real.safetensors"]


def test_a_covariance_of_one_feature_is_refused():
    with pytest.raises(ValueError, match="there are 1"):
        statistics_of(torch.randn(1, 3)).covariance  # noqa: B018
    assert FeatureStatistics().count == 0


def test_the_frechet_distance_of_gaussians_that_share_their_axes_is_that_of_means_and_standard_deviations():
    # ‖m − m'‖² + Σ (s − s')², in any rotation of the axes.
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    mean, other_mean = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.0, 2.5])
    std, other_std = torch.tensor([0.3, 1.0, 2.0]).double(), torch.tensor([0.5, 4.0, 0.0]).double()
    one = exact_statistics(mean, axes * std.square() @ axes.T)
    other = exact_statistics(other_mean, axes * other_std.square() @ axes.T)
    expected = (0.25 + 4 + 0.25) + (0.04 + 9 + 4)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-7)


def test_the_frechet_distance_of_two_skew_gaussians_in_the_plane_has_its_closed_form():
    # In two dimensions tr (C C')^½ = (tr C C' + 2 (det C det C')^½)^½.
    first, second = torch.randn(2, 2, 2, dtype=torch.float64)
    first, second = first @ first.T, second @ second.T
    root = math.sqrt((first @ second).trace() + 2 * math.sqrt(first.det() * second.det()))
    expected = first.trace() + second.trace() - 2 * root
    assert frechet_distance(exact_statistics([0, 0], first), exact_statistics([0, 0], second)) == pytest.approx(
        expected.item()
    )


@pytest.mark.parametrize("count", [100, 5])  # with fewer images than features the covariance has no full rank
def test_the_frechet_distance_is_that_of_torchmetrics(count):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    metric = FrechetInceptionDistance(feature=network, input_img_size=(3, 2, 2), normalize=True)
    real, generated = torch.rand(count, 3, 2, 2), torch.rand(count, 3, 2, 2).square()
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.no_grad():
        ours = frechet_distance(statistics_of(network(generated)), statistics_of(network(real)))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4, abs=1e-6)


def test_fd_local_does_not_depend_on_the_scale_of_the_features_and_is_scaled_by_the_reference():
    features, others = torch.randn(50, 4).double(), torch.rand(50, 4).double()
    reference, generated = statistics_of(features), statistics_of(others)
    scale = features.var(0).mean().sqrt()
    expected = frechet_distance(statistics_of(others / scale), statistics_of(features / scale))
    assert fd_local(generated, reference) == pytest.approx(expected)
    tenfold = fd_local(statistics_of(10 * others), statistics_of(10 * features))
    assert tenfold == pytest.approx(expected)


def test_the_energy_distance_of_points_on_a_line_is_that_of_their_gaps_but_for_those_of_a_row():
    """Kills: a factor 2 dropped, a sign, N² or N (N + 1) for N (N − 1), the pairs of a row kept."""
    one, other = torch.tensor([0.0, 1, 2])[:, None], torch.tensor([10.0, 20, 40])[:, None]
    between = (20 + 40) + (9 + 39) + (8 + 18)
    within = 2 * (1 + 2 + 1), 2 * (10 + 30 + 20)
    assert energy_distance(one, other) == pytest.approx((2 * between - sum(within)) / (3 * 2))


def test_precision_and_recall_are_those_of_neighbours_found_by_scikit_learn():
    generated, real = torch.randn(60, 3) * 0.5 + 0.7, torch.randn(80, 3)

    def share_inside(points, manifold):
        distances, _ = NearestNeighbors(n_neighbors=4).fit(manifold).kneighbors(manifold)  # itself and 3 others
        return sum(
            any((point - centre).norm() <= radius for centre, radius in zip(manifold, distances[:, -1], strict=True))
            for point in points
        ) / len(points)

    precision, recall = precision_recall(generated, real, batch_size=7)
    assert precision == pytest.approx(share_inside(generated, real))
    assert recall == pytest.approx(share_inside(real, generated))
    assert 0.2 < recall < precision < 1


def test_a_set_lies_within_itself_and_far_from_another():
    features = torch.randn(20, 4)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features + 100, features) == (0, 0)
    with pytest.raises(ValueError, match="3 neighbours need more than 20 and 3 features"):
        precision_recall(features, features[:3])


def test_a_classifier_comes_back_from_its_file_with_its_facts(tmp_path):
    classifier = ImageClassifier(1, 5, level_channels=(8, 16), num_features=6, stride=2).eval()
    classifier.save(tmp_path / "made" / "small.safetensors", held_out_accuracy=0.5)
    back = ImageClassifier.load(tmp_path / "made" / "small.safetensors")
    x = torch.randn(3, 1, 7, 9)
    with torch.no_grad():
        assert torch.equal(back(x), classifier(x))
        assert back.features(x).shape == (3, 6) and back(x).shape == (3, 5)
    assert back.facts == {"held_out_accuracy": 0.5} and back.config["num_features"] == 6


def test_a_classifier_looks_at_each_place_with_a_pixel_around_it_and_halves_its_maps_from_level_to_level():
    """Kills: `stride + 2` made 1 or 3, either convolution's stride or padding, no pooling or one too many."""
    classifier, sizes = ImageClassifier(3, 5, stride=4).eval(), []
    for level in classifier.levels:
        level.register_forward_hook(
            lambda module, inputs, output: sizes.append((*inputs[0].shape[2:], *output.shape[2:]))
        )
    classifier(torch.zeros(1, 3, 32, 64))
    assert sizes == [(32, 64, 8, 16), (4, 8, 4, 8), (2, 4, 2, 4)]
    assert [level[0].kernel_size for level in classifier.levels] == [(6, 6), (3, 3), (3, 3)]


@pytest.mark.parametrize(("size", "patch", "side"), [(20, 6, 18), (300, 100, 200)])
def test_dinov2_sees_colours_in_units_of_imagenet_at_the_largest_size_of_whole_patches(tmp_path, size, patch, side):
    """Kills: mean and std exchanged, the sign of the mean, [-1, 1] taken for [0, 1], another token, 224 passed over."""
    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
    }
    network = Dinov2Model(Dinov2Config(**shape)).eval()
    network.save_pretrained(tmp_path)
    features = load_dinov2(tmp_path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for level in (0.0, 1.0, -1.5):
        seen = features((2 * (mean + level * std) - 1)[None, :, None, None].expand(1, 3, 24, 24))
        with torch.no_grad():
            expected = network(torch.full((1, 3, side, side), level)).last_hidden_state[:, 0]
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
    assert features(torch.zeros(1, 1, 9, 9)).shape == (1, 8)  # grey is a colour, too


def test_what_is_no_classifier_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match="no classifier '.*nowhere'.*train_classifier.py"):
        ImageClassifier.load(tmp_path / "nowhere")
    statistics_of(torch.randn(4, 2)).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors' is not a classifier"):
        ImageClassifier.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="text.safetensors' is not a classifier"):
        ImageClassifier.load(tmp_path / "text.safetensors")


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
    for less in (0, 1):
        assert nearest_training_image(images, *as_arguments(p, see_through), less).tolist() != list(range(12))


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
