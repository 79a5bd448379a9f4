"""What the commands of `tq-fast` do; `tq_fast.cli` only parses their arguments."""
