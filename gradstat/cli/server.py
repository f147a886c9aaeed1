"""The command ``serve``: pages of runs, to this machine alone; which runs, and what is answered."""

from __future__ import annotations

import argparse
import os
import re
import socket
import socketserver
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from gradstat.cli.commands import run_name
from gradstat.history.file import open_regular
from gradstat.history.ranks import stats_of
from gradstat.report import page
from gradstat.report.live_run import LiveRun
from gradstat.util import __version__, escaped, json_text

_MOST_SIDE_BY_SIDE = 4
_FIRST_NUMBER = 1000  # of runs of a directory
_WRITTEN_S = 60.0  # since the last change; a run is taken to be going on for so long
_HOST, _USUAL_PORT = "127.0.0.1", 80
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    # Pages of others may not show these in a frame; those side by side are in frames.
    "Content-Security-Policy": "frame-ancestors 'self'",
}
_RUN = re.compile(r"/run/([0-9]{1,10})/(data)?")  # its number
_JSON, _HTML = "application/json", "text/html; charset=utf-8"


def serve(options: argparse.Namespace) -> int:
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


# Not `ThreadingHTTPServer`, which looks up this machine's name.
class Server(socketserver.ThreadingTCPServer):
    """Serves the pages of runs to this machine, on a port or, with 0, on any that is free."""

    daemon_threads = allow_reuse_address = True
    # With the usual 5, clients beyond it try again after a second, after two, after four.
    request_queue_size = socket.SOMAXCONN

    def __init__(self, runs: RunList, port: int) -> None:
        self.runs = runs
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            error.filename = f"{_HOST}:{port}"
            raise
        self.server_port = self.server_address[1]
        self.address = f"http://{_HOST}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"gradstat/{__version__}", ""
    disable_nagle_algorithm = True  # headers and body are written one after the other
    timeout = 60  # seconds that a connection may be idle

    def do_GET(self) -> None:
        """Answer from a fixed table: no part of an address becomes the name of a file."""
        if not self._is_own():
            return
        path, _, query = self.path.partition("?")
        try:
            found = _find(self.server.runs, path, parse_qs(query))
        except OSError as error:  # a directory cannot be read
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, escaped(error))
            return
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        else:
            self._answer(*found)

    do_HEAD = do_GET

    def _other(self) -> None:
        if self._is_own():
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _other

    def _is_own(self) -> bool:
        """Whether a request asks by this server's own name, as no other site's page can."""
        port = self.server.server_port
        hosts = self.headers.get_all("Host", [])
        own = {f"{host}:{port}" for host in (_HOST, "localhost")}
        # Browsers leave the usual port out.
        own |= {_HOST, "localhost"} if port == _USUAL_PORT else set()
        if len(hosts) == 1 and hosts[0].lower() in own:
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"only {self.server.address} is answered")
        return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # what else was sent is not read
        self._answer("text/plain; charset=utf-8", f"{status.phrase}: {why}\n", status)

    def _answer(self, kind: str, text: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **_HEADERS}
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""


def _find(runs: RunList, path: str, query: dict[str, list[str]]) -> tuple[str, str] | None:
    """Kind and text of what has an address; ``None`` if nothing has."""
    if path == "/list":
        told = {"single": runs.is_single, "show": runs.side_by_side(), "runs": runs.listed()}
        return _JSON, json_text(told)
    if path == "/" and not runs.is_single:
        return _HTML, page.render_list(runs.title)
    match = _RUN.fullmatch("/run/0/" if path == "/" else path)
    run = runs.find(int(match[1])) if match else None
    if match is None or run is None:
        return None
    if match[2] is None:
        title = runs.headings()[run.path]
        return _HTML, page.render(title, {"live": f"/run/{int(match[1])}/data"})
    since = query.get("since", ["0"])[-1]
    if not re.fullmatch(r"[0-9]{1,15}", since):
        return None
    told = run.since(int(since)) | {"single": runs.is_single, "path": escaped(run.path)}
    return _JSON, json_text(told)


