"""The commands of fm, by what they are about."""
