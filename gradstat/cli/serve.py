"""The command ``gradstat serve``: its arguments, and the server from its start to Ctrl-C."""

from __future__ import annotations

import argparse
import os
import threading

from gradstat.cli.arguments import add_runs

HELP = "show the report page of runs in a browser of this machine, while they are written"
_LAST_PORT = 65_535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_runs(
        parser,
        "what watch(path=...) writes or will write, a file that History.save() wrote, or a "
        "directory of such runs",
    )
    parser.add_argument(
        "--port", type=_port, default=0, help="to listen on; by default any that is free"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _LAST_PORT):
        raise argparse.ArgumentTypeError(f"needs a number from 0 to {_LAST_PORT}; got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from gradstat.cli.run_list import RunList
    from gradstat.cli.server import Server

    with Server(RunList(options.run_paths), options.port) as server:
        print(server.address, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(flush=True)
    if threading.active_count() > 1:
        # PyTorch aborts the process when the interpreter ends while another thread is inside it.
        os._exit(0)
    return 0
