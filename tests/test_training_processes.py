"""Training in processes of their own: two at a time, stopped from outside, killed at any moment."""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.forkserver import ensure_running

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from diffusers_dualrate import checkpoints
from diffusers_dualrate.checkpoints import find_damage, list_checkpoints, step_of
from diffusers_dualrate.data import load_images
from diffusers_dualrate.processes import run_script
from loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow

# One server imports everything once; each child is then a fork of it, free of what other tests did.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["test_training_processes", "datasets", "train_dual_rate", "train_single_rate", "distill"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images with two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "ab"[i % 2] / f"{i}.png")
    return root


def arguments(folder, output_dir, *more):
    fixed = ["--preset", "examples/presets/tiny.json", "--train_data_dir", folder, "--label_column", "label"]
    fixed += ["--cache_dir", folder.parent / "cache", "--validation_steps", 0, "--output_dir", output_dir]
    return [str(argument) for argument in (*fixed, *more)]


def take_up_fsdp2(blocks):
    """Do what `accelerate launch --config_file examples/fsdp2.yaml` does, but on the CPU, in full precision.

    torch spreads weights over CPUs as over GPUs. Accelerate takes FSDP up where it finds several GPUs or the like
    (`AcceleratorState.__init__`), so it is told that there are.
    """
    command = ["--config_file", "examples/fsdp2.yaml", "--mixed_precision", "no", "script.py"]
    command[2:2] = [] if blocks is None else ["--fsdp_transformer_layer_cls_to_wrap", blocks]
    environment = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(command))[0])
    os.environ.update({name: value for name, value in environment.items() if name.startswith(("ACCELERATE", "FSDP"))})
    torch.distributed.init_process_group("gloo")
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def work(script, argv, rank, world_size, port, at_step, happening, is_spread):
    """Body of a child: one process of a run, to which something may happen in a step of its own."""
    torch.set_num_threads(1)
    if world_size > 1 or is_spread:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    if is_spread:
        take_up_fsdp2(is_spread if isinstance(is_spread, str) else None)
    script, calls = importlib.import_module(script), []

    def loss_function(*args, **kwargs):
        calls.append(0)
        if len(calls) == at_step:
            if happening == "kill while saving":  # Accelerate's part of the checkpoint is written, the EMA is not
                checkpoints.save_file = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            elif happening == "fail":
                raise ValueError("this image is no image")
            elif isinstance(happening, float):  # a kill so many seconds later
                threading.Timer(happening, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), happening)
        return take_loss(*args, **kwargs)

    name = "grid_denoising_loss" if hasattr(script, "grid_denoising_loss") else "denoising_loss"
    name = "following_loss" if "--follow_encoder" in argv else name
    take_loss = getattr(script, name)
    setattr(script, name, loss_function)
    sys.stdout = sys.stderr = open(f"{argv[argv.index('--output_dir') + 1]}.log{rank}", "w")
    run_script(lambda argv: script.main(script.parse_args(argv)), argv)