class RunList:
    """Runs by number. A number stays that of its run, also when others come and go."""

    # Those that were given have theirs by their place, those of directories by their names, so that
    # a server that is started again knows them by the same. They need not be there yet.

    def __init__(self, paths: list[Path]) -> None:
        # The process may change its directory later.
        self._paths = list(dict.fromkeys(path.absolute() for path in paths))
        self._lock = threading.Lock()
        self._runs = {at: LiveRun(path) for at, path in enumerate(self._paths)}
        self._numbers = {path: at for at, path in enumerate(self._paths)}

    @property
    def is_single(self) -> bool:
        """Whether there is one run, rather than several or a directory of them."""
        return len(self._paths) == 1 and not _is_directory_of_runs(self._paths[0])

    @property
    def title(self) -> str:
        return run_name(self._paths[0]) if len(self._paths) == 1 else "Runs"

    def side_by_side(self) -> list[int]:
        """The runs that are shown at first: all, if they were given one by one and are few."""
        given = [self._number(path) for path in self._paths if not _is_directory_of_runs(path)]
        return given if len(given) == len(self._paths) <= _MOST_SIDE_BY_SIDE else []

    def find(self, number: int) -> LiveRun | None:
        if number not in self._runs:
            self.listed()  # it may be one of a directory
        return self._runs.get(number)

    def listed(self) -> list[dict[str, Any]]:
        """Number, name, seconds since the last change, and bytes of each run."""
        # Within a directory those that are being written come first, and then the newest. Seconds
        # are `None` where there is nothing yet.
        groups = [
            [each for each in path.iterdir() if _is_run(each)]
            if _is_directory_of_runs(path)
            else [path]
            for path in self._paths
        ]
        numbers = {path: self._number(path) for group in groups for path in group}
        headings = self.headings()
        found = []
        for group in groups:
            lines = [_line(numbers[path], headings[path], path) for path in group]
            # Those that are being written keep their places, whichever changed last.
            lines.sort(key=lambda line: (max(line["quiet"] or 0.0, _WRITTEN_S), line["name"]))
            found += lines
        return found

    def headings(self) -> dict[Path, str]:
        """The name of each run, or its path where others have the same name."""
        names = {run.path: run_name(run.path) for run in list(self._runs.values())}
        n_of_name = Counter(names.values())
        return {path: name if n_of_name[name] == 1 else str(path) for path, name in names.items()}

    def _number(self, path: Path) -> int:
        with self._lock:
            if path not in self._numbers:
                number = _FIRST_NUMBER + zlib.crc32(os.fsencode(path))
                while number in self._runs:
                    number += 1
                self._numbers[path], self._runs[number] = number, LiveRun(path)
            return self._numbers[path]


def _line(number: int, name: str, path: Path) -> dict[str, Any]:
    files = _files_of(path)
    quiet = max(0.0, time.time() - max(each.st_mtime for each in files)) if files else None
    size = sum(each.st_size for each in files)
    return {"number": number, "name": escaped(name), "quiet": quiet, "bytes": size}


def _files_of(path: Path) -> list[os.stat_result]:
    """As `stats_of`; none if the run has gone or may not be read."""
    try:
        return list(stats_of(path).values())
    except OSError:
        return []


def _is_directory_of_runs(path: Path) -> bool:
    # That the directory itself cannot be read is an error.
    return path.is_dir() and not _files_of(path) and any(map(_is_run, path.iterdir()))


def _is_run(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    try:
        if path.is_dir():
            return bool(_files_of(path))
        return path.suffix == ".npz" and _is_saved(path, path.stat().st_mtime_ns)
    except OSError:  # it has gone, or may not be looked at
        return False


@lru_cache(4096)
def _is_saved(path: Path, _: int) -> bool:
    """Whether `History.save` wrote a file, by the names in it; asked anew when its time changes."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as members:
            return {"run.npy", "integers.npy"} <= set(members.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):  # no file, as a pipe is none
        return False
