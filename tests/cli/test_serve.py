"""The server of `gradstat serve`: whom it answers and what, without a browser."""

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from histories import make_history

from gradstat import Log2Bins
from gradstat.cli.commands import run_name
from gradstat.cli.server import RunList, Server
from gradstat.history.journal import Journal


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_history(Log2Bins(), 3, 5).save(tmp_path / "run.npz")
    return tmp_path / "run.npz"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers = []

    def serve(*paths: Path) -> Server:
        server = Server(RunList(list(paths)), 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response, body


def raw(server: Server, request: str, *, whole: bool = False) -> str:
    """The first line that is answered to some bytes, or all of it where the server then closes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(request.encode("latin-1"))
        with connection.makefile("rb") as answer:
            if whole:
                return answer.read().decode("latin-1")
            return answer.readline().decode("latin-1").rstrip()


def test_server_listens_on_this_machine_alone(serve: Callable[..., Server], run: Path) -> None:
    server = serve(run)
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/"


def test_server_gives_the_page_and_its_data(serve: Callable[..., Server], run: Path) -> None:
    server = serve(run)
    response, page = ask(server, "/")
    assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "<h1>run</h1>" in page
    assert '{"live": "/run/0/data"}' in page
    assert response.headers["Content-Security-Policy"] == "frame-ancestors 'self'"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "connect-src 'self'" in page
    told = json.loads(ask(server, "/run/0/data")[1])
    assert (told["records"], told["state"], told["single"]) == (5, "there", True)
    assert told["head"]["layers"] == ["0.weight", "1.weight", "2.weight"]
    version = told["version"]
    assert ask(server, "/run/0/")[1] == page
    assert "head" not in json.loads(ask(server, f"/run/0/data?since={version}")[1])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{}", 200),
        ("localhost:{}", 200),
        ("LOCALHOST:{}", 200),
        ("127.0.0.1", 403),
        ("127.0.0.1:1", 403),
        ("localhost", 403),
        ("evil.example:{}", 403),
        ("127.0.0.1.evil.example:{}", 403),
        ("localhost:{}@evil.example", 403),
        ("[::1]:{}", 403),
        ("0.0.0.0:{}", 403),
        ("127.0.0.1:{0}, 127.0.0.1:{0}", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/run/0/data", "/nothing"])
def test_server_answers_its_own_name_alone(
    serve: Callable[..., Server], run: Path, host: str, status: int, path: str
) -> None:
    server = serve(run)
    response, body = ask(server, path, Host=host.format(server.server_port))
    assert response.status == (404 if status == 200 and path == "/nothing" else status)
    if status == 403:
        assert body == f"Forbidden: only {server.address} is answered\n"


def test_server_needs_one_host(serve: Callable[..., Server], run: Path) -> None:
    server = serve(run)
    own = f"Host: 127.0.0.1:{server.server_port}\r\n"
    assert raw(server, f"GET / HTTP/1.1\r\n{own}\r\n") == "HTTP/1.1 200 OK"
    assert raw(server, "GET / HTTP/1.1\r\n\r\n") == "HTTP/1.1 403 Forbidden"
    assert raw(server, "GET / HTTP/1.0\r\n\r\n") == "HTTP/1.1 403 Forbidden"
    assert raw(server, f"GET / HTTP/1.1\r\n{own}Host: evil\r\n\r\n") == "HTTP/1.1 403 Forbidden"
    assert raw(server, f"GET http://evil/ HTTP/1.1\r\n{own}\r\n") == "HTTP/1.1 404 Not Found"


def test_server_answers_two_hundred_clients_at_once(run: Path) -> None:
    with Server(RunList([run]), 0) as server:
        request = f"GET /run/0/data HTTP/1.0\r\nHost: localhost:{server.server_port}\r\n\r\n"
        began_s = time.monotonic()
        # Nobody accepts them yet: all of them wait in the queue.
        clients = [
            socket.create_connection(("127.0.0.1", server.server_port), timeout=5)
            for _ in range(200)
        ]
        for client in clients:
            client.sendall(request.encode())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            for client in clients:
                with client, client.makefile("rb") as answer:
                    assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        finally:
            server.shutdown()
            thread.join()
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"]
)
def test_server_answers_get_alone(serve: Callable[..., Server], run: Path, method: str) -> None:
    server = serve(run)
    response, body = ask(server, "/run/0/data", method)
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")
    assert body == "Method Not Allowed: only GET is answered\n"
    assert ask(server, "/", method, Host="evil.example")[0].status == 403
    assert raw(server, "BREW / HTTP/1.1\r\nHost: x\r\n\r\n").startswith("HTTP/1.1 501 ")


def test_server_answers_head_without_a_body(serve: Callable[..., Server], run: Path) -> None:
    server = serve(run)
    own = f"Host: 127.0.0.1:{server.server_port}\r\nConnection: close\r\n\r\n"
    head = raw(server, f"HEAD / HTTP/1.1\r\n{own}", whole=True)
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert head.endswith("\r\n\r\n")
    assert int(re.search(r"Content-Length: (\d+)", head)[1]) > 10_000 > len(head)


@pytest.mark.parametrize(
    "path",
    [
        "/run.npz",
        "/../run.npz",
        "/run/../run.npz",
        "/run/0/../../etc/passwd",
        "/run/0",
        "/run/1/",
        "/run/1/data",
        "/run/-1/",
        "/run/00000000001/",
        "/run/\u0661/".encode().decode("latin-1"),
        "/run/0/%64ata",
        "/run//",
        "http://[",
        "*",
        "/list/",
        "/run/0/data?since=-1",
        "/run/0/data?since=x",
        "/run/0/data?since=1e3",
        "/run/0/data?since=9999999999999999999999",
        "/report.css",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
    ],
)
def test_server_knows_no_other_page(serve: Callable[..., Server], run: Path, path: str) -> None:
    server = serve(run)
    first = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n")
    assert first == "HTTP/1.1 404 Not Found"


def test_server_lists_several_runs(serve: Callable[..., Server], run: Path, tmp_path: Path) -> None:
    server = serve(run, tmp_path / "later", run)
    page = ask(server, "/")[1]
    assert "<h1>Runs</h1>" in page
    told = json.loads(ask(server, "/list")[1])
    assert not told["single"]
    lines = [(line["number"], line["name"], line["bytes"] > 0) for line in told["runs"]]
    assert lines == [(0, "run", True), (1, "later", False)]
    assert told["show"] == [0, 1]
    assert told["runs"][1]["quiet"] is None
    assert "<h1>later</h1>" in ask(server, "/run/1/")[1]
    assert json.loads(ask(server, "/run/1/data")[1])["state"] == "waiting"


def test_server_lists_a_directory_of_runs(serve: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    server = serve(folder)
    # It may become a run or a directory of them.
    told = json.loads(ask(server, "/run/0/data")[1])
    assert (told["state"], told["single"]) == ("waiting", True)
    history = make_history(Log2Bins(), 2, 3)
    history.save(folder / "saved.npz")
    Journal(folder / "a & <b>\x1b", history)
    Journal(folder / "ranks" / "rank-0", history)
    history.save(folder / ".hidden.npz")
    for other in ("notes.txt", "data.npz"):
        (folder / other).write_bytes(b"PK")
    (folder / "empty").mkdir()
    told = json.loads(ask(server, "/list")[1])
    assert not told["single"]
    names = {line["name"]: line["number"] for line in told["runs"]}
    assert sorted(names) == ["a & <b>\\x1b", "ranks", "saved"]
    assert told["show"] == []
    assert json.loads(ask(server, "/run/0/data")[1])["single"] is False
    assert "<h1>runs</h1>" in ask(server, "/")[1]
    # A number stays that of its run.
    (folder / "saved.npz").unlink()
    history.save(folder / "another.npz")
    later = {line["name"]: line["number"] for line in json.loads(ask(server, "/list")[1])["runs"]}
    assert later["ranks"] == names["ranks"]
    assert later["another"] not in names.values()
    page = ask(server, f"/run/{names[next(each for each in names if '<' in each)]}/")[1]
    assert "<h1>a &amp; &lt;b&gt;\\x1b</h1>" in page


def test_server_shows_no_more_than_four_side_by_side_at_first(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    for n, shown in ((4, [0, 1, 2, 3]), (5, [])):
        server = serve(*(tmp_path / str(i) for i in range(n)))
        assert json.loads(ask(server, "/list")[1])["show"] == shown


def test_server_names_a_directory_as_it_is_once_it_is_there(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(tmp_path / "lr.3e-4")
    Journal(tmp_path / "lr.3e-4", make_history(Log2Bins(), 2, 3))
    assert "<h1>lr.3e-4</h1>" in ask(server, "/")[1]


def test_server_names_runs_of_one_name_by_their_paths(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    told = json.loads(ask(serve(tmp_path / "a" / "run", tmp_path / "b" / "run"), "/list")[1])
    assert [line["name"] for line in told["runs"]] == [
        str(tmp_path / each / "run") for each in ("a", "b")
    ]


def test_server_says_what_it_may_not_list(
    serve: Callable[..., Server], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gradstat.cli.server._is_directory_of_runs", refuse)
    response, body = ask(server, "/list")
    assert response.status == 503
    assert "Permission denied" in body


def test_server_started_again_knows_runs_by_the_same_numbers(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    history = make_history(Log2Bins(), 2, 3)
    for name in ("alpha", "beta"):
        history.save(tmp_path / f"{name}.npz")
    told = json.loads(ask(serve(tmp_path), "/list")[1])["runs"]
    numbers = {line["name"]: line["number"] for line in told}
    (tmp_path / "alpha.npz").unlink()
    again = serve(tmp_path)
    # Also before anybody has asked for the list.
    assert "<h1>beta</h1>" in ask(again, f"/run/{numbers['beta']}/")[1]
    assert ask(again, f"/run/{numbers['alpha']}/data")[0].status == 404
    data = json.loads(ask(again, f"/run/{numbers['beta']}/data")[1])
    assert data["path"] == str(tmp_path / "beta.npz")


def test_server_lists_runs_beside_what_cannot_be_read(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    make_history(Log2Bins(), 2, 3).save(tmp_path / "good.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    told = json.loads(ask(serve(tmp_path), "/list")[1])
    assert [line["name"] for line in told["runs"]] == ["good"]


def test_server_keeps_the_order_of_runs_that_are_written(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server, history = serve(tmp_path), make_history(Log2Bins(), 2, 3)
    for name in ("b", "a", "b", "a"):
        history.save(tmp_path / f"{name}.npz")
        history.save(tmp_path / "old.npz")
        os.utime(tmp_path / "old.npz", (0, 0))
        names = [line["name"] for line in json.loads(ask(server, "/list")[1])["runs"]]
        assert names == [*sorted(names[:-1]), "old"]


def test_pages_of_runs_of_one_name_have_their_paths_as_heading(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert f"<h1>{tmp_path / 'b' / 'run'}</h1>" in ask(server, "/run/1/")[1]


def test_server_at_the_usual_port_is_asked_without_it(
    serve: Callable[..., Server], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(run)
    without = "GET /list HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(server, without) == "HTTP/1.1 403 Forbidden"
    monkeypatch.setattr("gradstat.cli.server._USUAL_PORT", server.server_port)
    assert raw(server, without) == "HTTP/1.1 200 OK"


def test_listed_names_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcdefgh":
        make_history(Log2Bins(), 2, 3).save(tmp_path / f"{name}.npz")
    runs, named = RunList([tmp_path]), []
    monkeypatch.setattr(
        "gradstat.cli.server.run_name", lambda path: named.append(path) or run_name(path)
    )
    assert [line["name"] for line in runs.listed()] == list("abcdefgh")
    assert len(named) == len(set(named))
