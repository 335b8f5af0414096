"""The training loop: fetch, step, log, validate, save.

Runs on one device of one rank. It knows nothing of Ray: what it needs of its surroundings is a
`Session`. All randomness comes from the seed and the step, so a run resumed from a checkpoint goes
on exactly as an undisturbed one.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import PipelineError
from data_prep.storage import open_store
from dpnet.data import Samples, TrainingBatches
from dpnet.model import ModelConfig, build_discriminator, build_generator
from dpnet.model import losses as L
from dpnet.model.config import preset
from dpnet.train import LossSettings, ModelSettings, TrainJob, TrainSettings
from dpnet.validation import Validation, to_device

LOG_EVERY = 25  # steps that one record of the log averages
STATE, LOG = "state.pt", "log.jsonl"
M = TypeVar("M", bound=nn.Module)
BETA2 = 0.99


class Session(Protocol):
    """What the loop needs of whoever runs it. Every rank makes the same calls."""

    rank: int
    world: int
    device: torch.device

    def latest(self) -> AbstractContextManager[Path | None]:
        """The folder of the newest checkpoint, or None."""

    def save(self, step: int, folder: Path | None) -> None:
        """Keep a checkpoint; only rank 0 gives its folder."""

    def progress(self, step: int, note: str) -> None: ...


def train_loop(job: TrainJob, session: Session) -> None:
    """Train from the newest checkpoint, or from the start, to the last step."""
    settings, device = job.settings, session.device
    store = open_store(job.root)
    digests = (job.images.content_digest, job.masks.content_digest)
    batches = TrainingBatches(
        Samples(store, job.images.folder, "train"),
        Samples(store, job.masks.folder, "train"),
        digests,
        seed=settings.seed,
        batch=settings.batch_size,
        rank=session.rank,
        world=session.world,
    )
    validation = Validation(
        Samples(store, job.images.folder, "val"), Samples(store, job.masks.folder, "eval"), job
    )
    state = TrainState(job, device)
    log: list[dict[str, Any]] = []
    with session.latest() as folder:
        if folder is not None:
            state.load(folder)
            log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    step_fn = Step(state, job.losses, settings, session.world)
    if state.step == 0:
        log.append(validation.measure(state.ema, state.step, session.rank, session.world))
    meter = Meter()
    for step, batch in batches.ahead(state.step, settings.steps):
        start = time.monotonic()
        terms = step_fn(step, *to_device(batch, device))
        state.step = step + 1
        meter.add(terms, len(batch.image) * session.world, time.monotonic() - start)
        last = state.step == settings.steps
        if state.step % LOG_EVERY == 0 or last:
            log.append(meter.record(state.step))
        session.progress(state.step, _note(log, terms))
        if state.step % settings.validate_every == 0 or last:
            log.append(validation.measure(state.ema, state.step, session.rank, session.world))
        if state.step % settings.checkpoint_every == 0 or last:
            save_checkpoint(state, log, session)


class TrainState:
    """Everything that changes during training."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        settings = job.settings
        torch.manual_seed(settings.seed)  # the same initial weights on every rank
        config = model_config(job.model)
        self.generator = _placed(build_generator(config), device)
        self.discriminator = _placed(build_discriminator(config), device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        betas = (settings.beta1, BETA2)
        fused = device.type == "cuda"
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), settings.learning_rate, betas, fused=fused
        )
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(),
            settings.discriminator_learning_rate,
            betas,
            fused=fused,
        )
        self.step = 0
        self._parts: dict[str, Any] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "generator_optimizer": self.generator_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    def save(self, folder: Path) -> None:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save({"step": self.step, **parts}, folder / STATE)

    def load(self, folder: Path) -> None:
        saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        # Early averages forget faster, so that the start is not averaged in for long.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        averaged: list[Tensor] = list(self.ema.parameters())
        torch._foreach_lerp_(averaged, list(self.generator.parameters()), 1 - decay)
        for mine, theirs in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(theirs)


