"""Records in the viewers people already have open: `tensorboard`, `wandb`.

Each imports its package when it is called, so neither is needed to import gradstat.
"""
