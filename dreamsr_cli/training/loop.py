"""The training loop: any stage, checkpointed, resumable at a step, the same result whatever the interruptions."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dreamsr_cli import __version__
from dreamsr_cli.errors import OutputError, TrainingError
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.training import checkpoints, samples
from dreamsr_cli.training.adversarial import Adversary, gan_weight
from dreamsr_cli.training.distributed import Team, whole
from dreamsr_cli.training.interruption import Interruptions
from dreamsr_cli.training.networks import TRANSFORM, Networks
from dreamsr_cli.training.optimisers import Learner, learning_rate
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.sample_crops import sample_rows
from dreamsr_cli.training.sources import SkippedPhoto, Source
from dreamsr_cli.training.stages import Stage, kind_of_step
from dreamsr_cli.training.step_crops import StepCrops
from dreamsr_cli.training.step_data import Critic, Crops, Outcome
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trackers import Trackers
from dreamsr_cli.training.validation import validate
from dreamsr_cli.training.watch import LossWatch

SUMMARY_EVERY = 50
"""Steps between one-line summaries."""


class Run:
    """State of a run between checkpoints."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        out: Path,
        networks: Networks,
        source: Source,
        perceptual: Perceptual | None,
        team: Team,
        interruptions: Interruptions,
        trackers: Trackers,
        keep: int,
    ) -> None:
        self.stage, self.recipe, self.out = stage, recipe, out
        self.networks, self.source, self.perceptual = networks, source, perceptual
        self.team, self.interruptions, self.trackers, self.keep = team, interruptions, trackers, keep
        self.step = 0
        self.progress: Progress = SilentProgress()
        self._whole_steps, self._gave_up = True, False
        networks.train_only(stage.trains)
        self.call = team.wrap(networks.modules())
        # After the wrapping, which may replace parameters by sharded ones.
        self.learners = {k: Learner(networks.named(parts), recipe.optim) for k, parts in stage.learners.items()}
        self.gan_weight = gan_weight(recipe, stage)
        self.adversary = Adversary(recipe, self.gan_weight, team, perceptual) if self.gan_weight else None
        self.watch = LossWatch(recipe.explosion)

    def shipped(self) -> dict[str, Tensor]:
        """Trained weights by full name, as they go into a bundle."""
        found: dict[str, Tensor] = {}
        for learner in self.learners.values():
            found |= {
                n: whole(w.detach()) for n, w in zip(learner.masters.names, learner.masters.shipped(), strict=True)
            }
        return found

    def restore(self, saved: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Continue from a checkpoint's content. Raises `TrainingError` where it belongs to other networks."""
        try:
            for learner in self.learners.values():
                learner.restore(saved)
        except (KeyError, RuntimeError) as error:
            raise TrainingError(
                f"the last checkpoint of {self.out} doesn't fit: {error}", "warm-start a new run with --init-from"
            ) from error
        if "transform" in saved:
            with torch.no_grad():
                for name in TRANSFORM:
                    getattr(self.networks.autoencoder, name).copy_(saved["transform"][name])
        if self.adversary is not None:
            self.adversary.restore(saved)
        self.watch.restore(state.get("watch", {}))
        self.step = int(state["step"])

    def save(self) -> None:
        """Write a checkpoint of the present step, unless it is there already."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for learner in self.learners.values():
            for name, group in learner.tensors().items():
                tensors.setdefault(name, {}).update(group)
        if self.stage.fit_transform or not self.stage.prior:
            tensors["transform"] = {name: getattr(self.networks.patches, name) for name in TRANSFORM}
        if self.adversary is not None:
            tensors |= self.adversary.tensors()
        if self.team.main:
            with self.interruptions.held():
                state = {"version": __version__, "stage": self.stage.name, "watch": self.watch.state()}
                checkpoints.save(self.out, self.step, tensors, state, self.keep)

    def go(self, last: int, progress: Progress) -> dict[str, float]:
        """Steps up to `last`; saves on the way, at the end and when interrupted. Returns the last validation's
        figures."""
        recipe, figures = self.recipe, dict[str, float]()
        self.progress = progress
        progress.phase(f"train {self.stage.name}", last)
        progress.advance(self.step)
        frozen = self.networks.frozen_sha256() if self.stage.prior else ""
        if self.team.main:
            figures = checkpoints.trim_log(self.out, self.step)
        crops = StepCrops(
            self.source,
            recipe,
            self.step,
            self.team.device,
            rank=self.team.rank,
            world=self.team.world,
            on_bad=self._tell_bad,
        )
        began, first = time.monotonic(), self.step
        try:
            while self.step < last:
                started = time.monotonic()
                terms = self._one(next(crops))
                progress.advance()
                terms["seconds"] = time.monotonic() - started
                self._log(terms, last, (time.monotonic() - began) / (self.step - first))
                if self.step % recipe.save_every == 0:
                    self.save()
                if self.step % recipe.validate_every == 0 or self.step == last:
                    figures = self._validate()
                self._stop_together()
            self.save()
        except KeyboardInterrupt:
            # The step in progress is lost, none before it. Weights that are half a step ahead are not saved: the
            # checkpoint before them leads to the same result.
            if self._whole_steps:
                self.save()
            progress.note(f"stopped at step {self.step}; go on with the same command and --resume")
            raise
        except Exception:
            # Also what the data or the disk did to the run costs no step; a bad loss does, on purpose.
            if self._whole_steps and not self._gave_up and self.team.world == 1:
                with suppress(OutputError):
                    self.save()
            raise
        finally:
            crops.close()
        if self.stage.prior and self.networks.frozen_sha256() != frozen:
            raise TrainingError("weights that are frozen in this stage changed", "this is a bug: please report it")
        return figures

    def _one(self, passes: list[Crops]) -> dict[str, float]:
        recipe, team = self.recipe, self.team
        kind = kind_of_step(self.stage, self.step, recipe.seed, recipe.texture_share)
        judging = self.adversary is not None and self.adversary.counts(self.step)
        critic = partial(self.adversary.judge, step=self.step) if judging and self.adversary is not None else None
        totals: dict[str, Tensor] = {}
        fakes: list[Tensor] = []
        reals: list[Tensor] = []
        for number, crops in enumerate(passes, 1):
            with team.accumulating(self.call, last=number == len(passes)):
                with team.autocast():
                    outcome = self._forward(kind, crops, critic)
                (outcome.loss / len(passes)).backward()
            for name, value in {"loss": outcome.loss.detach(), **outcome.terms}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value / len(passes)
            if outcome.fake is not None and outcome.real is not None:
                fakes.append(outcome.fake)
                reals.append(outcome.real)
        terms = team.mean(totals)
        learner = self.learners[kind]
        norm = learner.masters.take_gradients(recipe.optim.clip)
        # The GAN term has no scale of its own and may be negative: it tells nothing about an explosion.
        steady = terms["loss"] - self.gan_weight * sum(value for name, value in terms.items() if name.endswith("_gan"))
        if complaint := self.watch.complaint(kind, steady, norm):
            self._give_up(complaint)
        with self.interruptions.held():
            self._whole_steps = False
            learner.update(learning_rate(recipe, self.step), self.step)
            if self.adversary is not None and fakes:
                terms |= team.mean(self.adversary.learn(self.step, fakes, reals))
            self.step += 1
            self._whole_steps = True
        return {**terms, "norm": norm}

    def _forward(self, kind: str, crops: Crops, critic: Critic | None) -> Outcome:
        return self.call(lambda: run_step(kind, self.networks, self.recipe, self.perceptual, critic, crops))

    def _give_up(self, complaint: str) -> None:
        self._gave_up = True
        good = checkpoints.describe_latest(self.out)
        raise TrainingError(
            f"{complaint} at step {self.step}; last good checkpoint: {good}",
            "start again with a lower --set optim.lr"
            if good == "none yet"
            else "write its bundle with --resume --max-steps 0, then start a new run from it with --init-from and a "
            "lower --set optim.lr",
        )

    def _log(self, terms: dict[str, float], last: int, pace: float) -> None:
        if self.step % self.recipe.log_every == 0 and self.team.main:
            line = {k: round(v, 5) for k, v in terms.items()}
            checkpoints.append_log(self.out, {"step": self.step, **line})
        self.trackers.log(self.step, {f"train/{k}": v for k, v in terms.items()})
        if self.step % SUMMARY_EVERY == 0:
            left = round(pace * (last - self.step))
            kept = ", ".join(f"{k} {v:.4g}" for k, v in terms.items() if k not in ("seconds", "norm"))
            time_left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            self.progress.note(f"step {self.step} of {last}: {kept}; {pace:.2f} s per step, {time_left} left")

    def _validate(self) -> dict[str, float]:
        if not self.source.validation:
            return {}
        for learner in self.learners.values():
            learner.masters.show_average()
        try:
            with torch.no_grad(), self.team.autocast():
                figures, rows = self.call(
                    lambda: (
                        validate(self.networks, self.recipe, self.source, self.perceptual, self.stage),
                        sample_rows(self.networks, self.recipe, self.source, self.stage),
                    )
                )
        finally:
            for learner in self.learners.values():
                learner.masters.restore()
        if self.team.main:
            checkpoints.append_log(self.out, {"step": self.step, "validation": figures})
            samples.write(self.out, self.step, rows)
            self.trackers.log(self.step, {f"validation/{k}": v for k, v in figures.items()})
        self.progress.note(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        return figures

    def _stop_together(self) -> None:
        self.interruptions.stop_if_asked()
        if self.team.any(self.interruptions.asked):
            raise KeyboardInterrupt

    def _tell_bad(self, photo: SkippedPhoto) -> None:
        self.progress.note(f"left out {photo.name}: {photo.reason}")