class Step:
    """One GAN step: the discriminator on real and composite, then the generator."""

    def __init__(
        self, state: TrainState, losses: LossSettings, settings: TrainSettings, world: int
    ) -> None:
        self.state, self.losses, self.settings = state, losses, settings
        self.generator: nn.Module = state.generator
        self.discriminator: nn.Module = state.discriminator
        if world > 1:
            # The spectral norms' vectors evolve alike on every rank; there is nothing to broadcast.
            self.generator = DistributedDataParallel(state.generator, broadcast_buffers=False)
            self.discriminator = DistributedDataParallel(
                state.discriminator, broadcast_buffers=False
            )
        self.vgg = load_vgg(losses, next(state.generator.parameters()).device)

    def __call__(self, step: int, image: Tensor, valid: Tensor) -> dict[str, float]:
        """Train on N3HW images in [0, 1] and N1HW masks; the loss terms, unweighted."""
        s = self.settings
        scale = rate(step, s)
        adversarial = self.losses.adversarial > 0 and step >= s.adversarial_from
        half = torch.autocast(
            image.device.type, torch.bfloat16, enabled=image.device.type == "cuda"
        )
        with half:
            raw = self.generator(image, valid)
            composite = torch.where(valid > 0, image, raw)
        terms: dict[str, Tensor] = {}
        if adversarial:
            with half:
                both = torch.cat([image, composite.detach()]), torch.cat([valid, valid])
                real, fake = self.discriminator(*both).chunk(2)
            terms["discriminator"] = L.discriminator_loss(real, fake, self.losses.gan)
            self._descend(
                terms["discriminator"],
                self.state.discriminator_optimizer,
                s.discriminator_learning_rate * scale,
                terms,
            )
        total = self._generator_loss(raw, composite, image, valid, adversarial, half, terms)
        self._descend(total, self.state.generator_optimizer, s.learning_rate * scale, terms)
        self.state.discriminator.requires_grad_(True)
        self.state.update_ema(s.ema_decay)
        return {name: float(term.detach()) for name, term in terms.items()}

    def _generator_loss(
        self,
        raw: Tensor,
        composite: Tensor,
        image: Tensor,
        valid: Tensor,
        adversarial: bool,
        half: AbstractContextManager[Any],
        terms: dict[str, Tensor],
    ) -> Tensor:
        w = self.losses
        terms["hole"], terms["valid"] = L.l1_terms(raw, image, valid)
        total = w.hole * terms["hole"] + w.valid * terms["valid"]
        if adversarial:
            self.state.discriminator.requires_grad_(False)
            with half:
                logits = self.state.discriminator(composite, valid)
            terms["adversarial"] = L.generator_adversarial(logits, w.gan)
            total = total + w.adversarial * terms["adversarial"]
        if self.vgg is not None:
            with half:
                true = self.vgg(image)
                of_raw, of_composite = self.vgg(raw), self.vgg(composite)
            terms["perceptual"] = L.perceptual(of_raw, true) + L.perceptual(of_composite, true)
            terms["style"] = L.style(of_composite, true)
            total = total + w.perceptual * terms["perceptual"] + w.style * terms["style"]
        if w.total_variation:
            terms["total_variation"] = L.total_variation(composite, valid)
            total = total + w.total_variation * terms["total_variation"]
        return total

    def _descend(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        terms: dict[str, Tensor],
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        if not math.isfinite(float(norm)):
            bad = [name for name, term in terms.items() if not math.isfinite(float(term.detach()))]
            raise PipelineError(
                f"training stopped at step {self.state.step + 1}: the loss or its gradient is not"
                f" finite ({', '.join(bad) or 'the gradient'}); the last checkpoint is kept: lower"
                " train.learning_rate or train.gradient_clip."
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()


class Meter:
    """Means of the loss terms since the last record."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images, self.seconds = 0, 0.0

    def add(self, terms: dict[str, float], images: int, seconds: float) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images
        self.seconds += seconds

    def record(self, step: int) -> dict[str, Any]:
        means = {name: round(total / self.counts[name], 6) for name, total in self.sums.items()}
        record = {
            "kind": "train",
            "step": step,
            "losses": means,
            "images": self.images,
            "seconds": round(self.seconds, 3),
        }
        self._reset()
        return record


def save_checkpoint(state: TrainState, log: list[dict[str, Any]], session: Session) -> None:
    """Every rank calls; rank 0 writes."""
    if session.rank != 0:
        session.save(state.step, None)
        return
    with tempfile.TemporaryDirectory(prefix="dpnet-checkpoint-") as name:
        folder = Path(name)
        state.save(folder)
        (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in log))
        session.save(state.step, folder)


def rate(step: int, settings: TrainSettings) -> float:
    """Learning rate at `step` as a share of its peak: linear warm-up, then a cosine."""
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    done = step / settings.steps
    return warm * (
        settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def model_config(settings: ModelSettings) -> ModelConfig:
    return preset(settings.preset, **settings.model_dump(exclude={"preset"}))


def load_vgg(losses: LossSettings, device: torch.device) -> L.VGGFeatures | None:
    """The frozen feature network, or None where no weights are given."""
    if losses.vgg_weights is None:
        return None
    path = Path(losses.vgg_weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        return _placed(L.VGGFeatures(weights, losses.vgg), device)
    except Exception as error:
        raise PipelineError(
            f"losses.vgg_weights {str(path)!r} cannot be used ({str(error).splitlines()[0]})."
        ) from error


def _placed(module: M, device: torch.device) -> M:
    placed: M = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _note(log: list[dict[str, Any]], terms: dict[str, float]) -> str:
    for record in reversed(log):
        if record["kind"] == "validation":
            return f"L1 in the hole {terms['hole']:.3f}, validation {record['hole_psnr']:.2f} dB"
    return f"L1 in the hole {terms['hole']:.3f}"
