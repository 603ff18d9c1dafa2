"""What a user can get wrong: one exception, whose message is one line that says what, where, and what to do.

The command line prints it and exits with status 2. Everything else that is raised is a fault of ours.
"""


class InputError(ValueError):
    """The user's input or configuration is wrong; the message is a single line fit to be shown as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
