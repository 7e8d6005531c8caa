"""gdino_nano, fine-tuned on your own COCO-format data: a rehearsal of gdino_tiny_custom on a CPU.

There are no public weights of this size; make them by configs/pretrain/gdino_nano_stamps.py, and
give their directory or checkpoint: ``train.init_checkpoint=hf:DIRECTORY``.
"""

from ..common.data.custom import data, dataloader  # noqa: F401
from ..common.models.gdino_nano import inference, model  # noqa: F401
from ..pretrain.gdino_nano_stamps import lr_multiplier, optimizer, train  # noqa: F401

dataloader.train.total_batch_size = 4

# 4 images * 200 iterations
train.max_iter = 200
train.init_checkpoint = "output/gdino_nano_stamps/model_final.pth"
train.output_dir = "output/gdino_nano_custom"
train.eval_first = True  # the gain is seen at the end
train.best_metric = "val/AP"
