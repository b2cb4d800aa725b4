"""The two-rate sampler once more, as one plain loop in float64 numbers: what the pipeline's tests compare it with.

It shares nothing with the package but the networks: the schedule and the transition are written out from the textbook
(q(z_s | z_t, x) by conditioning a Gaussian), each guidance branch is a pass of its own, nothing is kept or batched.
"""

import math

import torch


def log_snr_at(t, log_snr_min=-10.0, log_snr_max=10.0):
    """The cosine schedule: α/σ = cot of an angle that grows evenly in t."""
    first, last = (math.atan(math.exp(-end / 2)) for end in (log_snr_max, log_snr_min))
    return 2 * math.log(1 / math.tan(first + t * (last - first)))


def amplitudes(log_snr):
    return 1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))


def conditioned(log_snr_t, log_snr_s):
    """Weight of z_t, weight of x and variance of z_s given both, from Cov(z_s, z_t | x) = (α_t/α_s) σ_s²."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(log_snr_t), amplitudes(log_snr_s)
    slope = alpha_t / alpha_s * sigma_s**2 / sigma_t**2
    return slope, alpha_s - slope * alpha_t, sigma_s**2 - slope * alpha_t / alpha_s * sigma_s**2


@torch.no_grad()
def sample(
    denoiser, encoder, times, refresh_at, labels, noise, generator, scales=1.0, at=log_snr_at, clip=1.0, take_step=None
):
    """Images at the end of falling `times` in (0, 1]; `scales` one guidance scale, or one for each step.

    `take_step(i, z, v)` replaces the ancestral step, `at` the schedule.
    """
    scales = scales if isinstance(scales, list) else [scales] * len(times)
    z, context, level_of_context = noise, {}, None
    null = None if labels is None else torch.full_like(labels, denoiser.config.num_classes)
    for i, t in enumerate(times):
        level = at(t)
        branches = {"class": labels} | ({"null": null} if scales[i] != 1 else {})
        if encoder is not None and i in refresh_at:
            level_of_context = level
            for branch, of_branch in (("class", labels), ("null", null)):
                context[branch] = denoiser.project_context(encoder(z, level, of_branch).context)
        velocity = {
            branch: denoiser(z, level, of_branch, context.get(branch), level_of_context).sample
            for branch, of_branch in branches.items()
        }
        v = velocity["class"]
        if "null" in velocity:
            v = scales[i] * v + (1 - scales[i]) * velocity["null"]
        if take_step is not None:
            z = take_step(i, z, v)
            continue
        alpha, sigma = amplitudes(level)
        x = (alpha * z - sigma * v).clamp(-clip, clip)
        if i == len(times) - 1:
            return x
        weight_z, weight_x, variance = conditioned(level, at(times[i + 1]))
        z = weight_z * z + weight_x * x + math.sqrt(variance) * torch.randn(z.shape, generator=generator)
    return z


def variances(times, refresh_at, variance, gain_alone=1.0):
    """Var z after each step of the ancestral chain on Gaussian data, where x̂ = k_t z is exact and V_s = A² V_t + noise.

    Before the first of `refresh_at` the denoiser, which works alone, predicts x̂ = gain_alone k_t z.
    """
    found, so_far = [], 1.0
    for i, t in enumerate(times):
        alpha, sigma = amplitudes(log_snr_at(t))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        gain = gain if i >= min(refresh_at) else gain_alone * gain
        if i == len(times) - 1:
            return [*found, gain**2 * so_far]
        weight_z, weight_x, noise = conditioned(log_snr_at(t), log_snr_at(times[i + 1]))
        so_far = (weight_z + weight_x * gain) ** 2 * so_far + noise
        found.append(so_far)
