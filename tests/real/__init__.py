"""Tests that need packages beyond those of `make test`; `make real` installs them."""
