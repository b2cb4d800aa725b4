"""A training run: the folder it owns, its steps and batches, stopping and going on, what it logs and leaves behind.

No loop and no mathematics: those are in the examples. A loop uses a run like this:

    run = Run(accelerator, configuration, networks, images)     # claims the folder; refuses what cannot work
    averaged = copy.deepcopy(networks).eval()                   # will hold the EMA weights, for samples and release
    networks, optimizer, lr_scheduler, loader = accelerator.prepare(..., run.make_loader())
    ema = EMAModel(networks.parameters(), decay=...)
    run.load(ema, optimizer)                                    # goes on where a checkpoint stopped
    with run.watch(ema, averaged, pipeline):                    # SIGINT and SIGTERM now end the loop in order
        for step, part, batch, draws in run.batches(loader, draw):
            with accelerator.accumulate(networks):
                ...
                run.note(loss=loss)                             # logged, and must be finite
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(...)
                    run.agree(norm)                             # raises everywhere before weights are touched
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(networks.parameters())
                run.finish_step(lr=...)                         # logs, saves, draws, each when it is due
        return run.finish("pair")                               # saves the model; the exit status of the script
"""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ImagePipelineOutput
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .autoencoders import EncodedImages, encode_batch, fingerprint_of_images
from .captions import CaptionEmbeddings, TrainingConditions
from .cards import record_training, write_first_card
from .checkpoints import (
    gather,
    keep_newest,
    load_checkpoint,
    read_notes,
    save_checkpoint,
    step_of,
    tell_last_good_state,
)
from .commands import next_commands
from .configuration import Configuration, make_record
from .data import LabelledImages
from .flops import context_flops, network_flops, training_image_flops
from .inventory import describe_images
from .models import UViTContextEncoder, UViTDenoiser
from .optimization import begin_states
from .pair import TrainablePair
from .pictures import draw_grid
from .pipeline import DualRatePipeline
from .processes import choose_threads, leave_signals
from .progress import Progress
from .recipes import SingleRateRecipe
from .repositories import claim_repository, upload_model
from .run_folder import RunFolder
from .sources import fingerprint_of
from .streams import DealtBatches, ShuffledIndices, StreamedImages, Stretch

LOGGING_STEPS = 50
SAMPLES = 32
Drawn = TypeVar("Drawn")


