"""The command line: parse, call, print. Nothing here imports torch before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

EXIT_BELOW, EXIT_INPUT, EXIT_MISMATCH, EXIT_INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and leaves with its exit code; every expected error is one line on stderr."""
    import typer

    from epsball.cli.app import app
    from epsball.errors import EpsballError

    # The parser's error classes, by way of one that typer exports: newer releases carry a click of their own.
    parser_error: Any = typer.BadParameter.__mro__[2]
    command, words, code = typer.main.get_command(app), list(sys.argv[1:] if arguments is None else arguments), 0
    try:
        # Not command.main: in some releases of typer it makes a silent exit of Ctrl-C.
        with command.make_context("epsball", list(words)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        code = leave.exit_code
    except EpsballError as error:
        code = _complain(str(error))
    except parser_error as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "epsball"
        code = _complain(f"{error.format_message()}{_given(error, words)} (see {where} --help)")
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("epsball: interrupted before anything was known; nothing was written\n")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left
        code = 0
    if arguments is None:
        sys.exit(code)
    return code


def _given(error: Any, words: Sequence[str]) -> str:
    """The value that a parser error is about, where the parser names the option only."""
    options = getattr(getattr(error, "param", None), "opts", ())
    values = [value for word, value in zip(words, [*words[1:], ""], strict=True) if word in options]
    values += [word.partition("=")[2] for word in words if word.partition("=")[0] in options and "=" in word]
    return f": got '{values[-1]}'" if values and values[-1] not in error.format_message() else ""


def _complain(message: str) -> int:
    from epsball.report.text import clean

    sys.stderr.write(f"epsball: {clean(' '.join(message.split()))}\n")
    return EXIT_INPUT
