"""What the shipped models are scored on: photos, Stamps, and Raccoon, which they have never seen.

``coco`` asks every photo for all 80 names, ``coco_present`` only for those that it shows, which
flatters; so do Stamps' 30 names, of which one at least is there. ``val_real_all`` asks the same
photos for all names of Stamps. Sets that aren't there are named and left out.
"""

from ..common.evaluation import evaluate, evaluation, train  # noqa: F401
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

TESTS = {  # what is asked for: "all" names of the set, or those of the image and others up to n
    "coco": ("photos_coco_val", "all"),
    "coco_present": ("photos_coco_val", 1),
    "groceries": ("photos_groceries_val", "all"),
    "airport_debris": ("photos_airport_debris_val", "all"),
    "animals25": ("photos_animals25_val", "all"),
    "val": ("stamps_val", 30),
    "val_novel": ("stamps_val_novel", 30),
    "val_real": ("stamps_val_real", 30),
    "val_real_all": ("stamps_val_real", "all"),
    "raccoon": ("odinw_Raccoon_val", "all"),
}
dataloader = evaluate(
    {name: dataset for name, (dataset, _) in TESTS.items()},
    prompt_names={name: asked for name, (_, asked) in TESTS.items()},
) | dict(skip_missing=True)
train.output_dir = "output/eval/shipped"
