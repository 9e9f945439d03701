"""What a run is made of beside its settings: versions, the state of the source tree, the machine, the command; and
what it aimed at, in words."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dreamsr_cli import __version__
from dreamsr_cli.training.adversarial import gan_weight
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.stages import Stage

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors")


def facts(device: str, precision: str, world: int) -> dict[str, Any]:
    """For run.json: everything a person needs to run it again; none of it is compared on resume."""
    return {
        "versions": {"dreamsr": __version__, "python": platform.python_version(), **_libraries()},
        "git": git_state(Path(__file__).resolve().parent),
        "machine": {"system": platform.platform(), "device": device, "precision": precision, "processes": world},
        "command": command(),
    }


def command() -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["dreamsr", *sys.argv[1:]])


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the source tree that `folder` lies in and whether files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A package installed below somebody else's repository isn't part of it.
        git("ls-files", "--error-unmatch", str(folder / "__init__.py"))
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", str(folder)))}
    except (OSError, subprocess.SubprocessError):
        return None


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def losses(stage: Stage, recipe: Recipe) -> str:
    """For the card: the terms of the loss with their weights, in words."""
    loss, weight = recipe.loss, gan_weight(recipe, stage)
    perceptual = loss.perceptual != "none"
    words, lattice = [], [f"{loss.lattice:g} · lattice (ours)"] * (loss.lattice > 0)
    critic = f"heads on the features of {loss.perceptual}" if loss.gan_sees == "features" else "U-Net"
    gan = [f"{weight:g} · GAN from step {loss.gan_start} on (hinge, spectrally normalised {critic})"] * (weight > 0)
    # Where the texture part ends as inference does, it is what has to look like photos (`restoration_step`).
    textured = "both" in stage.learners and recipe.renoised_share > 0
    if stage.judges:
        return "cross-entropy of clean, compressed and damaged"
    if stage.enlarges:
        return f"pixel {loss.pixel_kind} on undamaged crops enlarged"
    if stage.cleans:
        terms = [f"Charbonnier with its knee at {loss.cleaner_knee:g}"]
        pleases = perceptual and stage.pleases
        seen = " after stage 2 and grain" * (loss.cleaner_seen == "finished")
        terms += [f"{loss.cleaner_perceptual:g} · {loss.perceptual}{seen}"] * (pleases and loss.cleaner_perceptual > 0)
        terms += (lattice + gan) * stage.pleases
        return " + ".join(terms)
    if stage.grains:
        terms = [f"{loss.grain_perceptual:g} · {loss.perceptual}"] * (perceptual and loss.grain_perceptual > 0)
        return " + ".join([*terms, f"{loss.grain_contrast:g} · local contrast (ours)"])
    if not stage.restore:
        return "Charbonnier on the round trip of clean crops"
    if stage.removes:
        terms = ["latent MSE", f"pixel {loss.pixel_kind}"]
        terms += [f"{loss.removal_perceptual:g} · {loss.perceptual}"] * (perceptual and loss.removal_perceptual > 0)
        terms += lattice
        terms += gan * (not textured)
        share = f", all · {loss.removal_part:g}" * (loss.removal_part != 1 and stage.textures and not stage.papers)
        words.append("removal (eq. 7): " + " + ".join(terms) + share)
    if stage.textures:
        extra = [
            f"pixel {loss.pixel_kind}",
            *[f"{loss.texture_perceptual:g} · {loss.perceptual}"] * perceptual,
            *lattice,
            *gan * textured,
        ]
        words.append(f"texture: velocity (eq. 5), for t ≤ 0.2 also {' + '.join(extra)} (eq. 6)")
    if recipe.optim.kind == "muon":
        words.append("optimizer: Muon for matrices inside blocks, AdamW for the rest")
    return "; ".join(words)
