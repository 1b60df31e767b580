"""HOW rows move: from a Routing to the experts and back."""
