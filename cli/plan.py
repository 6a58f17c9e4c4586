"""`edgert plan`: where every byte of a memory budget goes, before anything is loaded."""

from __future__ import annotations

import click

from edgert import BudgetError
from edgert.cli.options import ModelOptions, debug_options, json_option, load_options
from edgert.cli.report import print_json

__all__ = ["plan"]


@click.command()
@load_options
@json_option
@debug_options
def plan(options: ModelOptions, as_json: bool) -> None:
    """Show where every byte of a memory budget goes.

    Only the header of the file is read. A budget that cannot work ends with exit code 5 and the
    smallest budget that does.
    """
    try:
        found = options.plan()
    except BudgetError as error:
        if as_json:
            print_json(
                {
                    "feasible": False,
                    "budget_bytes": error.budget_bytes,
                    "floor_bytes": error.need_bytes,
                }
            )
        elif error.table:
            click.echo(error.table)
        # The table is on stdout now; the message alone follows on stderr.
        error.args = (str(error).partition("\n\n")[0],)
        raise
    if as_json:
        print_json({"feasible": True, **found.to_dict()})
    else:
        click.echo(found.table())
