"""`dreamsr train`: all stages of the training, checkpointed and resumable, from one process to many."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamsr_cli.cli.console import make_display
from dreamsr_cli.cli.train_options import Found, TrainOptions, train_options
from dreamsr_cli.cli.upscaling import silence_libraries

EPILOG = (
    "Examples:  dreamsr train --stage joint --data pairs/ --perceptual-weights weights/ -o runs/joint  ·  "
    "dreamsr train --stage backbone --config mini --data photos/ -o runs/mini  ·  "
    "dreamsr train --resume -o runs/joint  ·  "
    "torchrun --nproc-per-node 8 -m dreamsr_cli train --stage joint --config flux --data shards/ -o runs/flux"
)


def command(
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            help="autoencoder, backbone, transformer, controlnet, restoration, joint, cleanliness, enlarger, "
            "cleaner, cleaner-looks, cleaner-both or grain.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Recipe: mini, flux, or a TOML file. Default: the run's, or mini.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of good photos, of pairs that degrade wrote, or of shards.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Run folder: checkpoints, log.jsonl, samples/, bundle/.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Bundle that controlnet, restoration and joint train on. Default: mini."),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option("--init-from", help="Bundle or run whose weights the run starts from, with a fresh optimizer."),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the run's last checkpoint, with its own settings.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=0, help="Stop after this many more steps.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory, steps and samples; train nothing.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value of the recipe: optim.lr=1e-4. Repeatable.")
    ] = None,
    perceptual: Annotated[
        str | None,
        typer.Option("--perceptual", help="Perceptual distance: lpips-vgg, lpips-alex, lpips-squeeze or none."),
    ] = None,
    perceptual_weights: Annotated[
        Path | None, typer.Option("--perceptual-weights", help="Folder with the weights of the perceptual distance.")
    ] = None,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Checkpoints kept. Default: 2.")] = None,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Send figures to tensorboard, wandb, ... Repeatable.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps or xpu.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="auto, fp32 or bf16.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads for the networks.")] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="Compile the blocks: minutes at the start, then faster steps.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Train a model of your own: the paper's stages on a pretrained bundle, or a bundle from nothing.

    Settings may also lie in table train of ./dreamsr.toml. Ctrl-C leaves a checkpoint; --resume goes on, and the result
    is the same as without the interruption. Several processes: start it with torchrun or accelerate launch.
    """
    silence_libraries()
    from dreamsr_cli.training.stages import STAGES

    flags: dict[str, Any] = {
        "stage": stage,
        "config": config,
        "data": None if data is None else str(data),
        "out": None if out is None else str(out),
        "model": model,
        "init_from": init_from,
        "resume": resume,
        "max_steps": max_steps,
        "set": tuple(set_) if set_ else None,
        "perceptual": perceptual,
        "perceptual_weights": None if perceptual_weights is None else str(perceptual_weights),
        "keep": keep,
        "track": tuple(track) if track else None,
        "device": device,
        "precision": precision,
        "threads": threads,
        "compile": compile_,
    }
    found = train_options(flags, os.environ, Path.cwd(), tuple(STAGES), plan_only=dry_run)
    if dry_run:
        _print_plan(found, as_json)
        return
    # Of several processes the first one speaks.
    display = make_display(quiet or int(os.environ.get("RANK", "0")) > 0)
    with display.photo(str(found.options.out)):
        if found.note:
            display.note(found.note)
        result = _train(found, display)
    if not result.main:
        return
    if as_json:
        line = {"bundle": str(result.bundle), "steps": result.steps, "seconds": round(result.seconds, 1)}
        print(json.dumps({**line, "validation": result.validation}))
    else:
        print(result.bundle)


def _recipe(found: Found) -> Any:
    from dreamsr_cli.training.recipe import load_recipe, recipe_from_dict

    options = found.options
    overrides = [*options.set, *([f"loss.perceptual={options.perceptual}"] if options.perceptual else [])]
    if found.recipe is not None:
        return recipe_from_dict(found.recipe, f"{options.out}/run.json", overrides)
    return load_recipe(options.config or "mini", overrides)


def _train(found: Found, display: Any) -> Any:
    from dreamsr_cli.errors import UsageError
    from dreamsr_cli.training.stages import STAGES

    options: TrainOptions = found.options
    recipe = _recipe(found)
    assert options.stage is not None and options.data is not None and options.out is not None
    if not Path(options.data).exists():
        raise UsageError(f"--data {options.data}: not a folder", "give a folder of photos, of pairs or of .tar shards")

    import torch

    from dreamsr_cli.device import choose_device, choose_dtype
    from dreamsr_cli.training.checkpoints import DEFAULT_KEEP
    from dreamsr_cli.training.trainer import TrainJob, train

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen = choose_device(options.device)
    job = TrainJob(
        stage=STAGES[options.stage],
        recipe=recipe,
        recipe_name=found.recipe_name,
        data=Path(options.data),
        out=Path(options.out),
        model=options.model,
        init_from=options.init_from,
        perceptual_weights=None if options.perceptual_weights is None else Path(options.perceptual_weights),
        resume=options.resume,
        max_steps=options.max_steps,
        device=chosen,
        dtype=choose_dtype(options.precision, chosen),
        compile=options.compile,
        keep=options.keep or DEFAULT_KEEP,
        trackers=options.track,
    )
    return train(job, display)


def _print_plan(found: Found, as_json: bool) -> None:
    from dreamsr_cli.device import choose_device, choose_dtype
    from dreamsr_cli.training.plan import training_plan
    from dreamsr_cli.training.stages import STAGES

    options = found.options
    assert options.stage is not None
    dtype = choose_dtype(options.precision, choose_device(options.device))
    model = options.model or options.init_from
    plan = training_plan(_recipe(found), STAGES[options.stage], recipe_name=found.recipe_name, model=model, dtype=dtype)
    print(json.dumps(plan.to_json()) if as_json else plan.table())
