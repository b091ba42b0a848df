"""What fm bench measures: ours in turn with what a user would pick instead."""
