"""Value heads: Q_V of Transfer Q*, read off a model's hidden states, and how they are fitted."""
