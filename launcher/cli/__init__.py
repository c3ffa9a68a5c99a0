"""The command line: the only user of typer. Each command makes values, shows them, then acts.

Heavy imports wait until a command needs them: `speechctl --help` costs what a bare Typer app costs, and nothing here
ever imports torch.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from launcher.cli import before, checkpoint, results, runs

app = typer.Typer(
    name="speechctl",
    help="Launch DeepSpeed training of speech models, and come back from every failure.\n\n"
    "The whole way: speechctl pack RECIPE, speechctl launch RECIPE, speechctl status RUN; after an interruption"
    " speechctl resume RUN; at the end speechctl evaluate RUN and speechctl export RUN.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the help is text as everything else is: no boxes, no padding in a pipe
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Ended(BaseException):
    """A signal that ends this process came: on the way out everybody clears up, as after Ctrl-C."""


ENDING = (signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: object) -> None:
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)  # a terminal that closes sends several
    raise Ended(number)


def main() -> None:
    """The entry point: every failure ends as one text with a hint and the exit code of its class."""
    from launcher.errors import AlreadyTold, ExitCode, SpeechctlError

    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup one of them is ignored
            signal.signal(number, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail
    try:
        sys.exit(app(prog_name="speechctl", standalone_mode=False))
    except AlreadyTold as error:
        sys.exit(error.exit_code)
    except SpeechctlError as error:
        from launcher import ui

        ui.error(error.render())
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        _explain_usage(error)
        sys.exit(ExitCode.USAGE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Ended as ended:
        number = ended.args[0]
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # whoever waits for us sees what ended us
    except BrokenPipeError:
        os._exit(141)
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            f"\nerror: this is a bug of speechctl\n\nhint: report it with the traceback above (exit {ExitCode.BUG})",
            file=sys.stderr,
        )
        sys.exit(ExitCode.BUG)


def _explain_usage(error: typer.TyperException) -> None:
    """A wrong command line, in the form of every other error. Without any arguments it is the help."""
    from launcher import ui

    text = error.format_message()
    if text.startswith("Usage:"):
        print(text, file=sys.stderr)
        return
    command = getattr(getattr(error, "ctx", None), "command_path", "speechctl")
    there = "lists the commands" if command == "speechctl" else "shows what it takes"
    ui.error(f"error: {text[:1].lower()}{text[1:].rstrip('.')}\n\nhint: `{command} --help` {there}")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"speechctl {version('speechctl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def _group(name: str, about: str, *commands: Callable[..., None]) -> None:
    group = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None)
    for command in commands:
        group.command()(command)
    app.add_typer(group, name=name)


for _command in (
    before.prepare,
    before.pack,
    before.plan,
    before.fit,
    runs.launch,
    runs.resume,
    runs.status,
    runs.why,
    runs.audit,
    runs.logs,
    runs.attach,
    runs.stop,
    results.evaluate,
    results.report,
    results.export,
    results.transcribe,
):
    app.command()(_command)
_group("recipe", "Look at recipes.", before.check)
_group(
    "checkpoint",
    "Look after checkpoints.",
    checkpoint.ls,
    checkpoint.verify,
    checkpoint.prune,
    checkpoint.pin,
    checkpoint.unpin,
    checkpoint.reshard,
)
