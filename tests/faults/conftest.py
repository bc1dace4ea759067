"""The full counts leave what they measured in results.json, from which docs/reliability.md tells it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aerogel.cost.latency import cpu_name

RESULTS = Path(__file__).with_name("results.json")


@pytest.fixture
def faults_result(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """What a test of the full counts puts in here is written down once it has passed."""
    found: dict[str, object] = {}
    began = time.monotonic()
    failed = request.session.testsfailed
    yield found
    if request.session.testsfailed > failed or not found:
        return
    where = {"hardware": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}"}
    when = {"seconds": round(time.monotonic() - began), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    held[request.node.name] = found | when | where
    RESULTS.write_text(json.dumps(dict(sorted(held.items())), indent=1) + "\n")
