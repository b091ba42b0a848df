"""The data of a config, made ready, looked at and timed before a run takes it."""
