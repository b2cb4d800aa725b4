"""A network of diffusers as the heavy network of a training: fine-tuned, as the encoder of a pair, taught from."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from peft import LoraConfig, get_peft_model_state_dict

import benchmark
import distill
import evaluate
import generate
import train_dual_rate
import train_single_rate
from conftest import reset_accelerate
from diffusers_dualrate import DualRatePipeline, DualRateScheduler, HostNetwork, NoiseProcess, UViTDenoiser
from diffusers_dualrate.augmentation import Augmentation
from diffusers_dualrate.commands import find_changes
from diffusers_dualrate.configuration import Configuration
from diffusers_dualrate.conversion import cut_schedule, learning_parameters
from diffusers_dualrate.flops import decode_flops, network_flops
from diffusers_dualrate.light import shape_light
from test_hosts import generator, make_dit, make_unet, make_vae
from test_training import arguments, everything_in, folder  # noqa: F401 (a fixture)

SCRIPTS = {"single": train_single_rate, "dual": train_dual_rate, "distill": distill}
START = "--pretrained_model_name_or_path"
FOLLOW = ("--follow_encoder", "--context_dropout", 0, "--light", "auto")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of diffusers' own pipelines."""
    root = tmp_path_factory.mktemp("hosts")
    unets = {
        "unet": make_unet(sample_size=16),
        "classes": make_unet(sample_size=16, num_class_embeds=2),
        "deep": make_unet(
            sample_size=16, block_out_channels=(8, 16, 16), down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
        ),
    }  # fmt: skip
    for name, unet in unets.items():
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / name)
    dit = make_dit(out_channels=8, num_embeds_ada_norm=2, num_attention_heads=4)
    DiTPipeline(dit, make_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(root / "dit")
    return root


def train(script, folder, output_dir, *more, classes=False):  # noqa: F811
    args = arguments(folder, output_dir, *more)
    if not classes:
        at = args.index("--label_column")
        args = args[:at] + args[at + 2 :]
    try:
        return SCRIPTS[script].main(SCRIPTS[script].parse_args(args))
    finally:
        reset_accelerate()


@pytest.fixture(scope="module")
def pair(models, folder, tmp_path_factory):  # noqa: F811
    """Folder of a pair whose encoder is a U-Net that was followed."""
    path = tmp_path_factory.mktemp("pair") / "pair"
    assert train("dual", folder, path, START, models / "unet", *FOLLOW) == 0
    return path


def told_in(folder):  # noqa: F811
    return json.loads((folder / "configuration.json").read_text())


def test_a_model_of_diffusers_is_fine_tuned_in_its_own_process_and_stays_one_of_its_class(models, folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    train("single", folder, run, START, models / "unet", "--checkpointing_steps", 2)
    own, before = (UNet2DModel.from_pretrained(path) for path in (run / "denoiser", models / "unet/unet"))
    assert not torch.equal(own.conv_in.weight, before.conv_in.weight)
    tuned = DualRatePipeline.from_pretrained(run).denoiser
    assert tuned.process.config.prediction_type == "epsilon"
    assert torch.equal(tuned.process.log_snrs, NoiseProcess.of(DDPMScheduler()).log_snrs)
    told = Configuration.from_json(told_in(run))
    assert told.networks.context_encoder["network"]["_class_name"] == "UNet2DModel"
    assert told.networks.denoiser["sample_size"] == 16
    assert find_changes(told_in(run), Path("examples/presets"))["scheduler.log_snr_max"] == 10.0
    # The tuned model is one to start from, its own record repeats it, and it goes on bit for bit.
    again = tmp_path / "again"
    options = (START, run, "--preset", run / "configuration.json", "--checkpointing_steps", 2)
    train("single", folder, again, *options, "--max_train_steps", 2)
    train("single", folder, again, *options, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    train("single", folder, tmp_path / "whole", *options)
    assert everything_in(again / "checkpoint-4") == everything_in(tmp_path / "whole/checkpoint-4")


@pytest.mark.parametrize("way", ["follow", "freeze", "train"])
def test_a_model_of_diffusers_is_the_encoder_of_a_pair_as_it_is(way, models, folder, tmp_path, capsys):  # noqa: F811
    flags = {"follow": FOLLOW, "freeze": ("--freeze_encoder", *FOLLOW[3:]), "train": FOLLOW[3:]}[way]
    name = "unet" if way == "follow" else "classes"
    options = (START, models / name, "--gradient_checkpointing", *flags)
    train("dual", folder, tmp_path, *options, classes=name == "classes")
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    own = UNet2DModel.from_pretrained(tmp_path / "context_encoder").state_dict()
    before = UNet2DModel.from_pretrained(models / name / "unet").state_dict()
    before = {
        key: weight for key, weight in before.items() if "to_k.bias" not in key
    }  # on which attention does not depend
    changed = {key for key, weight in before.items() if not torch.equal(weight, own[key])}
    # Without its prediction handed over, what makes it has nothing to learn.
    assert changed == ({key for key in before if "_out." not in key[:14]} if way == "train" else set())
    assert pipe.denoiser.config.context_channels == [8, 16] and pipe.denoiser.context_proj[0].weight.abs().sum() > 0
    assert pipe.context_encoder.config.prediction_hand_over == pipe.config.encoder_denoises == (way == "follow")
    assert pipe.config.num_context_steps == 2 and pipe.id2label == ({0: "cat", 1: "dog"} if name == "classes" else {})
    assert len(pipe(*([[0]] if name == "classes" else []), output_type="pt").images) == 1
    # DDPM's table has no timestep of a log-SNR of 10.
    assert pipe.scheduler.config.log_snr_max == pytest.approx(
        float(torch.logit(DDPMScheduler().alphas_cumprod[0])), abs=1e-2
    )
    said = capsys.readouterr().out
    assert "noise levels: log-SNR -5 to 9.21, those that the UNet2DModel of " in said and "\nlight network: " in said
    assert ("no label dropout and no guidance: " in said) == (name == "classes")
    assert told_in(tmp_path)["training"]["label_dropout"] == (0.0 if name == "classes" else 0.1)
    if way == "follow":  # it goes on bit for bit
        parts = tmp_path / "parts"
        train("dual", folder, parts, *options, "--max_train_steps", 2)
        train("dual", folder, parts, *options, "--resume_from_checkpoint", "latest")
        assert everything_in(parts / "checkpoint-4") == everything_in(tmp_path / "checkpoint-4")


def test_a_presets_light_network_takes_the_maps_of_its_own_levels(models, folder, tmp_path):  # noqa: F811
    override = ("--override", "context_encoder.prediction_hand_over=true")
    train("dual", folder, tmp_path, START, models / "deep", "--freeze_encoder", "--max_train_steps", 1, *override)
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    assert pipe.context_encoder.config.prediction_hand_over and pipe.denoiser.config.prediction_hand_over
    assert pipe.context_encoder.context_shapes == [(16, 8, 8), (16, 4, 4)]
    assert list(pipe.denoiser.config.level_channels) == [8, 16] and pipe.denoiser.config.patch_size == 2
    with pytest.raises(ValueError, match="belongs to a run with another configuration: .*context_encoder.network"):
        options = (START, models / "unet", "--freeze_encoder", "--light", "auto", "--resume_from_checkpoint", "latest")
        train("dual", folder, tmp_path, *options)


def test_a_transformer_in_latents_is_followed_with_its_autoencoder_and_its_null_class(
    models, folder, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    """Of a preset's augmentation, what needs pixels is left out."""
    preset = json.loads(Path("examples/presets/tiny.json").read_text())
    preset["training"]["augmentation"] = {"translation": 1, "flip": True}
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    options = (START, models / "dit", *FOLLOW, "--preset", tmp_path / "mine.json", "--guidance_scale", 2)
    with pytest.warns(UserWarning, match="draws latents, which are encoded once: .* left out, but for flip=True"):
        train("dual", folder, tmp_path, *options, classes=True)
    assert told_in(tmp_path)["training"]["augmentation"] == json.loads(json.dumps(asdict(Augmentation(flip=True))))
    pipe = DualRatePipeline.from_pretrained(tmp_path)
    assert pipe.vae is not None and not pipe.scheduler.config.clip_sample and pipe.config.guidance_scale == 2
    assert pipe.context_encoder.context_shapes == [(32, 4, 4)] and pipe.denoiser.config.level_types == ["transformer"]
    own, before = (
        DiTTransformer2DModel.from_pretrained(path)
        for path in (tmp_path / "context_encoder", models / "dit/transformer")
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(own.parameters(), before.parameters(), strict=True))
    assert pipe("dog", output_type="pt").images.shape == (1, 3, 16, 16)
    assert told_in(tmp_path)["training"]["label_dropout"] == 0.1
    beside = [
        "--compare",
        models / "dit",
        "--num_columns",
        1,
        "--solver_steps",
        2,
        "--output",
        tmp_path / "samples.png",
    ]
    generate.main(generate.parse_args(list(map(str, ["--model", tmp_path, *beside]))))
    assert f"Decoding an image takes {decode_flops(pipe) / 1e9:.3g} more." in capsys.readouterr().out


@pytest.mark.parametrize("student", ["new", "itself", "pair"])
def test_a_model_of_diffusers_teaches_a_student(student, models, pair, folder, tmp_path):  # noqa: F811
    run, flags = tmp_path / "run", ("--light", "auto")
    if student == "itself":
        flags = ("--student", models / "unet")
    if student == "pair":
        flags = ("--student", pair, "--full_rollout")
    train("distill", folder, run, "--teacher", models / "unet", *flags)
    pipe, before = DualRatePipeline.from_pretrained(run), make_unet(sample_size=16)
    heavy = pipe.denoiser if student == "itself" else pipe.context_encoder
    assert (pipe.context_encoder is None) == (student == "itself")
    own = UNet2DModel.from_pretrained(run / ("denoiser" if student == "itself" else "context_encoder"))
    assert torch.equal(own.conv_in.weight, heavy.network.conv_in.weight)
    assert not torch.equal(own.conv_in.weight, before.conv_in.weight)
    assert len(pipe(output_type="pt").images) == 1 and pipe.config.num_inference_steps == 4
    assert pipe.scheduler.config.log_snr_max < 9.3


def test_a_trained_pair_is_timed_as_its_record_describes_it(pair):
    options = ("--num_inference_steps", 2, "--num_context_steps", 1, "--repeats", 2, "--batch_size", 1)
    record = benchmark.main(benchmark.parse_args(list(map(str, ["--preset", pair / "configuration.json", *options]))))
    heavy, light = network_flops(HostNetwork(make_unet(sample_size=16), NoiseProcess())), record["rows"][1]["flops"]
    assert record["rows"][0]["flops"] == 2 * heavy and heavy < light < 2 * heavy


def test_a_trained_pair_takes_adapters_of_both_networks_and_is_offloaded(pair, tmp_path):
    """The feature maps are those of the adapted network; what is saved never has adapters in its weights."""
    pipe, layers = DualRatePipeline.from_pretrained(pair), {}
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(generator=generator(), output_type="latent").images

    plain = draw()
    z = torch.randn(1, 3, 16, 16)
    maps = pipe.context_encoder(z, 0.0).context[:2]
    for name, target in (("denoiser", "to_out"), ("context_encoder", "conv1")):
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[target], init_lora_weights=False))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
        with pytest.raises(ValueError, match=f"The {name if name == 'denoiser' else 'network'} has adapters, which"):
            (pipe if name == "denoiser" else network).save_pretrained(tmp_path / "refused")
    adapted = draw()
    changed = pipe.context_encoder(z, 0.0).context[:2]
    assert not any(torch.allclose(one, other) for one, other in zip(maps, changed, strict=True))
    DualRatePipeline.save_lora_weights(tmp_path, **layers)
    pipe.unload_lora_weights()
    assert torch.equal(draw(), plain) and not torch.allclose(adapted, plain, atol=1e-3)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert torch.equal(draw(), adapted) and hasattr(pipe.context_encoder, "_hf_hook")
    pipe.remove_all_hooks()
    pipe.fuse_lora(["denoiser", "context_encoder"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "refused").exists()
    pipe = DualRatePipeline.from_pretrained(tmp_path / "fused")
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("dual", (START, "unet", "--resolution", 24), r"--resolution 24 contradicts the UNet2DModel of \S+, which is of 16x16"),
        ("dual", (START, "unet", "--freeze_encoder"), r"have maps of sizes \[\(8, 8\), \(4, 4\)\], and the UNet2DModel has"),
        ("dual", (START, "unet", *FOLLOW, "--override", "context_encoder.level_blocks=[1,1]"), "no effect beside the UNet2"),
        ("dual", (START, "unet", *FOLLOW, "--override", "denoiser.level_blocks=[1,1]"), "no effect beside the UNet2DModel"),
        ("dual", (START, "unet", *FOLLOW[:3], "--override", "denoiser.prediction_hand_over=true"), "no effect beside the UNet2"),
        ("dual", ("--preset", "host"), r"preset host is one of diffusers: give it with --pretrained_model_name_or_path, or"),
        ("single", ("--preset", "host"), r"preset host is one of diffusers: give it with --pretrained_model_name_or_path, or"),
        ("dual", (START, "unet", "--preset", "host"), "preset host has no light network: give --light auto, or another"),
        ("dual", ("--light", "auto"), "--light auto needs a heavy network of diffusers: leave it out"),
        ("dual", (START, "unet", "classes", *FOLLOW), "has no classes, and the data has 2"),
        ("dual", (START, "classes", "classes", *FOLLOW, "--guidance_scale", 2), "--guidance_scale 2.0 needs networks that"),
        ("dual", (START, "classes", "classes", *FOLLOW, "--override", "training.label_dropout=0.2"), "no effect beside"),
        ("single", (START, "unet", "--network", "light"), "--network light is of the preset, and the UNet2DModel of"),
        ("single", (START, "unet", "--override", "denoiser.dropout=0.1"), "no effect beside the UNet2DModel"),
        ("distill", ("--teacher", "unet", "--student", "unet", "--light", "auto"), "--light auto shapes the light network of a new pair"),
    ],
)  # fmt: skip
def test_what_contradicts_a_model_of_diffusers_is_refused_in_one_sentence(
    script, options, message, models, folder, tmp_path  # noqa: F811
):  # fmt: skip
    host = HostNetwork(make_unet(sample_size=16), NoiseProcess()).describe()
    preset = json.loads(Path("examples/presets/tiny.json").read_text()) | {"context_encoder": host, "denoiser": host}
    (tmp_path / "host.json").write_text(json.dumps(preset))
    places = {name: models / name for name in ("unet", "classes")} | {"host": tmp_path / "host.json"}
    flags = [places.get(option, option) for option in options]
    classes = "classes" in options[2:]
    if classes:
        flags.pop(2)
    with pytest.raises(ValueError, match=message):
        train(script, folder, tmp_path / "run", *flags, classes=classes)
    assert not (tmp_path / "run").exists()


def make_hosts():
    small = make_unet(sample_size=16, block_out_channels=(16, 32))
    classes = make_unet(
        sample_size=32, num_class_embeds=5, block_out_channels=(32, 64, 64, 96), layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    dit = make_dit(num_layers=6, num_attention_heads=4, attention_head_dim=16, sample_size=16, out_channels=8)
    return {"small": small, "classes": classes, "dit": dit}


@pytest.mark.parametrize("name", ["small", "classes", "dit"])
@pytest.mark.parametrize("hands_over", [False, True])
def test_a_light_network_is_shaped_to_a_quarter_to_a_sixth_of_the_heavy_one(name, hands_over):
    """And takes its context at every level. Mutants: a block more or less than was counted, heavy and light exchanged."""
    host = HostNetwork(make_hosts()[name], NoiseProcess(), prediction_hand_over=hands_over)
    denoiser = UViTDenoiser(**shape_light(host)).eval()
    assert 1 / 6 <= network_flops(denoiser) / network_flops(host) <= 1 / 4
    widths = [channels for channels, _, _ in host.context_shapes]
    assert tuple(denoiser.config.context_channels) == tuple(widths)
    shares = [ours / theirs for ours, theirs in zip(denoiser.config.level_channels, widths, strict=True)]
    assert max(shares) - min(shares) < 0.2
    pipe = DualRatePipeline(denoiser, DualRateScheduler(), host.eval(), num_inference_steps=2, num_context_steps=1)
    pipe.set_progress_bar_config(disable=True)
    labels = [0] if host.config.num_classes else None
    assert pipe(labels, generator=generator(), output_type="latent").images.isfinite().all()


def test_a_heavy_network_of_which_no_network_is_light_enough_is_named():
    unet = make_unet(sample_size=4, block_out_channels=(1, 1), norm_num_groups=1, add_attention=False,
                     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(ValueError, match=r"No light network has a quarter to a sixth .* MFLOP: give a preset's shape"):
        shape_light(HostNetwork(unet, NoiseProcess()))


@pytest.mark.parametrize("image_size", [None, 64])
def test_a_schedule_keeps_to_the_noise_levels_that_a_network_knows(image_size):
    """Mutants: the shift left out or of the other end, minimum and maximum exchanged, a sign."""
    narrow = NoiseProcess.of(
        DDIMScheduler(beta_start=0.01, beta_end=0.015, num_train_timesteps=500, prediction_type="v_prediction")
    )
    lowest, highest = narrow.log_snrs[-1].item(), narrow.log_snrs[0].item()
    wide = {"log_snr_min": -10.0, "log_snr_max": 10.0, "image_size": image_size, "noise_high": 48}
    cut = DualRateScheduler(**cut_schedule(wide, narrow))
    assert float(cut.log_snr_at(1.0)) == pytest.approx(lowest, abs=1e-3)
    assert float(cut.log_snr_at(0.0)) == pytest.approx(highest, abs=1e-3)
    within = {"log_snr_min": lowest + 1, "log_snr_max": highest - 1}
    assert cut_schedule(within, narrow) == within
    assert cut_schedule(wide, NoiseProcess(prediction_type="flow")) == wide
    # Ours as a table, as other networks were trained on it, is our own schedule.
    ours = DualRateScheduler()
    table = NoiseProcess.of(DDIMScheduler(trained_betas=ours.betas.tolist(), prediction_type="v_prediction"))
    own = {"log_snr_min": -10.0, "log_snr_max": 10.0}
    assert cut_schedule(own, table) == own
    # However finely timesteps count, the levels are the same.
    counts = [cut_schedule(wide | {"num_train_timesteps": n}, narrow)["log_snr_max"] for n in (10, 100, 1000, 5000)]
    knows = NoiseProcess.of(DDIMScheduler())
    counts += [cut_schedule(own | {"num_train_timesteps": n}, knows)["log_snr_max"] for n in (10, 1000)]
    assert len(set(counts[:4])) == len(set(counts[4:])) == 1
    # What predicts noise tells of the image too little near noise alone to be learned from, and may learn there itself.
    cut = DualRateScheduler(**cut_schedule(wide, knows))
    assert float(cut.log_snr_at(1.0)) == pytest.approx(-5, abs=1e-3)
    assert cut_schedule(own, knows, is_tuned=True) == own | {"log_snr_max": counts[-1]}
    latent = NoiseProcess(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=900)
    ends = [cut_schedule(own, process)["log_snr_min"] for process in (latent, NoiseProcess(prediction_type="sample"))]
    assert ends == [pytest.approx(latent.log_snrs[-1].item(), abs=1e-3), -10] and ends[0] > -5


@pytest.mark.parametrize("hands_over", [False, True])
def test_the_weights_that_learn_are_those_that_a_gradient_reaches_also_where_features_are_computed_twice(hands_over):
    """Maps that gradient checkpointing computes again have the gradient of those that it kept."""
    host = HostNetwork(make_unet(), NoiseProcess(), prediction_hand_over=hands_over).train()
    found = {}
    for twice in (False, True):
        network = copy.deepcopy(host)
        if twice:
            network.enable_gradient_checkpointing()
        context = network(torch.randn(2, 3, 8, 8, generator=generator()), torch.tensor([-1.0, 2.0])).context
        torch.stack([part.square().sum() for part in context]).sum().backward()
        found[twice] = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    assert found[False].keys() == found[True].keys() == learning_parameters(host, is_frozen=False)
    assert learning_parameters(host, is_frozen=True) == set() and len(found[False]) > 10
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient)


def test_a_description_makes_the_same_network_again_and_an_encoder_leaves_its_denoiser_alone():
    host = HostNetwork(make_unet(num_class_embeds=3), NoiseProcess(beta_end=0.03), ["mid_block"], True)
    made = HostNetwork.from_description(json.loads(json.dumps(host.describe())))
    assert made.describe() == host.describe() and made.config.num_classes == 3
    assert torch.equal(made.process.log_snrs, host.process.log_snrs)
    with pytest.raises(ValueError, match="must be one of UNet2DModel, .*, got AutoencoderKL"):
        HostNetwork.from_description({**host.describe(), "network": {"_class_name": "AutoencoderKL"}})
    encoder = HostNetwork.from_denoiser(host, ["conv_in"])
    z, labels = torch.randn(1, 3, 8, 8), torch.tensor([1])
    with torch.no_grad():
        assert torch.equal(encoder(z, 0.5, labels).sample, host(z, 0.5, labels).sample)
        assert [part.shape[1] for part in encoder(z, 0.5, labels).context] == [8]
        encoder.network.conv_in.weight.zero_()
        assert host.network.conv_in.weight.abs().sum() > 0 and len(host(z, 0.5, labels).context) == 4
    assert sum(len(module._forward_hooks) for module in encoder.modules()) == 1


def test_a_model_of_diffusers_is_measured_as_it_is(models, folder, tmp_path):  # noqa: F811
    flags = ("--model", models / "unet", "--train_data_dir", folder, "--num_samples", 4, "--num_inference_steps", 2)
    more = ("--num_noises", 4, "--batch_size", 4, "--output", tmp_path / "e.json", "--cache_dir", tmp_path / "cache")
    report = evaluate.main(evaluate.parse_args([str(flag) for flag in (*flags, *more)]))
    assert report["v_loss"]["model"] > 0 and report["samples"][0]["solver"] == "DDPMScheduler"
    assert report["samples"][0]["flops"] == 2 * network_flops(
        DualRatePipeline.from_pretrained(models / "unet").denoiser
    )


def test_a_pair_that_follows_a_network_stands_for_it_as_teacher_and_beside_itself(models, folder, pair, tmp_path):  # noqa: F811
    """Mutants: the student's networks taken from the pair, another network than X's own drawn beside it."""
    theirs, ours = (
        DualRatePipeline.from_pretrained(models / "unet"),
        DualRatePipeline.from_pretrained(pair).heavy_alone(),
    )
    z, level = torch.randn(1, 3, 16, 16), torch.tensor(0.5)
    with torch.no_grad():
        assert torch.equal(ours.denoiser(z, level).sample, theirs.denoiser(z, level).sample)
    student = ("--teacher", pair, "--student", pair, "--num_inference_steps", 4, "--num_context_steps", 2)
    assert train("distill", folder, tmp_path / "student", *student, "--max_train_steps", 2) == 0
    flags = ["--model", pair, "--compare", pair, "--distilled", tmp_path / "student", "--num_columns", 1]
    flags += ["--num_inference_steps", 4, "--solver_steps", 2, "--output", tmp_path / "picture.png"]
    rows = generate.main(generate.parse_args([str(flag) for flag in flags]))
    assert [(row.heavy, row.light) for row in rows[1:3]] == [(4, 0), (2, 0)]
