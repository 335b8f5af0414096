"""One step of GAN training and everything it changes. Needs torch alone, so that it can be measured
on a machine that has nothing else.

On a GPU it runs in bf16 and compiled. What is compiled are the generator's layers, each kind once,
the discriminator's loss, the likeness terms and the adversarial term. Nothing that changes from
step to step (learning rates, the adversarial weight) is inside a graph, so nothing is compiled
again; and nothing is read back from the device, so the host never waits.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.core.errors import PipelineError
from dpnet.model import Generator, ModelConfig, build_discriminator, build_generator
from dpnet.model import losses as L
from dpnet.model.attention import PyramidAttention

if TYPE_CHECKING:  # pydantic is not needed at run time
    from dpnet.training.settings import LossSettings, TrainSettings

BETA2 = 0.99
FINETUNE_RATE = 0.5  # of the peak: where the fine-tuning phase begins
M = TypeVar("M", bound=nn.Module)


class TrainState:
    """Everything that changes during training: networks, average, optimisers, step."""

    def __init__(self, config: ModelConfig, settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)  # the same initial weights on every rank
        self.config = config
        self.generator = placed(build_generator(config), device)
        self.discriminator = placed(build_discriminator(config), device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.generator_optimizer = self._adam(self.generator, settings)
        self.discriminator_optimizer = self._adam(self.discriminator, settings)
        self.step = 0  # steps done
        self.skipped = torch.zeros((), device=device)  # steps whose loss or gradient was not finite
        self.best: dict[str, Any] | None = None  # averaged generator of the best validation
        self._parts: dict[str, Any] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "generator_optimizer": self.generator_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    @staticmethod
    def _adam(module: nn.Module, settings: TrainSettings) -> torch.optim.Adam:
        # The learning rate is set at every step.
        return torch.optim.Adam(module.parameters(), betas=(settings.beta1, BETA2), fused=True)

    def to_dict(self) -> dict[str, Any]:
        """A copy on the CPU of all that a run goes on from; plain tensors, numbers and text."""
        parts = {name: _copied(part.state_dict()) for name, part in self._parts.items()}
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.skipped.is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state(self.skipped.device)
        best = self.best  # replaced as a whole, never changed
        numbers = {"step": self.step, "skipped": int(self.skipped), "best": best, "rng": rng}
        return {"model": self.config.to_json(), **numbers, **parts}

    def from_dict(self, saved: Any, where: str) -> None:
        """Take up what `to_dict` gave; `where` names it in the PipelineError if it does not fit."""
        advice = "restore it, or remove the run's folder to train afresh."
        names = {"model", "step", "skipped", "best", "rng", *self._parts}
        if not isinstance(saved, dict) or not names <= saved.keys():
            raise PipelineError(
                f"the checkpoint {where} is not one of this version of dpnet: {advice}"
            )
        ours = self.config.to_json()
        if saved["model"] != ours:
            differ = sorted(k for k in ours if saved["model"].get(k) != ours[k])
            differences = ", ".join(f"{k} {saved['model'].get(k)}, not {ours[k]}" for k in differ)
            raise PipelineError(
                f"the checkpoint {where} is of another network"
                f" ({differences or 'with options unknown here'}): train with its settings, or"
                " remove the run's folder to train afresh."
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise PipelineError(
                f"the checkpoint {where} does not fit this version of the network"
                f" ({_first_line(error)}): {advice}"
            ) from error
        self.step, self.best = saved["step"], saved["best"]
        self.skipped.fill_(saved["skipped"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if self.skipped.is_cuda and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], self.skipped.device)

    def keep_best(self, score: float) -> bool:
        """Remember the averaged generator, if no validation before gave as high a `score`."""
        if self.best is not None and score <= self.best["score"]:
            return False
        weights = _copied(self.ema.state_dict())
        self.best = {"score": score, "step": self.step, "ema": weights}
        return True

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        # Early averages forget faster, so that the start is not averaged in for long.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        averaged: list[Tensor] = list(self.ema.parameters())
        torch._foreach_lerp_(averaged, list(self.generator.parameters()), 1 - decay)
        for mine, theirs in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(theirs)


class Measured(NamedTuple):
    """What a step measured: scalars on the device, detached; to read one is to wait for it.

    Attributes:
        losses: the terms, unweighted: means over this rank's samples.
        gradients: each network's gradient norm before clipping, the same on every rank.
        weight: of this rank's means in the mean over all samples of the step, times the ranks.
    """

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weight: float = 1.0


class Step:
    """One GAN step: the discriminator on real and composite, then the generator.

    A step whose loss or gradient is not finite changes no weight. Once there were more of them than
    `settings.max_skipped`, no later step changes any either: the host, which reads nothing back
    before the next record of the log, stops then, and nothing was trained on in the meantime.

    Args:
        vgg: the feature network of the perceptual and style terms; without it they are off.
        world: number of ranks; with more than one, gradients are averaged over them (DDP).
        bf16: autocast to bfloat16. backend: torch.compile's, or None for eager.
    """

    def __init__(
        self,
        state: TrainState,
        losses: LossSettings,
        settings: TrainSettings,
        *,
        vgg: L.VGGFeatures | None = None,
        world: int = 1,
        bf16: bool = False,
        backend: str | None = None,
    ) -> None:
        self.state, self.losses, self.settings = state, losses, settings
        if world > 1 and backend is not None:
            # DDP would have each graph split, to average gradients while others are computed. It
            # cannot split every graph, and the gradients of these networks are soon averaged.
            torch._dynamo.config.optimize_ddp = False
        if backend is not None:
            _compile_layers(state.generator, backend)
        inpaint: nn.Module = _Inpaint(state.generator, bf16)
        judge = _compiled(_Judge(state.discriminator, losses.gan, bf16), backend)
        if world > 1:
            # The spectral norms' vectors evolve alike on every rank; there is nothing to broadcast.
            inpaint = DistributedDataParallel(inpaint, broadcast_buffers=False)
            judge = DistributedDataParallel(judge, broadcast_buffers=False)
        self._inpaint, self._judge = inpaint, judge
        self._likeness = _compiled(_Likeness(losses, vgg, bf16), backend)
        self._persuade = _compiled(_Persuade(state.discriminator, losses.gan, bf16), backend)

    def warm_up(self, samples: int, size: int, device: torch.device) -> None:
        """One pass forward and backward that changes nothing, on inputs of a step's shape.

        After its first backward pass DDP arranges the gradients anew, and with three ranks or more
        it sums them in another order from then on: a run that is taken up again would differ from
        an undisturbed one by rounding. So every run has that behind it before its first step, and
        where layers are compiled, nearly all of that too.
        """
        image = torch.full((samples, 3, size, size), 0.5, device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        valid = torch.ones(samples, 1, size, size, device=device)
        valid[:, :, size // 4 : size // 2] = 0
        networks = (self.state.generator, self.state.discriminator)
        buffers = [(buffer, buffer.clone()) for each in networks for buffer in each.buffers()]
        raw, composite = self._inpaint(image, valid)
        self._judge(image, composite.detach(), valid).backward()
        self._likeness(raw, composite, image, valid)[0].backward()
        for buffer, before in buffers:
            buffer.copy_(before)
        for each in networks:
            each.zero_grad(set_to_none=True)

    def __call__(self, step: int, image: Tensor, valid: Tensor, weight: float = 1.0) -> Measured:
        """Train on N3HW images in [0, 1] and N1HW masks, in fp32; `step` counts from 0.

        `weight` is this rank's share of the step's samples times the number of ranks: 1 where all
        have the same number. With it the mean over ranks is the mean over samples.
        """
        s, state = self.settings, self.state
        scale = rate(step, s)
        adversarial = adversarial_weight(step, self.losses, s)
        parts = min(s.accumulate, len(image))
        # Of each micro-batch: its samples, and its share of the sum that the gradients are.
        micro = [
            (x, v, weight * len(x) / len(image))
            for x, v in zip(image.tensor_split(parts), valid.tensor_split(parts), strict=True)
        ]
        terms: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        bad = torch.zeros_like(state.skipped)

        # With one micro-batch both networks learn from the same pass; several would have to be held
        # in memory at once, so each is computed again for the generator.
        once = self._inpaint(image, valid) if parts == 1 else None
        if adversarial > 0:
            state.discriminator_optimizer.zero_grad(set_to_none=True)
            for number, (x, v, share) in enumerate(micro, 1):
                composite = once[1] if once else self._composite(x, v)
                with _last_syncs(self._judge, number == parts):
                    loss = self._judge(x, composite.detach(), v)
                    self._backward(loss, share)
                _add(terms, "discriminator", loss, share / weight)
            gradients["discriminator"], bad = self._descend(
                state.discriminator_optimizer, s.discriminator_learning_rate * scale, bad
            )
        state.generator_optimizer.zero_grad(set_to_none=True)
        state.discriminator.requires_grad_(False)
        for number, (x, v, share) in enumerate(micro, 1):
            with _last_syncs(self._inpaint, number == parts):
                raw, composite = once or self._inpaint(x, v)
                total, likeness = self._likeness(raw, composite, x, v)
                if adversarial > 0:
                    likeness["adversarial"] = self._persuade(composite, v)
                    total = total + adversarial * likeness["adversarial"]
                self._backward(total, share)
            for name, term in likeness.items():
                _add(terms, name, term, share / weight)
        gradients["generator"], bad = self._descend(
            state.generator_optimizer, s.learning_rate * scale, bad
        )
        state.discriminator.requires_grad_(True)
        state.skipped += bad
        state.update_ema(s.ema_decay)
        state.step = step + 1
        return Measured(terms, gradients, weight)

    @torch.no_grad()
    def _composite(self, image: Tensor, valid: Tensor) -> Tensor:
        composite: Tensor = self._inpaint(image, valid)[1]
        return composite

    def _backward(self, loss: Tensor, share: float) -> None:
        # The second factor is 1; for a loss that is not finite it is NaN, and so are all gradients,
        # on every rank. Otherwise one rank could go on where another does not.
        (loss * share * (loss.detach() * 0 + 1)).backward()  # type: ignore[no-untyped-call]

    def _descend(
        self, optimizer: torch.optim.Optimizer, learning_rate: float, bad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of the optimiser, unless a gradient of this step is not finite.

        Returns the gradients' norm before clipping, and 1 if the step is bad so far, else 0.
        """
        (group,) = optimizer.param_groups
        norm = nn.utils.clip_grad_norm_(group["params"], self.settings.gradient_clip)
        bad = torch.maximum(bad, (~norm.isfinite()).to(bad.dtype))
        halted = self.state.skipped + bad > self.settings.max_skipped
        # What a gradient scaler sets: the optimiser skips its step where it is 1, without waiting.
        optimizer.found_inf = torch.maximum(bad, halted.to(bad.dtype))  # type: ignore[attr-defined]
        group["lr"] = learning_rate
        optimizer.step()
        return norm, bad


