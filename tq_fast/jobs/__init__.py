"""Files of prompts and records, and what makes a job go on where it was stopped."""