def run(script, argv, world_size=1, at_step=None, happening=None, is_spread=False):
    """Train in `world_size` processes; what happens, happens to the last one. Returns the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world_size):
        step = at_step if rank == world_size - 1 else None
        args = (script, argv, rank, world_size, port, step, happening, is_spread)
        children.append(PROCESSES.Process(target=work, args=args))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(
            "PYTHONPATH", os.pathsep.join(sys.path)
        )  # else the server finds no module of ours to preload
        ensure_running()
    for child in children:
        child.start()
    for child in children:
        child.join(240)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def weights_of(model):
    """Released weights of a model, by network and name."""
    return {
        f"{path.parent.name}.{name}": weight
        for path in model.glob("*/diffusion_pytorch_model.safetensors")
        for name, weight in load_file(path).items()
    }


def assert_same_model(one, other):
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys() and ours
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


def everything_in(checkpoint):
    hashes = json.loads((checkpoint / "hashes.json").read_text())
    assert len(hashes) >= 6
    return hashes


def test_a_run_killed_at_any_moment_loses_no_more_than_the_steps_since_its_last_checkpoint(folder, tmp_path):
    steps = ["--max_train_steps", 6, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    assert run("train_single_rate", arguments(folder, tmp_path / "whole", *steps)) == [0]
    argv = arguments(folder, tmp_path / "parts", *steps, "--resume_from_checkpoint", "latest")
    chance = random.Random(0)
    # In a step, in a checkpoint, then some time after a step began: in it, in its checkpoint, or in a later one.
    happenings = [(2, signal.SIGKILL), (2, "kill while saving"), *((1, chance.uniform(0, 0.15)) for _ in range(3))]
    done = 0
    for at_step, happening in happenings:
        code = run("train_single_rate", argv, at_step=at_step, happening=happening)
        found = list_checkpoints(tmp_path / "parts")
        assert code in ([-signal.SIGKILL], [0])
        assert all(find_damage(path) is None for path in found)
        assert not found or step_of(found[-1]) >= done + at_step - 1
        assert happening != "kill while saving" or list((tmp_path / "parts").glob(".checkpoint-*/model.safetensors"))
        done = step_of(found[-1]) if found else 0
    assert run("train_single_rate", argv) == [0]
    assert everything_in(tmp_path / "whole/checkpoint-6") == everything_in(tmp_path / "parts/checkpoint-6")
    assert {path.name for path in (tmp_path / "parts").glob("*checkpoint*")} == {"checkpoint-5", "checkpoint-6"}


def test_two_processes_started_into_the_folder_of_a_run_that_is_alive_both_end_and_say_so(folder, tmp_path):
    """The lock is that of this process; once it is free, a run that was killed is no obstacle either."""
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    argv = arguments(folder, output_dir, "--max_train_steps", 1)
    with FileLock(output_dir / ".lock"):
        codes = run("train_single_rate", argv, 2)
    assert codes == [1, 1] and not list_checkpoints(output_dir)
    for rank in range(2):
        assert "holds a run that is alive: wait for its end" in (tmp_path / f"run.log{rank}").read_text()
    assert run("train_single_rate", argv, 2) == [0, 0]


def test_two_processes_train_as_one_and_stop_and_go_on_together(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/a/12.png").write_bytes(b"no image")  # which both of two processes find
    folder = tmp_path / "images"
    options = ["--learning_rate", 1e-4, "--override", "training.lr_warmup_steps=3", "--on_corrupt", "skip"]
    assert run("train_dual_rate", arguments(folder, tmp_path / "one", *options)) == [0]
    assert run("train_dual_rate", arguments(folder, tmp_path / "two", *options), 2) == [0, 0]
    rates = [torch.load(tmp_path / name / "checkpoint-4/scheduler.bin") for name in ("one", "two")]
    assert rates[0]["_last_lr"] == rates[1]["_last_lr"] and [rate["last_epoch"] for rate in rates] == [4, 4]
    one, two = (load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert all(record.pop("seconds") > 0 for record in records)
    assert records[0] == records[1] and records[0]["images_seen"] == 4 * 8 and records[0]["corrupt_images"] == 1

    # The signal reaches the second process alone.
    argv = arguments(folder, tmp_path / "parts", *options)
    codes = run("train_dual_rate", argv, 2, at_step=2, happening=signal.SIGINT)
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path / "parts")] == [2]
    assert run("train_dual_rate", [*argv, "--resume_from_checkpoint", "latest"], 2) == [0, 0]
    assert everything_in(tmp_path / "parts/checkpoint-4") == everything_in(tmp_path / "two/checkpoint-4")


def test_a_distillation_spread_with_fsdp2_goes_on_with_any_number_of_processes_and_ends_as_in_one(folder, tmp_path):
    """It stops in its first phase, in which some weights have had no gradient yet."""
    assert run("train_single_rate", arguments(folder, tmp_path / "teacher", "--max_train_steps", 1)) == [0]
    options = ["--teacher", tmp_path / "teacher", "--checkpointing_steps", 1]
    assert run("distill", arguments(folder, tmp_path / "one", *options)) == [0]
    argv = arguments(folder, tmp_path / "spread", *options)
    codes = run("distill", argv, 2, at_step=1, happening=signal.SIGINT, is_spread=True)
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    argv += ["--resume_from_checkpoint"]
    assert run("distill", [*argv, "latest"], 1, is_spread=True) == [0]
    assert run("distill", [*argv, "checkpoint-4"], 2, is_spread=True) == [0, 0]
    assert_same_model(tmp_path / "one", tmp_path / "spread")
    assert run("distill", [*argv, "checkpoint-4"]) == [1]
    assert "was saved with FSDP2, and this run is without it" in (tmp_path / "spread.log0").read_text()


def test_a_network_of_diffusers_is_followed_by_two_processes_as_by_one(folder, tmp_path):
    """With DDP, and with its own blocks spread by FSDP2, which goes on though most weights never have a gradient."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    options = ["--pretrained_model_name_or_path", tmp_path / "unet", "--follow_encoder", "--context_dropout", 0]
    options += ["--light", "auto", "--max_train_steps", 2, "--override", "training.lr_warmup_steps=0"]

    def told(name):
        argv = arguments(folder, tmp_path / name, *options)
        at = argv.index("--label_column")
        return argv[:at] + argv[at + 2 :]

    assert run("train_dual_rate", told("one")) == [0]
    assert run("train_dual_rate", told("two"), 2) == [0, 0]
    assert_same_model(tmp_path / "one", tmp_path / "two")
    blocks = "UViTResBlock,UViTTransformerBlock,ResnetBlock2D"
    codes = run("train_dual_rate", told("spread"), 2, at_step=1, happening=signal.SIGINT, is_spread=blocks)
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    argv = [*told("spread"), "--resume_from_checkpoint", "latest"]
    assert run("train_dual_rate", argv, is_spread=blocks) == [0]
    assert_same_model(tmp_path / "one", tmp_path / "spread")


