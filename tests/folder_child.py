"""What the tests of folders run in another process: the real command, which signals itself at a chosen moment."""

from __future__ import annotations

import os
import signal

import torch

from dreamsr_cli.cli import app
from dreamsr_cli.cli.console import PlainDisplay, stop_on_signals
from dreamsr_cli.overlap import threads_left


def work(arguments: list[str], moment: str, sent: int, messages: str) -> None:
    """`dreamsr ARGUMENTS`, its stdout and stderr in the file `messages`; once a line of progress ends in `moment` the
    process gets the signal `sent` (0: it is left alone). Leaves as the console script does."""
    torch.set_num_threads(1)
    file = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop_on_signals()
    say = PlainDisplay._say

    def said(self: PlainDisplay, text: str) -> None:
        say(self, text)
        if text.endswith(moment) and sent:
            os.kill(os.getpid(), sent)

    setattr(PlainDisplay, "_say", said)  # noqa: B010
    code = app.run(arguments)
    print(f"threads left: {threads_left()}", flush=True)
    os._exit(code)
