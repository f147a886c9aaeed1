"""Records in the viewers people already have open, and watches in the trainers they use.

The viewers are `tensorboard` and `wandb`; each imports its package when it is called. The trainers
are `lightning` and `transformers`, which import theirs at once. None is needed to import gradstat.
"""
