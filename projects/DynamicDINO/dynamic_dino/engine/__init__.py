"""Training and evaluation: Detectron2's lazy-config loop, with exact resume and clear errors."""
