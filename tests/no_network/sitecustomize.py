"""No Python process of the suite may open a connection: every attempt is refused and written down.

Imported by tests/conftest.py, and as `sitecustomize` by every Python that a test starts: this folder is then the first
on PYTHONPATH. Unix sockets are no network. Loopback is allowed to tests marked `distributed`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

LOG, LOOPBACK = "AEROGEL_TEST_CONNECTIONS", "AEROGEL_TEST_LOOPBACK"
LOOKUPS = frozenset(f"socket.{name}" for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr"))
CALLS = frozenset(("socket.connect", "socket.sendto", "socket.sendmsg"))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in CALLS:
        own, address = arguments
        if own.family == 1 or address is None:  # AF_UNIX; a socket that is connected already
            return
        host = address[0] if isinstance(address, tuple) else address
    elif event in LOOKUPS:
        host = arguments[0]
    else:
        return
    if os.environ.get(LOOPBACK) and _is_here(host):
        return
    if log := os.environ.get(LOG):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{event} {host!r}\n")
    raise PermissionError(f"the tests open no connections, but {event} {host!r} was tried")


def _is_here(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name is None or name in ("localhost", "::1", "", os.uname().nodename) or str(name).startswith("127.")


if os.environ.get(LOG):
    sys.addaudithook(refuse)
