"""From a budget to a plan: what it costs, that it is the best of what was tried, and what is kept of it."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler

import plan
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, plan_refreshes
from diffusers_dualrate.brownian import BrownianNoise
from diffusers_dualrate.evaluation import energy_distance
from diffusers_dualrate.flops import network_flops, plan_flops
from diffusers_dualrate.guidance import Guidance
from diffusers_dualrate.planning import PLANNING_SEED, Choice, _Search, plan_for

LATE = {"context_free": True, "num_inference_steps": 8, "guidance_scale": 2.0}
FEW = {"num_images": 4, "num_trials": 12}


def flops_of(pipe, choice):
    """What an image costs by a choice, guidance included."""
    pipe.scheduler.set_timesteps(choice.num_inference_steps)
    guidance = Guidance(pipe.config.guidance_scale, choice.guidance_interval or (-math.inf, math.inf))
    guided = [guidance.acts_at(level) for level in pipe.scheduler.step_log_snrs.tolist()]
    return plan_flops(pipe.denoiser, pipe.context_encoder, choice.plan, guided=guided)


@pytest.fixture
def pipe(make_pipe):
    return make_pipe(**LATE)


def budget_of(pipe, evaluations=8):
    """GFLOPs of so many heavy evaluations, guided."""
    return 2 * evaluations * network_flops(pipe.context_encoder) / 1e9


def test_the_choice_is_the_best_of_what_was_tried_and_all_of_that_is_affordable(pipe):
    """Mutants: `<` made `>` in what is better; the budget of guidance halved; a plan tried twice."""
    planned = plan_for(pipe, budget_of(pipe), **FEW)
    keys = [(c.num_inference_steps, c.refresh_steps, c.second_order, c.guidance_interval) for c in planned.tried]
    assert len(set(keys)) == len(keys) == 12
    assert planned.choice.score == min(choice.score for choice in planned.tried)
    for choice in planned.tried:
        assert choice.cost == pytest.approx(flops_of(pipe, choice) / 1e9) and choice.cost <= budget_of(pipe)
    assert {choice.second_order for choice in planned.tried} == {True, False}
    assert any(choice.refresh_steps[0] > 0 for choice in planned.tried)
    even = [
        plan_refreshes(c.num_inference_steps, len(c.refresh_steps), num_steps_alone=c.refresh_steps[0])
        for c in planned.tried
    ]
    assert any(list(choice.plan) != list(other) for choice, other in zip(planned.tried, even, strict=True))
    again = plan_for(pipe, budget_of(pipe), **FEW)
    assert again.choice == planned.choice and again.tried == planned.tried
    assert plan_for(pipe, budget_of(pipe), **FEW, seed=1).choice.score != planned.choice.score


def test_a_pair_that_never_learned_to_go_without_context_is_planned_from_step_0(make_pipe):
    pipe = make_pipe(num_inference_steps=8)
    planned = plan_for(pipe, budget_of(pipe), **FEW)
    assert all(choice.refresh_steps[0] == 0 for choice in planned.tried)


def test_no_chain_of_a_late_pair_has_a_context_above_its_context_from_nor_has_the_long_one(make_pipe, watch):
    """Mutants: `starts` from 0, in the openings, the neighbours or the long chain; one step later or earlier."""
    context_from = 0.25
    pipe = make_pipe(**LATE | {"guidance_scale": 1.0}, context_from=context_from)
    calls = watch(pipe)
    planned = plan_for(pipe, budget_of(pipe, 1), num_images=2, num_trials=16, batch_size=2)
    latest = pipe.scheduler.log_snr_at(context_from).item()
    seen = torch.cat([call.log_snr.flatten() for call in calls.encoder])
    assert seen.min().item() == pytest.approx(latest, abs=1e-3)
    begins = {(c.num_inference_steps, c.refresh_steps[0]) for c in planned.tried}
    assert all(1 - first / n <= context_from + 1e-9 for n, first in begins)
    assert any(1 - (first - 1) / n > context_from for n, first in begins)  # some begin as early as they may
    with pytest.raises(ValueError, match="is less than the cheapest plan costs"):
        plan_for(pipe, 1e-9)
    with pytest.raises(ValueError, match=r"context_from=0.01 leaves none of 64 steps"):
        plan_for(make_pipe(**LATE, context_from=0.01), 1.0)


def test_milliseconds_of_an_evaluation_are_those_of_one_branch(pipe, watch):
    """Guidance is in the cost of a plan already. Mutant: the model's scale as a chain is timed."""
    calls = watch(pipe)
    _Search(pipe, 4, 0, 3).price("milliseconds")
    assert {call.rows for call in [*calls.encoder, *calls.denoiser]} == {3}


