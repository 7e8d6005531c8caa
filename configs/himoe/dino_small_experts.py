"""The other reading of the experts' size: 16 small ones, as the paper's parameters suggest.

Its Table 5 (GFLOPs by K) speaks for experts of the FFN's size, as in the other recipes; its
Table 3, 50M -> 52M, for small ones: 6 layers * (16 * (168 * 513 + 256) + 5184 - 1.05M) = 2.0M.
They can't start from a dense FFN.
"""

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.layer.ffn.expert_hidden = 168
model.decoder.layer.ffn.init_experts = False
train.output_dir = "output/himoe/dino_small_experts"
