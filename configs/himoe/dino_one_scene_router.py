"""HI-MoE by the letter of its Algorithm 1 and Figure 1: one scene router for the whole decoder,
which sees the mean of the encoder's final features, of all levels; routes have the paper's names.

dino.py has a scene router in each layer, which sees the coarsest level. The names are labels:
nothing teaches a route to be what it is called.
"""

from detectron2.config import LazyCall as L
from dynamic_dino.moe.scene_router import SceneRouter

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

ROUTES = ["indoor", "outdoor", "crowd", "generalist"]

model.scene_levels = "all"
model.scene_router = L(SceneRouter)(dim=256, num_routes=len(ROUTES))
model.decoder.layer.ffn.router.shared_scene = True
model.decoder.layer.ffn.router.route_names = ROUTES
train.output_dir = "output/himoe/dino_one_scene_router"