def test_a_single_rate_model_is_planned_by_its_steps_alone(make_pipe):
    pipe = make_pipe(single_rate=True, num_inference_steps=8)
    planned = plan_for(pipe, 0.5, unit="share", num_images=4, num_trials=6)
    assert all(choice.refresh_steps is None for choice in planned.tried)
    assert planned.choice.num_inference_steps <= 4  # half of its own eight
    assert planned.choice.apply_to(pipe).config.num_inference_steps == planned.choice.num_inference_steps


def test_a_criterion_of_ones_own_decides_and_intervals_of_guidance_are_tried(pipe):
    def brightness(images):
        return images.mean().item()

    planned = plan_for(pipe, budget_of(pipe), criterion=brightness, num_images=4, num_trials=30)
    assert planned.criterion == "brightness"
    intervals = {choice.guidance_interval for choice in planned.tried}
    assert None in intervals and len(intervals) > 1
    assert planned.choice.score == min(choice.score for choice in planned.tried)


@pytest.mark.parametrize("second_order", [False, True])
def test_two_chains_along_the_same_noise_end_alike_where_the_image_is_known(second_order):
    """With x given, the chain is Markov in its own right: whatever its steps, it ends at one place of one path.

    Mutants: noise scaled by the variance, or by the place; an increment of other ends; a bridge without its end.
    """
    x, path = torch.tensor([[[[0.4]], [[-1.3]]]]).expand(2000, -1, -1, -1), BrownianNoise((2000, 2, 1, 1), 0)
    ends = {}
    for n in (3, 12, 7):
        scheduler = DualRateScheduler(clip_sample=False, second_order=second_order)
        # One more step than is taken: the last gives x itself.
        scheduler.set_timesteps(timesteps=[1000 * (1 - 0.8 * i / n) for i in range(n + 1)])
        levels, z = scheduler.step_log_snrs, path.start
        noise = path.of_steps(levels.tolist())
        for i, t in enumerate(scheduler.timesteps[:-1]):
            alpha, sigma = levels[i].sigmoid().sqrt(), (-levels[i]).sigmoid().sqrt()
            z = scheduler.step((alpha * z - x) / sigma, t, z, variance_noise=noise[i]).prev_sample
        ends[n] = z
        for each in noise[:-1]:
            assert each.mean().abs() < 0.08 and each.std().item() == pytest.approx(1, abs=0.05)
    for n in (12, 7):
        torch.testing.assert_close(ends[n], ends[3], rtol=0, atol=2e-4)
    alpha, sigma = levels[-1].sigmoid().sqrt(), (-levels[-1]).sigmoid().sqrt()
    standard = (ends[3] - alpha * x) / sigma
    assert standard.mean().abs() < 0.08 and standard.std().item() == pytest.approx(1, abs=0.05)


def test_each_image_has_noise_of_its_own_seed_whatever_the_count():
    few, many = BrownianNoise((2, 1, 4, 4), 3), BrownianNoise((5, 1, 4, 4), 3)
    levels = [-9.0, 0.0, 4.0]
    assert torch.equal(few.start, many.start[:2]) and not torch.equal(many.start[0], many.start[1])
    for one, other in zip(few.of_steps(levels), many.of_steps(levels), strict=True):
        assert torch.equal(one, other[:2])
    assert not torch.equal(BrownianNoise((2, 1, 4, 4), 4).start, few.start)


def test_milliseconds_are_those_of_this_machine_and_a_share_is_of_the_heavy_network_at_the_models_own_steps(pipe):
    shared = plan_for(pipe, 0.5, unit="share", num_images=2, num_trials=3)
    heavy = 2 * pipe.config.num_inference_steps * network_flops(pipe.context_encoder)
    for choice in shared.tried:
        assert choice.cost == pytest.approx(flops_of(pipe, choice) / heavy) and choice.cost <= 0.5
    timed = plan_for(pipe, 1000.0, unit="milliseconds", num_images=2, num_trials=2)
    assert all(0 < choice.cost <= 1000 for choice in timed.tried) and "cpu" in timed.machine and shared.machine is None


