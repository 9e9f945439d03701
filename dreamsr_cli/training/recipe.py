"""Training recipes: frozen dataclasses, the only home of a training default; TOML files lie in
`dreamsr_cli/recipes`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from dreamsr_cli.config import BundleConfig, BundleDefaults, ControlConfig, LatentConfig, SamplingConfig
from dreamsr_cli.errors import ConfigError
from dreamsr_cli.plain_data import from_dict, load_toml
from dreamsr_cli.training.loss_recipe import LossRecipe

SMALLEST_FOR_FEATURES = 48
"""Pixels of a crop's side that a discriminator on features needs: LPIPS' smallest, and its window's shift."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a bundle trained from nothing."""

    double_blocks: int = 4
    """MM-DiT blocks of the transformer."""
    single_blocks: int = 4
    """Single blocks of the transformer."""
    heads: int = 4
    """Attention heads."""
    head_dim: int = 64
    """Width per head."""
    rope_axes: tuple[int, int, int] = (8, 28, 28)
    """Split of a head's width over (unused, row, column) positions; its sum is `head_dim`."""
    text_width: int = 192
    """Width of text tokens and of the pooled vector."""
    text_layers: int = 2
    """Layers of the byte encoder."""
    refiner_width: int = 64
    """Channels of the refiner."""
    refiner_blocks: int = 3
    """Residual blocks of the refiner; its reach is 4 * (2 + 2 * blocks) pixels."""
    refiner_restored: bool = False
    """Whether the refiner has a second manner for stage 1's results (`autoencoder.Refiner`)."""
    enlarger_rank: int = 24
    """Rank of a fresh enlarger's changes to the refiner's kernels (`models/enlarger.py`)."""
    cleaner_widths: tuple[int, int, int] = (48, 96, 140)
    """Channels of a fresh cleaner at the photo's size, at half and at a quarter of it (`models/cleaner.py`)."""
    cleaner_blocks: tuple[int, int, int] = (1, 2, 2)
    """Residual blocks of a fresh cleaner at each of these sizes."""
    cleaner_deepen: tuple[int, int, int] = (0, 0, 0)
    """Residual blocks there that a cleaner is given where it has fewer when its stages begin; they start as the
    identity. 0: as many as it has."""
    cleaner_views: int = 0
    """In how many views a cleaner looks at a photo whose stages begin: 1, 2 or 4 (`models/cleaner.VIEWS`). 0: as it
    is."""
    whitening: float = 0.5
    """Power of a component's standard deviation it is divided by."""
    lora_rank: int = 16
    """Rank of a fresh Restoration Acceleration LoRA."""
    single_cut: int = 0
    """Single blocks with which stage backbone begins from a transformer that is there: the first ones stay. 0: all."""
    lora_cut: int = 0
    """Rank with which stages restoration and joint begin from a LoRA that is there: what it changes most stays
    (truncated SVD). 0: all of it."""


@dataclass(frozen=True)
class CropPlan:
    """One size of crops and how often a step uses it."""

    size: int
    """Crop side in pixels, multiple of 16."""
    batch: int
    """Crops per optimizer step, over all processes and accumulated passes."""
    share: float
    """Share of steps."""


@dataclass(frozen=True)
class DataRecipe:
    """What the networks are shown."""

    preset: str = "seesr-mild"
    """Degradation preset of `degradations/pixel.py`."""
    mix: dict[str, float] = field(default_factory=dict)
    """Shares of samples that use further presets; the rest use `preset`, and so does validation."""
    sharpen: bool | None = None
    """Sharpen the good crop before it is degraded and as the target; None: as each preset says."""
    crops: tuple[CropPlan, ...] = (CropPlan(256, 8, 1.0),)
    """Crop sizes."""
    dead_leaves: float = 0.1
    """Share of samples that are dead-leaves images made on the fly."""
    full_photo: float = 0.2
    """Receptive-Field Enhancement: chance that the photo is first shrunk to a short side of `full_side`; a crop of
    about all of it has local text = global text."""
    full_side: int = 1024
    """Short side in pixels of a shrunk photo."""
    full_sides: tuple[int, ...] = ()
    """Short sides beside `full_side`, one of all drawn per sample: the same photo with finer and coarser texture
    (ours)."""
    slanted: float = 0.0
    """Share of the crops of shrunk photos that are turned by any angle up to 45 degrees, of photos shrunk to 0.86 to
    1.2 times the short side of the others: so that few photos show more (ours)."""
    recoloured: float = 0.0
    """Share of the crops that get other colours, tones and less contrast before they are degraded (ours); for crops
    without words."""
    full_crop: int | None = None
    """Side of the crops of shrunk photos (the paper's: 1024); None: that of the step's other crops."""
    turns: int = 8
    """Flips and quarter turns of crops: 8 all, 2 mirroring only (prompts and writing stay right), 1 none."""
    max_bad: float = 0.1
    """Share of photos that may be unreadable before the run stops."""
    words: bool = True
    """Whether crops are described; stages that read no texts (cleanliness, enlarger, cleaner) are faster without."""
    detail_words: float = 0.0
    """Chance that a local text of the describer's begins with how much fine detail the good crop has (ours)."""
    no_text: float = 0.1
    """Chance that a sample's texts are empty, so that `--captioner none` works."""
    hold_out: int = 4
    """Photos kept for validation, the last by hash; 0: none, and no validation."""
    workers: int = 1
    """Background processes that make crops, for each training process."""
    cache_latents: bool = False
    """Keep latents on disk: for a set of pairs of the crops' own size, with turns = 1, whose crops come back."""


