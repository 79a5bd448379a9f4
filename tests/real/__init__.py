"""Tests that need packages beyond the test environment; `make real` installs them and runs these."""
