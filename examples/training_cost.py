"""What the training of a model cost, by what it was told.

FLOPs are those of the networks, forwards and backwards: a backward pass is two forward ones, one for the weights and one for
what the network was given; at a frozen network it stops. Losses, checks and the optimiser are left out.
"""

from diffusers_dualrate import flops
from diffusers_dualrate.flops import context_flops, network_flops
from diffusers_dualrate.recipes import DistillationRecipe


def distillation_flops(denoiser, context_encoder, teacher, recipe):
    """FLOPs for each image of a batch in every phase of a distillation.

    A step brings the student to its time without gradient (R), lets it predict there (P), and has the teacher, twice where
    it is guided, and the auxiliary of its shape (T) judge that: R + P + (G + 3) T for the auxiliary, R + 3 P + (G + 1) T for
    the student.
    """
    n, k = recipe.num_inference_steps, recipe.num_context_steps
    light, judge = network_flops(denoiser), network_flops(teacher)
    encode, project = 0, 0
    if context_encoder is not None:
        encode, project = network_flops(context_encoder), context_flops(denoiser)
    interval = n // k
    rollout = (interval - 1) * light
    if recipe.full_rollout:  # from noise to the segment, too
        rollout += (n - interval) * light + (k - 1) * (encode + project)
    predict = light + encode + project
    judged = 2 if recipe.guidance_scale > 1 and teacher.config.num_classes else 1
    return {
        "pretraining": 3 * light + 2 * project + encode,  # with the encoder frozen
        "auxiliary": rollout + predict + (judged + 3) * judge,
        "student": rollout + 3 * predict + (judged + 1) * judge,
    }


def training_flops(pipe, recipe, images_seen, teacher=None):
    """FLOPs of a model's own training, without those of what it started from; `None` where they are not known.

    Args:
        pipe: The model.
        recipe: What its configuration says of the training.
        images_seen: Images that it was trained on.
        teacher: Pipeline of the teacher, for a student.
    """
    if not isinstance(recipe, DistillationRecipe):
        return round(flops.training_flops(pipe.denoiser, pipe.context_encoder, **recipe.encoder_costs) * images_seen)
    if teacher is None:
        return None
    each = distillation_flops(pipe.denoiser, pipe.context_encoder, teacher.denoiser, recipe)
    return sum(each[phase] * count for phase, count in recipe.images_by_phase.items())
