"""What a user takes out of a rule, and the share of the time at which a rule fails a check.

"G2:features.stage2.*" names modules as a shell names files. A comment `# aerogel: allow G2, P1` stands on the line of a
forward that calls the op; after the rules, commas between them, other words may follow. The captured graph knows that
line as "net.py:12", without its folder, so it is looked up among the files of the imported modules. Where several have
that name and not the same comment there, that is refused: use a pattern instead.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aerogel.cost.count import Layer
from aerogel.cost.guidelines.finding import RULES, Finding
from aerogel.errors import AerogelError, nearest
from aerogel.files import read_toml
from aerogel.graph import Graph

COMMENT = re.compile(r"#\s*aerogel:\s*allow\s+([\w-]+(?:\s*,\s*[A-Za-z]\d[\w-]*)*)")


@dataclass(frozen=True)
class Exceptions:
    """patterns: (rule, pattern of modules). lines: the rules that the comment on a source line names."""

    patterns: tuple[tuple[str, str], ...]
    lines: dict[str, frozenset[str]]

    @classmethod
    def read(cls, graph: Graph, allow: Iterable[str]) -> Exceptions:
        """Raises AerogelError for a text that is no RULE:PATTERN, or a pattern that no module matches."""
        patterns = []
        modules = {op.where for op in graph.ops}
        for text in allow:
            word, colon, pattern = text.partition(":")
            if not colon or not pattern:
                raise AerogelError(f"allow must be RULE:PATTERN of modules, got {text!r}; write G2:features.stage2.*")
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise AerogelError(f"allow: no module matches {pattern!r} in {text!r}; {nearest(pattern, modules)}")
            patterns.append((rule_named(word, "allow"), pattern))
        return cls(tuple(patterns), _comments({op.source for op in graph.ops}))

    def allowed(self, rule: str, layer: Layer) -> bool:
        name = layer.name or layer.node
        return rule in self.lines.get(layer.source, ()) or any(
            rule == named and fnmatchcase(name, pattern) for named, pattern in self.patterns
        )


def rule_named(word: str, caller: str) -> str:
    """The rule of "G2", "P1-simd" or "P1". Raises AerogelError."""
    for rule in RULES:
        if word.strip().lower() in (rule.lower(), rule.partition("-")[0].lower()):
            return rule
    raise AerogelError(f"{caller}: {word!r} is no rule; {nearest(word, RULES)}")


def _comments(sources: set[str]) -> dict[str, frozenset[str]]:
    names = {source.partition(":")[0] for source in sources if source}
    files: dict[str, set[Path]] = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).name in names:
            files.setdefault(Path(file).name, set()).add(Path(file).resolve())
    found = {}
    for source in sources:
        name, _, line = source.partition(":")
        texts = {_comment(path, int(line)) for path in files.get(name, ()) if line.isdecimal()}
        if len(texts) > 1:
            raise AerogelError(
                f"lint: {len(files[name])} imported files are called {name}, and what they allow in line {line} "
                "differs; write --allow RULE:MODULES"
            )
        words = [word.strip() for word in next(iter(texts), "").split(",")]
        found[source] = frozenset(rule_named(word, f"the comment at {source}") for word in words if word)
    return found


def _comment(path: Path, line: int) -> str:
    """The rules that a line's comment allows, as written; "" where there is none."""
    linecache.checkcache(str(path))
    match = COMMENT.search(linecache.getline(str(path), line))
    return match[1] if match else ""


class Settings(BaseModel):
    """What `aerogel lint --config FILE.toml` may hold; `--allow` and `--fail-on` add to its lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: str | None = None
    allow: list[str] = Field(default_factory=list)
    fail_on: list[str] = Field(default_factory=list)


def settings(path: Path | None) -> Settings:
    """Those of a TOML file. Raises AerogelError naming the file and the entry at fault."""
    if path is None:
        return Settings()
    try:
        return Settings.model_validate(read_toml(path, "lint", "give device, allow, fail_on"))
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        raise AerogelError(f"lint: {path}: {entry}: {first['msg']}; give device, allow, fail_on") from error


def exceeded(findings: Iterable[Finding], limits: Iterable[str]) -> list[str]:
    """A line for each "G1=5%" whose rule's findings add up to a larger share of the predicted time.

    Raises AerogelError for a text that is no RULE=SHARE%.
    """
    found = list(findings)
    lines = []
    for text in limits:
        word, _, share = text.partition("=")
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", share)
        if match is None:
            raise AerogelError(f"fail-on must be RULE=SHARE%, got {text!r}; write G1=5%")
        rule, limit = rule_named(word, "fail-on"), float(match[1]) / 100
        of_rule = [finding for finding in found if finding.rule == rule]
        total = sum(finding.share for finding in of_rule)
        if total > limit:
            dearest = of_rule[0]
            lines.append(
                f"{rule}: {total:.1%} of the predicted time, over {limit:.1%}; dearest: "
                f"{dearest.module or dearest.nodes[0]} ({dearest.share:.1%})"
            )
    return lines
