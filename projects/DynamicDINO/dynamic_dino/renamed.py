"""Former names, so that the config.yaml of a run by an older version is read as it was meant, and
code that imports what has moved finds it.

A config.yaml names classes and functions by their paths; `current` brings those up to date, and
`current_nodes` the arguments that they are called with.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELING = (
    "attention backbone decoder deformable_enhancer detector enhancer feed_forward heads losses "
    "neck postprocess prompt query_selection structures swin text vocabulary"
)
COMMANDS = {f"dynamic_dino.data.{name}" for name in ("drawn", "glyphs", "stamps")}
_SERVING = "accelerate deploy inference"
# Former path -> present path, each for itself and all below it; the longest match counts.
PATHS = {
    **{f"dynamic_dino.{name}": f"dynamic_dino.modeling.{name}" for name in _MODELING.split()},
    **{f"dynamic_dino.{name}": f"dynamic_dino.serving.{name}" for name in _SERVING.split()},
    "dynamic_dino.checkpoint_import": "dynamic_dino.checkpoint.public",
    "dynamic_dino.data.drawn": "dynamic_dino.data.synthetic.drawn",
    "dynamic_dino.data.glyphs": "dynamic_dino.data.synthetic.glyphs",
    "dynamic_dino.data.stamps": "dynamic_dino.data.synthetic.stamps",
    "dynamic_dino.engine.config": "dynamic_dino.config",
    "dynamic_dino.hub": "dynamic_dino.sources",
    "dynamic_dino.moe.proposals": "dynamic_dino.modeling.proposals",
    "dynamic_dino.visualization": "dynamic_dino.data.visualization",
    "dynamic_dino.vocabulary.ClassVocabulary": "dynamic_dino.data.class_names.class_vocabulary",
    "dynamic_dino.vocabulary.count_classes": "dynamic_dino.data.class_names.count_classes",
}


def current(text: str) -> str:
    """The text of a config.yaml with the present paths of classes and functions, and values."""
    text = re.sub(r"\bmax_detections_per: piece\b", "max_detections_per: chunk", text)
    return re.sub(r"(?<![\w/.])dynamic_dino\.[\w.]*\w", lambda match: current_path(match[0]), text)


def current_path(path: str) -> str:
    """The present path of a class or function, such as "dynamic_dino.text.TextEncoder"."""
    former = [old for old in PATHS if path == old or path.startswith(f"{old}.")]
    longest = max(former, key=len, default="")
    return PATHS[longest] + path.removeprefix(longest) if longest else path


def current_nodes(content: Any) -> Any:
    """The content of a config.yaml, its paths up to date, with the present arguments."""
    if isinstance(content, list):
        return [current_nodes(value) for value in content]
    if not isinstance(content, dict):
        return content
    node = {key: current_nodes(value) for key, value in content.items()}
    match node.get("_target_"):
        case "dynamic_dino.moe.layer.MoEFeedForward":
            return _router_apart(node)
        case "dynamic_dino.modeling.backbone.Backbone" if "frozen_parts" in node:
            node["frozen_modules"] = node.pop("frozen_parts")
    return node


# Arguments that the layer of experts had for its router -> what they are called there.
_ROUTER_ARGUMENTS = {
    "num_experts": "num_experts",
    "top_k": "top_k",
    "gate": "gate",
    "init_router": "tied",
    "router_std": "std",
}


def _router_apart(node: dict) -> dict:
    """Of a layer whose router was its own; one that was given counted, whatever stood beside."""
    options = {new: node.pop(old) for old, new in _ROUTER_ARGUMENTS.items() if old in node}
    if node.get("router") is None:
        options = {name: value for name, value in options.items() if value is not None}
        target = "dynamic_dino.moe.routers.SoftmaxRouter"
        node["router"] = {"_target_": target, "dim": node["dim"], **options}
    return node


class FormerModules(MetaPathFinder, Loader):
    """Imports a module by its former path, with a DeprecationWarning that says the present one.

    The first of the finders, since a module in a package that moved would be found twice. The
    former commands are modules themselves.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname in COMMANDS or current_path(fullname) == fullname:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__
        present = current_path(former)
        warnings.warn(f"{former} is {present} now", DeprecationWarning, stacklevel=2)
        sys.modules[former] = importlib.import_module(present)