@dataclass(frozen=True)
class OptimRecipe:
    """The optimizer, with linear warm-up and cosine decay."""

    kind: str = "adamw"
    """"adamw" (the paper's), or "muon": Muon for the matrices inside the blocks, AdamW for everything else."""
    lr: float = 5e-4
    """Peak learning rate."""
    text: float = 1.0
    """Learning rate of text encoder and context cross-attention, as a multiple of the others' (ours)."""
    warmup: int = 200
    """Steps of linear warm-up."""
    final: float = 0.05
    """Share of the peak that is left at the last step."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    clip: float = 1.0
    """Largest global gradient norm."""
    ema: float = 0.998
    """Decay of the averaged weights that are shipped; 0: no average is kept, and the last weights ship."""
    eight_bit: bool = False
    """Keep AdamW's moments in 8 bits (bitsandbytes)."""


ABLATIONS = {
    "none": "the whole method",
    "no-text-branch": "image features only; the global text in both networks",
    "no-erasure": "texture steps are conditioned on the bad crop, not on the erased one",
    "no-rfe": "every photo is shrunk to a short side of 1024 px and cut into 1024 px crops",
    "no-lora": "stage controlnet alone, conditioned on the bad crop; sampling starts from pure noise",
}
"""Switches of the paper's Tables 3 to 5 (docs/method.md)."""
PAPERS_GAN = 0.5
"""lambda_2 of eq. 7."""
CONDITIONS = ("erased", "removed", "mixed", "degraded")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run's result, beside its data and weights it starts from."""

    name: str
    """Name of the bundle."""
    licence: str = "Apache-2.0"
    """Licence of the bundle."""
    seed: int = 1
    """Seed of every draw."""
    steps: int = 3000
    """Optimizer steps; the learning rate's decay ends there."""
    control_std: float = 0.02
    """How far from zero the injections start in stage `backbone` (decisions.md)."""
    t_range: tuple[float, float] = (0.0, 1.0)
    """Range of t in texture steps."""
    renoised_share: float = 0.0
    """Share of a texture step's samples that begin as at inference, from the condition renoised (eq. 3), not from the
    good picture (eq. 5); the good picture stays their target (ours, docs/method.md)."""
    renoised_t: tuple[float, float] = (0.05, 0.2)
    """Range of t of these samples."""
    model: str | None = None
    """Bundle that stages controlnet, restoration and joint train on, where `--model` names none; None: mini."""
    fresh: bool = False
    """In these stages, begin the parts that learn as the paper does (the ControlNet a copy of the transformer, its
    injections and the LoRA without effect) even where the bundle has them; else those are trained further."""
    condition: str = "erased"
    """What texture steps are conditioned on (stages controlnet and joint): "erased" (the encoded i2i picture),
    "removed" (the bad crop after the removal step, as at inference), "mixed" (each sample one of the two), "degraded"
    (the bad crop)."""
    texture_share: float = 0.5
    """Chance that a step of stage joint is a texture step."""
    texture_every: int = 1
    """Stage backbone: every how many steps there is a texture part beside the removal part; 0: never."""
    ablation: str = "none"
    """A row of the paper's Tables 3 to 5: a key of `ABLATIONS`."""
    accumulate: int = 1
    """Passes whose gradients add up to one optimizer step."""
    checkpointing: bool = False
    """Compute activations of the blocks again in the backward pass: less memory, a third more time."""
    explosion: float = 20.0
    """The run stops where a loss is this many times its running mean; 0: never."""
    save_every: int = 200
    """Steps between checkpoints."""
    validate_every: int = 200
    """Steps between validations."""
    log_every: int = 10
    """Steps between log lines."""
    sizes: ModelSizes = field(default_factory=ModelSizes)
    """Network sizes."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Latent layout."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """Injection of control features."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Constants written into the bundle."""
    defaults: BundleDefaults = field(default_factory=BundleDefaults)
    """Flag defaults written into the bundle."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """What the networks are shown."""
    loss: LossRecipe = field(default_factory=LossRecipe)
    """Loss weights."""
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    """Optimizer."""

    def bundle_config(self) -> BundleConfig:
        """bundle.json of a fresh bundle with these sizes, its parts not yet named."""
        return BundleConfig(
            format=1,
            name=self.name,
            licence=self.licence,
            parts={},
            latent=self.latent,
            sampling=self.sampling,
            control=self.control,
            defaults=self.defaults,
        )


def load_recipe(config: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe `config` (a name in `dreamsr_cli/recipes` or a TOML file), with `key=value` overrides laid over it.

    Keys are dotted ("optim.lr=1e-4"), values TOML. Raises `ConfigError` on an unknown name, key or type.
    """
    folder = Path(str(resources.files("dreamsr_cli"))) / "recipes"
    path = Path(config)
    if path.suffix != ".toml":
        path = folder / f"{config}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
            raise ConfigError(f"no recipe named {config!r}", f"use one of {known}, or a .toml file")
    return recipe_from_dict(_with_overrides(load_toml(path), overrides or []), str(path))


