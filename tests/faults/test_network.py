"""Nothing connects to anywhere: the suite's own guard against it, here and in processes that a test starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ELSEWHERE = "192.0.2.1"  # of RFC 5737: no machine has it


def forget(connections: Path) -> list[str]:
    """What was tried; the test that tried on purpose does not fail for it."""
    tried = connections.read_text().splitlines()
    connections.write_text("")
    return tried


def test_a_connection_is_refused_and_written_down(connections: Path) -> None:
    with socket.socket() as one, pytest.raises(PermissionError, match=r"no connections, but socket.connect '192"):
        one.connect((ELSEWHERE, 80))
    with pytest.raises(PermissionError, match=r"socket.getaddrinfo 'example.org'"):
        socket.create_connection(("example.org", 443))
    with (
        socket.socket(type=socket.SOCK_DGRAM) as one,
        pytest.raises(PermissionError, match=r"no connections, but socket.sendto '192"),
    ):
        one.sendto(b"?", (ELSEWHERE, 53))
    assert [line.split()[0] for line in forget(connections)] == [
        "socket.connect", "socket.getaddrinfo", "socket.sendto",
    ]  # fmt: skip


def test_so_it_is_in_a_process_that_a_test_starts(connections: Path) -> None:
    script = f"import socket\ntry:\n    socket.create_connection(({ELSEWHERE!r}, 80))\nexcept OSError:\n    print('no')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("no\n", "")
    assert forget(connections)


def test_loopback_is_refused_too(connections: Path) -> None:
    with socket.socket() as one, pytest.raises(PermissionError, match=r"socket.connect '127.0.0.1'"):
        one.connect(("127.0.0.1", 9))
    assert forget(connections)


@pytest.mark.distributed
def test_loopback_is_there_for_processes_that_meet() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname()) as one:
            assert one.getpeername() == server.getsockname()


def test_unix_sockets_are_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the whole path may be too long for one
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as one:
        server.bind("here")
        server.listen()
        one.connect("here")


def test_no_network_code_is_in_the_package() -> None:
    """No module of ours imports what talks to a network."""
    package = Path(__file__).parents[2] / "aerogel"
    clients = ("urllib.request", "http.client", "requests", "httpx", "aiohttp", "socket", "huggingface_hub", "ftplib")
    lines = [
        f"{file.name}: {line.strip()}"
        for file in sorted(package.rglob("*.py"))
        for line in file.read_text().splitlines()
        for client in clients
        if line.strip().startswith((f"import {client}", f"from {client}"))
    ]
    assert lines == []


def test_onnx_runtime_keeps_no_record_of_its_use(tmp_path: Path) -> None:
    """Its own telemetry writes a device's number and what was run into the user's cache, unless it is told not to."""
    script = "import aerogel\nfrom aerogel.export import verify\nassert verify.onnxruntime.get_available_providers()\n"
    home = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | home
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path for path in tmp_path.rglob("*") if "onnx" in path.name.lower() or path.name == "deviceid"] == []