class Run:
    """One training run in one folder, the same on every process.

    Args:
        accelerator: Accelerate's, made by the script.
        configuration: What the run was told.
        networks: Module whose children are the networks to train, before `prepare`.
        images: What to train on.
        models: Trained models that it starts or learns from, by the flags that name them.
        captions: What embeds the captions of the images, if they have any.

    Attributes:
        configuration: What the run was told, with the global batch for these processes.
        recipe: Its part on how networks are trained.
        options: Its part on how the run goes.
        conditions: What its images show: classes, texts or nothing.
        step: Steps done.
        is_stopping: Whether all processes agreed to stop after the running step.

    Raises:
        ValueError: If the folder holds another run, or this one and it is not to be resumed, or it lives; if the
            checkpoint does not exist, is damaged or belongs to another run; if the batch cannot be divided.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        configuration: Configuration,
        networks: nn.Module,
        images: LabelledImages | StreamedImages,
        models: Mapping[str, DualRatePipeline | None] = MappingProxyType({}),
        captions: CaptionEmbeddings | None = None,
    ):
        self.accelerator, self.images = accelerator, images
        self.conditions = TrainingConditions(images, captions, accelerator.device)
        self.configuration = configuration.divide_batch(accelerator.num_processes)
        self.recipe, self.options = self.configuration.recipe, self.configuration.options
        self.output_dir = Path(self.options.output_dir)
        self.parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
        self._count = None if isinstance(images, StreamedImages) else len(images)
        known = {flag: fingerprint_of(model) for flag, model in models.items() if model is not None}
        known |= {} if captions is None else captions.fingerprints
        precision = dataclasses.replace(self.options, mixed_precision=accelerator.mixed_precision)
        told = dataclasses.replace(self.configuration, options=precision)
        record = make_record(told, fingerprint_of_images(images), known)
        self._folder = RunFolder(accelerator, self.output_dir, record, self.options.resume_from_checkpoint)
        self.checkpoint = self._folder.checkpoint
        self.step = 0 if self.checkpoint is None else step_of(self.checkpoint)
        # How far a stream has been read; other sets need no memory of it.
        self._position = (0, 0) if self.checkpoint is None else read_notes(self.checkpoint)["position"]
        self._num_corrupt, self._seconds_in_all = 0, 0.0
        self.is_stopping = False
        self._signal: int | None = None
        self._noted: dict[str, list[Tensor]] = {}
        self._repo_id: str | None = None
        if self.options.push_to_hub and accelerator.is_main_process:
            # Before training, so that a missing right is known at once.
            self._repo_id = claim_repository(self.options.repository)

    def make_loader(self) -> DataLoader:
        """Batches from here to the end of training, for `prepare`: an endless shuffle, cut to measure."""
        size, steps = self.recipe.train_batch_size, self.recipe.num_steps
        workers = self.configuration.data.dataloader_num_workers
        load = functools.partial(DataLoader, num_workers=workers, worker_init_fn=leave_signals)
        if isinstance(self.images, StreamedImages):
            stretch = Stretch(self.images, self._position, max(0, steps - self.step), size, self.parts)
            return load(stretch, size // self.parts, drop_last=True)
        order = ShuffledIndices(len(self.images), self.options.seed, self.step * size, steps * size)
        return load(self.images, batch_sampler=DealtBatches(order, size // self.parts, self.parts))

    def load(self, ema: EMAModel, optimizer: torch.optim.Optimizer) -> None:
        """Restore what `prepare` returned and the EMA weights from the checkpoint, if there is one to resume from."""
        if self.accelerator.is_fsdp2:
            begin_states(optimizer)  # whose checkpoints load only where every weight that is trained has one
        if self.checkpoint is not None:
            with self._folder.released_on_error():
                load_checkpoint(self.accelerator, ema, self.checkpoint)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            keep_newest(self.output_dir, self.options.checkpoints_total_limit)

    def rows(self, part: int) -> range:
        """Numbers in the global batch of the rows that this process holds in a part of a step."""
        first = part * self.accelerator.num_processes + self.accelerator.process_index
        return range(first, self.recipe.train_batch_size, self.parts)

    def count_of_first(self, part: int, share: float) -> int:
        """Number of rows of a part that lie in the first `share` of the global batch, rounded to whole rows there.

        So a split of the batch falls on the same images however the batch is dealt out.

        Raises:
            ValueError: If a share above 0 comes to no row.
        """
        first = round(share * (size := self.recipe.train_batch_size))
        if first == 0 < share:
            self._folder.release()
            raise ValueError(f"A share of {share} of {size} images is none: use larger batches, or 0.")
        return sum(row < first for row in self.rows(part))

    @contextlib.contextmanager
    def watch(self, ema: EMAModel, averaged: TrainablePair, pipeline: DualRatePipeline) -> Iterator[None]:
        """Encode and announce, start trackers and progress bar, and let signals end the loop at a step's boundary.

        Args:
            ema: Its weights go into checkpoints and, at each sampling, into `averaged`.
            averaged: Copy of the trained module, made before `prepare`. Samples are drawn from the copy. So the trained
                weights stay as they are, and wrappers such as FSDP never see a call of it.
            pipeline: Pipeline of the networks in `averaged`, to sample and to save.
        """
        self.ema, self.averaged, self.pipeline = ema, averaged, pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        if isinstance(self.images, EncodedImages):  # it may take minutes, so whatever refuses the run came before
            with self._folder.released_on_error():
                self.images.encode_all()
        self._announce()
        self._seconds, self._started, self._logged_step = 0.0, time.perf_counter(), self.step
        self._first_step = self.step
        self._progress = Progress(self.step, self.recipe.num_steps, self.accelerator.is_local_main_process)
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception as error:
            # A full disk, mostly; where a checkpoint could not be written, the error says so by itself.
            if isinstance(error, OSError) and (state := tell_last_good_state(self.output_dir)) not in str(error):
                error.add_note(f"The run ended at step {self.step}; {state}.")
            for tracker in self.accelerator.trackers:  # what was logged is kept, where that can be
                with contextlib.suppress(Exception):
                    tracker.finish()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._progress.close()
            self._folder.release()
        for tracker in self.accelerator.trackers:  # not `end_training`, which destroys the group: see processes.py
            tracker.finish()

    def _ask_to_stop(self, number, frame):
        self._signal = number

    def _announce(self):
        accelerator, images, size = self.accelerator, self.images, self.recipe.train_batch_size
        recipe = dataclasses.asdict(self.recipe)
        if self.options.report_to:
            flags = recipe | dataclasses.asdict(self.configuration.data) | dataclasses.asdict(self.options)
            flags = {name: value for name, value in flags.items() if isinstance(value, (bool, int, float, str))}
            accelerator.init_trackers("diffusers-dualrate", config=flags)
        accelerator.print(json.dumps(recipe, indent=2))
        counted = {
            name: network_flops(cast(UViTContextEncoder | UViTDenoiser, network))
            for name, network in self.averaged.named_children()
        }
        for name, network in self.averaged.named_children():
            flops: float = counted[name]
            if name == "denoiser" and self.averaged.denoiser.config.context_channels is not None:
                flops += context_flops(self.averaged.denoiser)
            count = sum(parameter.numel() for parameter in network.parameters())
            accelerator.print(f"{name}: {count:,} parameters, {flops / 1e6:,.1f} MFLOP per image and evaluation")
        if isinstance(self.recipe, SingleRateRecipe):  # distillation has costs of its own
            flops = training_image_flops(self.averaged.denoiser, self.averaged.context_encoder, self.recipe)
            accelerator.print(f"training: {flops / 1e6:,.1f} MFLOP per noisy image, forwards and backwards")
        accelerator.print(describe_images(images))
        on = f"{n} processes" if (n := accelerator.num_processes) > 1 else "1 process"
        accelerator.print(f"steps {self.step:,} to {self.recipe.num_steps:,}, each of {size:,} images, on {on}")
        accelerator.print(choose_threads(size // self.parts * max(counted.values())))
        if every := self.configuration.validation_steps:
            accelerator.print(f"a grid of samples every {every:,} steps: {self.output_dir / 'samples'}")

    def batches(
        self, loader: Iterable[dict[str, Tensor]], draw: Callable[[int, Sequence[int]], Drawn]
    ) -> Iterator[tuple[int, int, dict[str, Tensor], Drawn]]:
        """Yield (step, part, batch, draws) until training ends or is stopped; a thread calls `draw` one batch ahead."""
        parts, ahead = self.accelerator.gradient_accumulation_steps, None
        with ThreadPoolExecutor(1) as thread:
            for micro_step, batch in enumerate(loader, start=self.step * parts):
                if "position" in batch:
                    self._position = batch.pop("position")[-1].tolist()
                    self._num_corrupt = int(batch.pop("num_corrupt")[-1])
                (step, part), (next_step, next_part) = divmod(micro_step, parts), divmod(micro_step + 1, parts)
                # The first are drawn here: data workers are forks, and none may be made while a thread computes.
                draws = draw(step, self.rows(part)) if ahead is None else ahead.result()
                ahead = thread.submit(draw, next_step, self.rows(next_part))
                encode_batch(self.images, batch, self.options.seed, step, self.rows(part))
                yield step, part, batch, draws
                if self.is_stopping:
                    return

    def note(self, **scalars: Tensor) -> None:
        """Remember numbers of this part of the step: their mean is logged, and they must be finite."""
        for name, value in scalars.items():
            self._noted.setdefault(name, []).append(value.detach().float())

    def agree(self, norm: Tensor) -> None:
        """Settle with all processes, before weights change, whether the step is sound and whether to stop after it.

        Args:
            norm: Norm of the gradients. Under fp16 it may overflow: the scaler then leaves the step out.

        Raises:
            ValueError: On every process, if the norm or something noted is not finite on any.
        """
        numbers = [value for values in self._noted.values() for value in values]
        if self.accelerator.scaler is None:
            numbers.append(torch.as_tensor(gather(norm), device=self.accelerator.device).float())
        is_bad = ~torch.stack(numbers).isfinite().all()
        flags = torch.stack([is_bad.float(), torch.full_like(is_bad, self._signal is not None, dtype=torch.float32)])
        is_bad, self.is_stopping = (self.accelerator.reduce(flags, "sum") > 0).tolist()
        if is_bad:
            raise ValueError(f"The training diverged at step {self.step}; {tell_last_good_state(self.output_dir)}.")

    def finish_step(self, **scalars: float) -> None:
        """Count the step, then log, save a checkpoint and draw samples, each if it is due.

        Args:
            scalars: Numbers to log as they are, such as the learning rate.
        """
        elapsed = time.perf_counter() - self._started
        self._seconds += elapsed
        self._seconds_in_all += elapsed
        self.step += 1
        self._progress.advance()
        is_last = self.is_stopping or self.step == self.recipe.num_steps
        if is_last or self.step % LOGGING_STEPS == 0:
            self._log(scalars)
        elif self._logged_step == self._first_step:  # until the first log, of this process alone
            self._progress.show({name: torch.stack(values).mean().item() for name, values in self._noted.items()})
        if is_last or self.step % self.options.checkpointing_steps == 0:
            save_checkpoint(self.accelerator, self.ema, self.output_dir, self.step, {"position": self._position})
            if self.accelerator.is_main_process:
                keep_newest(self.output_dir, self.options.checkpoints_total_limit)
        if (every := self.configuration.validation_steps) and (
            self.step % every == 0 or self.step == self.recipe.num_steps
        ):
            self._sample()
        self._started = time.perf_counter()  # what is saved or drawn is no training time

    def _log(self, scalars):
        own = torch.stack([torch.stack(values).mean() for values in self._noted.values()])
        means = dict(zip(self._noted, self.accelerator.reduce(own, "mean").tolist(), strict=True))
        size = self.recipe.train_batch_size
        speed = (self.step - self._logged_step) * size / self._seconds
        counts = {"images_per_second": speed, "images_seen": self.step * size}
        self.accelerator.log(means | scalars | counts, step=self.step)
        self._progress.show(means, speed)
        self._noted, self._seconds, self._logged_step = {}, 0.0, self.step

    def _update_averaged(self):
        """Puts the EMA weights into the pipeline; called by all processes, as FSDP spreads weights over them."""
        for parameter, shadow in zip(self.averaged.parameters(), self.ema.shadow_params, strict=True):
            parameter.data.copy_(gather(shadow))

    def _sample(self):
        """Draws a grid of samples with the pipeline's own N and K; classes and seeds are the same at every call."""
        self._update_averaged()
        if not self.accelerator.is_main_process:
            return
        asked, names = self.conditions.examples(SAMPLES)
        generators = [torch.Generator().manual_seed(i) for i in range(SAMPLES)]
        pipeline = self.pipeline.to(self.accelerator.device)
        images = cast(ImagePipelineOutput, pipeline(**asked, generator=generators)).images
        self.pipeline.to("cpu")
        path = self.output_dir / "samples" / f"{self.step:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(images, names).save(path)
        array = np.stack([np.asarray(image.convert("RGB")) for image in images])
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):  # not every tracker of Accelerate's takes images
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": array}, step=self.step, **options)

    def _count_corrupt(self):
        """How many images of the set any process, or any data worker of one, found corrupt since this run was started."""
        if isinstance(self.images, StreamedImages):  # one process reads for all, and its batches tell
            return self._num_corrupt
        return len(set(gather_object(list(self.images.corrupt))))

    def finish(self, network: str) -> int:
        """Save the model with the EMA weights where `from_pretrained` finds it, and a record of its training beside it.

        A run that was asked to stop saves its checkpoint only.

        Args:
            network: What was trained, for the record.

        Returns:
            The exit status of the script: 0, or for a stopped run 128 and the signal's number, as a shell has it.
        """
        accelerator = self.accelerator
        if self.step < self.recipe.num_steps:
            more = "--resume_from_checkpoint latest goes on from there"
            accelerator.print(f"Stopped at step {self.step} by a signal: {more}.")
            return 128 + (self._signal or signal.SIGTERM)
        self._update_averaged()
        num_corrupt = self._count_corrupt()
        if accelerator.is_main_process:
            self.pipeline.save_pretrained(self.output_dir)
            record_training(
                self.output_dir,
                self.configuration.start,
                network=network,
                images_seen=self.step * self.recipe.train_batch_size,
                corrupt_images=num_corrupt,
                seconds=round(self._seconds_in_all, 1),
            )
            card = write_first_card(self.output_dir, self.pipeline, self._count, self._repo_id)
            accelerator.print(f"The model is in {self.output_dir}, and its card is {card}.")
            accelerator.print(*next_commands(self.output_dir, self.configuration, self.pipeline), sep="\n")
            if self._repo_id is not None:
                accelerator.print(f"It is published: {upload_model(self.output_dir, self._repo_id)}")
        if num_corrupt:
            accelerator.print(f"Corrupt images that were left out: {num_corrupt}.")
        accelerator.wait_for_everyone()
        return 0