def test_a_model_of_text_is_planned_on_prompts_that_are_embedded_once(make_text_pipe, tmp_path, capsys):
    """A late plan costs what it costs with classes, and each image is of its own prompt and noise."""
    pipe = make_text_pipe(**LATE)
    encoded = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    planned = plan_for(pipe, budget_of(pipe), prompts=["a red apple", "two fish"], **FEW)
    assert len(encoded) == 1 and any(choice.refresh_steps[0] > 0 for choice in planned.tried)
    for choice in planned.tried:
        assert choice.cost == pytest.approx(flops_of(pipe, choice) / 1e9) and choice.cost <= budget_of(pipe)
    swapped = plan_for(pipe, budget_of(pipe), prompts=["two fish", "a red apple"], **FEW)
    assert swapped.tried[0].score != planned.tried[0].score
    choice, search = planned.choice, _Search(pipe, 2, 0, 2, ["a red apple", "two fish"])
    both = search.sample(choice)
    alone = _Search(pipe, 2, 0, 1, ["a red apple", "two fish"]).sample(choice)
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
    for prompts, said in ((None, "prompts of a model of text must be"), ([], "is empty"), (["a", 3], "got 3")):
        with pytest.raises(ValueError, match=said):
            plan_for(pipe, budget_of(pipe), prompts=prompts, **FEW)

    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red apple\n\ntwo fish\n")
    few = ["--budget", budget_of(pipe), "--num_images", 2, "--num_trials", 2]
    flags = ["--model", tmp_path / "model", *few, "--output", tmp_path / "planned"]
    run(*flags, "--prompt_list", tmp_path / "prompts.txt")
    assert json.loads((tmp_path / "planned" / "plan.json").read_text())["prompts"] == ["a red apple", "two fish"]
    with pytest.raises(ValueError, match="is a model of text: give --prompt_list, or data"):
        run(*flags[:-1], tmp_path / "other")
    DualRatePipeline.from_pipe(pipe, text_encoder=None, tokenizer=None).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no text_encoder to embed prompts"):
        bare = ["--model", tmp_path / "bare", *few, "--output", tmp_path / "other"]
        run(*bare, "--prompt_list", tmp_path / "prompts.txt")


