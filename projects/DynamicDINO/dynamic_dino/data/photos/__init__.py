"""Photos with boxes for a small detector's training: a subset of COCO 2017 and three other sets.

The command ``python -m dynamic_dino.data.photos`` puts them under ``photos/`` of the data root,
each as train.json, val.json and images/; see datasets/README.md.
"""
