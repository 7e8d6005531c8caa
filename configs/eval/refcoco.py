"""P@1, P@5 and P@10 on RefCOCO, RefCOCO+ and RefCOCOg. Splits that aren't there are left out."""

from ..common.evaluation import evaluate, evaluation, train  # noqa: F401
from ..moe_tuning.dynamic_dino_x16_top2 import inference, model  # noqa: F401

evaluation["batch_size"] = 32  # sentences; those of a photo share its features, 7 in RefCOCO's val

SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
names = [f"{name}_{split}" for name, splits in SPLITS.items() for split in splits]
dataloader = evaluate({name: name for name in names}) | dict(skip_missing=True)
train.output_dir = "output/eval/refcoco"
