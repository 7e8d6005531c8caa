"""MM-Grounding-DINO with Swin-T (arXiv 2401.02361): heads of their own for each decoder layer, and
class logits with a scale and a bias, as they train better from scratch."""

from .gdino_tiny import inference, model  # noqa: F401

model.query_selection.class_head.scaled = True
model.decoder.class_head.scaled = True
model.decoder.separate_heads = True
