"""Where text comes from: files, datasets, chains, and what is wrong with them."""
