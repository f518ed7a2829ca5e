"""stage(config) -> result: what the labs, the command line and exported scripts run.

Each tells `on_event` how far it is. Once `stop` is set it saves, and ends after the present step or turn;
`resume` in its config goes on there.
"""
