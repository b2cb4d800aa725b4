"""Students whose first steps go without context: what they are judged by, what learns from it, and what they cost."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from conftest import PRESET
from diffusers_dualrate import DualRatePipeline
from diffusers_dualrate.diffusion import cosine_log_snr
from diffusers_dualrate.moment_matching import (
    Judges,
    Rollout,
    draw_on_grid,
    grid_denoising_loss,
    roll_out,
    sample_student,
    student_loss,
)
from diffusers_dualrate.recipes import DistillationRecipe
from diffusers_dualrate.refreshes import plan_segments
from distill import check_processes
from test_distill import data, root, run  # noqa: F401 (a fixture)
from test_moment_matching import (
    FLOOR,
    GRID,
    N,
    Scale,
    amplitudes,
    best_gain,
    best_gains,
    exact_draws,
    gaussian_teacher,
    grid_of,
    linear_network,
    log_snr_at,
    posterior_of,
    times_s,
    weight_at,
)

LATE = [(1, 0.5), (2, 0.5), (4, 0.5), (2, 0.75), (3, 0.375), (1, 0.125), (1, 0.9)]


def rolled_out(n, plan, gains, context_gains, encoder_gain, std, from_noise):
    """Step by step in coefficients of the independent sources: z_t, z_τ, x̃ and the noise, as vectors over (noises, x)."""
    source = torch.eye(N + 2, dtype=torch.float64)
    begin = max((i for i in range(n + 1) if plan[i]), default=0)
    alpha, sigma = amplitudes(log_snr_at(GRID[begin]))
    z, z_tau = alpha * std * source[N + 1] + sigma * source[0], torch.zeros(N + 2, dtype=torch.float64)
    if from_noise:
        z, begin = source[0], 0
    for i in range(begin, n + 1):
        if plan[i]:
            z_tau = z
        x_hat = gains[i] * z + context_gains[i] * encoder_gain * z_tau
        if i < n:
            of_z, of_x, noise_std = posterior_of(GRID[i], GRID[i + 1])
            z = of_z * z + of_x * x_hat + noise_std * source[i + 1]
    return z, z_tau, x_hat, source[n + 1]


@pytest.mark.parametrize(("k", "context_from"), LATE)
@pytest.mark.parametrize("from_noise", [False, True])
def test_rows_before_the_first_refresh_are_judged_without_context_and_the_others_behind_their_own_rollout(
    k, context_from, from_noise
):
    """Mutants: `<` made `<=` in `n < alone`; a context from step 0; rows put back in another order; `- alone` left out of
    the segments; the opening skipped or repeated on the way to the first refresh."""
    std, plan = 0.6, plan_segments(N, k, context_from)
    alone = plan.num_steps_alone
    assert alone == sum(t > context_from for t in GRID)
    rows, x, draws = exact_draws()
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows, x = [rows[i] for i in shuffle], x[shuffle]
    draws = type(draws)(draws.uniforms[shuffle], draws.noise[shuffle])
    gains = (1.2 * best_gains(std**2)).requires_grad_()
    context_gains = torch.linspace(0.1, -0.2, N, dtype=torch.float64).requires_grad_()
    encoder_gain, encoded = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), []
    refreshes = cosine_log_snr(
        torch.tensor([t for t, now in zip(GRID, plan, strict=True) if now], dtype=torch.float64)
    )

    def encode(z, log_snr, class_labels):
        assert torch.isin(log_snr, refreshes).all()
        encoded.append(len(z))
        return (encoder_gain * z,), None

    q = torch.full((len(rows),), 0.4, dtype=torch.float64)
    loss, _ = student_loss(
        linear_network(GRID, gains, context_gains), encode, None if from_noise else std * x, None, draws,
        grid=grid_of(N, k, context_from),
        judges=Judges(linear_network(times_s(rows), q), gaussian_teacher(std**2), FLOOR),
    )  # fmt: skip
    slopes = torch.autograd.grad(loss, (gains, context_gains, encoder_gain))
    assert encoded == [sum(n >= alone for n, _ in rows)] * (k if from_noise else 1)
    expected = [torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64), 0.0]
    fixed = (gains.detach(), context_gains.detach(), encoder_gain.item())
    for n, offset in rows:
        s = 1 - (n + offset) / N
        z_t, z_tau, x_hat, noise = rolled_out(n, plan, *fixed, std, from_noise)
        of_z, of_x, noise_std = posterior_of(GRID[n], s)
        z_s = of_z * z_t + of_x * x_hat + noise_std * noise
        scale = weight_at(s) * (0.4 - best_gain(log_snr_at(s), std**2)) / len(rows)
        expected[0][n] += scale * (z_s @ z_t)
        expected[1][n] += scale * fixed[2] * (z_s @ z_tau)
        expected[2] += scale * fixed[1][n] * (z_s @ z_tau)
    assert (slopes[1][:alone] == 0).all() and (slopes[1][alone:] != 0).all()
    for slope, exact in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, torch.as_tensor(exact), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("from_noise", [False, True])
def test_a_batch_that_stands_before_the_first_refresh_runs_no_encoder_and_gives_it_no_gradient(from_noise):
    denoiser, encoder = Scale(0.5), Scale(0.3)
    draws = draw_on_grid(0, 0, range(8), (1, 4, 4), 4)
    draws.uniforms[:, 0] *= 0.5
    grid = grid_of(4, 1, 0.5)
    x = None if from_noise else torch.randn(8, 1, 4, 4)
    sample_student(denoiser.denoise, encoder.encode, x, None, draws, grid=grid).x.sum().backward()
    assert encoder.calls == [] and encoder.weight.grad is None
    assert denoiser.calls == [False, True] and denoiser.weight.grad is not None  # one step to go, at most
    draws.uniforms[:, 0] += 0.5
    sample_student(denoiser.denoise, encoder.encode, x, None, draws, grid=grid).x.sum().backward()
    assert encoder.calls == [True] and encoder.weight.grad is not None


def test_denoising_on_the_grid_sees_contexts_behind_the_first_refresh_alone():
    """Mutants: the context-free rows given one; τ of another segment; a row's prediction at another's place."""
    std, plan = 0.6, plan_segments(N, 2, 0.75)
    rows, x, draws = exact_draws()
    gains = best_gains(std**2).requires_grad_()
    context_gains = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    refreshes = cosine_log_snr(torch.tensor([0.75, 0.375], dtype=torch.float64))

    def encode(z, log_snr, class_labels):
        assert torch.equal(log_snr, refreshes[[0] * 12 + [1] * 12])
        return (z,), None

    loss = grid_denoising_loss(
        linear_network(GRID, gains, context_gains), encode, std * x, None, draws,
        grid=grid_of(N, 2, 0.75), min_variance=FLOOR,
    )  # fmt: skip
    assert [i for i in range(N) if plan[i]] == [2, 5]
    for slope in torch.autograd.grad(loss, (gains, context_gains)):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)
    levels = [amplitudes(log_snr_at(t)) for t in GRID]
    least = [std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2) / max(sigma**2, FLOOR) for alpha, sigma in levels]
    assert loss.item() == pytest.approx(sum(least) / N, rel=1e-9)


@pytest.mark.parametrize(("n", "k", "context_from", "left"), [(4, 2, 0.75, 3), (4, 3, 0.5, 2), (2, 1, 0.3, 0)])
def test_a_number_of_refreshes_that_does_not_divide_the_steps_left_is_refused(n, k, context_from, left):
    message = (
        f"must divide the {left} steps at or below context_from={context_from} of num_inference_steps={n}, got {k}"
    )
    with pytest.raises(ValueError, match=message):
        plan_segments(n, k, context_from)


def test_a_rollout_without_an_encoder_takes_a_late_plan_for_none():
    noise, levels = torch.randn(3, 5, 1, 4, 4), cosine_log_snr(torch.linspace(1, 0, 5).double()).float()
    start, network = torch.zeros(3).long(), Scale(0.5)
    plans = plan_segments(4, 1, 0.5), plan_segments(4, 4)
    ends = [
        roll_out(network.denoise, None, noise[:, 0], Rollout(None, noise, levels), start, start + 4, refreshes=plan)
        for plan in plans
    ]
    assert torch.equal(*ends)


def steps_of(folder):
    """N, K, the first context and whether the model knows to go without, as the folder says."""
    index = json.loads((folder / "model_index.json").read_text())
    return [index[name] for name in ("num_inference_steps", "num_context_steps", "context_from", "context_free")]


@pytest.mark.parametrize("full_rollout", [False, True])
def test_a_student_of_two_steps_whose_first_is_the_light_network_alone_needs_no_telling(root, tmp_path, full_rollout):  # noqa: F811
    """It costs L + (H + L). Mutants: the flag not in the recipe; the saved model without its plan."""
    few = ["--override", "distillation.num_inference_steps=2", "distillation.num_context_steps=1"]
    few += ["--context_from", 0.5, "--max_train_steps", 4]
    late = tmp_path / "late"
    assert run(root, late, *data(root), *few, *["--full_rollout"] * full_rollout) == 0
    assert steps_of(late) == [2, 1, 0.5, True]
    pipe = DualRatePipeline.from_pretrained(late)
    calls = []
    pipe.context_encoder.register_forward_hook(lambda *_: calls.append("H"))
    pipe.denoiser.register_forward_hook(lambda *_: calls.append("L"))
    image = pipe("dog", output_type="pt").images
    assert calls == ["L", "H", "L"] and image.isfinite().all()
    if full_rollout:
        return
    # A pair that knows it is distilled so unless it is told otherwise.
    again = tmp_path / "again"
    assert run(root, again, *data(root), *few[:3], "--max_train_steps", 2, "--student", late) == 0
    assert steps_of(again) == [2, 1, 0.5, True]
    whole = tmp_path / "whole"
    options = ["--student", late, "--context_from", 1.0, "--max_train_steps", 2]
    assert run(root, whole, *data(root), *few[:3], *options) == 0
    assert steps_of(whole) == [2, 1, None, False]


@pytest.mark.parametrize(
    ("student", "context_from", "message"),
    [
        ("pair", 0.5, "--context_from 0.5 needs a student that learned to go without context"),
        ("teacher", 0.5, "--context_from 0.5 is for a pair"),
        (None, 0.7, "must divide the 2 steps at or below context_from=0.7 of num_inference_steps=4"),
        (None, 1.5, "context_from must be"),
    ],
)
def test_a_student_that_cannot_begin_late_is_refused_before_anything_is_made(
    root,  # noqa: F811
    tmp_path,
    student,
    context_from,
    message,
):
    options = [] if student is None else ["--student", root / student]
    if context_from == 0.7:
        options += ["--override", "distillation.num_context_steps=4"]
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "out", *data(root), *options, "--context_from", context_from)
    assert not (tmp_path / "out").exists()


def test_late_contexts_are_refused_where_processes_must_evaluate_all_networks_equally_often():
    """A process whose rows all stand before the first refresh skips the encoder, and FSDP's others would wait for it."""
    steps = {"num_inference_steps": 4, "num_context_steps": 2}
    early, late = (
        DistillationRecipe(**PRESET["distillation"] | steps | {"context_from": time}) for time in (1.0, 0.5)
    )
    spread, whole = (
        SimpleNamespace(distributed_type=kind) for kind in (DistributedType.FSDP, DistributedType.MULTI_GPU)
    )
    with pytest.raises(ValueError, match=r"context_from=0\.5 does not run with FSDP.*choose DDP"):
        check_processes(spread, late)
    check_processes(spread, early)
    check_processes(whole, late)
