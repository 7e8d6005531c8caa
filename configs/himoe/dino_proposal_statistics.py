"""The scene router also sees statistics of the selected boxes, which the paper allows for."""

from detectron2.config import LazyCall as L
from dynamic_dino.modeling.proposals import STATISTICS, ProposalStatistics

from .dino import dataloader, inference, lr_multiplier, model, optimizer, train  # noqa: F401

model.proposal_statistics = L(ProposalStatistics)()
model.decoder.layer.ffn.router.scene_dim = 256 + len(STATISTICS)
train.output_dir = "output/himoe/dino_proposal_statistics"
