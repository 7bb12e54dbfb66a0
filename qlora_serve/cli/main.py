"""`qlora-serve`: the commands, and the one place where errors become exit codes."""

import errno
import importlib
import sys
from typing import Any

import typer
from typer.core import TyperCommand

from qlora_serve import __version__
from qlora_serve.cli.help import App, Group
from qlora_serve.errors import QloraServeError, UsageError
from qlora_serve.progress import quieten_libraries

# Each command's module is imported only when the command is used, so that `--help` stays quick.
_COMMANDS = {
    "train": "Train a LoRA adapter on a base model.",
    "serve": "Serve one base model with many adapters.",
    "feedback": "Results of experiments, and rows to train on.",
    "keys": "Make, list and revoke the keys of a server.",
    "plan": "What training and serving will need, before any weight is loaded.",
    "eval": "Compare base and adapters on held-out rows.",
    "sweep": "Train several adapters over a grid of settings, and compare them.",
    "merge": "Bake an adapter into its unquantized base, and prove the result.",
    "adapters": "Keep, show, check and convert adapters.",
    "combine": "Make one adapter of several.",
    "fold": "Make an adapter's rank smaller.",
    "export": "Write a model or an adapter as GGUF.",
    "extract": "Make an adapter of a full fine-tune.",
    "compare": "Ask base and adapters the same question, side by side.",
    "chat": "Talk to a served model in the terminal.",
    "base": "Prepare a base model.",
    "data": "Look at training data as the model will see it.",
}

EXIT_USER_ERROR = 1
EXIT_BAD_USAGE = 2
EXIT_INTERRUPTED = 130


class LazyGroup(Group):
    """A group that knows its commands' names and one-line helps before importing them."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands, in the order of an adapter's life."""
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command itself, or only its name and help while the list is being printed."""
        if cmd_name not in _COMMANDS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=_COMMANDS[cmd_name])
        module = importlib.import_module(f"qlora_serve.cli.{cmd_name}")
        return typer.main.get_command(module.app)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the list of commands without importing any."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


app = App(LazyGroup, no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qlora-serve {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Train, serve and merge LoRA adapters: one tool for an adapter's whole life.

    Examples:

        qlora-serve base prepare smollm2

        qlora-serve train --base smollm2 --data chats.jsonl --output adapters/mine

        qlora-serve serve smollm2 --adapter mine=adapters/mine

        qlora-serve merge adapters/mine --output merged
    """


def main() -> None:
    """Runs the command line; exits 0, 1 (the user's to mend), 2 (bad usage) or 130 (Ctrl-C)."""
    quieten_libraries()
    try:
        app()
    except UsageError as error:
        _fail(str(error), EXIT_BAD_USAGE)
    except QloraServeError as error:
        _fail(str(error))
    except SystemExit as leaving:
        # Typer turns Ctrl-C into this exit code itself, and says nothing.
        if leaving.code == EXIT_INTERRUPTED:
            print("stopped", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(f"the disk is full{where}; free some space and run the command again")


def _fail(message: str, code: int = EXIT_USER_ERROR) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
