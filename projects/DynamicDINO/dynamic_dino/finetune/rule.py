"""How long, and at which rate.

On a CPU the shipped dense nano is tuned, on a GPU public weights of Grounding DINO.

N photos that show an object take 30 * sqrt(N) iterations of 4 photos, 60 at least: a set four
times as large is trained twice as long. Few photos come often (10 of them 38 times), because new
names and boxes want some hundred samples however few photos there are; many come seldom (2,000 of
them 2.7 times), because each brings something new.

The rate is the recipe's, which falls to a hundredth along half a cosine; below 20 photos it is
half of that, as nothing new would correct a step that was too far.
"""

from __future__ import annotations

import math

LEAST = 60  # iterations
BATCH = 4  # photos
FEW = 20  # photos; with fewer the rate is halved


def iterations_for(photos: int, batch: int = BATCH) -> int:
    """Iterations of `batch` photos, to tens."""
    return max(10 * round(3 * math.sqrt(photos) * BATCH / batch), LEAST)


def rate_for(photos: int, rate: float) -> float:
    """`rate` is the recipe's."""
    return rate / 2 if photos < FEW else rate