def test_a_choice_is_applied_to_a_copy_and_saved_as_the_default(pipe, tmp_path):
    choice = Choice(6, (2, 3, 5), True, (-3.0, 4.0), 1.0, 0.5)
    planned = choice.apply_to(pipe)
    assert pipe.config.num_inference_steps == 8 and pipe.config.refresh_steps is None
    assert not pipe.scheduler.config.second_order
    planned.save_pretrained(tmp_path)
    loaded = DualRatePipeline.from_pretrained(tmp_path)
    assert [i for i, now in enumerate(loaded.plan_run()) if now] == [2, 3, 5] and loaded.scheduler.config.second_order
    for each in (planned, loaded):
        each.set_progress_bar_config(disable=True)
    options = {"output_type": "latent", "generator": torch.Generator()}
    images = [
        each([0, 3], **options | {"generator": torch.Generator().manual_seed(0)}).images for each in (planned, loaded)
    ]
    assert torch.equal(*images)
    asked = planned(
        [0, 3], 6, refresh_steps=[2, 3, 5], guidance_interval=(-3.0, 4.0), generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(asked, images[0])
    plain = Choice(6, (2, 3, 5), True, None, 1.0).apply_to(planned)
    assert plain.config.guidance_interval is None  # not taken over from before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1e-9}, "budget=1e-09 gflop is less than the cheapest plan costs"),
        ({"budget": -1.0}, "budget must be"),
        ({"unit": "hours"}, "unit must be one of"),
        ({"num_images": 1}, "num_images must be"),
        ({"num_trials": 0}, "num_trials must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_budget_that_nothing_fits_and_bad_arguments_are_refused(pipe, watch, options, message):
    calls = watch(pipe)
    with pytest.raises(ValueError, match=message):
        plan_for(pipe, **{"budget": 1.0} | options)
    assert not calls.encoder and not calls.denoiser


def test_the_cheapest_plan_is_found_and_its_cost_told(make_pipe):
    """It may be guided at few steps only. Mutants: the model's own interval alone; another first refresh."""
    pipe = make_pipe(**LATE, context_from=0.5)
    with pytest.raises(ValueError, match="cheapest plan costs") as refused:
        plan_for(pipe, 1e-9)
    least = float(str(refused.value).rstrip(".").split()[-1])
    found = plan_for(pipe, 1.001 * least, num_images=2, num_trials=1, batch_size=2)
    assert found.choice.cost == pytest.approx(least, rel=1e-3) and found.choice.guidance_interval is not None


def test_a_criterion_that_gives_no_number_chooses_nothing(pipe):
    """Mutants: nan is the least; nan is kept among what was tried."""
    numbers = iter([math.nan, 2.0, 1.0, math.nan])
    planned = plan_for(pipe, budget_of(pipe), criterion=lambda images: next(numbers), **FEW | {"num_trials": 4})
    assert planned.choice.score == 1.0 and [choice.score for choice in planned.tried] == [2.0, 1.0]
    with pytest.raises(ValueError, match="gave no finite number for any of 2 plans"):
        plan_for(pipe, budget_of(pipe), criterion=lambda images: math.nan, **FEW | {"num_trials": 2})


def test_a_scheduler_of_the_host_is_refused(make_pipe):
    pipe = make_pipe(scheduler=DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="DDIMScheduler"):
        plan_for(pipe, 1.0)


def test_the_energy_distance_is_that_of_the_closed_form_and_punishes_what_is_bland():
    """Of two points a apart it is 2 a; of N(0, 1) and N(m, s²) a mean of folded normals. Mutants: any sign, a factor, the
    pairs within a row kept."""
    at = torch.tensor([[0.0], [0.0], [0.0]])
    assert energy_distance(at, at + 1.5) == pytest.approx(3.0)
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    for mean, std in ((0.0, 0.5), (0.7, 1.0), (0.0, 1.0)):
        spread = math.sqrt(1 + std**2)
        ratio = mean / spread
        folded = spread * (math.sqrt(2 / math.pi) * math.exp(-(ratio**2) / 2) + ratio * math.erf(ratio / math.sqrt(2)))
        expected = 2 * folded - 2 / math.sqrt(math.pi) * (1 + std)
        shared = mean + std * x  # the same noise in both
        assert energy_distance(x, shared) == pytest.approx(expected, abs=2e-2)
    near, bland = x + 0.9 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(1)), 0.2 * x
    near = near / near.std()
    assert (near - x).square().mean() > 0.7 * (bland - x).square().mean() and energy_distance(
        near, x
    ) < energy_distance(bland, x)


def run(*arguments):
    return plan.main(plan.parse_args([str(argument) for argument in arguments]))


def test_a_user_plans_a_model_and_samples_it_by_its_plan(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "training.json").write_text("{}")
    options = ["--model", tmp_path / "model", "--budget", budget_of(pipe), "--num_images", 2, "--num_trials", 4]
    planned = run(*options, "--output", tmp_path / "planned")
    record = json.loads((tmp_path / "planned" / "plan.json").read_text())
    assert record["choice"]["refresh_steps"] == list(planned.choice.refresh_steps)
    assert record["model"] == "model" and record["unit"] == "gflop" and len(record["tried"]) == 4
    assert str(PLANNING_SEED) in record["seeds"] and record["criterion"] == "energy_distance_from_long_chain"
    assert (tmp_path / "planned" / "training.json").is_file()
    said, guides = capsys.readouterr().out, pipe.config.guidance_scale > 1
    assert str(planned.choice.plan) in said and (" order, no guidance\n" in said) == (not guides)
    loaded = DualRatePipeline.from_pretrained(tmp_path / "planned")
    assert list(loaded.plan_run()) == list(planned.choice.plan)
    before = (tmp_path / "planned" / "plan.json").read_bytes()
    with pytest.raises(ValueError, match="--output must be a new or an empty folder"):
        run(*options, "--output", tmp_path / "planned")
    assert (tmp_path / "planned" / "plan.json").read_bytes() == before
    (tmp_path / "prompts.txt").write_text("a fish\n")
    for more, said in (
        (["--classifier", "x.safetensors"], "needs data beside it"),
        (["--dataset_name", "digits"], "Data needs --classifier beside it"),
        (["--prompt_list", tmp_path / "prompts.txt"], "takes no text: leave --prompt_list out"),
    ):
        with pytest.raises(ValueError, match=said):
            run(*options, "--output", tmp_path / "other", *more)
    assert not (tmp_path / "other").exists()
