"""The loop that trains a part of the embedded model: learning rate, moving average, checkpoints, progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

CHECKPOINT_EVERY_S = 120
LOG_EVERY = 20  # steps


class Trainer:
    """Minimises `loss(step)` over the parameters of `model`.

    `loss` draws all its randomness from the step's number, so a run that was cut and goes on is the uncut one.

    Attributes:
        average: moving average of the weights, which is what gets shipped.
        losses: (step, mean loss of the last `LOG_EVERY` steps).
        seconds: time spent in steps, over all runs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[int], torch.Tensor],
        checkpoint: Path,
        *,
        steps: int,
        learning_rate: float,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.loss, self.checkpoint = model, loss, checkpoint
        self.steps, self.learning_rate, self.after_step = steps, learning_rate, after_step
        # Muon learns what words mean to the picture about twice as fast as AdamW alone
        parameters = dict(model.named_parameters())
        matrices = {name for name, value in parameters.items() if value.ndim == 2 and "embed" not in name}
        others = [value for name, value in parameters.items() if name not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    [value for name, value in parameters.items() if name in matrices],
                    weight_decay=0.0,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self.average = {name: value.clone() for name, value in model.state_dict().items()}
        self.losses: list[tuple[int, float]] = []
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._load()

    def run(self, until: int | None = None) -> None:
        """Train to step `until` (the last one by default), keeping a checkpoint every two minutes and at the end."""
        until = self.steps if until is None else until
        saved_s = time.monotonic()
        recent: list[torch.Tensor] = []
        with tqdm(total=until, initial=self.step, unit="step", mininterval=10) as bar:
            while self.step < until:
                started_s = time.monotonic()
                recent.append(self._one_step())
                self.seconds += time.monotonic() - started_s
                bar.update()
                if self.step % LOG_EVERY == 0:
                    self.losses.append((self.step, torch.stack(recent).mean().item()))
                    bar.set_postfix_str(f"loss {self.losses[-1][1]:.4f}")
                    recent.clear()
                if time.monotonic() - saved_s > CHECKPOINT_EVERY_S:
                    self._save()
                    saved_s = time.monotonic()
        self._save()

    def _one_step(self) -> torch.Tensor:
        progress = self.step / self.steps
        warm_up = min(1.0, (self.step + 1) / min(100, 1 + self.steps // 10))
        for optimizer, gain in zip(self.optimizers, (1, 2), strict=False):
            for group in optimizer.param_groups:  # the second half of the training comes to rest
                group["lr"] = gain * self.learning_rate * min(warm_up, 2 * (1 - progress))
        loss = self.loss(self.step)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.after_step()
        self.step += 1
        keep = min(0.998, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - keep)
        return loss.detach()

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": self.losses,
            "step": self.step,
            "seconds": self.seconds,
        }
        _write(state, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        if state["optimizers"]:
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        self.average, self.losses = state["average"], state["losses"]
        self.step, self.seconds = state["step"], state["seconds"]


def begin(checkpoint: Path, model: torch.nn.Module) -> None:
    """Write a checkpoint at step 0 from which a `Trainer` goes on with the weights of `model`.

    Raises `FileExistsError` when there is one.
    """
    if checkpoint.exists():
        raise FileExistsError(f"there is a checkpoint in {checkpoint}")
    weights = model.state_dict()
    state = {"model": weights, "average": weights, "optimizers": [], "losses": [], "step": 0, "seconds": 0.0}
    _write(state, checkpoint)


def _write(state: dict[str, Any], checkpoint: Path) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    draft = checkpoint.with_suffix(f".{os.getpid()}")
    torch.save(state, draft)
    draft.replace(checkpoint)
