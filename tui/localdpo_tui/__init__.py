"""The terminal UI of localdpo: four places (Pairs, Train, Chat, Runs) over one workspace folder.

Nothing is imported here, and nothing in this package imports mlx, mlx_lm, transformers or a localdpo module
that does: models live in the model host (`services.model_host`), training in a process of its own
(`services.trainer`). The README beside this file says how a place is written.
"""
