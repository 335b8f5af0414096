"""One step of GAN training.

It needs only torch, so it can be measured on a machine without our other libraries.

On a GPU the step runs in bf16 and compiled. Compiled are: each kind of generator layer, the
discriminator's loss, the losses against the truth, and the adversarial loss. Learning rates and the
adversarial weight change from step to step, so they stay outside the graphs, and no graph is
compiled twice. The step reads nothing back from the device, so the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpnet.model import Generator
from dpnet.model import losses as L
from dpnet.model.attention import PyramidAttention
from dpnet.training.schedule import adversarial_weight, rate
from dpnet.training.state import TrainState, first_line

if TYPE_CHECKING:  # pydantic is not needed at run time
    from dpnet.training.settings import LossSettings, TrainSettings


class Measured(NamedTuple):
    """The measurements of a step: detached scalars on the device. Reading one waits for the device.

    Attributes:
        losses: The loss terms without their weights, averaged over this rank's samples.
        gradients: The gradient norm of each network before clipping, the same on every rank.
        weight: This rank's share of the step's samples, times the number of ranks.
    """

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weight: float = 1.0


class Step:
    """One GAN step: first the discriminator on real images and composites, then the generator.

    A step with a loss or gradient that is not finite changes no weight, no average and no state of
    an optimiser. After more than `settings.max_skipped` such steps, no step changes them. The
    discriminator learns before the generator's loss is known, so its update is undone where that
    loss is not finite. The host reads the losses only for the next log record, and stops training
    there.

    Args:
        state: Networks and optimisers. Each step changes them.
        losses: Weights of the loss terms.
        settings: Learning rates, clipping and so on.
        vgg: Feature network of the perceptual and style losses. Without it they are off.
        world: Number of ranks. With more than one, gradients are averaged over them (DDP).
        bf16: Autocast to bfloat16.
        backend: Backend of torch.compile, or None to run without compiling.
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
        self.state, self.losses, self.settings, self.vgg = state, losses, settings, vgg
        if world > 1 and backend is not None:
            # DDP would split each graph, to average gradients while others are computed. It cannot
            # split every graph, and averaging the gradients of these networks takes little time.
            torch._dynamo.config.optimize_ddp = False
        if backend is not None:
            _compile_layers(state.generator, backend)
        inpaint: nn.Module = Inpaint(state.generator, bf16)
        judge = _compiled(_Judge(state.discriminator, losses.gan, bf16), backend)
        if world > 1:
            # No broadcast is needed: the vectors of the spectral norms are equal on every rank.
            inpaint = DistributedDataParallel(inpaint, broadcast_buffers=False)
            judge = DistributedDataParallel(judge, broadcast_buffers=False)
        self._inpaint, self._judge = inpaint, judge
        self._likeness = _compiled(Likeness(losses, vgg, bf16), backend)
        self._persuade = _compiled(Persuade(state.discriminator, losses.gan, bf16), backend)

    def warm_up(
        self,
        samples: int,
        size: int,
        device: torch.device,
        begin: Callable[[str], None] = lambda part: None,
    ) -> None:
        """Run one pass forward and backward that changes nothing.

        After its first backward pass, DDP rearranges the gradients. With three ranks or more it
        then sums them in another order, so a resumed run would differ from an undisturbed one by
        rounding. With a pass before the first step, both are the same. The pass also compiles
        all parts, so that no later step waits for the compiler. With `accumulate` above 1, parts of
        another size and the pass of the GAN without gradients are compiled when they first run.

        Args:
            samples: Samples of this rank in one part of a batch.
            size: Side of the images in pixels.
            device: Device of the networks.
            begin: Gets the name of each part before it runs.
        """
        image = torch.full((samples, 3, size, size), 0.5, device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        valid = torch.ones(samples, 1, size, size, device=device)
        valid[:, :, size // 4 : size // 2] = 0
        networks = (self.state.generator, self.state.discriminator)
        buffers = [(buffer, buffer.clone()) for each in networks for buffer in each.buffers()]
        begin("the generator")
        raw, composite = self._inpaint(image, valid)
        begin("the discriminator")
        self._judge(image, composite.detach(), valid).backward()
        begin("the losses")
        self.state.discriminator.requires_grad_(False)
        total = self._likeness(raw, composite, image, valid)[0]
        if self.losses.adversarial > 0:
            total = total + self._persuade(composite, valid)
        begin("the backward pass")
        total.backward()
        self.state.discriminator.requires_grad_(True)
        for buffer, before in buffers:
            buffer.copy_(before)
        for each in networks:
            each.zero_grad(set_to_none=True)

    def __call__(self, step: int, image: Tensor, valid: Tensor, weight: float = 1.0) -> Measured:
        """Train on one batch.

        Args:
            step: Number of the step, from 0.
            image: N3HW in [0, 1], float32.
            valid: N1HW in {0, 1}, float32; 1 is a known pixel.
            weight: This rank's share of the step's samples, times the number of ranks. With it, the
                mean over ranks is the mean over samples.
        """
        s, state = self.settings, self.state
        scale = rate(step, s)
        adversarial = adversarial_weight(step, self.losses, s)
        parts = min(s.accumulate, len(image))
        # Each part of the batch, with the share of its gradients in the sum.
        micro = [
            (x, v, weight * len(x) / len(image))
            for x, v in zip(image.tensor_split(parts), valid.tensor_split(parts), strict=True)
        ]
        terms: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        bad = torch.zeros_like(state.skipped)

        # With one part, both networks learn from the same forward pass. With several, their passes
        # do not fit into memory together, so the generator computes each part again.
        once = self._inpaint(image, valid) if parts == 1 else None
        before: list[Tensor] = []
        if adversarial > 0:
            before = [tensor.detach().clone() for tensor in state.of_discriminator()]
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
        skip = self._skip(bad)
        if adversarial > 0:
            state.undo_discriminator(before, skip)
        state.update_ema(s.ema_decay, skip)
        state.skipped += bad
        state.step = step + 1
        return Measured(terms, gradients, weight)

    @torch.no_grad()
    def _composite(self, image: Tensor, valid: Tensor) -> Tensor:
        composite: Tensor = self._inpaint(image, valid)[1]
        return composite

    def _backward(self, loss: Tensor, share: float) -> None:
        # The second factor is 1. If the loss is not finite it is NaN, and so are all gradients on
        # every rank. Without it, one rank could update its weights while another does not.
        (loss * share * (loss.detach() * 0 + 1)).backward()  # type: ignore[no-untyped-call]

    def _descend(
        self, optimizer: torch.optim.Optimizer, learning_rate: float, bad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update the weights, unless a gradient of this step is not finite.

        Returns:
            The gradient norm before clipping; and 1 if this step is bad so far, else 0.
        """
        (group,) = optimizer.param_groups
        norm = nn.utils.clip_grad_norm_(group["params"], self.settings.gradient_clip)
        bad = torch.maximum(bad, (~norm.isfinite()).to(bad.dtype))
        # A gradient scaler sets this too: if it is 1, the optimiser skips its step on the device.
        optimizer.found_inf = self._skip(bad)  # type: ignore[attr-defined]
        group["lr"] = learning_rate
        optimizer.step()
        return norm, bad

    def _skip(self, bad: Tensor) -> Tensor:
        """Return 1 if the step must change nothing, else 0.

        Args:
            bad: 1 if a loss or gradient of this step is not finite, else 0.
        """
        halted = self.state.skipped + bad > self.settings.max_skipped
        return torch.maximum(bad, halted.to(bad.dtype))


def _add(terms: dict[str, Tensor], name: str, term: Tensor, share: float) -> None:
    part = term.detach() * share
    terms[name] = terms[name] + part if name in terms else part


def _last_syncs(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Average gradients over the ranks only for the last part of a batch."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = module.no_sync()
    return context


class Inpaint(nn.Module):
    """The generator: returns the raw prediction and the composite, both N3HW."""

    def __init__(self, generator: Generator, bf16: bool) -> None:
        super().__init__()
        self.generator, self.bf16 = generator, bf16

    def forward(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        with _autocast(image, self.bf16):
            raw = self.generator.paint(image, valid)
        return raw, torch.where(valid > 0, image, raw)


class _Judge(nn.Module):
    """The discriminator's loss, with real and fake images in one forward pass."""

    def __init__(self, discriminator: nn.Module, kind: L.Adversarial, bf16: bool) -> None:
        super().__init__()
        self.discriminator, self.kind, self.bf16 = discriminator, kind, bf16

    def forward(self, real: Tensor, fake: Tensor, valid: Tensor) -> Tensor:
        with _autocast(real, self.bf16):
            both = self.discriminator(torch.cat([real, fake]), torch.cat([valid, valid]))
        of_real, of_fake = both.chunk(2)
        return L.discriminator_loss(of_real, of_fake, self.kind)


class Persuade(nn.Module):
    """The generator's adversarial loss."""

    def __init__(self, discriminator: nn.Module, kind: L.Adversarial, bf16: bool) -> None:
        super().__init__()
        self.discriminator, self.kind, self.bf16 = discriminator, kind, bf16

    def forward(self, composite: Tensor, valid: Tensor) -> Tensor:
        with _autocast(composite, self.bf16):
            logits = self.discriminator(composite, valid)
        return L.generator_adversarial(logits, self.kind)


class Likeness(nn.Module):
    """The losses against the truth: their weighted sum, and each term without its weight."""

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
                with torch.no_grad():  # separate, so that no activations are kept
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


def compiler_problem(device: torch.device) -> str | None:
    """Compile a small function. Return why that fails on this machine, or None."""

    def small(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    try:
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(small, fullgraph=True)(x).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return first_line(error)
    return None


def _compiled(module: nn.Module, backend: str | None) -> nn.Module:
    if backend is None:
        return module
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    return cast(nn.Module, compiled)


def _compile_layers(generator: Generator, backend: str) -> None:
    """Compile each layer, but not the network as a whole.

    The whole network is one graph of 4,000 nodes, mostly repeated blocks. 16 cores did not compile
    it in 200 s. Layers of the same kind share one graph.
    """
    # torch counts all layers as one function, compiled once for each kind and batch size.
    torch._dynamo.config.recompile_limit = 64
    for child in generator.children():
        for layer in child if isinstance(child, nn.ModuleList) else [child]:
            # Attention has kernels of its own, and a single convolution is one kernel already.
            if not isinstance(layer, PyramidAttention | nn.Conv2d):
                layer.compile(fullgraph=True, dynamic=False, backend=backend)


def _autocast(like: Tensor, bf16: bool) -> torch.autocast:
    return torch.autocast(like.device.type, torch.bfloat16, enabled=bf16)
