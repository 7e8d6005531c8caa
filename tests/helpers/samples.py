"""Images of noise for a detector, as the mapper gives them."""

import torch
from dynamic_dino.modeling.prompt import Prompt


def batch(*prompts: str) -> list[dict]:
    return [
        {
            "image": torch.randint(256, (3, 96, 128), dtype=torch.uint8),
            "image_size": (96, 128),
            "height": 200,
            "width": 300,
            "prompt": Prompt.parse(prompt),
        }
        for prompt in prompts
    ]
