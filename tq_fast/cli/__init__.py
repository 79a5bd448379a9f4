"""The command line: `tq-fast`."""
