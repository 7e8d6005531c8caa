"""From a user's photos with boxes to a detector of their own, with a table of what was gained.

plan      what is tuned, from which weights, for how long: the rule
run       the steps, one after the other; each is skipped where it is done already
report    the table and the pictures of before and after
cli       finetune.py, `dynamic-dino-finetune`
"""
