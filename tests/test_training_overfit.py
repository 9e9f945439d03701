"""Every stage learns: a tiny model over-fits four crops of a real photo, from nothing to the paper's stages.

One thread, two to five minutes in all. Stages follow one another as they do for a user, through the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CPU

from dreamsr_cli import flow
from dreamsr_cli.cli.app import run as dreamsr
from dreamsr_cli.losses import velocity_loss
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.training.both_stages import encode_texts, texture_velocity
from dreamsr_cli.training.networks import Networks, build, build_on
from dreamsr_cli.training.recipe import load_recipe
from dreamsr_cli.training.stages import STAGES

pytestmark = pytest.mark.slow

PHOTO = Path(__file__).resolve().parents[1] / "examples" / "chelsea.jpg"
SIDE, SCALE = 64, 4
SPOTS = ((10, 10), (20, 40), (40, 20), (50, 55))
TIMES = (0.3, 0.5, 0.7, 0.9)
RECIPE = """
name = "four-crops"
steps = 300
condition = "removed"
save_every = 100000
validate_every = 100000
log_every = 50
[sizes]
double_blocks = 2
single_blocks = 2
heads = 2
head_dim = 32
rope_axes = [8, 12, 12]
text_width = 32
text_layers = 1
refiner_width = 32
refiner_blocks = 1
lora_rank = 16
[latent]
channels = 16
[control]
map = [0, 1]
[defaults]
tile = 64
overlap = 0
color_fix = "none"
[data]
crops = [{ size = 64, batch = 4, share = 1.0 }]
hold_out = 0
workers = 0
turns = 1
dead_leaves = 0.0
full_photo = 0.0
no_text = 0.0
[loss]
perceptual = "none"
gan = 0.0
[optim]
lr = 2e-3
warmup = 20
ema = 0.9
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four crops as pairs for removal (pixel/) and for texture (texture/), and the recipe."""
    folder = tmp_path_factory.mktemp("overfit")
    (folder / "recipe.toml").write_text(RECIPE)
    with Image.open(PHOTO) as photo:
        small = photo.convert("RGB").resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
    for kind in ("pixel", "texture"):
        for half in ("hq", "lq"):
            (folder / kind / half).mkdir(parents=True)
    for number, (top, left) in enumerate(SPOTS):
        hq = small.crop((left, top, left + SIDE, top + SIDE))
        lq = hq.resize((SIDE // SCALE, SIDE // SCALE), Image.Resampling.BICUBIC)
        erased = hq.resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC).resize(hq.size, Image.Resampling.BICUBIC)
        for kind, other in (("pixel", lq), ("texture", erased)):
            hq.save(folder / kind / "hq" / f"{number}.png")
            other.save(folder / kind / "lq" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def learn(place: Path) -> Callable[..., Path]:
    """Trains a stage with the command and returns the run folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DREAMSR_CACHE", str(place / "cache"))
    torch.set_num_threads(1)

    def run(stage: str, data: str, *arguments: str, name: str = "") -> Path:
        out = place / (name or stage)
        common = ["--config", str(place / "recipe.toml"), "--data", str(place / data), "-o", str(out), "-q"]
        assert dreamsr(["train", "--stage", stage, *common, "--device", "cpu", "--precision", "fp32", *arguments]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def autoencoder(learn) -> tuple[Path, Path]:
    """(before, after) the refiner's training, on the same transform."""
    before = learn("autoencoder", "pixel", "--max-steps", "0", name="autoencoder-0")
    return before, learn("autoencoder", "pixel", "--set", "optim.lr=5e-3", "--set", "steps=500")


@pytest.fixture(scope="module")
def backbone(learn, autoencoder) -> Path:
    return learn("backbone", "pixel", "--init-from", str(autoencoder[1]), "--set", "steps=400")


def crops(place: Path, kind: str, half: str) -> torch.Tensor:
    """(4, 3, P, Q) in [-1, 1]."""
    files = sorted((place / kind / half).iterdir())
    pictures = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def fixed_velocity_loss(place: Path, made: Networks) -> float:
    """Eq. 5 on the four crops, at the same times and noise, conditioned on the erased crops."""
    z_0, condition = made.encode(crops(place, "texture", "hq")), made.encode(crops(place, "texture", "lq"))
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(1))
    text = encode_texts(made, [""] * 4)
    losses = []
    for t in TIMES:
        t_B = torch.full((4,), t)
        v = texture_velocity(made, flow.mix(z_0, eps, t), t_B, condition, text, text, "velocity")
        losses.append(float(velocity_loss(v, z_0, eps)))
    return sum(losses) / len(losses)


