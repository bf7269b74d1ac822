"""`RunLife`: everything about a run beside its steps: checkpoints and resume, signals, saving, steps that are not finite.

`BatchLoss` (batch_loss.py) and `DPOTrainer` (trainer.py) build on it; they know batches and losses.
"""

import contextlib
import logging
import math
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from transformers import Trainer
from transformers.integrations.liger import apply_liger_kernel

from . import checkpoint
from .disk import room_for
from .fingerprint import OPTIMIZER, compare, fingerprint
from .model_card import TAGS, model_card
from .optim import MasterWeights
from .ref_model import CACHED
from .run_lock import hold
from .saving import model_bytes, optimizer_bytes, quiet_unless_terminal, replacing, write_arguments
from .screen import use_lines
from .start_model import warn_without_name
from .stopping import TERMINATED, FiniteWatch, SkipNonFinite, Termination, weights_are_finite
from .throughput import Throughput
from .trackers import write_below

logger = logging.getLogger(__name__)
HALF = (torch.bfloat16, torch.float16)
_REF_FILE = "ref_model.safetensors"


@contextlib.contextmanager
def _hub(what: str):
    """What the hub's client raises, as an OSError that begins with `what`: each of its HTTP libraries has errors of its own."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise OSError(f"{what} ({type(error).__name__}: {error})") from error


class RunLife(Trainer):
    """transformers' Trainer, whose runs resume only as themselves, stop in order, and leave nothing half written."""

    _tag_names = TAGS

    def _begin_life(self) -> None:
        """Set up callbacks and state, once the model is set up and before work is spent on it."""
        self.throughput = Throughput()
        self.termination = Termination()
        self.add_callback(self.termination)
        self.watch = FiniteWatch(self.accelerator)
        if self.args.on_nan == "skip":
            self.add_callback(SkipNonFinite(self.watch))
        use_lines(self)
        write_below(self)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        self._fingerprint: dict | None = None  # of the model and options at the start, taken before the first step
        self._run = ""  # the name of the run; a resumed run keeps its name
        self._changed: set[str] = set()  # the names that `resume_changed` allowed and that did change
        resume = self.args.resume_from_checkpoint
        if resume and Path(resume, checkpoint.MARKER).exists():
            self._agree(resume)

    # Resume.

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train as `Trainer.train` does; `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises ValueError for a checkpoint that is damaged or of another run, while another run writes into the same
        folder, and for a loss or gradient that is not finite. Raises SystemExit(143) once SIGTERM has stopped the run
        and its checkpoint is written.
        """
        if self.train_dataset is None:
            raise ValueError("there is nothing to train on: pass train_dataset")
        if self.is_world_process_zero():
            hold(self.args.output_dir)
        resume = checkpoint.find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if resume and self.is_world_process_zero():
            checkpoint.check_contents(resume)
        self._agree(resume)
        if self.setup.reference == CACHED and self.ref_model is None and not self.setup.adapters:
            warn_without_name(self)
        if self.args.use_liger_kernel:  # transformers does it once more, after the comparison
            apply_liger_kernel(self.model, self.args.liger_kernel_config)
        self._verify()
        self.watch.clear()
        self.throughput.restart()
        with self.termination.listening():
            try:
                output = super().train(resume_from_checkpoint=resume, **kwargs)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted at step {self.state.global_step}. {self._kept()}") from None
        if self.termination.stopped:
            logger.warning("stopped by SIGTERM at step %d. %s", self.state.global_step, self._kept())
            raise SystemExit(TERMINATED)
        return output

    def _agree(self, resume: str | None) -> None:
        """Set the run's name and fingerprint, from `resume` if given. Raises ValueError where that is of another run."""
        args = self.args
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self)
        if not resume:
            if args.resume_changed:
                raise ValueError("resume_changed has no effect without resume_from_checkpoint: leave it out")
            self._run = uuid.uuid4().hex
            return
        marker = checkpoint.read_marker(resume)
        if not marker.get("resumable", True):
            raise ValueError(
                f"{resume} holds weights alone (save_only_model=True), without which no run goes on: start from them by "
                "naming it as the model"
            )
        if 0 < args.max_steps < marker["step"]:
            raise ValueError(f"{resume} is of step {marker['step']}, past max_steps={args.max_steps}: raise max_steps")
        if args.max_steps <= 0 and marker["epoch"] > args.num_train_epochs:
            raise ValueError(
                f"{resume} is of epoch {marker['epoch']:g}, past num_train_epochs={args.num_train_epochs:g}: raise it"
            )
        self._changed = compare(marker["fingerprint"], self._fingerprint, args.resume_changed, resume)
        self._run = marker["run"]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.args.sync_ref_model:
                load_model(self.ref_model, os.path.join(resume_from_checkpoint, _REF_FILE))
        except RuntimeError as error:
            raise ValueError(f"the weights in {resume_from_checkpoint} do not fit the model: {error}") from error

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load the saved state; where `resume_changed` allowed another value, this run's options replace the saved ones."""
        if checkpoint is None:
            return
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        base = list(getattr(self.lr_scheduler, "base_lrs", ()))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError) as error:
            raise ValueError(
                f"the optimizer's or the schedule's state in {checkpoint} does not fit: {error}"
            ) from error
        if not self._changed & OPTIMIZER:
            return
        lambdas = getattr(self.lr_scheduler, "lr_lambdas", None)
        if lambdas is None:
            raise ValueError(f"lr_scheduler_type {self.args.lr_scheduler_type} keeps its values: change none at resume")
        self.lr_scheduler.base_lrs = base
        for group, options, lr, factor in zip(self.optimizer.param_groups, fresh, base, lambdas, strict=True):
            group.update(options)
            group["lr"] = lr * factor(self.lr_scheduler.last_epoch)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the log shows

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, as transformers takes them; none where a resumed run has already reached its last step."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def start_fingerprint(self) -> str | None:
        """Fingerprint of the weights before the first step, as `train` took it; None before that."""
        return None if self._fingerprint is None else self._fingerprint["model"]

    # Saving.

    def create_optimizer(self, model=None):
        """transformers' optimizer, with fp32 masters for bf16 and fp16 weights, which would lose a learning rate of 1e-6."""
        low = any(p.dtype in HALF for p in self.model.parameters() if p.requires_grad)
        if low and self.optimizer is None and not self.is_deepspeed_enabled:
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if chosen[0] is not MasterWeights:
                self.optimizer_cls_and_kwargs = (MasterWeights, {"optimizer_class": chosen[0], **chosen[1]})
        return super().create_optimizer(model)

    def _save_checkpoint(self, model, trial):
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with self.throughput.paused():
            if self.args.should_save:
                checkpoint.mark_incomplete(folder)
            self._count_tokens()
            try:
                with self._room(folder, optimizer=True):
                    super()._save_checkpoint(model, trial)
                    if self.args.sync_ref_model and self.args.should_save:
                        save_model(self.ref_model, os.path.join(folder, _REF_FILE))
            except OSError:
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.mark_complete(
                    folder,
                    step=self.state.global_step,
                    epoch=self.state.epoch,
                    run=self._run,
                    resumable=not self.args.save_only_model,
                    fingerprint=self._fingerprint,
                )
                checkpoint.rotate(run_dir, limit, self.state.best_model_checkpoint, self._run)

    def _room(self, folder, optimizer: bool = False):
        """A context that raises OSError where the disk has no room for the model (and, if `optimizer`, its state)."""
        if not self.args.should_save:
            return contextlib.nullcontext()
        with_state = optimizer and not self.args.save_only_model and self.optimizer is not None
        needed = model_bytes(self.model) + (optimizer_bytes(self.optimizer) if with_state else 0)
        return room_for(folder, needed, Path(folder).name if optimizer else "the model", self._kept())

    def save_model(self, output_dir=None, _internal_call=False):
        """Save as `Trainer.save_model` does, with a model card; files in `output_dir` change once all new ones are written.

        Raises ValueError and writes nothing where a weight is not finite. Raises OSError where the disk is full.
        """
        if not weights_are_finite(self.model, self.accelerator):
            raise ValueError(
                f"the weights hold nan or inf after step {self.state.global_step}, so they are not saved. "
                f"{self._kept()}. Lower the learning rate"
            )
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            self._write_card(output_dir or self.args.output_dir)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        with self._room(folder), replacing(folder) as pending, quiet_unless_terminal():
            super()._save(str(pending), state_dict)
            write_arguments(self.args, pending)

    def init_hf_repo(self, *args, **kwargs):
        """As transformers'; a hub that cannot be reached is an OSError of one line."""
        with _hub(
            f"push_to_hub: {self.args.hub_model_id or Path(self.args.output_dir).name} cannot be made on the hub"
        ):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """As transformers'; OSError where the upload fails: the model is in `output_dir` by then."""
        with _hub(f"the model was not uploaded; it is in {self.args.output_dir}"):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, *, model_name=None, tags=None, dataset=None, **kwargs):
        """Write `README.md` into `args.output_dir`; `push_to_hub` calls this with its keyword arguments."""
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir, model_name=model_name, tags=tags, dataset=dataset)

    def _write_card(self, folder, **facts) -> None:
        Path(folder, "README.md").write_text(model_card(self, **facts))

    def _kept(self) -> str:
        """A sentence, without its period, on the last checkpoint that is safe on the disk."""
        whole = checkpoint.complete_checkpoints(self.args.output_dir)
        if not whole:
            return "No checkpoint was written"
        return f"The last whole checkpoint is {whole[-1]} (--resume_from_checkpoint true goes on from it)"

    # Steps that are not finite.

    def check_finite(self, logs: dict) -> None:
        """Raise ValueError for a loss or gradient norm in a log that is not finite, unless such steps are left out."""
        if self.args.on_nan == "skip":
            return
        # fp16's loss scaling overflows now and then and leaves these steps out itself.
        norm = None if self.args.fp16 else logs.get("grad_norm")
        if math.isfinite(logs["loss"]) and (norm is None or math.isfinite(norm)):
            self.watch.clear()
            return
        raise ValueError(
            f"{self.watch.describe(self.state.global_step, norm)}. {self._kept()}. Lower the learning rate or leave the "
            "pairs out; on_nan=skip leaves out such steps"
        )
