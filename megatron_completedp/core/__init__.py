"""The rules of Complete(d)P. Pure Python: nothing here imports outside the standard library."""
