"""What a user did wrong, said in one line; and the exit codes of the command lines."""

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # a signal asked for a stop; the state was saved and --resume goes on


class UserError(Exception):
    """A mistake in the input. Its text is one line that names the field, the value and the remedy."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run was saved. Its text says where."""
