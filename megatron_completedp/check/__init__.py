"""Checks before a big run: do the rules hold here, with a figure and the numbers behind it."""
