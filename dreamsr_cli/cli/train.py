"""`dreamsr train`: train a bundle of our own kind, checkpointed and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dreamsr_cli.cli.console import make_display

EPILOG = (
    "Examples:  dreamsr train --stage autoencoder --config mini --data photos/ -o runs/ae  ·  "
    "dreamsr train --stage backbone --config mini --data photos/ --init-from runs/ae/bundle "
    "--perceptual-weights weights/ -o runs/mini  ·  the same line with --resume after an interruption"
)


def command(
    stage: Annotated[str, typer.Option("--stage", help="autoencoder or backbone.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of good photos, searched to its depth.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder: checkpoints, log.jsonl, bundle/.")],
    config: Annotated[str, typer.Option("--config", help="Recipe: mini, or a TOML file.")] = "mini",
    init_from: Annotated[
        str | None,
        typer.Option("--init-from", help="Bundle whose weights the run starts from, with a fresh optimizer."),
    ] = None,
    perceptual_weights: Annotated[
        Path | None, typer.Option("--perceptual-weights", help="Folder with the weights of the perceptual loss.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=0, help="Stop after this many more steps.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value of the recipe: optim.lr=1e-4. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps or xpu.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads for the networks.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks: minutes at the start, then faster steps.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Train the stages autoencoder and backbone of a bundle of your own, from photos alone.

    Stops cleanly on Ctrl-C and goes on with --resume: the result is the same as without the interruption.
    """
    from dreamsr_cli.errors import UsageError
    from dreamsr_cli.training.recipe import load_recipe
    from dreamsr_cli.training.stages import STAGES

    if stage not in STAGES:
        raise UsageError(f"--stage {stage}: no such stage", f"use {' or '.join(STAGES)}")
    recipe = load_recipe(config, set_)
    if not data.is_dir():
        raise UsageError(f"--data {data}: not a folder", "give a folder of photos")

    import torch

    from dreamsr_cli.device import choose_device, choose_dtype
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.training.trainer import TrainJob, train

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    job = TrainJob(
        stage=STAGES[stage],
        recipe=recipe,
        recipe_name=Path(config).with_suffix(".toml").name,
        data=data,
        out=out,
        start=open_bundle(init_from) if init_from else None,
        perceptual_weights=perceptual_weights,
        resume=resume,
        max_steps=max_steps,
        device=chosen,
        dtype=choose_dtype(precision, chosen),
        compile=compile_,
    )
    display = make_display(quiet)
    with display.photo(str(out)):
        result = train(job, display)
    if as_json:
        line = {"bundle": str(result.bundle), "steps": result.steps, "seconds": round(result.seconds, 1)}
        print(json.dumps({**line, "validation": result.validation}))
    else:
        print(result.bundle)
