"""The state of a training: everything that a checkpoint stores. Needs only torch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from data_prep.core.errors import PipelineError
from dpnet.model import ModelConfig, build_discriminator, build_generator

if TYPE_CHECKING:  # pydantic is not needed at run time
    from dpnet.training.settings import TrainSettings

BETA2 = 0.99
M = TypeVar("M", bound=nn.Module)


class TrainState:
    """Everything that changes during training: networks, averaged generator, optimisers, step."""

    def __init__(self, config: ModelConfig, settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)  # the same initial weights on every rank
        self.config = config
        self.generator = placed(build_generator(config), device)
        self.discriminator = placed(build_discriminator(config), device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.generator_optimizer = self._adam(self.generator, settings)
        self.discriminator_optimizer = self._adam(self.discriminator, settings)
        self.step = 0  # steps done
        self.skipped = torch.zeros(
            (), device=device
        )  # steps with a loss or gradient that was not finite
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
        """Copy the whole state to the CPU, as plain tensors, numbers and text."""
        parts = {name: _copied(part.state_dict()) for name, part in self._parts.items()}
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.skipped.is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state(self.skipped.device)
        best = self.best  # replaced as a whole, never changed
        numbers = {"step": self.step, "skipped": int(self.skipped), "best": best, "rng": rng}
        return {"model": self.config.to_json(), **numbers, **parts}

    def from_dict(self, saved: Any, where: str) -> None:
        """Load what `to_dict` returned. Raises PipelineError if it does not fit.

        Args:
            saved: The stored state.
            where: Name of the checkpoint in an error message.
        """
        advice = "restore it from a backup, or remove the run's folder to train from the start."
        names = {"model", "step", "skipped", "best", "rng", *self._parts}
        if not isinstance(saved, dict) or not names <= saved.keys():
            raise PipelineError(
                f"the checkpoint {where} was not made by this version of dpnet: {advice}"
            )
        ours, theirs = self.config.to_json(), {"statistics": "own"} | saved["model"]
        if theirs != ours:
            differ = sorted(k for k in ours if theirs.get(k) != ours[k])
            differences = ", ".join(f"{k} {theirs.get(k)}, not {ours[k]}" for k in differ)
            raise PipelineError(
                f"the checkpoint {where} has another network"
                f" ({differences or 'with unknown options'}): train with its settings, or remove"
                " the run's folder to train from the start."
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise PipelineError(
                f"the checkpoint {where} does not fit this version of the network"
                f" ({first_line(error)}): {advice}"
            ) from error
        self.step, self.best = saved["step"], saved["best"]
        self.skipped.fill_(saved["skipped"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if self.skipped.is_cuda and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], self.skipped.device)

    def keep_best(self, score: float) -> bool:
        """Keep the averaged generator if `score` is the highest so far. Return whether it is."""
        if self.best is not None and score <= self.best["score"]:
            return False
        weights = _copied(self.ema.state_dict())
        self.best = {"score": score, "step": self.step, "ema": weights}
        return True

    def of_discriminator(self) -> list[Tensor]:
        """Return the tensors that a step of the discriminator changes, the optimiser's last.

        Before the optimiser's first step, it has none.
        """
        module, optimizer = self.discriminator, self.discriminator_optimizer
        kept = [optimizer.state.get(weight, {}) for weight in module.parameters()]
        moments = [tensor for each in kept for tensor in each.values()]
        return [*module.parameters(), *module.buffers(), *moments]

    @torch.no_grad()
    def undo_discriminator(self, before: list[Tensor], undo: Tensor) -> None:
        """Restore the discriminator if `undo` is 1, without reading it.

        Args:
            before: Copies of what `of_discriminator` returned before the step.
            undo: A scalar on the device, 0 or 1.
        """
        after = self.of_discriminator()
        before = before + [torch.zeros_like(tensor) for tensor in after[len(before) :]]
        for mine, earlier in zip(after, before, strict=True):
            mine.copy_(torch.where(undo > 0, earlier, mine))

    @torch.no_grad()
    def update_ema(self, decay: float, keep: Tensor) -> None:
        """Move the averaged generator towards the generator by the share 1 - `decay`.

        Args:
            decay: Share of the average that stays, 0 to 1.
            keep: A scalar on the device. If it is 1, nothing changes; else it is 0.
        """
        # The decay is smaller early on, so that the first weights leave the average soon.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        share = (1 - decay) * (1 - keep)
        averaged, current = self.ema.parameters(), self.generator.parameters()
        for average, weight in zip(averaged, current, strict=True):
            average.lerp_(weight, share)
        for mine, theirs in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(torch.where(keep > 0, mine, theirs))


def _copied(tree: Any) -> Any:
    """Copy nested dicts and lists of tensors to the CPU, without shared memory."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return tree


def placed(module: M, device: torch.device) -> M:
    """Move `module` to `device` in channels_last, the fastest layout for convolutions."""
    moved: M = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
