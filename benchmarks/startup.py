"""What checking weights against weights.lock costs at the start of `dreamsr upscale`: nothing worth a name once the
hashes are cached.

    python benchmarks/startup.py

Times, in one process and in turn, what an upscale does before its first network is opened: the bundle with the check of
every file and its hash. "cold" with an empty cache of hashes, "warm" with a filled one, "unchecked" with both left out
(only bundle.json is read). Weights of `--size` are made in a temporary folder, so that nothing has to be fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 10**6


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=1000, help="MB of weights in the made bundle (default 1000)")
    parser.add_argument("--files", type=int, default=25, help="files that they lie in; FLUX.1-dev has 23 (default 25)")
    parser.add_argument("--repeat", type=int, default=7, help="medians of this many runs (default 7)")
    parser.add_argument("--json", action="store_true", help="one JSON object with every figure")
    return parser.parse_args(words)


def make_weights(base: Path, size: int, files: int) -> None:
    """A weights.lock with one entry "far" and its files, old enough for their hashes to be cached; and a bundle whose
    parts all point at it."""
    from dreamsr_cli.weights_lock import LockEntry, LockRow, write_entry

    folder = base / "weights" / "far"
    folder.mkdir(parents=True)
    block = os.urandom(MB)
    rows = []
    for number in range(files):
        path = folder / f"part-{number:03d}.safetensors"
        digest = hashlib.sha256()
        with path.open("wb") as stream:
            for piece in range(max(1, size // files)):
                data = piece.to_bytes(4, "big") + number.to_bytes(4, "big") + block[8:]
                stream.write(data)
                digest.update(data)
        os.utime(path, (time.time() - 60, time.time() - 60))
        rows.append(LockRow(path.name, path.stat().st_size, digest.hexdigest(), "test"))
    lock = base / "weights.lock"
    lock.write_text("format = 1\n", encoding="utf-8")
    write_entry(lock, LockEntry("far", tuple(rows), repository="a/far", revision="0" * 40, licence="test"))
    bundle = base / "bundle"
    bundle.mkdir()
    parts = {name: {"lock": "far"} for name in ("transformer", "vae", "text_encoder", "controlnet")}
    config = {"format": 1, "name": "far", "licence": "test", "parts": parts}
    (bundle / "bundle.json").write_text(json.dumps(config), encoding="utf-8")


def measure(size: int, files: int, repeat: int) -> dict[str, Any]:
    """Seconds of each way (medians), and their ratios."""
    from dreamsr_cli.models import bundle

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_weights(base, size, files)
        os.environ |= {
            "DREAMSR_WEIGHTS_DIR": str(base / "weights"),
            "DREAMSR_LOCK": str(base / "weights.lock"),
            "DREAMSR_CACHE": str(base / "cache"),
        }
        cache = base / "cache" / "hashes.json"

        def checked() -> None:
            made = bundle.open_bundle(str(base / "bundle"))
            for part in made.config.parts:
                made.part_folder(part)
            assert len(made.sha256) == 64

        def unchecked() -> None:
            bundle.open_bundle(str(base / "bundle"))

        def timed(work: Callable[[], None]) -> float:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin

        found: dict[str, list[float]] = {"cold": [], "warm": [], "unchecked": []}
        for _ in range(repeat):
            cache.unlink(missing_ok=True)
            found["cold"].append(timed(checked))
            found["warm"].append(timed(checked))
            found["unchecked"].append(timed(unchecked))
    seconds = {way: statistics.median(times) for way, times in found.items()}
    return {
        "megabytes": size,
        "files": files,
        **{f"{way}_seconds": value for way, value in seconds.items()},
        "warm_over_cold": seconds["warm"] / seconds["cold"],
        "seconds_per_file_warm": (seconds["warm"] - seconds["unchecked"]) / files,
        "load": round(os.getloadavg()[0], 2),
    }


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    options = arguments(words)
    found = measure(options.size, options.files, options.repeat)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['megabytes']} MB in {found['files']} files (load {found['load']})")
    print(f"  cold cache   {found['cold_seconds'] * 1000:9.1f} ms: every byte is hashed")
    print(f"  warm cache   {found['warm_seconds'] * 1000:9.1f} ms: {found['warm_over_cold']:.4f} of it")
    print(f"  unchecked    {found['unchecked_seconds'] * 1000:9.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
