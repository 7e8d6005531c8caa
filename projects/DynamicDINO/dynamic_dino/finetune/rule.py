"""How long, and at which rate.

On a CPU the shipped dense nano is tuned, on a GPU public weights of Grounding DINO.

N photos that show an object take 30 * sqrt(N) iterations of 4 photos, 60 at least: a set four
times as large is trained twice as long. Few photos come often (10 of them 38 times), because new
names and boxes want some hundred samples however few photos there are; many come seldom (2,000 of
them 2.7 times), because each brings something new.

The rate is the recipe's, however few they are, and falls to a hundredth along half a cosine: on 10
photos of raccoons, half of it ended no better (AP 42.4 instead of 44.0, one seed).
"""

from __future__ import annotations

import math

LEAST = 60  # iterations
BATCH = 4  # photos


def iterations_for(photos: int, batch: int = BATCH) -> int:
    """Iterations of `batch` photos, to tens."""
    return max(10 * round(3 * math.sqrt(photos) * BATCH / batch), LEAST)