def test_where_one_process_fails_both_end_at_once_each_with_its_own_sentence(folder, tmp_path):
    began = time.monotonic()
    argv = arguments(folder, tmp_path / "run", "--max_train_steps", 1_000_000)
    assert run("train_single_rate", argv, 2, at_step=2, happening="fail") == [1, 1]
    assert time.monotonic() - began < 120  # a group of gloo waits half an hour for one who says nothing
    lost, failed = ((tmp_path / f"run.log{rank}").read_text() for rank in (0, 1))
    assert failed.endswith("ValueError: this image is no image\n") and "Another process" not in failed
    assert "Another process of this run failed" in lost.splitlines()[-1] and "no image" not in lost


def test_a_killed_process_ends_its_peer_and_the_run_goes_on_as_if_neither_had_ended(folder, tmp_path):
    images = load_images(train_data_dir=folder, label_column="label")
    for shard in range(2):
        images.shard(2, shard).to_parquet(str(tmp_path / f"shards/train-{shard:05}-of-00002.parquet"))
    options = ["--streaming", "--shuffle_buffer", 5, "--max_train_steps", 4, "--checkpointing_steps", 1]
    whole, parts = (
        ["--preset", "examples/presets/tiny.json", "--dataset_name", tmp_path / "shards", "--label_column", "label"]
        + [*options, "--validation_steps", 0, "--output_dir", tmp_path / name]
        for name in ("whole", "parts")
    )
    whole, parts = ([str(argument) for argument in argv] for argv in (whole, parts))
    assert run("train_single_rate", whole, 2) == [0, 0]
    began = time.monotonic()
    assert run("train_single_rate", parts, 2, at_step=3, happening=signal.SIGKILL) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 120  # a group of gloo waits half an hour for one who says nothing
    assert "Another process of this run failed, was killed" in (tmp_path / "parts.log0").read_text()
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path / "parts")] == [1, 2]
    assert run("train_single_rate", [*parts, "--resume_from_checkpoint", "latest"], 2) == [0, 0]
    assert everything_in(tmp_path / "whole/checkpoint-4") == everything_in(tmp_path / "parts/checkpoint-4")


def test_torchrun_passes_a_signal_on_and_leaves_a_checkpoint(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["examples/train_single_rate.py"]
    command += arguments(folder, tmp_path, "--checkpointing_steps", 1_000_000, "--max_train_steps", 1_000_000)
    command += ["--validation_steps", "3"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while agent.poll() is None and not (tmp_path / "samples").exists():
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) != 0
    finally:
        agent.kill()
    [checkpoint] = list_checkpoints(tmp_path)
    assert step_of(checkpoint) >= 3 and find_damage(checkpoint) is None
    assert (checkpoint / "random_states_1.pkl").is_file()


def test_a_signal_to_the_whole_job_leaves_its_data_workers_to_the_run(folder, tmp_path):
    command = [sys.executable, "examples/train_single_rate.py", *arguments(folder, tmp_path)]
    command += ["--dataloader_num_workers", "2", "--max_train_steps", "1000000", "--checkpointing_steps", "1000000"]
    command += ["--validation_steps", "3"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while job.poll() is None and not (tmp_path / "samples").exists():
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(60) == 128 + signal.SIGTERM
    finally:
        job.kill()
    [checkpoint] = list_checkpoints(tmp_path)
    assert step_of(checkpoint) >= 3 and find_damage(checkpoint) is None


def test_a_run_publishes_its_model_its_record_and_its_samples_and_nothing_else(folder, tmp_path):
    with LoopbackHub() as hub:
        command = [sys.executable, "examples/train_single_rate.py"]
        command += arguments(folder, tmp_path / "run", "--max_train_steps", 1, "--validation_steps", 1)
        command += ["--push_to_hub", "--hub_model_id", "org/trained", "--report_to", "tensorboard"]
        subprocess.run(command, env=hub.environment(tmp_path / "huggingface"), check=True, capture_output=True)
        _, files = hub.repositories["org/trained"].find("main")
    sent = set(files) - {".gitattributes"}
    assert sent == {
        *("README.md", "model_index.json", "pipeline.py", "samples/0000001.png"),
        *("configuration.json", "training.json"),
        *("scheduler/scheduler_config.json", "scheduler/diffusers_dualrate.py"),
        *("denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors", "denoiser/diffusers_dualrate.py"),
    }
    weights = (tmp_path / "run/denoiser/diffusion_pytorch_model.safetensors").read_bytes()
    assert files["denoiser/diffusion_pytorch_model.safetensors"] == weights
    for name in sent:
        assert files[name] == (tmp_path / "run" / name).read_bytes(), name
    card = files["README.md"].decode()
    assert 'DualRatePipeline.from_pretrained("org/trained")' in card and "](samples/0000001.png)" in card
    assert "accelerate launch examples/evaluate.py --model runs/run --train_data_dir" in card
    assert "automatically generated" not in card and str(tmp_path) not in card
