"""The GAN term of eq. 7: the discriminator with its own optimizer, beside the networks that learn.

It learns from the very pictures the step just made, after the networks' own update. It is saved with every
checkpoint and never shipped.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dreamsr_cli.draws import generator
from dreamsr_cli.losses import hinge_discriminator
from dreamsr_cli.models.discriminator import fresh
from dreamsr_cli.models.feature_discriminator import SHIFT, fresh_heads
from dreamsr_cli.models.perceptual import Lpips, Perceptual, window
from dreamsr_cli.training.distributed import Team
from dreamsr_cli.training.recipe import PAPERS_GAN, Recipe
from dreamsr_cli.training.stages import Stage

BETAS = (0.5, 0.99)
"""AdamW's decay rates: a short memory of gradients, since what is to be told apart keeps changing."""


def gan_weight(recipe: Recipe, stage: Stage) -> float:
    """lambda_2: the recipe's, or where it says nothing the paper's in the paper's stages, none in the others. None in
    stages without eq. 7 and without the cleaner's second manner."""
    if not (stage.removes or stage.pleases):
        return 0.0
    if recipe.loss.gan is not None:
        return recipe.loss.gan
    return PAPERS_GAN if stage.papers else 0.0


class Adversary:
    """The discriminator, its optimizer and its schedule; weights in float32."""

    def __init__(self, recipe: Recipe, weight: float, team: Team, perceptual: Perceptual | None = None) -> None:
        """`perceptual` is what `loss.gan_sees = "features"` looks through. ValueError where it is no `Lpips`."""
        self.weight, self._team, self._seed = weight, team, recipe.seed
        self.starts, self.learns_from = recipe.loss.gan_start, max(0, recipe.loss.gan_start - recipe.loss.gan_lead)
        self._shift = SHIFT if recipe.loss.gan_sees == "features" else 0
        if not self._shift:
            self.network: nn.Module = fresh(recipe.seed).to(team.device)
        elif isinstance(perceptual, Lpips):
            self.network = fresh_heads(recipe.seed, perceptual).to(team.device)
        else:
            raise ValueError("a discriminator on features without LPIPS")
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.loss.gan_lr, betas=BETAS, weight_decay=0.0
        )

    def counts(self, step: int) -> bool:
        """Whether the GAN term is part of the loss of `step`."""
        return step >= self.starts

    def judge(self, fake_BCPQ: Tensor, step: int = 0) -> Tensor:
        """Logits of `step`, whose gradient goes to the pictures only; the spectral norms are not updated."""
        self.network.eval().requires_grad_(False)
        return self.network(self._window(fake_BCPQ.float(), step))

    def _window(self, rgb_BCPQ: Tensor, step: int) -> Tensor:
        if not self._shift:
            return rgb_BCPQ
        top, left = generator(self._seed, "gan-window", step).integers(self._shift, size=2).tolist()
        return window(rgb_BCPQ, self._shift, top, left)

    def learn(self, step: int, fakes: list[Tensor], reals: list[Tensor]) -> dict[str, Tensor]:
        """One update from the pictures of all passes of `step`; its terms for the log, {} before it learns."""
        if step < self.learns_from:
            return {}
        self.network.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        share, totals = 1 / len(fakes), torch.zeros(3, device=self._team.device)
        for number, (fake, real) in enumerate(zip(fakes, reals, strict=True)):
            # Spectral norms are updated once a step, however many passes it has.
            self.network.train(number == 0)
            both = self._window(torch.cat([real, fake]).float(), step)
            # Most of the work of heads on features is the frozen network's.
            with self._team.autocast() if self._shift else nullcontext():
                # One call for both, so that they see the same spectral norms.
                logits_real, logits_fake = self.network(both).float().chunk(2)
            loss = hinge_discriminator(logits_real, logits_fake)
            (share * loss).backward()
            totals += share * torch.stack([loss.detach(), logits_real.detach().mean(), logits_fake.detach().mean()])
        self._team.average_gradients(self.network.parameters())
        self.optimizer.step()
        return dict(zip(("discriminator", "real_logit", "fake_logit"), totals, strict=True))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: weights with the norms' running vectors, and the optimizer's moments."""
        moments = {}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}|{key}"] = value
        return {"discriminator": self.network.state_dict(), "discriminator_optimizer": moments}

    def restore(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`; a checkpoint without a discriminator leaves it fresh."""
        if "discriminator" not in saved:
            return
        self.network.load_state_dict(saved["discriminator"])
        by_name = dict(self.network.named_parameters())
        for key, value in saved["discriminator_optimizer"].items():
            name, moment = key.split("|")
            # AdamW's step count stays on the CPU.
            place = "cpu" if moment == "step" else self._team.device
            self.optimizer.state[by_name[name]][moment] = value.to(place)
