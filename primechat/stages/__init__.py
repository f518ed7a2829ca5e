"""Training stages, each a function stage(config) -> result, for labs, the command line and exported scripts.

Each reports its progress to `on_event`. Once `stop` is set, it ends after the current step or turn and saves;
`resume` in its config continues from there.
"""
