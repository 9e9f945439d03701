"""A run's result: the bundle in `RUN/bundle/`, with its model card.

Parts that the run left as its base has them are not copied: bundle.json names the bundle or the entry of weights.lock
that holds them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.config import BundleConfig, PartConfig
from dreamsr_cli.errors import OutputError
from dreamsr_cli.models.autoencoder import PatchAutoencoder
from dreamsr_cli.models.bundle import BUILT_IN, Bundle, save_bundle
from dreamsr_cli.training.distributed import whole
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.stages import CONTROL, Stage
from dreamsr_cli.weights import BUILTIN_FOLDER

FLUX_NOTICE = (
    "The FLUX.1 [dev] Model is licensed by Black Forest Labs. Inc. under the FLUX.1 [dev] Non-Commercial License. "
    "Copyright Black Forest Labs. Inc. IN NO EVENT SHALL BLACK FOREST LABS, INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR "
    "OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH "
    "USE OF THIS MODEL."
)
"""The licence's own Attribution Notice (section 3b)."""
FLUX_CHANGED = "The FLUX.1 [dev] Model was modified: the weights in this folder were trained on top of it."
"""Section 3c."""


@dataclass(frozen=True)
class Card:
    """What the model card tells beside the bundle's config."""

    stage: str
    recipe: str
    steps: int
    """Steps of this run."""
    data: str
    """What it was trained on, in words: number of photos, folder, what was skipped."""
    data_sha256: str
    perceptual: str
    """The perceptual distance of the loss, "none" included."""
    losses: str
    """Terms and weights, in words."""
    figures: Mapping[str, float]
    """The last validation's."""
    command: str
    """What repeats the run."""


def export(
    networks: Networks,
    trained: Mapping[str, Tensor] | None,
    folder: Path,
    config: BundleConfig,
    *,
    base: Bundle | None = None,
    keep: Iterable[str] = (),
    card: Card | None = None,
    write: bool = True,
) -> None:
    """Write the bundle: `trained` are weights by full name that replace the networks' own.

    Without `base` every part is written. With it the parts named `keep`, which are as `base` has them, are referred
    to. `write` is False in all processes but one: sharded weights are put together by all of them. An older bundle is
    replaced only when the new one is complete. Raises `OutputError` where it can't be written.
    """
    elsewhere = {name: refer(base, name) for name in keep} if base is not None else {}
    modules: dict[str, nn.Module] = {"transformer": networks.transformer}
    if isinstance(networks.autoencoder, PatchAutoencoder):
        modules["vae"] = networks.autoencoder
    if isinstance(networks.text_encoder, nn.Module):
        modules["text_encoder"] = networks.text_encoder
    modules["controlnet"] = networks.controlnet
    if networks.context_attention is not None:
        modules["context_attention"] = networks.context_attention
    if networks.cleanliness is not None:
        modules["cleanliness"] = networks.cleanliness
    if networks.enlarger is not None:
        modules["enlarger"] = networks.enlarger
    if networks.grain is not None:
        modules["grain"] = networks.grain
    if networks.cleaner is not None:
        modules["cleaner"] = networks.cleaner
    modules = {name: module for name, module in modules.items() if name not in elsewhere}
    lora = None if "lora" in elsewhere else networks.lora
    sources: dict[str, nn.Module] = dict(modules) if lora is None else {**modules, "lora": networks.transformer}
    states = {name: _state(name, module, trained or {}) for name, module in sources.items()}
    if not write:
        return
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(part, ignore_errors=True)
        own: dict[str, ModelMixin] = {name: m for name, m in modules.items() if isinstance(m, ModelMixin)}
        save_bundle(part, config, own, lora, elsewhere=elsewhere, state=lambda name, _: states[name])
        if card is not None:
            (part / "README.md").write_text(card_text(config, card, states, elsewhere), encoding="utf-8")
            if is_flux(config.licence):
                (part / "NOTICE").write_text(f"{FLUX_NOTICE}\n\n{FLUX_CHANGED}\n", encoding="utf-8")
        _let_others_read(part)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: {error.strerror or error}", "make room, then the same command with --resume --max-steps 0"
        ) from error


