"""stage(config) -> result: what the labs, the command line and exported scripts run."""
