"""The command line, ``iia-ode``: a file for each command, and files of shared options, plots and processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ..__about__ import __version__
from ..errors import IIAError
from .compare import compare_command
from .experiment import experiment_command
from .fit import fit_command
from .sample import sample_command
from .show import show_command
from .solvers import solvers_command
from .train import train_group

__all__ = ["cli", "main"]


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="iia-ode")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Sample diffusion and flow models in few evaluations, and measure the errors."""
    if ctx.invoked_subcommand is None:  # in some versions of click, a missing command would be an error
        click.echo(ctx.get_help())


for command in (
    compare_command,
    experiment_command,
    fit_command,
    sample_command,
    show_command,
    solvers_command,
    train_group,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error is one line on stderr and exit status 2.

    Parameters
    ----------
    arguments : command and options; by default ``sys.argv[1:]``.
    """
    try:
        cli.main(arguments, prog_name="iia-ode", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("iia-ode: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except (IIAError, OSError) as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:  # torch is out of memory or has trouble with a device
        # The first line names the error; torch's further lines are advice.
        _fail(f"{type(error).__name__}: {(str(error).strip() or 'out of memory').splitlines()[0]}")


def _fail(message: str) -> None:
    click.echo(f"iia-ode: error: {' '.join(message.split())}", err=True)
    sys.exit(2)
