"""Records for the viewers that people have open, and watches for the trainers that they use.

The viewers are `tensorboard` and `wandb`; each imports its package when it is called. The trainers
are `lightning` and `transformers`, which import theirs at once. None is needed to import gradstat.
"""
