"""The exception whose message a user sees instead of a traceback."""


class UserError(Exception):
    """Bad input, whose message names the setting, its value and what to do.

    `train.py` prints the message and exits with `exit_code`: 2 for a command line or a TOML file
    that cannot be used, 1 for an error that is found later.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
