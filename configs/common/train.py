"""Training settings shared by all recipes: the engine's defaults, for recipes to change."""

from copy import deepcopy

from dynamic_dino.config import TRAIN_DEFAULTS

train = deepcopy(TRAIN_DEFAULTS)