def recipe_from_dict(data: dict[str, Any], where: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe held by plain data (a run's run.json, a parsed TOML file); `where` names it in messages."""
    data = _with_overrides(data, overrides or [])
    control = data.get("control")
    if isinstance(control, dict) and isinstance(control.get("map"), list):
        # TOML has no null: -1 stands for "this block receives nothing".
        control["map"] = [None if feature == -1 else feature for feature in control["map"]]
    recipe = from_dict(Recipe, data, where)
    _check(recipe, where)
    return recipe


def _with_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    import tomllib

    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text}: no '='", "write --set key=value, for example --set optim.lr=1e-4")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        table = data
        *parents, last = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {text}: {parent!r} is not a table", "give the key that holds the whole value")
        table[last] = parsed
    return data


def _check(recipe: Recipe, where: str) -> None:
    sizes = recipe.sizes
    if sum(sizes.rope_axes) != sizes.head_dim:
        raise ConfigError(
            f"{where}: sizes.rope_axes sum to {sum(sizes.rope_axes)}, not head_dim", "correct one of them"
        )
    if sizes.single_cut < 0:
        raise ConfigError(f"{where}: sizes.single_cut is {sizes.single_cut}", "use a count, or 0 to keep all blocks")
    if sizes.lora_cut < 0:
        raise ConfigError(f"{where}: sizes.lora_cut is {sizes.lora_cut}", "use a rank, or 0 to keep all of it")
    if min(sizes.cleaner_deepen) < 0:
        raise ConfigError(
            f"{where}: sizes.cleaner_deepen is {list(sizes.cleaner_deepen)}", "use counts, or 0 to keep what it has"
        )
    if sizes.cleaner_views not in (0, 1, 2, 4):
        raise ConfigError(
            f"{where}: sizes.cleaner_views is {sizes.cleaner_views}", "use 1, 2 or 4, or 0 to keep what it has"
        )
    control_map = recipe.control.map
    features = {feature for feature in control_map if feature is not None}
    if len(control_map) > sizes.double_blocks or features != set(range(len(features))):
        raise ConfigError(
            f"{where}: control.map {list(control_map)} doesn't fit {sizes.double_blocks} double blocks",
            "give each block at most one of the features 0, 1, ...",
        )
    if recipe.data.hold_out < 0:
        raise ConfigError(f"{where}: data.hold_out is {recipe.data.hold_out}", "hold out 0 photos or more")
    if not 0 <= recipe.data.max_bad <= 1:
        raise ConfigError(f"{where}: data.max_bad is {recipe.data.max_bad}", "use a share from 0 to 1")
    for name in ("save_every", "validate_every", "log_every"):
        if getattr(recipe, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(recipe, name)}", "use 1 or more steps")
    if abs(sum(c.share for c in recipe.data.crops) - 1) > 1e-6:
        raise ConfigError(f"{where}: shares of data.crops don't sum to 1", "correct them")
    for crop in recipe.data.crops:
        if crop.size % 16 or crop.size < 32:
            raise ConfigError(f"{where}: crop size {crop.size} is not a multiple of 16", "use 256")
    for name, value, known in (
        ("condition", recipe.condition, CONDITIONS),
        ("ablation", recipe.ablation, tuple(ABLATIONS)),
        ("loss.pixel_kind", recipe.loss.pixel_kind, ("mse", "charbonnier")),
        ("loss.gan_sees", recipe.loss.gan_sees, ("pixels", "features")),
        ("loss.cleaner_seen", recipe.loss.cleaner_seen, ("cleaned", "finished")),
        ("optim.kind", recipe.optim.kind, ("adamw", "muon")),
    ):
        if value not in known:
            raise ConfigError(f"{where}: {name} {value!r} is not known", f"use one of {', '.join(known)}")
    smallest = min(c.size for c in recipe.data.crops)
    if not 0 <= recipe.loss.perceptual_shift <= smallest // 2:
        raise ConfigError(
            f"{where}: loss.perceptual_shift is {recipe.loss.perceptual_shift}", f"use 0 to {smallest // 2} pixels"
        )
    if recipe.loss.gan_sees == "features" and (recipe.loss.perceptual == "none" or smallest < SMALLEST_FOR_FEATURES):
        raise ConfigError(
            f"{where}: loss.gan_sees features needs loss.perceptual and crops of {SMALLEST_FOR_FEATURES} px or more",
            "--set loss.gan_sees=pixels, or --perceptual lpips-squeeze and larger data.crops",
        )
    if recipe.texture_every < 0:
        raise ConfigError(f"{where}: texture_every is {recipe.texture_every}", "use 0 (never) or more steps")
    if recipe.loss.lattice < 0:
        raise ConfigError(f"{where}: loss.lattice is {recipe.loss.lattice}", "use 0 for none")
    if recipe.loss.removal_part <= 0:
        raise ConfigError(f"{where}: loss.removal_part is {recipe.loss.removal_part}", "use a weight above 0")
    if recipe.accumulate < 1:
        raise ConfigError(f"{where}: accumulate is {recipe.accumulate}", "use 1 or more passes")
    if not 0 <= recipe.texture_share <= 1:
        raise ConfigError(f"{where}: texture_share is {recipe.texture_share}", "use a share from 0 to 1")
    if not 0 < recipe.optim.text < math.inf:
        raise ConfigError(f"{where}: optim.text is {recipe.optim.text}", "use a positive factor, 1 for one rate")
    if not 0 <= recipe.optim.ema < 1:
        raise ConfigError(f"{where}: optim.ema is {recipe.optim.ema}", "use 0 (off) or a decay below 1")
    if min(recipe.loss.gan or 0, recipe.loss.gan_start, recipe.loss.gan_lead, recipe.explosion) < 0:
        raise ConfigError(f"{where}: loss.gan, gan_start, gan_lead and explosion can't be negative", "use 0 for none")
    if not 0 <= recipe.renoised_share <= 1:
        raise ConfigError(f"{where}: renoised_share is {recipe.renoised_share}", "use a share from 0 to 1")
    for name in ("t_range", "renoised_t"):
        low, high = getattr(recipe, name)
        if not 0 <= low < high <= 1:
            raise ConfigError(f"{where}: {name} {(low, high)} is not inside 0..1", "use [0.0, 1.0]")


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for the run folder."""
    return dataclasses.asdict(recipe)


def for_ablation(recipe: Recipe, stage: str) -> Recipe:
    """The recipe with its ablation spelled out in its other keys. Raises `ConfigError` where the stage has none."""
    match recipe.ablation:
        case "none":
            return recipe
        case "no-lora" if stage != "controlnet":
            raise ConfigError(
                f'ablation "no-lora" in stage {stage}', "use --stage controlnet: there is no LoRA to train"
            )
        case "no-text-branch":
            return dataclasses.replace(recipe, control=dataclasses.replace(recipe.control, text=False))
        case "no-rfe":
            side, plan = recipe.data.full_side, recipe.data.crops[0]
            crops = (CropPlan(side, plan.batch, 1.0),)
            return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, full_photo=1.0, crops=crops))
        case _:
            return dataclasses.replace(recipe, condition="degraded")
