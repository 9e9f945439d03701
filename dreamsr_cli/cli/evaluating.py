"""One run of `dreamsr eval`: opens data, methods and metrics, tells rows as they come, writes the report."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.console import Display, explain, report, stop_if_asked
from dreamsr_cli.cli.eval_options import NO_MODEL, EvalSettings, split_sr_dir
from dreamsr_cli.cli.options import UpscaleOptions
from dreamsr_cli.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    DreamSRError,
    UsageError,
)

if TYPE_CHECKING:
    from dreamsr_cli.evaluation.compare import Comparison
    from dreamsr_cli.evaluation.datasets import Dataset
    from dreamsr_cli.evaluation.methods import Method
    from dreamsr_cli.evaluation.results import Failure, PairedDifference
    from dreamsr_cli.evaluation.rows import Scored
    from dreamsr_cli.evaluation.runs import EvalJob, Outcome


class Evaluating:
    """The command's state: settings, and what was done."""

    def __init__(
        self,
        settings: EvalSettings,
        shared: UpscaleOptions,
        compared: list[Path],
        restart: bool,
        as_json: bool,
        display: Display,
    ) -> None:
        self.settings, self.shared, self.compared = settings, shared, compared
        self.restart, self.as_json, self.display = restart, as_json, display
        self.done = 0

    def run(self) -> int:
        """Evaluate or compare; the exit code. Raises `DreamSRError` for what concerns every photo."""
        if self.settings.dataset is None:
            return self._compare_only()
        try:
            return self._evaluate(self.settings.dataset)
        except KeyboardInterrupt:
            print(f"interrupted: {self.done} results scored; the same command goes on", file=sys.stderr)
            return EXIT_INTERRUPTED

    def _evaluate(self, name: str) -> int:
        from dreamsr_cli.evaluation.compare import load_run
        from dreamsr_cli.evaluation.datasets import load_dataset

        earlier = [load_run(folder) for folder in self.compared]
        settings = self.settings
        dataset = load_dataset(
            name,
            Path(settings.data_root).expanduser() if settings.data_root else None,
            limit=settings.limit,
            subset=Path(settings.subset).expanduser() if settings.subset else None,
            strict=settings.strict_dataset,
        )
        for note in dataset.notes:
            self.display.note(note)
        job = self._job(dataset)
        for note in job.columns.notes:
            self.display.note(note)
        for column, reason in job.columns.unavailable.items():
            if "pyiqa is not installed" not in reason or not job.columns.notes:
                self.display.note(f"{column} is not available: {reason}")

        from dreamsr_cli.evaluation.outputs import write_outputs
        from dreamsr_cli.evaluation.runs import evaluate

        outcome = evaluate(job, self.display)
        if not outcome.rows:
            return EXIT_FAILED
        if earlier:
            outcome = self._compared(outcome, job, earlier)
        with self.display.photo("report"):
            page, evaluation = write_outputs(outcome.evaluation, job.out, job.methods, self.display)
        self._conclude(replace(outcome, evaluation=evaluation), page)
        return EXIT_SOME_FAILED if outcome.evaluation.failures else EXIT_DONE

    def _compared(self, outcome: Outcome, job: EvalJob, earlier: list[Any]) -> Outcome:
        from dreamsr_cli.evaluation.compare import Run, compare_runs

        found = compare_runs(Run(str(job.out), outcome.rows), earlier, job.seed)
        for note in found.notes:
            self.display.note(note)
        old = outcome.evaluation
        differences, notes = (*old.differences, *found.differences), (*old.notes, *found.notes)
        return replace(outcome, evaluation=replace(old, differences=differences, notes=notes))

    def _job(self, dataset: Dataset) -> EvalJob:
        from dreamsr_cli.cli.upscaling import silence_libraries
        from dreamsr_cli.evaluation.metrics import MetricOptions, choose_metrics, parse_names

        names = parse_names(self.settings.metrics)
        silence_libraries()
        from dreamsr_cli.device import choose_device
        from dreamsr_cli.evaluation.runs import EvalJob

        weights = self.settings.perceptual_weights
        channels = tuple(dict.fromkeys(self.settings.channel))
        options = MetricOptions(
            names=names,
            channels=channels,
            crop_border=self.settings.crop_border,
            weights=Path(weights).expanduser() if weights else None,
            device=str(choose_device(self.shared.config.device)),
        )
        scale = self._scale(dataset)
        out = Path(self.shared.run.out or f"eval-{dataset.name}").expanduser()
        if out.exists() and not out.is_dir():
            raise UsageError(f"-o {out} is a file, not a folder", "name a folder")
        return EvalJob(
            dataset=dataset,
            methods=self._methods(dataset, scale),
            columns=choose_metrics(options, dataset.has_references),
            out=out,
            crop_border=self.settings.crop_border,
            scale=scale,
            restart=self.restart,
            explain=explain,
            watch=self._watch,
            tell=self._tell,
        )

    def _scale(self, dataset: Dataset) -> float:
        from dreamsr_cli.evaluation.datasets import SCALE

        asked = self.shared.config.scale
        if dataset.public is not None and asked not in (None, SCALE):
            raise UsageError(f"--scale {asked:g}: {dataset.name} is a set for x{SCALE}", "leave out --scale")
        return float(asked or SCALE)

    def _methods(self, dataset: Dataset, scale: float) -> tuple[Method, ...]:
        from dreamsr_cli.evaluation.methods import Baseline, Foreign, Upscaled

        run = self.shared.run
        methods: list[Method] = []
        if run.model != NO_MODEL and (run.model or run.weights or not self.settings.sr_dir):
            from dreamsr_cli.cli.upscaling import open_verified_bundle
            from dreamsr_cli.settings import check_settings

            bundle = open_verified_bundle(run)
            config = replace(self.shared.config, scale=scale)
            check_settings(config, bundle)
            methods.append(Upscaled(bundle.config.name.replace("/", "-"), bundle, config))
        elif run.model == NO_MODEL and run.weights:
            raise UsageError("--model none contradicts --weights", "leave out one of the two")
        names = frozenset(pair.name for pair in dataset.pairs)
        methods += [Foreign(name, folder, names) for name, folder in map(split_sr_dir, self.settings.sr_dir)]
        methods += [Baseline(name, scale) for name in dict.fromkeys(self.settings.baseline) if name != "none"]
        if not methods:
            raise UsageError("nothing to score", "leave out --model none or --baseline none, or add --sr-dir NAME=DIR")
        seen: set[str] = set()
        for method in methods:
            if method.name.lower() in seen:
                raise UsageError(f"two methods are called {method.name}", "name one otherwise: --sr-dir NAME=DIR")
            seen.add(method.name.lower())
        return tuple(methods)

    # ---------------------------------------------------------------- telling

    def _watch(self, label: str) -> AbstractContextManager[None]:
        stop_if_asked()
        return self.display.photo(label)

    def _tell(self, outcome: Scored | Failure) -> None:
        from dreamsr_cli.evaluation.results import Failure

        if isinstance(outcome, Failure):
            whose = f" ({outcome.method})" if outcome.method else ""
            message = outcome.reason if outcome.name in outcome.reason else f"{outcome.name}: {outcome.reason}"
            report(DreamSRError(f"{message}{whose}", "put it right and run the same command again"))
            if self.as_json:
                self._print({"name": outcome.name, "method": outcome.method, "error": outcome.reason})
            return
        self.done += 1
        if self.as_json:
            self._print(outcome.to_json())

    def _conclude(self, outcome: Outcome, page: Path) -> None:
        from dreamsr_cli.evaluation.outputs import to_json
        from dreamsr_cli.evaluation.tables import markdown

        if self.as_json:
            self._print({"summary": True, **to_json(outcome.evaluation), "report": str(page)})
            return
        print(markdown(outcome.evaluation))
        if self.compared:
            print(difference_table(outcome.evaluation.differences) + "\n")
        print(page, flush=True)

    def _print(self, data: dict[str, Any]) -> None:
        print(json.dumps(data, ensure_ascii=False, default=str), flush=True)

    # ---------------------------------------------------------------- runs against runs

    def _compare_only(self) -> int:
        from dreamsr_cli.evaluation.compare import compare_runs, load_run

        if not self.compared:
            hint = "add --dataset RealSR (DRealSR, RealLQ250, RealLR200, RealDeg) or a folder, or --compare RUN RUN"
            raise UsageError("--dataset is missing", hint)
        if len(self.compared) < 2:
            raise UsageError("--compare needs two runs, or --dataset", "add another run's folder")
        first, *others = [load_run(folder) for folder in self.compared]
        found: Comparison = compare_runs(first, others)
        for note in found.notes:
            self.display.note(note)
        if not found.differences:
            raise DreamSRError(
                "nothing could be compared: no common photo with a figure of the same definition",
                "compare runs of the same set, made with the same --metrics, --channel and --crop-border",
            )
        if self.as_json:
            for difference in found.differences:
                self._print(asdict(difference))
        else:
            print(difference_table(found.differences))
        return EXIT_DONE


def difference_table(differences: tuple[PairedDifference, ...]) -> str:
    """Markdown: first minus second, with its interval and the count of photos where the first is better."""
    lines = ["| metric | first − second | mean [95 %] | first better |", "| --- | --- | ---: | ---: |"]
    for d in differences:
        figures = f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        lines.append(f"| {d.metric} | {d.first} − {d.second} | {figures} | {d.better} of {d.count} |")
    return "\n".join(lines).replace("*", "\\*")
