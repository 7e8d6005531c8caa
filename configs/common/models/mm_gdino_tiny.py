"""MM-Grounding-DINO with Swin-T (arXiv 2401.02361): heads of their own for each decoder layer, and
class logits with a scale and a bias, as they train better from scratch. The classes weigh more in
the matching, and less in the loss, than Grounding DINO's."""

from .gdino_tiny import inference, model  # noqa: F401

model.query_selection.class_head.scaled = True
model.decoder.class_head.scaled = True
model.decoder.separate_heads = True
model.criterion.matcher.cost_class = 2.0
model.criterion.weight_class = 1.0