def upscaled_psnr(place: Path, run: Path, capsys) -> float:
    """Mean PSNR in dB of `dreamsr upscale --strength 0` of the four bad crops."""
    found = []
    for number in range(4):
        out = place / f"{run.name}-{number}.png"
        source = place / "pixel" / "lq" / f"{number}.png"
        words = ["upscale", str(source), "--model", str(run), "--strength", "0", "-o", str(out), "--overwrite", "-q"]
        assert dreamsr([*words, "--device", "cpu", "--precision", "fp32", "--no-resume"]) == 0
        found.append(_psnr(np.asarray(Image.open(out).convert("RGB"), np.float64), _good(place, number)))
    capsys.readouterr()
    return float(np.mean(found))


def _good(place: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(place / "pixel" / "hq" / f"{number}.png").convert("RGB"), np.float64)


def _cubic(place: Path, number: int) -> np.ndarray:
    bad = Image.open(place / "pixel" / "lq" / f"{number}.png").convert("RGB")
    return np.asarray(bad.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)


def _psnr(made: np.ndarray, good: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((made - good) ** 2)))


def test_the_autoencoder_gains_three_decibels(place, autoencoder) -> None:
    good, psnr = crops(place, "pixel", "hq"), []
    for run in autoencoder:
        made = open_bundle(str(run)).open_autoencoder(CPU, torch.float32)
        with torch.no_grad():
            psnr.append(float(10 * torch.log10(4 / (made.decode(made.encode(good)) - good).square().mean())))
    print(f"autoencoder: {psnr[0]:.2f} -> {psnr[1]:.2f} dB")
    assert psnr[1] > psnr[0] + 3


def test_the_backbone_halves_its_velocity_loss(place, autoencoder, backbone) -> None:
    recipe = load_recipe(str(place / "recipe.toml"))
    before, after = (
        fixed_velocity_loss(place, build(recipe, open_bundle(str(run)))) for run in (autoencoder[1], backbone)
    )
    print(f"backbone: velocity loss {before:.3f} -> {after:.3f}")
    assert after < before / 2


def test_the_controlnet_halves_the_velocity_loss(place, learn, backbone) -> None:
    """From a copy of the transformer's blocks with injections at zero, the transformer frozen."""
    more = ["--set", "condition=erased", "--set", "fresh=true"]
    run = learn("controlnet", "texture", "--model", str(backbone), *more)
    recipe = load_recipe(str(place / "recipe.toml"), ["condition=erased", "fresh=true"])
    stage, base = STAGES["controlnet"], open_bundle(str(backbone))
    before = fixed_velocity_loss(place, build_on(recipe, stage, base, None, CPU, torch.float32))
    kept = load_recipe(str(place / "recipe.toml"))
    after = fixed_velocity_loss(place, build_on(kept, stage, open_bundle(str(run)), None, CPU, torch.float32))
    print(f"controlnet: velocity loss {before:.3f} -> {after:.3f}")
    assert after < before / 2


@pytest.mark.parametrize("stage", ["restoration", "joint"])
def test_upscaling_gains_three_decibels(place, learn, backbone, capsys, stage) -> None:
    """`upscale --strength 0` with the run's bundle, against the same stage before its first step."""
    more = ["--model", str(backbone), "--set", "fresh=true"]
    before = upscaled_psnr(place, learn(stage, "pixel", *more, "--max-steps", "0", name=f"{stage}-0"), capsys)
    after = upscaled_psnr(place, learn(stage, "pixel", *more), capsys)
    cubic = np.mean([_psnr(_cubic(place, number), _good(place, number)) for number in range(4)])
    print(f"{stage}: {before:.2f} -> {after:.2f} dB (cubic {cubic:.2f})")
    assert after > max(before, cubic) + 3