def _add(terms: dict[str, Tensor], name: str, term: Tensor, share: float) -> None:
    part = term.detach() * share
    terms[name] = terms[name] + part if name in terms else part


def _last_syncs(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Average gradients over the ranks in the last micro-batch only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = module.no_sync()
    return context


def _copied(tree: Any) -> Any:
    """A copy on the CPU of nested dicts and lists of tensors, in which nothing is shared."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return tree


class _Inpaint(nn.Module):
    """The raw prediction and the composite, N3HW."""

    def __init__(self, generator: Generator, bf16: bool) -> None:
        super().__init__()
        self.generator, self.bf16 = generator, bf16

    def forward(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        with _autocast(image, self.bf16):
            raw = self.generator.paint(image, valid)
        return raw, torch.where(valid > 0, image, raw)


class _Judge(nn.Module):
    """The discriminator's loss: real and fake in one forward."""

    def __init__(self, discriminator: nn.Module, kind: L.Adversarial, bf16: bool) -> None:
        super().__init__()
        self.discriminator, self.kind, self.bf16 = discriminator, kind, bf16

    def forward(self, real: Tensor, fake: Tensor, valid: Tensor) -> Tensor:
        with _autocast(real, self.bf16):
            both = self.discriminator(torch.cat([real, fake]), torch.cat([valid, valid]))
        of_real, of_fake = both.chunk(2)
        return L.discriminator_loss(of_real, of_fake, self.kind)


class _Persuade(nn.Module):
    """The generator's adversarial term."""

    def __init__(self, discriminator: nn.Module, kind: L.Adversarial, bf16: bool) -> None:
        super().__init__()
        self.discriminator, self.kind, self.bf16 = discriminator, kind, bf16

    def forward(self, composite: Tensor, valid: Tensor) -> Tensor:
        with _autocast(composite, self.bf16):
            logits = self.discriminator(composite, valid)
        return L.generator_adversarial(logits, self.kind)


class _Likeness(nn.Module):
    """The weighted sum of the terms that compare with the truth, and the terms unweighted."""

    def __init__(self, losses: LossSettings, vgg: L.VGGFeatures | None, bf16: bool) -> None:
        super().__init__()
        self.vgg, self.bf16 = vgg, bf16
        names = ("hole", "valid", "perceptual", "style", "total_variation")
        self.weights = {name: float(getattr(losses, name)) for name in names}

    def forward(
        self, raw: Tensor, composite: Tensor, image: Tensor, valid: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        w = self.weights
        terms = dict(zip(("hole", "valid"), L.l1_terms(raw, image, valid), strict=True))
        if self.vgg is not None and (w["perceptual"] or w["style"]):
            with _autocast(image, self.bf16):
                with torch.no_grad():  # apart from the others: nothing of it is kept
                    true = self.vgg(image)
                both = self.vgg(torch.cat([raw, composite]))
            of_raw = [features.chunk(2)[0] for features in both]
            of_composite = [features.chunk(2)[1] for features in both]
            terms["perceptual"] = L.perceptual(of_raw, true) + L.perceptual(of_composite, true)
            terms["style"] = L.style(of_composite, true)
        if w["total_variation"]:
            terms["total_variation"] = L.total_variation(composite, valid)
        total = torch.stack([w[name] * term for name, term in terms.items()]).sum()
        return total, terms


def rate(step: int, settings: TrainSettings) -> float:
    """Learning rate at `step`, counted from 0, as a share of its peak. Our choice.

    Linear warm-up, then constant; in the last `finetune_share` of the steps a cosine from half of
    the peak to `final_rate`.
    """
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    start = settings.steps * (1 - settings.finetune_share)
    if step < start:
        return warm
    done = (step - start) / (settings.steps - start)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return warm * (settings.final_rate + (FINETUNE_RATE - settings.final_rate) * cosine)


def adversarial_weight(step: int, losses: LossSettings, settings: TrainSettings) -> float:
    """Weight of the adversarial term at `step`: 0 before its first step, then a linear rise.

    It rises over as many steps as the warm-up has, in which the discriminator learns what it is to
    teach. Our choice.
    """
    since = step - settings.adversarial_from + 1
    return losses.adversarial * min(1.0, max(0, since) / max(settings.warmup_steps, 1))


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine, or None: a small function is compiled."""

    def small(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    try:
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(small, fullgraph=True)(x).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return _first_line(error)
    return None


def load_vgg(file: Path, kind: str, device: torch.device) -> L.VGGFeatures:
    """The frozen feature network of a file with torchvision's VGG weights.

    Raises PipelineError with one sentence when the file is not that.
    """
    where = f"losses.vgg_weights {str(file)!r}"
    advice = f"save torchvision's {kind} weights again, or leave the option out."
    try:
        weights = _read_weights(file)
    except Exception as error:
        raise PipelineError(
            f"{where} cannot be read ({_first_line(error)}), so it is missing, cut short or no file"
            f" of weights: {advice}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise PipelineError(f"{where} holds no table of named weights: {advice}")
    # Up to their third stage the two networks have the same shapes under the same names.
    other, mark = {"vgg19": ("vgg16", 17), "vgg16": ("vgg19", 16)}[kind]
    if f"features.{mark}.weight" in weights:
        raise PipelineError(f"{where} holds weights of {other}: set losses.vgg to {other}.")
    try:
        return placed(L.VGGFeatures(weights, cast("Any", kind)), device)
    except (ValueError, KeyError, RuntimeError) as error:
        raise PipelineError(
            f"{where} does not hold the weights of torchvision's {kind}"
            f" ({' '.join(str(error).split()).rstrip('.')}): {advice}"
        ) from error


def placed(module: M, device: torch.device) -> M:
    """`module` on `device` in channels_last, in which convolutions are fastest."""
    moved: M = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _read_weights(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _compiled(module: nn.Module, backend: str | None) -> nn.Module:
    if backend is None:
        return module
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    return cast(nn.Module, compiled)


def _compile_layers(generator: Generator, backend: str) -> None:
    """Have each layer compiled, but not the network as a whole.

    As one graph it has 4,000 nodes, most of them the same in every block, and had not been compiled
    on 16 cores after 200 s. Layers that are alike share one graph.
    """
    # All layers count as one function that is compiled again, each kind for each size of a batch.
    torch._dynamo.config.recompile_limit = 64
    for child in generator.children():
        for layer in child if isinstance(child, nn.ModuleList) else [child]:
            # Attention has kernels of its own, and a convolution alone is one already.
            if not isinstance(layer, PyramidAttention | nn.Conv2d):
                layer.compile(fullgraph=True, dynamic=False, backend=backend)


def _autocast(like: Tensor, bf16: bool) -> torch.autocast:
    return torch.autocast(like.device.type, torch.bfloat16, enabled=bf16)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
