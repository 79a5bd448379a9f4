"""Files of prompts and records, and whether a job may go on from what they hold."""
