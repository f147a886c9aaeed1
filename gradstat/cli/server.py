"""The command ``serve``: pages of runs, to this machine alone, and what requests are answered."""

from __future__ import annotations

import argparse
import os
import re
import socket
import socketserver
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from gradstat.cli.runs import RunList
from gradstat.report import page
from gradstat.util import escaped, json_text
from gradstat.version import __version__

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
_JSON, _HTML = "application/json", "text/html; charset=utf-8"


def serve(options: argparse.Namespace) -> int:
    """Serve the report page of runs until Ctrl-C."""
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


class Server(ThreadingHTTPServer):
    """Serves the pages of runs to this machine.

    Args:
        runs: which.
        port: to listen on; 0 for any that is free.

    Raises:
        OSError: the port is taken, or may not be had.
    """

    daemon_threads = True
    # With the usual 5, clients beyond it try again after a second, after two, after four.
    request_queue_size = socket.SOMAXCONN

    def __init__(self, runs: RunList, port: int) -> None:
        self.runs = runs
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            error.filename = f"{_HOST}:{port}"
            raise

    def server_bind(self) -> None:
        """Bind, without the look-up of this machine's name that `HTTPServer` makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, self.server_address[1]

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{_HOST}:{self.server_port}/"

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
        path, _, text = self.path.partition("?")
        query = parse_qs(text)
        for pattern, answer in _ROUTES:
            if match := pattern.fullmatch(path):
                try:
                    found = answer(self.server.runs, match[1], query)
                except OSError as error:  # a directory cannot be read
                    self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, escaped(error))
                    return
                if found is not None:
                    self._answer(*found)
                    return
        self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

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


_Query = dict[str, list[str]]
_Answer = tuple[str, str] | None  # kind and text; None: there is none


def _first(runs: RunList, _: str, __: _Query) -> _Answer:
    """The page of a single run, or the list of several."""
    if runs.is_single:
        return _run(runs, "0", {})
    return _HTML, page.render_list(runs.title)


def _run(runs: RunList, number: str, _: _Query) -> _Answer:
    found = runs.find(int(number))
    if found is None:
        return None
    return _HTML, page.render(runs.name(found), {"live": f"/run/{int(number)}/data"})


def _data(runs: RunList, number: str, query: _Query) -> _Answer:
    found = runs.find(int(number))
    since = query.get("since", ["0"])[-1]
    if found is None or not re.fullmatch(r"[0-9]{1,15}", since):
        return None
    told = found.since(int(since)) | {"single": runs.is_single}
    told["path"] = escaped(found.path)
    return _JSON, json_text(told)


def _list(runs: RunList, _: str, __: _Query) -> _Answer:
    told = {"single": runs.is_single, "show": runs.side_by_side(), "runs": runs.listed()}
    return _JSON, json_text(told)


_ROUTES = (
    (re.compile(r"/()"), _first),
    (re.compile(r"/()list"), _list),
    (re.compile(r"/run/([0-9]{1,10})/"), _run),
    (re.compile(r"/run/([0-9]{1,10})/data"), _data),
)
