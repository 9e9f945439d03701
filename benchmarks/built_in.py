"""The table of docs/mini.md: a model against Lanczos and the field's bicubic, by `dreamsr degrade` and `dreamsr eval`.

    python benchmarks/built_in.py -o OUT --good KODAK --pairs REALSR --photos REAL_LQ --perceptual-weights WEIGHTS

Good photos are degraded by presets seesr-mild, realesrgan and jpeg, once for each seed, and by bicubic once; pairs and
photos without a reference are taken as they are. The reference is the photo itself, not sharpened, whatever the preset
says. Each set is enlarged by default and with --strength 0. A row for each metric: the model's mean, both baselines'
means, and the paired differences with their 95 % bootstrap intervals over photos (a photo degraded with several seeds
counts as often). OUT keeps pairs, results and reports; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRESETS = ("seesr-mild", "realesrgan", "jpeg", "bicubic")
SETTINGS = {"default": (), "strength-0": ("--strength", "0")}
METRICS = {"psnr-y": "psnr", "lpips-squeeze*": "lpips-squeeze", "niqe": "niqe"}
"""Names in the table, and what `dreamsr eval --metrics` calls them."""
BASELINES = ("lanczos", "bicubic")


def dreamsr(*words: str) -> None:
    """One command in a process of its own; `DreamSRError` where it fails."""
    from dreamsr_cli.errors import DreamSRError

    done = subprocess.run([sys.executable, "-m", "dreamsr_cli", *words], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise DreamSRError(f"dreamsr {' '.join(words)} ended with {done.returncode}", "see what it wrote above")


def degraded(good: Path, preset: str, seeds: int, out: Path) -> Path:
    """Pairs of all photos for seeds 0, 1, ... in one set, the seed before each name; bicubic draws nothing."""
    together = out / "sets" / preset
    for seed in range(1 if preset == "bicubic" else seeds):
        pairs = out / "pairs" / f"{preset}-{seed}"
        words = ["--preset", preset, "--seed", str(seed), "--size", "0", "--usm", "off", "-q"]
        dreamsr("degrade", str(good), "-o", str(pairs), *words)
        for half in ("lq", "hq"):
            (together / half).mkdir(parents=True, exist_ok=True)
            for picture in sorted((pairs / half).iterdir()):
                shutil.copyfile(picture, together / half / f"{seed}-{picture.name}")
    return together


def scored(name: str, photos: Path, setting: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `dreamsr eval` finds, with both baselines."""
    folder = Path(options.out) / "evaluations" / f"{name}-{setting}"
    words = ["eval", "--dataset", str(photos), "-o", str(folder), "-q", *SETTINGS[setting]]
    words += ["--model", options.model, "--metrics", ",".join(options.metrics)]
    words += [word for baseline in BASELINES for word in ("--baseline", baseline)]
    if options.weights:
        words += ["--weights", options.weights]
    if options.perceptual_weights:
        words += ["--perceptual-weights", options.perceptual_weights]
    dreamsr(*words)
    return json.loads((folder / "evaluation.json").read_text())


def rows_of(name: str, setting: str, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each metric that has figures, the model's mean and each baseline's with the paired difference."""
    method, means = found["methods"][0], found["summaries"]
    for metric in METRICS:
        if means[method].get(metric, {}).get("mean") is None:
            continue
        against = {
            d["second"]: {k: d[k] for k in ("mean", "low", "high", "better", "count")}
            for d in found["differences"]
            if d["metric"] == metric and d["first"] == method and d["second"] in BASELINES
        }
        for baseline, difference in against.items():
            difference["baseline"] = means[baseline][metric]["mean"]
        value = means[method][metric]["mean"]
        yield {"set": name, "setting": setting, "metric": metric, "value": value, "against": against}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from dreamsr_cli.errors import UsageError

    out, sets = Path(options.out), dict[str, Path]()
    for preset in options.presets if options.good else ():
        sets[preset] = degraded(Path(options.good), preset, options.seeds, out)
    for kind in ("pairs", "photos"):
        if getattr(options, kind):
            sets[kind] = Path(getattr(options, kind))
    if not sets:
        raise UsageError("no photos to measure on", "give --good, --pairs or --photos")
    rows: list[dict[str, Any]] = []
    for name, photos in sets.items():
        for setting in SETTINGS:
            rows += rows_of(name, setting, scored(name, photos, setting, options))
            print(f"{name}, {setting}: done", file=sys.stderr)
    return {"model": options.weights or options.model, "rows": rows}


def text(found: dict[str, Any]) -> Iterator[str]:
    """The table in Markdown."""
    titles = " | ".join(f"{baseline}, and the difference" for baseline in BASELINES)
    yield f"| set | settings | metric | {found['model']} | {titles} |"
    yield "|---" * (4 + len(BASELINES)) + "|"
    for row in found["rows"]:
        cells = [row["set"], row["setting"], row["metric"], f"{row['value']:.4f}"]
        for d in (row["against"].get(baseline) for baseline in BASELINES):
            if d is None:
                cells.append("")
            elif row["metric"].startswith("psnr"):
                cells.append(f"{d['baseline']:.4f}, {d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] dB")
            else:
                mean, low, high = (100 * d[k] / d["baseline"] for k in ("mean", "low", "high"))
                cells.append(f"{d['baseline']:.4f}, {mean:+.1f} % [{low:+.1f}, {high:+.1f}]")
        yield "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", required=True, help="folder for pairs, results and reports")
    parser.add_argument("--good", help="folder of good photos to degrade")
    parser.add_argument("--pairs", help="folder with lq/ and hq/, or test_LR/ and test_HR/")
    parser.add_argument("--photos", help="folder of photos without a reference (NIQE only)")
    parser.add_argument("--seeds", type=int, default=4, help="degradations of each good photo by the random presets")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS, help="what degrades good photos")
    parser.add_argument("--model", default="mini", help="bundle: a name or a folder")
    parser.add_argument("--weights", default=None, help="folder of a training run laid over it")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS.values()), help="of dreamsr eval")
    parser.add_argument("--perceptual-weights", default=None, help="folder with the weights of LPIPS and NIQE")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    from command import report

    return report(lambda: measure(options), text, options.json)


if __name__ == "__main__":
    sys.exit(main())
