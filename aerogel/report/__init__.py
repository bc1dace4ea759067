"""The report of a run: `render` and `write` make the page, `terminal` the lines for a pipe."""

from __future__ import annotations

from aerogel.report.page import render as render
from aerogel.report.page import write as write
from aerogel.report.terminal import terminal as terminal
