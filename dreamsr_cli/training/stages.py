"""Stages are data: which parts train in which kind of step, and what a step is made of (method.md, Training).

Stages `autoencoder` and `backbone` make a bundle that has no pretrained prior (decisions.md), stage `transformer`
trains one further. Stage `cleanliness` trains what judges photos, stage `enlarger` what enlarges undamaged ones, stages
`cleaner`, `cleaner-looks` and `cleaner-both` what cleans damaged ones, stage `grain` what says how strong the finest
texture of a result is to be. The other three are the paper's: the transformer is frozen, and only the MM-ControlNet
(texture steps) and the LoRA (removal steps) learn.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreamsr_cli.draws import generator

CONTROL = ("controlnet", "context_attention")
"""Parts of the MM-ControlNet, as a bundle names them."""
LORA = ("lora",)
JUDGE = ("cleanliness",)
"""What tells clean photos from damaged ones."""
ENLARGER = ("enlarger",)
"""What enlarges undamaged photos."""
GRAIN = ("grain",)
"""What says how strong grain is to be."""
CLEANER, PLEASING = ("cleaner.down", "cleaner.faithful"), ("cleaner.pleasing",)
"""What cleans damaged photos in the place of stage 1, and its second manner."""
EVERYTHING = ("transformer", *CONTROL, "text_encoder", "refiner", "lora")
ON_LATENTS = tuple(part for part in EVERYTHING if part != "refiner")
"""What the refiner, and with it the enlarger, doesn't depend on."""


@dataclass(frozen=True)
class Stage:
    """One stage of training. Parts are names of `networks.MODULES` or of what is in them, and "lora"."""

    name: str
    """What `--stage` takes."""
    purpose: str
    """One line for people."""
    learners: dict[str, tuple[str, ...]]
    """For each kind of step the parts that learn in it, with an AdamW of their own. Kinds: "reconstruct" (clean crops
    through encode and decode), "texture" (eq. 5 and 6, LoRA off), "removal" (eq. 7, LoRA on), "both" (a removal part,
    then a texture part on the same crops, one loss), "judge" (bad crops alone: how they look),
    "enlarge" (crops that were only shrunk, or then saved as JPEGs, back to their good versions), "clean" (bad crops to
    their good versions), "please" (the same by LPIPS), "clean-both" (the two at once), "grain" (grain on what frozen
    networks make of bad crops)."""
    fit_transform: bool = False
    """Fit the patch transform in closed form before the first step."""
    prior: bool = True
    """Trains on a frozen pretrained transformer, whose bundle the run's result refers to."""

    @property
    def trains(self) -> tuple[str, ...]:
        """All parts whose weights change."""
        return tuple(part for parts in self.learners.values() for part in parts)

    @property
    def papers(self) -> bool:
        """Whether it is the paper's: the transformer is frozen."""
        return self.prior and self.restore and "transformer" not in self.trains

    @property
    def restore(self) -> bool:
        """Whether the networks take part that make pictures, beside the autoencoder."""
        return not {"reconstruct", "judge", "enlarge"} & self.learners.keys() and not self.cleans

    @property
    def judges(self) -> bool:
        """Whether its steps only look at bad crops."""
        return "judge" in self.learners

    @property
    def enlarges(self) -> bool:
        """Whether its steps undo shrinking, in pixels alone."""
        return "enlarge" in self.learners

    @property
    def cleans(self) -> bool:
        """Whether its steps make good crops of bad ones in pixels alone."""
        return "clean" in self.learners or self.pleases

    @property
    def pleases(self) -> bool:
        """Whether the cleaner's second manner learns in its steps."""
        return bool({"please", "clean-both"} & self.learners.keys())

    @property
    def compares(self) -> bool:
        """Whether its losses may have a perceptual distance."""
        return self.restore or self.pleases

    @property
    def grains(self) -> bool:
        """Whether its steps add grain to finished results."""
        return "grain" in self.learners

    @property
    def stands_alone(self) -> bool:
        """Whether it trains a part beside the method's, and takes nothing else from where it starts."""
        return self.judges or self.enlarges or self.cleans or self.grains

    @property
    def removes(self) -> bool:
        """Whether some of its steps have eq. 7, and with it the GAN term."""
        return "removal" in self.learners or "both" in self.learners

    @property
    def textures(self) -> bool:
        """Whether some of its steps have eq. 5."""
        return "texture" in self.learners or "both" in self.learners


STAGES = {
    stage.name: stage
    for stage in (
        Stage("autoencoder", "latents: transform and refiner", {"reconstruct": ("refiner",)}, True, prior=False),
        Stage("backbone", "every network at once, from nothing", {"both": EVERYTHING}, prior=False),
        Stage("transformer", "every network but the refiner, on from a bundle of our own", {"both": ON_LATENTS}),
        Stage("controlnet", "texture: the MM-ControlNet", {"texture": CONTROL}),
        Stage("restoration", "removal: the LoRA", {"removal": LORA}),
        Stage("joint", "texture or removal, drawn step by step", {"texture": CONTROL, "removal": LORA}),
        Stage("cleanliness", "what photos look like, for --looks auto", {"judge": JUDGE}),
        Stage("enlarger", "enlarging photos that only lack pixels", {"enlarge": ENLARGER}),
        Stage("cleaner", "cleaning damaged photos, faithfully", {"clean": CLEANER}),
        Stage("cleaner-looks", "cleaning damaged photos for texture to begin from", {"please": PLEASING}),
        Stage("cleaner-both", "both manners of the cleaner at once", {"clean-both": (*CLEANER, *PLEASING)}),
        Stage("grain", "how strong grain is to be on results", {"grain": GRAIN}),
    )
}


def kind_of_step(stage: Stage, step: int, seed: int, texture_share: float) -> str:
    """What `step` is: the stage's only kind, or for stage joint a draw from (seed, step) alone, the same on all
    ranks."""
    if len(stage.learners) == 1:
        return next(iter(stage.learners))
    return "texture" if generator(seed, "joint-step", step).random() < texture_share else "removal"
