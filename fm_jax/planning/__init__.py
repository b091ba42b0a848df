"""Planning a run before a device is used."""
