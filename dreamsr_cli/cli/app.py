"""The command `dreamsr`: its sub-commands, and how every error becomes two lines and an exit code."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from dreamsr_cli import __version__
from dreamsr_cli.cli import caption, degrade, doctor, fetch_weights, train, upscale
from dreamsr_cli.cli import eval as evaluate
from dreamsr_cli.cli.console import explain, report, stop_on_signals
from dreamsr_cli.cli.several_processes import end, help_out, is_shared, role
from dreamsr_cli.cli.upscaling import silence_libraries
from dreamsr_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, DreamSRError, UsageError
from dreamsr_cli.overlap import threads_left
from dreamsr_cli.ranks import this_place

app = typer.Typer(
    name="dreamsr",
    help="Ultra-high-resolution photo restoration: an open implementation of DreamSR (CVPR 2026).",
    epilog="Start with: dreamsr upscale photo.jpg",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("upscale", epilog=upscale.EPILOG)(upscale.command)
app.command("caption", epilog=caption.EPILOG)(caption.command)
app.command("train", epilog=train.EPILOG)(train.command)
app.command("degrade", epilog=degrade.EPILOG)(degrade.command)
app.command("eval", epilog=evaluate.EPILOG)(evaluate.command)
app.command("fetch-weights", epilog=fetch_weights.EPILOG)(fetch_weights.command)
app.command("doctor", epilog=doctor.EPILOG)(doctor.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dreamsr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run `dreamsr ARGUMENTS` and return the exit code; errors are told on stderr, never raised."""
    try:
        code = app(args=arguments or ["--help"], prog_name="dreamsr", standalone_mode=False)
    except DreamSRError as error:
        return _fail(error)
    except typer.TyperException as error:
        command = next((word for word in arguments if not word.startswith("-")), "")
        known = {info.name for info in app.registered_commands}
        hint = f"dreamsr {command} --help" if command in known else "dreamsr --help"
        return _fail(UsageError(error.format_message(), hint))
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except Exception as error:
        return _fail(explain(error, f"running dreamsr {' '.join(arguments[:1])}".rstrip()))
    return code if isinstance(code, int) else EXIT_DONE


def _fail(error: DreamSRError) -> int:
    report(error)
    return error.exit_code


def main() -> NoReturn:
    """Entry point of the console script; SIGTERM ends the work as Ctrl-C does."""
    stop_on_signals()
    # A file name may hold bytes that are no text; it is printed back as those bytes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    arguments = sys.argv[1:]
    try:
        place = this_place()
    except DreamSRError as error:
        sys.exit(_fail(error))
    if place.world == 1:
        code = run(arguments)
    else:
        here = role(arguments, place)
        if here == "helper":
            silence_libraries()
            help_out(place, arguments)
        code = EXIT_DONE if here == "nobody" else run(arguments)
        if is_shared(arguments):
            end(code)
    if threads_left():
        # An interruption doesn't wait for a large photo being read or written; its journal holds all that is needed.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)
