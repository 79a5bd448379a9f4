"""The roll-outs of a step: what they are, their random streams, and running them."""
