"""Which file holds the prompts of a photo: what `--prompts` and `--prompt-dir` name."""

from __future__ import annotations

import os
from pathlib import Path

from dreamsr_cli.cli.options import RunConfig
from dreamsr_cli.cli.photos import Job
from dreamsr_cli.errors import UsageError


class PromptPaths:
    """Finds the file of prompts of each photo of a run."""

    def __init__(self, run: RunConfig, photos: int) -> None:
        """`photos` is how many the run has. Raises `PromptsError` if the named file or folder isn't there, `UsageError`
        if one file is named for several photos."""
        named = run.prompts or run.prompt_dir
        self._named = Path(os.path.expanduser(named)) if named else None
        self._for_all = run.prompts is not None
        if self._named is None:
            return
        flag = "--prompts" if self._for_all else "--prompt-dir"
        if not os.path.lexists(self._named):
            from dreamsr_cli.prompts_file import PromptsError

            raise PromptsError(f"{flag} {named} doesn't exist", f"check the path after {flag}")
        if self._named.is_dir():
            return
        if not self._for_all:
            raise UsageError(f"--prompt-dir {named} is a file, not a folder", f"type --prompts {named}, or a folder")
        if photos > 1:
            raise UsageError(
                f"--prompts {named} is one file, but there are {photos} photos",
                "name a folder after --prompts, with a file for each photo",
            )

    def of(self, job: Job) -> Path | None:
        """The file of this photo; None where the captioner is to describe it. Raises `PromptsError` if `--prompts`
        names a folder without a file for it."""
        from dreamsr_cli.prompts_file import ENDINGS, PromptsError, find_prompts, prompts_name

        if self._named is None or not self._named.is_dir():
            return self._named
        found = find_prompts(self._named, job.source, job.tree)
        if found is None and self._for_all:
            names = ", ".join([prompts_name(job.source), *(job.source.stem + ending for ending in ENDINGS)])
            raise PromptsError(
                f"{job.source}: {self._named} holds no prompts for it, none of {names}",
                f"dreamsr caption {job.source} -o {self._named / prompts_name(job.source)}; or use --prompt-dir",
            )
        return found
