"""The run table: what runs write of themselves, read back as columns."""