def _let_others_read(folder: Path) -> None:
    """safetensors writes files for the owner alone; a bundle is to be shared as far as the umask allows."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def untouched(networks: Networks, base: Bundle, start: Bundle | None, stage: Stage) -> tuple[str, ...]:
    """Parts of `base` that a run left as they are, and may refer to."""
    touched = {part.split(".")[0] for part in stage.trains}
    if start is not None and start.folder != base.folder and not stage.stands_alone:
        touched |= {*CONTROL, "lora"}
    # A part that the run leaves out on purpose (an ablation) is not referred to either.
    if networks.context_attention is None:
        touched.add("context_attention")
    if networks.lora is None:
        touched.add("lora")
    return tuple(name for name in base.config.parts if name not in touched)


def refer(bundle: Bundle, name: str) -> PartConfig:
    """Where another bundle.json finds part `name` of `bundle`."""
    part = bundle.config.parts[name]
    if part.path is None:
        return part
    own = bundle.folder.resolve() == BUILTIN_FOLDER.resolve()
    return PartConfig(bundle=BUILT_IN[0] if own else str(bundle.folder.resolve()), subfolder=part.subfolder)


def is_flux(licence: str) -> bool:
    """Whether a licence is that of FLUX.1-dev, which binds what is derived from it."""
    return "flux" in licence.lower()


def _state(name: str, module: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    part = "transformer" if name == "lora" else name
    tensors = {}
    for key, value in module.state_dict().items():
        full = f"refiner.{key.removeprefix('refiner.')}" if part == "vae" else f"{part}.{key}"
        tensors[key] = trained[full] if full in trained else whole(value)
    return tensors


def card_text(
    config: BundleConfig,
    card: Card,
    states: Mapping[str, Mapping[str, Tensor]],
    elsewhere: Mapping[str, PartConfig],
) -> str:
    """The model card, Markdown."""
    rows = []
    for name, state in states.items():
        count = sum(v.numel() for k, v in state.items() if ("lora_" in k) == (name == "lora"))
        rows.append(f"| {name} | in this folder | {count:,} |")
    for name, part in elsewhere.items():
        rows.append(f"| {name} | {part.bundle or part.lock}, unchanged | |")
    figures = [f"| {name} | {value:.4f} |" for name, value in card.figures.items()] or ["| none | |"]
    lines = [
        f"# Model card: {config.name}",
        "",
        f"A bundle for dreamsr, trained with `dreamsr train --stage {card.stage}`.",
        f"Licence: {config.licence}.",
        "",
        "| part | where | parameters |",
        "|---|---|---|",
        *rows,
        "",
        "## How it was made",
        "",
        f"- Recipe: {card.recipe}, {card.steps} steps of stage {card.stage} ({config.training.steps} in all);"
        f" dreamsr {config.training.dreamsr}. The whole recipe is in the run's run.json.",
        f"- Data: {card.data}; fingerprint of the photos (sha256): `{card.data_sha256}`.",
        f"- Loss: {card.losses}.",
        f"- Perceptual distance: {card.perceptual}.",
        f"- Command: `{card.command}`",
        "",
        "## What it measures",
        "",
        "On crops held back from training (the last validation):",
        "",
        "| figure | value |",
        "|---|---|",
        *figures,
        "",
    ]
    if is_flux(config.licence):
        lines += [
            "## Licence duties (FLUX.1 [dev])",
            "",
            "These weights are a derivative of FLUX.1 [dev]: they were trained on top of its frozen transformer, and"
            " the ControlNet began as a copy of a part of it. So the FLUX.1 [dev] Non-Commercial License binds them:",
            "",
            "- no commercial or production use;",
            "- whoever passes them on adds a copy of that licence and the NOTICE file of this folder, says that they"
            " were modified, and doesn't suggest that Black Forest Labs endorses them;",
            "- whoever lets others use them filters or reviews what they make, and discloses that it is made by AI"
            " where the law asks for it.",
            "",
            FLUX_NOTICE,
            "",
        ]
    return "\n".join(lines)
