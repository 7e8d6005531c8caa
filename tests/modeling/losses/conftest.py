import pytest
import torch
from dynamic_dino.modeling.structures import Predictions, Target, TextFeatures


@pytest.fixture
def draw():
    return Draw()


class Draw:
    """Random prompts, targets and predictions. Phrases of 1 to 3 tokens; padding at the end."""

    phrases, tokens, dim = 5, 18, 8

    def text(self, batch: int) -> TextFeatures:
        phrase_map = torch.zeros(batch, self.phrases, self.tokens)
        mask = torch.zeros(batch, self.tokens, dtype=torch.bool)
        for image in range(batch):
            start = 1
            for phrase in range(self.phrases):
                length = int(torch.randint(1, 4, ()))
                phrase_map[image, phrase, start : start + length] = 1 / length
                start += length
            mask[image, :start] = True
        features = torch.randn(batch, self.tokens, self.dim)
        return TextFeatures(features, mask, torch.zeros(batch, self.tokens).long(), phrase_map)

    def boxes(self, *shape: int) -> torch.Tensor:
        corners = torch.rand(*shape, 2, 2).sort(dim=-2).values
        return torch.cat([corners.mean(-2), corners[..., 1, :] - corners[..., 0, :] + 0.01], -1)

    def targets(self, *counts: int) -> list[Target]:
        return [Target(self.boxes(n), torch.randint(self.phrases, (n,))) for n in counts]

    def predictions(self, text: TextFeatures, queries: int) -> Predictions:
        """Leaves with gradients on; logits are -inf at the padding tokens."""
        batch = len(text.mask)
        logits = torch.randn(batch, queries, self.tokens) * 2 - 2
        logits = logits.masked_fill(~text.mask.unsqueeze(1), -torch.inf)
        boxes = self.boxes(batch, queries)
        return Predictions(logits.requires_grad_(), boxes.requires_grad_())
