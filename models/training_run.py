"""Running a training: devices, checkpoints, interruption.

OUT/prior.safetensors   the prior, when it is trained; of a posterior OUT/posterior.safetensors
OUT/state.safetensors   what the training goes on from, until then
OUT/log/version_K/      metrics.csv, of the K-th time that it was started
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import DiffusionPrior, load_prior
from neurosde.models.training import DenoiserModule
from neurosde.models.training_config import PosteriorTraining, PriorTraining
from neurosde.models.training_data import TrainingData
from neurosde.models.training_state import SafeTensorsIO, check_same_training
from neurosde.provenance import config_json, make_folder
from neurosde.validation import check_count, check_positive

Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["32-true", "bf16-mixed"]
Model = DiffusionPrior | CFGPosterior


@dataclass(frozen=True)
class TrainingRun:
    """Where a training runs. Rounding depends on the device, the precision, and how many devices and threads."""

    accelerator: Accelerator = field(default="auto", metadata={"help": "auto takes a GPU if there is one"})
    devices: int = field(default=1, metadata={"help": "GPUs, or processes on the CPU"})
    precision: Precision = field(default="32-true", metadata={"help": "32-true replays CUDA graphs on a single GPU"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "minutes of work that a kill can cost at most"})
    log_every: int = field(default=50, metadata={"help": "steps between lines of metrics.csv"})
    validate_every: int = field(default=1000, metadata={"help": "steps between validations"})

    def __post_init__(self) -> None:
        if self.accelerator not in get_args(Accelerator):
            raise ValueError(f"accelerator must be one of {get_args(Accelerator)}; got {self.accelerator!r}.")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}; got {self.precision!r}.")
        for name in ("devices", "log_every", "validate_every"):
            check_count(getattr(self, name), name)
        check_positive(self.checkpoint_minutes, "checkpoint_minutes")
        there = torch.cuda.device_count()
        if self.accelerator == "gpu" and there < self.devices:
            raise ValueError(
                f"{self.devices} GPUs are asked for and {there} are there; lower --devices, or give --accelerator cpu."
            )


def train_prior(config: PriorTraining, out: str | Path, run: TrainingRun | None = None) -> DiffusionPrior:
    """Train a prior, or go on with it where it was interrupted.

    Args:
        config: what to train.
        out: folder of the prior, its state and its log.
        run: where to train.

    Returns:
        The prior, which is in OUT/prior.safetensors too.

    Raises:
        ValueError: OUT is of another training, or the data do not fit.
        MemoryError: the GPU is too small; the message says what to lower.
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C; the state is saved, and the same call goes on.
    """
    prior = _train(config, Path(out), run or TrainingRun(), "prior", load_prior)
    assert isinstance(prior, DiffusionPrior)
    return prior


def train_posterior(config: PosteriorTraining, out: str | Path, run: TrainingRun | None = None) -> CFGPosterior:
    """Train a posterior, or go on with it where it was interrupted.

    Args:
        config: what to train.
        out: folder of the posterior, its state and its log.
        run: where to train.

    Returns:
        The posterior, which is in OUT/posterior.safetensors too.

    Raises:
        ValueError, MemoryError, FloatingPointError, KeyboardInterrupt: as `train_prior`.
    """
    posterior = _train(config, Path(out), run or TrainingRun(), "posterior", CFGPosterior.from_pretrained)
    assert isinstance(posterior, CFGPosterior)
    return posterior


def _train(config: PriorTraining, out: Path, run: TrainingRun, kind: str, load: Callable[[Path], Model]) -> Model:
    final, state = out / f"{kind}.safetensors", out / "state.safetensors"
    if final.exists():
        model = load(final)
        there = {key: value for key, value in model.config.training.items() if key not in ("steps_done", "of_cubes")}
        check_same_training(config_json(there), config_json(config.contents()), final)
        return model
    module = DenoiserModule(config)
    module.data.check_batches(run.devices)
    make_folder(state)  # only now, so that a training that is refused leaves nothing behind
    with _quiet(), _interruptible() as interrupted:
        trainer = pl.Trainer(
            accelerator=run.accelerator,
            devices=run.devices,
            strategy="ddp" if run.devices > 1 else "auto",
            precision=run.precision,
            max_steps=config.steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            logger=CSVLogger(out, name="log"),
            log_every_n_steps=run.log_every,
            val_check_interval=min(run.validate_every, config.steps),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            use_distributed_sampler=False,
            plugins=[SafeTensorsIO(config.contents())],
            callbacks=[_States(state, run.checkpoint_minutes), _Stop(interrupted)],
        )
        try:
            trainer.fit(module, _Data(module.data), ckpt_path=str(state) if state.exists() else None)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU is too small for a step; lower --batch-entries (now {config.batch_entries}), or "
                f"--checkpoint-above (now {config.checkpoint_above}) to below N."
            ) from error
        except SystemExit as error:  # what Lightning makes of a second Ctrl-C
            raise KeyboardInterrupt from error
    model = module.model()
    if interrupted.is_set():
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        model.save(final)
        state.unlink(missing_ok=True)
    return model


class _Data(pl.LightningDataModule):
    """Batches from the step that the training is at."""

    def __init__(self, data: TrainingData) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return _Iterable(self._batches)

    def val_dataloader(self) -> Any:
        return _Iterable(self.data.validation)

    def _batches(self) -> Iterable[dict[str, Any]]:
        trainer: Any = self.trainer
        return self.data.batches(trainer.global_step, trainer.global_rank, trainer.world_size)


class _Iterable:
    """What Lightning takes for a data loader: each pass calls `batches`."""

    def __init__(self, batches: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches())


class _States(ModelCheckpoint):
    """Saves the state every few minutes, and where a training ends before its last step."""

    FILE_EXTENSION = ".safetensors"

    def __init__(self, path: Path, minutes: float) -> None:
        super().__init__(
            path.parent, path.stem, train_time_interval=timedelta(minutes=minutes), enable_version_counter=False
        )
        self.path = path

    def on_fit_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class _Stop(pl.Callback):
    """Ends a training between two steps once it has been interrupted, on all processes at once."""

    def __init__(self, interrupted: threading.Event) -> None:
        self.interrupted = interrupted

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        asked = self.interrupted.is_set()
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self.interrupted.set()
            trainer.should_stop = True


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; the second interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(_: int, __: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners and hints to itself."""
    logs = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", module="lightning_fabric")
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # of replayed passes: waits, no error
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
