"""What checks and searches share: runs in folders of their own, kept rows, statistics, reports."""
