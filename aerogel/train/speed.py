"""How fast training goes, what it waits for, and which knob to turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aerogel.train.steps import Step

WAITS = 0.2  # of the time: from there on the data are what holds training back


@dataclass
class Speed:
    """Sums over steps. Steps that were cut in half by a resume count as what they took.

    decoded: the images are read from files in every epoch, rather than once.
    """

    decoded: bool = False
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, step: Step) -> None:
        self.images += step.images
        self.seconds += step.seconds
        self.waited += step.waited

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def share_waited(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0

    def text(self) -> str:
        """`1,234 images/s, 3 % of it waiting for data`."""
        return f"{self.images_per_second:,.0f} images/s, {100 * self.share_waited:.0f} % of the time waiting for data"

    def knob(self, ranks: int = 1) -> str:
        """What to turn to train faster."""
        if self.share_waited >= WAITS and not self.decoded:
            return 'to go faster: augment = "none" in [train] of --config; the images are decoded already'
        if self.share_waited >= WAITS:
            return "to go faster: `aerogel data pack` the images once, or read them with more workers"
        more = "larger batches" if ranks > 1 else "more processes (torchrun)"
        return f"to go faster: bf16 (autocast) or {more}; the data keep up"

    def to_json(self, ranks: int = 1) -> dict[str, Any]:
        rates = {"images_per_second": self.images_per_second, "share_waited": self.share_waited}
        sums = {name: value for name, value in asdict(self).items() if name != "decoded"}
        return sums | rates | {"processes": ranks, "text": f"{self.text()}; {self.knob(ranks)}"}
