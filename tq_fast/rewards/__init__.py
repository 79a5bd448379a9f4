"""Rewards: whole responses in, one score each out."""
